"""Whole checkpoints between scenic and this package, as the command `tokenlearner convert` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..layers.token_learner import LEARNERS
from ..models.factory import create_model, load_model, save_model
from ..utils.validation import check_choice, check_count
from .readers import read_weights, write_flax
from .scenic import load_scenic, nest, to_scenic
from .scenic_config import describe

_IMAGE, _VIDEO = "vit_base_patch16_gap_384", "vivit_large_patch16x2_224"  # all sizes are replaced
_NOT_ARGUMENTS = ("num_positions", "num_learners")


@dataclass(frozen=True)
class ConvertConfig:
    """Turns a checkpoint of scenic's into a model of this package, or the other way round.

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
    global_pool: str = "avg"
    num_frames: int = 1
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_count("num_frames", self.num_frames)
        check_choice("global_pool", self.global_pool, ("avg", "max", "sum"))
        if self.learner is not None:
            check_choice("learner", self.learner, list(LEARNERS))
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together; pass both or neither")


def convert_checkpoint(config: ConvertConfig) -> Path:
    """Reads one checkpoint and writes the other.

    Returns:
        The file that was written.

    Raises:
        ValueError: A file cannot be read, or its parameters make no model with these arguments.
    """
    if Path(config.out).suffix != ".safetensors":
        write_flax(config.out, {"params": nest(to_scenic(load_model(config.checkpoint)))})
        return Path(config.out)
    params = read_weights(config.checkpoint)
    arguments = model_arguments(describe(params, config.gelu), config)
    name = _VIDEO if config.num_frames > 1 else _IMAGE
    return save_model(load_scenic(create_model(name, **arguments), params), config.out)


def model_arguments(told: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """Completes what a checkpoint tells of its model by what it cannot tell.

    Args:
        told: By `scenic.describe`.
        config: Has the rest.

    Raises:
        ValueError: Something is missing, or does not go with what the checkpoint tells.
    """
    arguments = {key: value for key, value in told.items() if key not in _NOT_ARGUMENTS}
    if told["num_tokens"] and "at" not in told and config.at is None:
        raise ValueError(
            "the checkpoint does not tell in front of which block its tokens are learned; pass "
            "--at with the tokenlearner_loc it was trained with"
        )
    if config.at is not None:
        if told.get("at", config.at) != config.at:
            raise ValueError(f"at is {config.at}, but the fusers start at block {told['at']}")
        arguments["at"] = config.at
    if config.learner is not None:
        arguments["learner"] = config.learner
    pool = config.global_pool if told["num_classes"] else ""  # the headless model gives all tokens
    frames = _frames(told, config)
    return arguments | frames | {"global_pool": pool, "img_size": _img_size(told, config)}


def _frames(told: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """The arguments that a video model has besides an image model's."""
    if config.num_frames == 1:
        if "tubelet_size" in told:
            raise ValueError(
                f"this is a video model with tubelets of {told['tubelet_size']}; pass --num_frames"
            )
        return {}
    sampling = "tubelet" if "tubelet_size" in told else "uniform"
    return {"num_frames": config.num_frames, "sampling": sampling}


def _img_size(told: dict[str, Any], config: ConvertConfig) -> tuple[int, int]:
    patch = told["patch_size"]
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    n, rest = divmod(told["num_positions"], config.num_frames // told.get("tubelet_size", 1) or 1)
    side = math.isqrt(n)
    height = config.height or side * patch_height
    width = config.width or side * patch_width
    if rest or (height // patch_height) * (width // patch_width) != n:
        raise ValueError(
            f"{told['num_positions']} positions do not make {config.num_frames} frames of "
            f"{height} x {width} in patches of {patch_height} x {patch_width}; pass --height and "
            "--width of the images, and --num_frames"
        )
    return height, width
