"""Converts whole checkpoints between scenic and this package, as `tokenlearner convert` does."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..layers.token_learner import LEARNERS
from ..models.factory import create_model, save_model
from ..models.hub import load_model
from ..utils.io import check_output_file
from ..utils.validation import check_choice, check_count, check_literals
from .flax_msgpack import write_flax
from .readers import read_weights
from .scenic import load_scenic, nest, to_scenic
from .scenic_config import describe

_IMAGE, _VIDEO = "vit_base_patch16_gap_384", "vivit_large_patch16x2_224"  # all sizes are replaced
_NOT_ARGUMENTS = ("num_positions", "num_learners")


@dataclass(frozen=True)
class ConvertConfig:
    """Turns a checkpoint of scenic into a model of this package, or the other way round.

    Args:
        checkpoint: scenic's checkpoint, or its parameters as .npz; to go back, a saved model.
        out: File that ends in .safetensors for the model; to go back, any other file.
        at: Block in front of which tokens are learned, tokenlearner_loc in scenic's config. Only
            fusers show it in a checkpoint.
        learner: How V1 pools, which no checkpoint shows, v1 (sum) or v1-mean.
        gelu: Whether the grouped V1.1 has a GELU, true since January 2022, false before.
        global_pool: How the tokens are pooled, avg (scenic's gap), max (gmp) or sum (gsp).
        num_frames: Frames that a video model sees; 1 for images.
        height: Of the images; needed if they are not square.
        width: Of the images; needed if they are not square.
    """

    checkpoint: str
    out: str
    at: int | None = None
    learner: str | None = None
    gelu: bool | None = None
    global_pool: Literal["avg", "max", "sum"] = "avg"
    num_frames: int = 1
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        object.__setattr__(self, "out", os.path.expanduser(self.out))
        check_count("num_frames", self.num_frames)
        check_literals(self)
        if self.learner is not None:
            check_choice("learner", self.learner, list(LEARNERS))
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together; pass both or neither")


def convert_checkpoint(config: ConvertConfig) -> Path:
    """Reads one checkpoint and writes the other.

    Returns:
        The file that was written.

    Raises:
        ValueError: A file cannot be read, its parameters make no model with these arguments, or
            the other cannot be written or is too large for its disk.
    """
    check_output_file(config.out)
    to_flax = Path(config.out).suffix != ".safetensors"
    params = (
        to_scenic(load_model(config.checkpoint)) if to_flax else read_weights(config.checkpoint)
    )
    check_output_file(config.out, size=sum(value.nbytes for value in params.values()))
    if to_flax:
        write_flax(config.out, {"params": nest(params)})
        return Path(config.out)
    arguments = model_arguments(describe(params, config.gelu), config)
    name = _VIDEO if config.num_frames > 1 else _IMAGE
    return save_model(load_scenic(create_model(name, **arguments), params), config.out)


def model_arguments(inferred: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """Completes the arguments that a checkpoint shows by those that it does not.

    Args:
        inferred: From `scenic_config.describe`.
        config: Has the rest.

    Raises:
        ValueError: An argument is missing or contradicts the checkpoint.
    """
    arguments = {key: value for key, value in inferred.items() if key not in _NOT_ARGUMENTS}
    if inferred["num_tokens"] and "at" not in inferred and config.at is None:
        raise ValueError(
            "the checkpoint does not show in front of which block its tokens are learned; pass "
            "--at with the tokenlearner_loc it was trained with"
        )
    if config.at is not None:
        if inferred.get("at", config.at) != config.at:
            raise ValueError(f"at is {config.at}, but the fusers start at block {inferred['at']}")
        arguments["at"] = config.at
    if config.learner is not None:
        arguments["learner"] = config.learner
    pool = config.global_pool if inferred["num_classes"] else ""  # headless models give all tokens
    frames = _frames(inferred, config)
    return arguments | frames | {"global_pool": pool, "img_size": _img_size(inferred, config)}


def _frames(inferred: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """Returns the arguments that a video model has besides an image model's."""
    tubelet = inferred.get("tubelet_size")
    if config.num_frames > 1:
        sampling = "tubelet" if tubelet else "uniform"
        return {"num_frames": config.num_frames, "sampling": sampling}
    if tubelet:
        raise ValueError(f"this is a video model with tubelets of {tubelet}; pass --num_frames")
    return {}


def _img_size(inferred: dict[str, Any], config: ConvertConfig) -> tuple[int, int]:
    patch, positions = inferred["patch_size"], inferred["num_positions"]
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    n, rest = divmod(positions, config.num_frames // inferred.get("tubelet_size", 1) or 1)
    side = math.isqrt(n)
    height = config.height or side * patch_height
    width = config.width or side * patch_width
    if rest or (height // patch_height) * (width // patch_width) != n:
        raise ValueError(
            f"{positions} positions do not make {config.num_frames} frames of "
            f"{height} x {width} in patches of {patch_height} x {patch_width}; pass --height and "
            "--width of the images, and --num_frames"
        )
    return height, width
