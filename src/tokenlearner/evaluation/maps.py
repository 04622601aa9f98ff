"""Attention maps of learned tokens, `attention_maps(model, images)`, and a figure of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.blocks import FusedBlock, ReducedBlock
from ..models.features import wrapped_blocks
from ..utils.modules import eager, training_mode, uncompiled
from ..utils.validation import Grid
from .map_figures import FigureRow, map_scale, write_figure


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Runs `model` on images or clips and returns the maps of its learned tokens.

    The model runs in evaluation mode, not compiled; nothing is kept on it. Several threads may ask
    one model that is in evaluation mode.

    Args:
        model: A model with learned tokens.
        images: What the model takes: `b c h w`, or a clip with 5 axes.

    Returns:
        For each block at which tokens are learned its maps, `b k h w` on the grid of positions; of
        clips `b t k h w`. Where tokens are learned from tokens, the map is that of the positions
        they come from in the end: the two maps multiplied.
        V1.1 maps sum to 1 over an image, V1 maps are gates in (0, 1).

    Raises:
        ValueError: The model has no learned tokens, or its grid is unknown.
    """
    model = uncompiled(model)
    blocks, maps, thread = wrapped_blocks(model), {}, threading.get_ident()
    reduced: list[Tensor] = []  # maps of blocks behind which there are tokens only, in order
    if not blocks:
        raise ValueError("this model has no learned tokens to look at; insert(model) adds them")

    def keep(index: int, block: ReducedBlock) -> Any:
        def hook(learner: Any, args: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread:  # another one that runs the same model
                return
            flat = learner.attention(*args)
            if not isinstance(block, FusedBlock):
                if reduced and reduced[-1].shape[1] == flat.shape[2]:
                    flat = flat @ reduced[-1]
                reduced.append(flat)
            on_grid = flat.unflatten(-1, _grid(block, images, flat.shape[-1]))
            maps[index] = on_grid.unflatten(0, (len(images), -1)) if images.ndim == 5 else on_grid

        return hook

    hooks = [b.learner.register_forward_pre_hook(keep(i, b)) for i, b in blocks.items()]
    try:
        with training_mode(model, training=False), eager():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def has_gates(model: nn.Module) -> bool:
    """Returns whether a model's maps are V1's gates in (0, 1), not distributions over positions."""
    return any(block.needs_grid for block in wrapped_blocks(model).values())


def draw_maps(
    path: str | Path, images: Tensor, maps: Tensor, names: Sequence[str], title: str
) -> Path:
    """Writes a figure with a row for each image: itself, its `k` maps over it, and their sum.

    One color scale serves the whole figure. It counts in multiples of the even share, so 1 means
    that a position gets as much as any, and a bar beside the figure says so.

    Args:
        path: The PNG to write.
        images: `b c h w` in [0, 1], gray or color.
        maps: `b k h w` of one insertion point, each map summing to 1.
        names: What to write beside each image.
        title: What to write above the figure.
    """
    rows = [FigureRow(*row) for row in zip(names, images, maps, strict=True)]
    return write_figure(path, rows, map_scale(rows, gates=False), title)


def _grid(block: ReducedBlock, images: Tensor, n: int) -> Grid:
    grid = block.grid_of((images.shape[-2], images.shape[-1]))
    if grid is None or grid[0] * grid[1] != n:
        raise ValueError(
            f"{n} positions do not fit the model's grid {grid}; build it for this image size, "
            "or call model.set_input_size((height, width))"
        )
    return grid
