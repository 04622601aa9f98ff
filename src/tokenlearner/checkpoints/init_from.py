"""One model started from the weights of another: other resolutions, images to video, new heads.

`init_from(model, weights)` is the reference's fine-tuning path. What the two models share is
copied; position embeddings are resampled to the new grid and repeated for every frame; a kernel of
patches becomes one of tubelets; learners, fusers and the head stay as new as they are.

Source: scenic `init_token_learner_from_train_state` and `vivit` `model_utils`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..utils.validation import Grid, check_choice, check_pair, shortened
from .readers import read_weights
from .scenic import state_from_scenic

_NEW = re.compile(r"(.*\.)?(learner|fuser)\..*|time_embed")  # may be missing in the weights
_DROPPED = re.compile(r"cls_token|reg_token|head\..*|pre_logits\..*")  # may be left over
_PREFIXES = ("cls_token", "reg_token")
_POSITIONS, _PATCHES = "pos_embed", "patch_embed.proj.weight"


@dataclass(frozen=True)
class Started:
    """What became of each parameter, by the model's names (`unused`: by the weights' names)."""

    copied: tuple[str, ...]
    changed: tuple[str, ...]
    """Resampled position embeddings, kernels of patches made into tubelets."""
    new: tuple[str, ...]
    """Left as they were: train these first."""
    unused: tuple[str, ...]


def init_from(
    model: nn.Module,
    weights: nn.Module | Mapping[str, Any] | str | Path,
    *,
    keep_head: bool = False,
    tubelet_init: str = "central",
    grid: Grid | None = None,
) -> Started:
    """Starts a model from the weights of another one of the same width and depth, in place.

    Args:
        model: A `TokenLearnerViT`, `ViViT` or `FrameViT`, or a ViT of timm's.
        weights: A model, a state dict (ours or timm's) or scenic's parameters, or a file that
            `checkpoints.read_weights` reads. Class tokens and registers are left out, with their
            positions.
        keep_head: Copy the classifier too; otherwise it stays new, as in the reference.
        tubelet_init: How an image model's kernel becomes a tubelet's: `"central"` (the middle
            frame alone) or `"average"` (all frames alike).
        grid: Height and width of the positions in `weights`, where they are no square.

    Returns:
        What was copied, changed, left new and not used.

    Raises:
        ValueError: The two do not fit each other. The model is then as it was.
    """
    check_choice("tubelet_init", tubelet_init, ("central", "average"))
    came, unused = _state_of(weights, model)
    came = {_plain(key): value for key, value in came.items()}
    state = {_plain(key): (key, value) for key, value in model.state_dict().items()}
    if not keep_head:
        unused += [key for key in came if key.startswith("head.")]
        came = {key: value for key, value in came.items() if not key.startswith("head.")}
    _check_names(came, set(state), keep_head)
    unused += [key for key in came if key not in state]
    made = {key: came[key] for key in state if key in came}
    if _POSITIONS in made:
        source = _without_prefix(came, grid)
        made[_POSITIONS] = _positions(source, _place(model), grid)
    if _PATCHES in made:
        made[_PATCHES] = _kernel(made[_PATCHES], state[_PATCHES][1], tubelet_init)
    _check_shapes(made, {key: value for key, (_, value) in state.items()})
    for key, value in made.items():
        state[key][1].copy_(value)
    return _report(state, came, made, unused)


def resample_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resamples position embeddings bilinearly, corners on corners: `1 (h w) c -> 1 (H W) c`.

    Source: scenic `interpolate_positional_embeddings` (`scipy.ndimage.zoom` of order 1); grids need
    not be square here.
    """
    planes = rearrange(positions.float(), "1 (h w) c -> 1 c h w", h=old[0], w=old[1])
    resized = F.interpolate(planes, size=new, mode="bilinear", align_corners=True)
    return rearrange(resized, "1 c h w -> 1 (h w) c").to(positions.dtype)


def _state_of(weights: Any, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The weights as a state dict, and the names of those that have no place in `model`."""
    if isinstance(weights, nn.Module):
        return dict(weights.state_dict()), []
    if isinstance(weights, str | Path):
        weights = read_weights(weights)
    if any("/" in key for key in weights) or any(isinstance(v, Mapping) for v in weights.values()):
        return state_from_scenic(model, weights)
    return dict(weights), []


def _plain(key: str) -> str:
    """A name as it is in a ViT without learners: wrapped blocks and encoders have longer ones."""
    return re.sub(r"(^|\.)(blocks\.\d+)\.block\.", r"\1\2.", key.removeprefix("encoder."))


def _check_names(came: Mapping[str, Any], wanted: set[str], keep_head: bool) -> None:
    missing = sorted(
        key
        for key in wanted - came.keys()
        if not _NEW.fullmatch(key) and (keep_head or not key.startswith("head."))
    )
    over = sorted(key for key in came.keys() - wanted if not _DROPPED.fullmatch(key))
    if missing or over:
        told = f"missing: {shortened(missing)}; " * bool(missing)
        told += f"left over: {shortened(over)}; " * bool(over)
        raise ValueError(
            f"the weights do not fit the model: {told}build the model with the depth and layers "
            "that they come from"
        )


def _check_shapes(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} is {list(value.shape)}, expected {list(wanted[key].shape)}"
        for key, value in made.items()
        if value.shape != wanted[key].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights do not fit the model: {shortened(wrong, 10)}; build the model with the "
            "width, channels and patch size that they come from, and leave keep_head out for "
            "other classes"
        )


def _without_prefix(came: Mapping[str, Tensor], grid: Grid | None) -> Tensor:
    """The position embeddings without those of class token and registers: `1 n c`."""
    positions = came[_POSITIONS]
    prefix = sum(came[key].shape[1] for key in _PREFIXES if key in came)
    n = positions.shape[1]
    fits = [p for p in (prefix, 0) if (grid and math.prod(check_pair(grid)) == n - p)]
    if not grid:  # timm's no_embed_class has tokens without positions
        fits = [p for p in (prefix, 0) if math.isqrt(n - p) ** 2 == n - p] or [prefix]
    if not fits:
        raise ValueError(f"{n} positions (with {prefix} class or register tokens) are no {grid}")
    return positions[:, fits[0] :]


def _place(model: Any) -> tuple[int, Grid]:
    """The frames that a model has positions for, and the grid of one of them."""
    embed = getattr(model, "encoder", model).patch_embed
    return getattr(embed, "frames", 1), embed.grid_size


def _positions(source: Tensor, place: tuple[int, Grid], grid: Grid | None) -> Tensor:
    """Position embeddings of one image or of the same clip, for the frames of a model."""
    frames, new = place
    n = source.shape[1]
    if grid is None and n == frames * math.prod(new):
        return source
    side = math.isqrt(n)
    if grid is None and side * side != n:
        raise ValueError(
            f"{n} positions are no square, and no clip of {frames} frames of {new}; pass "
            "grid=(height, width) of the image that they come from"
        )
    one = resample_positions(source, grid or (side, side), new)
    return repeat(one, "1 n c -> 1 (t n) c", t=frames)


def _kernel(source: Tensor, target: Tensor, how: str) -> Tensor:
    """An image model's kernel of patches for the tubelets of a video model."""
    if source.ndim != 4 or target.ndim != 5:
        return source
    frames = target.shape[2]
    if how == "average":
        return repeat(source / frames, "o i h w -> o i t h w", t=frames)
    kernel = source.new_zeros(*source.shape[:2], frames, *source.shape[2:])
    kernel[:, :, frames // 2] = source
    return kernel


def _report(
    state: Mapping[str, tuple[str, Tensor]],
    came: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    unused: list[str],
) -> Started:
    same = {k for k, v in made.items() if v is came[k] or torch.equal(v, came[k])}
    names = {key: name for key, (name, _) in state.items()}
    return Started(
        copied=tuple(names[key] for key in made if key in same),
        changed=tuple(names[key] for key in made if key not in same),
        new=tuple(name for key, name in names.items() if key not in made),
        unused=tuple(sorted(unused)),
    )
