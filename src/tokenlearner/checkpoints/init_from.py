"""Initializes a model from the weights of another: other resolutions, images to video, new heads.

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

from ..utils.validation import (
    Grid,
    check_choice,
    check_pair,
    find_not_finite,
    require,
    shortened,
)
from .readers import read_weights
from .scenic import state_from_scenic

_NEW = re.compile(r"(.*\.)?(learner|fuser)\..*|time_embed")  # may be missing in the weights
# These may be left over.
_DROPPED = re.compile(r"cls_token|dist_token|reg_token|head(_dist)?\..*|pre_logits\..*")
_HEAD = re.compile(r"head(_dist)?\.")
_PREFIXES = ("cls_token", "dist_token", "reg_token")
_POSITIONS, _PATCHES = "pos_embed", "patch_embed.proj.weight"


@dataclass(frozen=True)
class InitReport:
    """Lists what happened to each parameter, by the model's names (`unused`: the weights')."""

    copied: tuple[str, ...]
    changed: tuple[str, ...]
    """Resampled position embeddings, kernels of patches made into tubelets."""
    new: tuple[str, ...]
    """Left as they were: train these first."""
    unused: tuple[str, ...]


Started = InitReport  # its name in version 0.3


def init_from(
    model: nn.Module,
    weights: nn.Module | Mapping[str, Any] | str | Path,
    *,
    keep_head: bool = False,
    tubelet_init: str = "central",
    grid: Grid | None = None,
) -> InitReport:
    """Initializes a model from the weights of another of the same width and depth, in place.

    Args:
        model: A `TokenLearnerViT`, `ViViT` or `FrameViT`, or a ViT of timm's.
        weights: A model, a state dict (ours or timm's) or scenic's parameters, or a file that
            `checkpoints.read_weights` reads. Class tokens and registers that the model does not
            have are left out, with their positions.
        keep_head: Copy the classifier too; otherwise it stays new, as in the reference.
        tubelet_init: How an image model's kernel becomes a tubelet's: `"central"` (the middle
            frame alone) or `"average"` (all frames alike).
        grid: Height and width of the positions in `weights`, where they are no square.

    Returns:
        What was copied, changed, left new and not used.

    Raises:
        ValueError: The two do not fit each other. The model is then not changed.
    """
    check_choice("tubelet_init", tubelet_init, ("central", "average"))
    source, unused = _state_of(weights, model)
    source = {_plain(key): value for key, value in source.items()}
    names = {_plain(key): key for key in model.state_dict()}
    target = {_plain(key): value for key, value in model.state_dict().items()}
    if not keep_head:
        unused += [key for key in source if _HEAD.match(key)]
        source = {key: value for key, value in source.items() if not _HEAD.match(key)}
    _check_names(source, set(target), keep_head)
    unused += [key for key in source if key not in target]
    adapted = {key: source[key] for key in target if key in source}
    if _POSITIONS in adapted:
        adapted |= _with_positions(source, target, _frames_grid(model), grid)
    if _PATCHES in adapted:
        adapted[_PATCHES] = _kernel(adapted[_PATCHES], target[_PATCHES], tubelet_init)
    _check_shapes(adapted, target)
    broken = find_not_finite(adapted)
    require(
        not broken, f"the weights are NaN or infinite in {shortened(broken)}; take another file"
    )
    for key, value in adapted.items():
        target[key].copy_(value)
    same = {k for k, v in adapted.items() if v is source[k] or torch.equal(v, source[k])}
    return InitReport(
        copied=tuple(names[key] for key in adapted if key in same),
        changed=tuple(names[key] for key in adapted if key not in same),
        new=tuple(name for key, name in names.items() if key not in adapted),
        unused=tuple(sorted(unused)),
    )


def resample_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resamples position embeddings bilinearly, corners on corners: `1 (h w) c -> 1 (H W) c`.

    Source: scenic `interpolate_positional_embeddings` (`scipy.ndimage.zoom` of order 1); grids need
    not be square here.
    """
    planes = rearrange(positions.float(), "1 (h w) c -> 1 c h w", h=old[0], w=old[1])
    resized = F.interpolate(planes, size=new, mode="bilinear", align_corners=True)
    return rearrange(resized, "1 c h w -> 1 (h w) c").to(positions.dtype)


def _state_of(weights: Any, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights as a state dict, and the names of those that `model` does not have."""
    if isinstance(weights, nn.Module):
        return dict(weights.state_dict()), []
    if isinstance(weights, str | Path):
        weights = read_weights(weights)
    if any("/" in key for key in weights) or any(isinstance(v, Mapping) for v in weights.values()):
        return state_from_scenic(model, weights)
    return dict(weights), []


def _plain(key: str) -> str:
    """Returns a name as it is in a ViT without learners: those in wrapped blocks are longer."""
    return re.sub(r"(^|\.)(blocks\.\d+)\.block\.", r"\1\2.", key.removeprefix("encoder."))


def _check_names(source: Mapping[str, Any], expected: set[str], keep_head: bool) -> None:
    missing = sorted(
        key
        for key in expected - source.keys()
        if not _NEW.fullmatch(key) and (keep_head or not _HEAD.match(key))
    )
    extra = sorted(key for key in source.keys() - expected if not _DROPPED.fullmatch(key))
    if missing or extra:
        problems = f"missing: {shortened(missing)}; " * bool(missing)
        problems += f"left over: {shortened(extra)}; " * bool(extra)
        raise ValueError(
            f"the weights do not fit the model: {problems}build the model with the depth and "
            "layers that they come from"
        )


def _check_shapes(adapted: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} is {list(value.shape)}, expected {list(target[key].shape)}"
        for key, value in adapted.items()
        if value.shape != target[key].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights do not fit the model: {shortened(wrong, 10)}; build the model with the "
            "width, channels and patch size that they come from, and leave keep_head out for "
            "other classes"
        )


def _with_positions(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    frames_grid: tuple[int, Grid],
    grid: Grid | None,
) -> dict[str, Tensor]:
    """Returns positions for the model's frames and prefix tokens, and what tokens take of them."""
    prefix, positions = _split_prefix(source, grid)
    expected = target[_POSITIONS].shape[1] - frames_grid[0] * math.prod(frames_grid[1])
    tokens = {key: source[key] for key in _PREFIXES if key in target and key in source}
    taken = dict[str, Tensor]()
    if expected == 0 and prefix.shape[1] and tokens:  # timm's no_embed_class: added to the tokens
        _check_prefix(prefix, sum(value.shape[1] for value in tokens.values()))
        added = prefix.split([value.shape[1] for value in tokens.values()], dim=1)
        taken = {key: tokens[key] + part for key, part in zip(tokens, added, strict=True)}
    if expected:
        _check_prefix(prefix, expected)
    resampled = _positions(positions, frames_grid, grid)
    taken[_POSITIONS] = torch.cat([prefix, resampled], dim=1) if expected else resampled
    return taken


def _check_prefix(prefix: Tensor, expected: int) -> None:
    if prefix.shape[1] != expected:
        raise ValueError(
            f"the weights have positions of {prefix.shape[1]} prefix tokens, such as class token "
            f"and registers, the model of {expected}; build the model with those that they come "
            "from"
        )


def _split_prefix(source: Mapping[str, Tensor], grid: Grid | None) -> tuple[Tensor, Tensor]:
    """Returns the position embeddings of class token and registers, and the others: `1 n c`."""
    positions = source[_POSITIONS]
    prefix = sum(source[key].shape[1] for key in _PREFIXES if key in source)
    n = positions.shape[1]
    fits = [p for p in (prefix, 0) if (grid and math.prod(check_pair(grid)) == n - p)]
    if not grid:  # timm's no_embed_class has tokens without positions
        fits = [p for p in (prefix, 0) if math.isqrt(n - p) ** 2 == n - p] or [prefix]
    if not fits:
        raise ValueError(
            f"grid is {grid}, but there are {n} positions, {prefix} of them prefix tokens"
        )
    return positions[:, : fits[0]], positions[:, fits[0] :]


def _frames_grid(model: Any) -> tuple[int, Grid]:
    """Returns the number of frames that a model has positions for, and the grid of each."""
    embed = getattr(model, "encoder", model).patch_embed
    return getattr(embed, "frames", 1), embed.grid_size


def _positions(source: Tensor, target: tuple[int, Grid], grid: Grid | None) -> Tensor:
    """Makes position embeddings of an image or of the same clip those for a model's frames."""
    frames, new = target
    n = source.shape[1]
    if grid is None and n == frames * math.prod(new):
        return source
    side = math.isqrt(n)
    if grid is None and side * side != n:
        raise ValueError(
            f"{n} positions are no square, and no clip of {frames} frames of {new}; pass "
            "grid=(height, width) of the image that they come from"
        )
    resampled = resample_positions(source, grid or (side, side), new)
    return repeat(resampled, "1 n c -> 1 (t n) c", t=frames)


def _kernel(source: Tensor, target: Tensor, tubelet_init: str) -> Tensor:
    """Makes an image model's kernel of patches one for the tubelets of a video model."""
    if source.ndim != 4 or target.ndim != 5:
        return source
    frames = target.shape[2]
    if tubelet_init == "average":
        return repeat(source / frames, "o i h w -> o i t h w", t=frames)
    kernel = source.new_zeros(*source.shape[:2], frames, *source.shape[2:])
    kernel[:, :, frames // 2] = source
    return kernel
