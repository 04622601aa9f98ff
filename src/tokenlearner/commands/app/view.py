"""Content of the page about a prediction: images with captions in words, numbers, remarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...evaluation.map_figures import overlay
from ...evaluation.map_stats import AttentionStats
from .inference import Prediction

_MIN_SIDE = 448  # to which small images are enlarged, without smoothing
_TERMS = (
    "One square of a map is one position of the grid; nothing is smoothed. Overlap (Bhattacharyya) "
    "is 1 for the same map and 0 for maps that share no position; maps that are nearly even "
    "overlap by 0.9 and more. Most alike: the largest overlap with another token. Spreads over: "
    "the share of the image that a map covers in effect."
)
NUMBER_HEADERS = ("token", "strongest at", "spreads over", "most alike")

Captioned = tuple[Image.Image, str]  # the caption is its alternative text too


def map_images(prediction: Prediction, block: int, frame: int) -> list[Captioned]:
    """Draws a frame, the maps of a block over it, the mean of these, and the colors' scale."""
    row, scale = prediction.row(block, frame), prediction.scale
    size = " × ".join(map(str, row.image.shape[-2:]))
    title = f"{prediction.image.name}{when(prediction, frame)}, as the model gets it: {size}"
    images = [(to_pil(row.image, _MIN_SIDE), title)]
    k = len(row.maps)
    for i, shown in enumerate(scale.shown(row.maps)):
        name = f"token {i + 1}" if i < k else f"sum / {k}"
        image = to_pil(overlay(row.image, shown, scale), _MIN_SIDE)
        images.append((image, f"{name}: {_strongest(shown, scale.gates)}"))
    ramp = torch.linspace(0, scale.top, 64).expand(64, 64)
    colors = to_pil(overlay(torch.full((1, 64, 64), 0.5), ramp, scale), _MIN_SIDE)
    top = f"{scale.top:.3g}{'' if scale.gates else ' or more'}"
    unit = " ".join(scale.label.split())
    return [*images, (colors, f"colors: 0 (dark blue) to {top} (yellow), {unit}")]


def map_numbers(prediction: Prediction, block: int, frame: int) -> list[list[str]]:
    """Returns a row for each token, as `NUMBER_HEADERS`."""
    stats, scale = prediction.stats[block], prediction.scale
    shown = scale.shown(prediction.row(block, frame).maps)
    return [
        [
            str(i + 1),
            _strongest(shown[i], scale.gates),
            f"{share:.0%}",
            f"{max((x for j, x in enumerate(stats.pairs[i]) if j != i), default=0.0):.2f}",
        ]
        for i, share in enumerate(stats.effective_share)
    ]


def map_notes(block: int, stats: AttentionStats) -> str:
    """Returns the numbers of a block and what is wrong with its tokens, as Markdown."""
    h, w = stats.grid
    notes = [f"Block {block}: {len(stats.pairs)} tokens of {h} × {w} positions."]
    if stats.overlap is not None:
        notes.append(f"Overlap of two tokens, mean: {stats.overlap:.2f}.")
    if over := stats.over_frames:
        notes.append(f"From frame to frame: {sum(over) / len(over):.2f}.")
    notes += [f"**Warning: {text}.**" for text in stats.warnings()]
    return f"{' '.join(notes)}\n\n{_TERMS}"


def when(prediction: Prediction, frame: int) -> str:
    """Names a frame of a clip; nothing for an image."""
    return f", frame {frame} of {prediction.frames}" if prediction.image.is_video else ""


def to_pil(image: Any, min_side: int = 0) -> Image.Image:
    """Converts `c h w` or `h w 3` in [0, 1], enlarged without smoothing."""
    if isinstance(image, Tensor):
        image = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    pixels = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    times = max(1, min_side // max(pixels.size))
    return pixels.resize((pixels.width * times, pixels.height * times), Image.Resampling.NEAREST)


def _strongest(shown: Tensor, gates: bool) -> str:
    """A map in words: where it is strongest, and how strong."""
    h, w = shown.shape
    row, column = divmod(int(shown.argmax()), w)
    top = float(shown.max())
    amount = f"gate {top:.2f}" if gates else f"{top:.1f} × even share"
    return f"row {row + 1} of {h}, column {column + 1} of {w}, {amount}"
