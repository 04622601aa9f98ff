"""Runs the page's models: the prediction and the maps of one image or clip, and what it costs.

Axes: `t` frames as the maps have them, `k` tokens, `h w` grid, `c` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...evaluation.flops import count_macs
from ...evaluation.hardware import describe_machine
from ...evaluation.latency import time_models
from ...evaluation.map_figures import FigureRow, MapScale, map_scale
from ...evaluation.map_stats import AttentionStats, map_stats
from ...evaluation.maps import has_gates
from ...models.insertion import remove
from ...models.outputs import has_classifier
from ...utils.modules import clone_structure
from ...utils.validation import counted, require
from .._inputs import MapInput
from ..maps import compute_maps, time_step_rows
from .models import OfferedModel

BATCH = 32  # that is measured besides a single image or clip
COST_HEADERS = ("learned tokens", "GMACs each", "at once", "runs", "ms", "speed-up")
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 30, 2.0  # a measurement takes about that long
_MAX_BATCH_SECONDS = 4.0  # of a round


@dataclass(frozen=True, eq=False)
class Prediction:
    """A model's prediction and maps of one image or clip.

    Args:
        image: The image or clip, as the model got it.
        shares: Of each class by softmax, `c`, the mean over the frames of a clip; None without a
            classifier.
        maps: `t k h w` for each block at which tokens are learned; none without learned tokens.
        stats: Numbers about them, for each block.
        scale: What their colors mean.
    """

    image: MapInput
    shares: Tensor | None
    maps: dict[int, Tensor]
    stats: dict[int, AttentionStats]
    scale: MapScale

    @property
    def frames(self) -> int:
        """Frames that can be shown."""
        return len(self.image.pixels)

    def row(self, block: int, frame: int) -> FigureRow:
        """Returns a frame, counted from 1, and the maps of a block on it."""
        rows = time_step_rows(self.image, self.maps, frame - 1)
        return rows[[*self.maps].index(block)]


def predict(offered: OfferedModel, image: MapInput) -> Prediction:
    """Runs a model on one image or clip: its prediction, and its maps if it has any.

    Raises:
        ValueError: The model does not take it, or returns numbers that are not finite.
    """
    model = clone_structure(offered.model)  # hooks read its maps while the other is measured
    like = next(model.parameters())
    with torch.inference_mode():
        maps = compute_maps(model, image) if offered.has_tokens else {}
        logits = model(image.model_input.to(like)).float()
    require(bool(logits.isfinite().all()), f"{offered.name} returns NaN or infinity")
    stats = {i: map_stats(m[None] if image.is_video else m) for i, m in maps.items()}
    gates = has_gates(model)
    frames = range(len(image.pixels)) if maps else ()
    rows = [row for frame in frames for row in time_step_rows(image, maps, frame)]
    scale = map_scale(rows, gates) if rows else MapScale(1.0, gates)
    shares = logits.softmax(-1).mean(0).cpu() if has_classifier(model) else None
    return Prediction(image, shares, maps, stats, scale)


def measure_cost(offered: OfferedModel, model_input: Tensor) -> tuple[list[list[str]], str]:
    """Measures one image or clip with and without the learned tokens, interleaved.

    Without them it is the same model with its learners removed: it costs what the host costs, but
    was not trained so, and its prediction is of no use.

    Args:
        offered: The model.
        model_input: Its input; the first of a batch is measured.

    Returns:
        A row for each model and batch size, as `COST_HEADERS`, and how they were measured.
    """
    one = model_input[:1].to(next(offered.model.parameters()))
    models = _with_and_without(offered, one)
    seconds = sum(min(times) for times in time_models(models, one, rounds=2).values())
    batches = [1, BATCH] if BATCH * seconds <= _MAX_BATCH_SECONDS else [1]
    rows = [row for n in batches for row in _cost_rows(models, one, n, seconds)]
    machine = describe_machine(one.device)
    remark = (
        f"Medians (and quartiles), on {' x '.join(map(str, one.shape[1:]))}, runs interleaved; "
        f"{machine['accelerator'] or machine['cpu']}, "
        f"{one.device}, {counted(torch.get_num_threads(), 'thread')}, torch {machine['torch']}. "
        "Other programs, and small models, in which the calls cost more than the arithmetic, blur "
        "the speed-up. Without: the same model, its learners removed; it was not trained so, and "
        "only its cost is right."
    )
    return rows, remark


def _cost_rows(
    models: dict[str, nn.Module], one: Tensor, n: int, seconds: float
) -> list[list[str]]:
    rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(_SECONDS / max(n * seconds, 1e-6))))
    times = time_models(models, one.expand(n, *one.shape[1:]), rounds)
    first = next(iter(times.values()))
    return [
        [
            name,
            f"{count_macs(models[name], one) / 1e9:.4f}",
            *(str(n), str(rounds), f"{each.latency_ms:.2f}"),
            f"{each.speedup_over(first):.2f}",
        ]
        for name, each in times.items()
    ]


def _with_and_without(offered: OfferedModel, one: Tensor) -> dict[str, nn.Module]:
    """Returns the model, after itself without learned tokens where it runs without."""
    if not offered.has_tokens:
        return {"none": offered.model}
    plain = clone_structure(offered.model)
    try:
        remove(plain)
        with torch.inference_mode():
            plain(one)
    except (ValueError, AssertionError, RuntimeError):
        return {"with (does not run without)": offered.model}
    return {"without": plain, "with": offered.model}
