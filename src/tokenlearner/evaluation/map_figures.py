"""Figures of attention maps as PNG, and animations as GIF or MP4.

One square is one position of the model's grid; nothing is smoothed. The colors are cividis, which
rises evenly in lightness, so that it reads alike with color blindness and in gray print. They lie
over the image, grayed and pale, and the bar beside a figure shows them over middle gray.
Axes: `k` tokens, `h w` grid or pixels, `c` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.imports import require_package
from ..utils.io import atomic_write
from ..utils.validation import plain_text, require

_COLORS = "cividis"
_PATCHES = (16, 14, 32, 8)  # the usual sizes
_OPAQUE = 0.65  # share of the map's color; the rest is the image
_CONTRAST = 0.6  # of the image beneath, so that it shifts a color by a tenth of white at most
_GATES_TOP, _LEAST_TOP = 1.0, 2.0  # the latter keeps even maps, all near 1, from looking like peaks


@dataclass(frozen=True)
class FigureRow:
    """An image and the maps that belong on it.

    Args:
        label: What to write beside it.
        image: `c h w` in [0, 1], gray or color.
        maps: `k h w` on the grid of positions, as `attention_maps` gives them.
    """

    label: str
    image: Tensor
    maps: Tensor


@dataclass(frozen=True)
class MapScale:
    """Holds what colors stand for, from 0 up to `top`.

    Args:
        top: What the brightest color stands for; more than that looks the same.
        gates: V1's gates, shown as they are; otherwise weights, as multiples of the even share.
    """

    top: float
    gates: bool

    @property
    def label(self) -> str:
        """The unit in words."""
        return "gate, from 0 to 1" if self.gates else "weight, in multiples\nof the even share 1/n"

    def shown(self, maps: Tensor) -> Tensor:
        """Returns maps in the scale's unit, and behind them their sum divided by their count."""
        values = maps.float().cpu()
        values = values if self.gates else values * values.shape[-2:].numel()
        return torch.cat([values, values.mean(0, keepdim=True)])


def map_scale(rows: Sequence[FigureRow], gates: bool) -> MapScale:
    """Finds one scale for all rows: 0 to 1 for gates, otherwise up to nearly the largest weight."""
    if gates:
        return MapScale(_GATES_TOP, True)
    values = torch.cat([MapScale(1, False).shown(row.maps).flatten() for row in rows])
    return MapScale(max(_LEAST_TOP, float(np.quantile(values.numpy(), 0.995))), False)


def write_figure(path: str | Path, rows: Sequence[FigureRow], scale: MapScale, title: str) -> Path:
    """Writes a PNG with a line for each row: the image, its maps over it, and their sum.

    Raises:
        ValueError: matplotlib is missing, or there is no row.
    """
    figure, _ = _figure(rows, scale, title)
    with atomic_write(path) as temporary:
        figure.canvas.print_png(str(temporary))
    return Path(path).expanduser()


def write_animation(
    paths: Sequence[str | Path],
    time_steps: Sequence[Sequence[FigureRow]],
    scale: MapScale,
    title: str,
    frames_per_second: int = 4,
) -> list[Path]:
    """Writes an animation of the figures of several time steps.

    Args:
        paths: Files that end in .gif (which goes round and round) or .mp4.
        time_steps: For each of them rows of the same shapes.
        scale: As of a figure.
        title: As of a figure.
        frames_per_second: How fast they follow each other.

    Raises:
        ValueError: A package is missing, or a name ends in something else.
    """
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    odd = [str(path) for path in paths if Path(path).suffix not in writers]
    require(not odd, f"{odd} cannot be written, expected names that end in .gif or .mp4")
    frames = _pixels(time_steps, scale, title)
    for path in paths:
        with atomic_write(path) as temporary:
            writers[Path(path).suffix](temporary, frames, frames_per_second)
    return [Path(path).expanduser() for path in paths]


def check_matplotlib() -> None:
    """Checks that matplotlib is installed.

    Raises:
        ValueError: It is missing.
    """
    require_package("matplotlib", "train", "drawing maps")


def overlay(image: Tensor, values: Tensor, scale: MapScale) -> np.ndarray:
    """Colors a map and lays it over an image: `c h w`, `h w` of the grid -> `h w 3` in [0, 1].

    Where patches do not fill an image, what is left at its right and lower edge stays uncolored.
    """
    gray = image.float().mean(0).cpu().numpy()
    pale = 0.5 + _CONTRAST * (gray - 0.5)
    cell = [patch_size(*sizes) for sizes in zip(gray.shape, values.shape, strict=True)]
    squares = np.kron(values.numpy(), np.ones(cell))[: gray.shape[0], : gray.shape[1]]
    pixels = np.repeat(pale[..., None], 3, axis=-1)
    covered = pixels[: squares.shape[0], : squares.shape[1]]
    covered[:] = _blended(squares / scale.top, covered)
    return pixels


