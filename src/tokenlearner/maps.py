"""Where the learned tokens look: `attention_maps(model, images)`, and a sheet that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Grid
from .evaluate import mode
from .files import written_whole
from .insert import wrapped_blocks
from .wrappers import FusedBlock, ReducedBlock


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Runs `model` on pictures or clips and returns the maps of its learned tokens.

    The model runs in evaluation mode; nothing is kept on it.

    Args:
        model: A model with learned tokens.
        images: What the model takes: `b c h w`, or a clip with 5 axes.

    Returns:
        For each block at which tokens are learned its maps, `b k h w` on the grid of positions; of
        clips `b t k h w`. Where tokens are learned from tokens, the map is that of the positions
        they come from in the end: the two maps multiplied.
        V1.1 maps sum to 1 over a picture, V1 maps are gates in (0, 1).

    Raises:
        ValueError: The model has no learned tokens, or the grid cannot be told.
    """
    found, maps = wrapped_blocks(model), {}
    reduced: list[Tensor] = []  # maps behind which there are tokens only, in the order of the run
    if not found:
        raise ValueError("this model has no learned tokens to look at; insert(model) adds them")

    def keep(index: int, block: ReducedBlock) -> Any:
        def hook(learner: Any, args: tuple[Any, ...]) -> None:
            flat = learner.attention(*args)
            if not isinstance(block, FusedBlock):
                if reduced and reduced[-1].shape[1] == flat.shape[2]:
                    flat = flat @ reduced[-1]
                reduced.append(flat)
            on_grid = flat.unflatten(-1, _grid(block, images, flat.shape[-1]))
            maps[index] = on_grid.unflatten(0, (len(images), -1)) if images.ndim == 5 else on_grid

        return hook

    hooks = [b.learner.register_forward_pre_hook(keep(i, b)) for i, b in found.items()]
    try:
        with mode(model, training=False):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def draw_maps(
    path: str | Path, pictures: Tensor, maps: Tensor, names: Sequence[str], title: str
) -> Path:
    """Writes a sheet with a row for each picture: itself, its `k` maps over it, and their mean.

    One colour scale (viridis) serves the whole sheet. It counts in multiples of an even map, so 1
    means that a position gets as much as any, and a bar beside the sheet says so.

    Args:
        path: The PNG to write.
        pictures: `b c h w` in [0, 1], grey or colour.
        maps: `b k h w` of one insertion point, each map summing to 1.
        names: What to write beside each picture.
        title: What to write above the sheet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    b, k, h, w = maps.shape
    relative = maps.float().cpu() * (h * w)
    shown = torch.cat([relative, relative.mean(1, keepdim=True)], dim=1)
    figure = Figure(figsize=(1.25 * (k + 2) + 1.2, 1.22 * b + 0.8), layout="constrained")
    axes = figure.subplots(b, k + 2, squeeze=False)
    top = float(shown.quantile(0.995))
    heat = None
    for row, picture, row_maps, name in zip(axes, pictures.cpu(), shown, names, strict=True):
        _show(row[0], picture)
        row[0].set_ylabel(name, fontsize=8)
        for axis, one in zip(row[1:], row_maps, strict=True):
            _show(axis, picture, grey=True)
            extent = (-0.5, picture.shape[-1] - 0.5, picture.shape[-2] - 0.5, -0.5)
            heat = axis.imshow(
                one.numpy(), cmap="viridis", vmin=0, vmax=top, alpha=0.75, extent=extent
            )
    for axis, label in zip(axes[0], ["picture", *map(str, range(1, k + 1)), "mean"], strict=True):
        axis.set_title(label, fontsize=8)
    assert heat is not None
    figure.colorbar(heat, ax=axes, shrink=0.8, label="weight, in multiples of an even map")
    figure.suptitle(title, fontsize=10)
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return Path(path)


def _show(axis: Any, picture: Tensor, grey: bool = False) -> None:
    is_grey = grey or picture.shape[0] == 1
    pixels = picture.mean(0) if is_grey else picture.permute(1, 2, 0)
    axis.imshow(pixels.numpy(), cmap="gray" if is_grey else None, vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def _grid(block: ReducedBlock, images: Tensor, n: int) -> Grid:
    grid = block.grid_of((images.shape[-2], images.shape[-1]))
    if grid is None or grid[0] * grid[1] != n:
        raise ValueError(
            f"{n} positions do not fit the model's grid {grid}; build it for this picture size, "
            "or call model.set_input_size((height, width))"
        )
    return grid