def patch_size(pixels: int, squares: int) -> int:
    """Returns the side of a patch, of which an image of a side in pixels has that many.

    Where they do not fill the image, several would fit; a usual one is taken.
    """
    smallest, largest = pixels // (squares + 1) + 1, max(1, pixels // squares)
    return next((p for p in _PATCHES if smallest <= p <= largest), largest)


def _blended(shares: np.ndarray, beneath: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    colors = colormaps[_COLORS](np.clip(shares, 0, 1))[..., :3]
    return _OPAQUE * colors + (1 - _OPAQUE) * beneath


def _panels(row: FigureRow, scale: MapScale) -> list[np.ndarray]:
    """Returns what stands in a line of a figure, from left to right."""
    color = row.image.float().cpu().expand(3, -1, -1).permute(1, 2, 0).clip(0, 1).numpy()
    return [color, *(overlay(row.image, one, scale) for one in scale.shown(row.maps))]


def _figure(rows: Sequence[FigureRow], scale: MapScale, title: str) -> tuple[Any, list[list[Any]]]:
    """Makes a figure that is ready to be drawn, and returns it with its images, row by row."""
    check_matplotlib()
    require(len(rows) > 0, "there is no image to draw; pass one or more")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(len(row.maps) for row in rows)
    height, width = rows[0].image.shape[-2:]
    tall = 1.22 * max(0.4, min(2.5, height / width))
    size = (1.25 * (most + 2) + 1.2, max(tall * len(rows) + 1.0, 2.2))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), most + 2, squeeze=False)
    images = []
    for number, (line, row) in enumerate(zip(axes, rows, strict=True)):
        line[0].set_ylabel(plain_text(row.label), fontsize=8, parse_math=False)
        k, panels = len(row.maps), _panels(row, scale)
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis in line[k + 2 :]:
            axis.set_visible(False)
        images.append([axis.imshow(panel) for axis, panel in zip(line, panels, strict=False)])
        if number == 0 or k != len(rows[number - 1].maps):
            for axis, name in zip(line, _titles(k), strict=False):
                axis.set_title(name, fontsize=8)
    _add_bar(figure, axes, scale)
    figure.suptitle(plain_text(title), fontsize=10, parse_math=False)
    figure.supxlabel("one square is one position of the grid, nothing is smoothed", fontsize=7)
    return figure, images


def _titles(k: int) -> list[str]:
    return ["image", *map(str, range(1, k + 1)), f"sum / {k}"]


def _add_bar(figure: Any, axes: Any, scale: MapScale) -> None:
    """Adds the colors as they look over middle gray, and the numbers they stand for."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap(_blended(np.linspace(0, 1, 256), np.full((256, 3), 0.5)))
    mappable = ScalarMappable(Normalize(0, scale.top), colors)
    more = "neither" if scale.gates else "max"
    bar = figure.colorbar(mappable, ax=axes, shrink=0.9, extend=more, aspect=15 * len(axes))
    bar.set_label(scale.label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _pixels(time_steps: Sequence[Sequence[FigureRow]], scale: MapScale, title: str) -> np.ndarray:
    """Draws every time step in the same layout, `t h w 3`; `h` and `w` are even, as MP4 needs."""
    require(len(time_steps) > 0, "there is no time step to draw; pass one or more")
    figure, images = _figure(time_steps[0], scale, title)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # keeps the layout
    frames = []
    for rows in time_steps:
        for line, row in zip(images, rows, strict=True):
            line[0].axes.set_ylabel(plain_text(row.label), fontsize=8, parse_math=False)
            for image, panel in zip(line, _panels(row, scale), strict=True):
                image.set_data(panel)
        figure.canvas.draw()
        drawn = np.asarray(figure.canvas.buffer_rgba())
        frames.append(drawn[: len(drawn) // 2 * 2, : drawn.shape[1] // 2 * 2, :3].copy())
    return np.stack(frames)


def _write_gif(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    from PIL import Image

    t, height, width, _ = frames.shape
    strip = Image.fromarray(frames.reshape(t * height, width, 3))
    strip = strip.quantize(256, dither=Image.Dither.NONE)  # one palette for all
    first, *others = [strip.crop((0, i * height, width, (i + 1) * height)) for i in range(t)]
    wait_ms = round(1000 / frames_per_second)
    first.save(path, save_all=True, append_images=others, duration=wait_ms, loop=0)


def _write_mp4(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    av = require_package("av", "video", "writing MP4")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=frames_per_second)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
