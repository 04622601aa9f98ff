"""What the page shows of one image or clip, before it is drawn: prediction, maps, numbers, cost.

Axes: `t` frames as the maps have them, `k` tokens, `h w` grid, `c` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...evaluation.flops import count_macs
from ...evaluation.hardware import describe_machine
from ...evaluation.latency import Timing, time_models
from ...evaluation.map_figures import FigureRow, MapScale, map_scale
from ...evaluation.map_stats import AttentionStats, map_stats
from ...evaluation.maps import has_gates
from ...models.insertion import remove
from ...utils.modules import clone_structure
from ...utils.validation import check_choice, require
from .._inputs import MapInput
from ..maps import compute_maps, counted, time_step_rows
from .models import OfferedModel

ALL_TOKENS = "sum"
AT_ONCE = 32  # in the batch that is measured besides a single image or clip
_MOST_ROUNDS, _LEAST_ROUNDS, _SECONDS = 30, 3, 2.0  # each measurement takes about that long
_MOST_SECONDS = 4.0  # of a batch, at worst


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model made of one image or clip.

    Args:
        name: What the image or clip is called.
        seen: `t c h w` in [0, 1], as the model got it.
        is_video: Whether it is a clip.
        shares: Of each class by softmax, `c`, over the frames of a clip the mean.
        maps: `t k h w` for each block at which tokens are learned; none without learned tokens.
        stats: Numbers about them, for each block.
        scale: What their colors mean.
    """

    name: str
    seen: Tensor
    is_video: bool
    shares: Tensor
    maps: dict[int, Tensor]
    stats: dict[int, AttentionStats]
    scale: MapScale

    @property
    def frames(self) -> int:
        """Frames that can be shown."""
        return len(self.seen)

    @property
    def blocks(self) -> list[str]:
        """The blocks at which tokens are learned."""
        return [str(block) for block in self.maps]

    def tokens(self, block: str) -> list[str]:
        """The tokens of a block that can be shown, and their sum."""
        return [ALL_TOKENS, *(str(i + 1) for i in range(self.maps[int(block)].shape[1]))]

    def rows(self, frame: int) -> list[FigureRow]:
        """A row of a sheet for each block, of a frame counted from 1.

        Raises:
            ValueError: There is no such frame.
        """
        require(1 <= frame <= self.frames, f"frame is {frame}, expected 1 to {self.frames}")
        seen = MapInput(self.name, self.seen, self.seen, self.is_video)
        return time_step_rows(seen, self.maps, frame - 1)

    def shown(self, block: str, token: str, frame: int) -> Tensor:
        """One token's map of a frame in the scale's unit, `h w`; of the sum divided by `k`.

        Raises:
            ValueError: There is no such block, token or frame.
        """
        check_choice("block", block, self.blocks)
        check_choice("token", token, self.tokens(block))
        maps = self.rows(frame)[self.blocks.index(block)].maps
        return self.scale.shown(maps)[-1 if token == ALL_TOKENS else int(token) - 1]


@dataclass(frozen=True)
class MeasuredCost:
    """What a model costs; speed-ups are round by round, over the first model of the report."""

    name: str
    gmacs: float
    """Multiply-adds of one image or clip, counted as 1, in 1e9."""
    latency_ms: Timing
    """Of one image or clip."""
    speedup: Timing
    batch_latency_ms: Timing | None
    """Of `AT_ONCE` of them; None where that would take too long."""
    batch_speedup: Timing | None


@dataclass(frozen=True)
class CostReport:
    """The same model with and without its learned tokens, measured in turn.

    Args:
        costs: Without learned tokens, then with them; one only where that cannot be.
        rounds: Timed runs of each on a single image or clip.
        size: Of that, such as `1 x 28 x 28`.
        machine: On what.
        remark: Why there is one cost only, if so.
    """

    costs: tuple[MeasuredCost, ...]
    rounds: int
    size: str
    machine: str
    remark: str = ""


def predict(offered: OfferedModel, seen: MapInput) -> Prediction:
    """Runs a model on one image or clip: its prediction, and its maps if it has any.

    Raises:
        ValueError: The model does not take it, or makes no finite numbers of it.
    """
    like = next(offered.model.parameters())
    with torch.inference_mode():
        maps = compute_maps(offered.model, seen) if offered.has_tokens else {}
        logits = offered.model(seen.taken.to(like)).float()
    require(bool(logits.isfinite().all()), f"{offered.name} makes no finite numbers of it")
    stats = {i: map_stats(one[None] if seen.is_video else one) for i, one in maps.items()}
    gates = has_gates(offered.model)
    each = len(seen.seen) // max(len(one) for one in maps.values()) if maps else 1
    moments = (
        [time_step_rows(seen, maps, i) for i in range(0, len(seen.seen), each)] if maps else []
    )
    rows = [row for moment in moments for row in moment]
    return Prediction(
        name=seen.name,
        seen=seen.seen,
        is_video=seen.is_video,
        shares=logits.softmax(-1).mean(0).cpu(),
        maps=maps,
        stats=stats,
        scale=map_scale(rows, gates) if rows else MapScale(1.0, gates),
    )


def measure_cost(offered: OfferedModel, taken: Tensor) -> CostReport:
    """Measures one image or clip with and without the learned tokens, in turn.

    Without them it is the same model with its learners taken out: it costs what the host costs,
    but was not trained so, and its prediction is of no use.

    Args:
        offered: The model.
        taken: What it takes; the first of a batch is measured.
    """
    one = taken[:1].to(next(offered.model.parameters()))
    models, remark = _with_and_without(offered, one)
    seconds = _seconds_a_round(models, one)
    rounds = _fitting_rounds(seconds)
    single = _timed(models, one, rounds)
    batch = None
    if AT_ONCE * seconds <= _MOST_SECONDS:  # in truth a batch takes less
        batch_rounds = min(rounds, 10, _fitting_rounds(AT_ONCE * seconds / 4))
        batch = _timed(models, one.expand(AT_ONCE, *one.shape[1:]), batch_rounds)
    costs = tuple(
        MeasuredCost(
            name,
            count_macs(model, one) / 1e9,
            *single[name],
            *(batch[name] if batch else (None, None)),
        )
        for name, model in models.items()
    )
    size = " x ".join(map(str, one.shape[1:]))
    return CostReport(costs, rounds, size, _machine(one.device), remark)


def _timed(
    models: dict[str, nn.Module], images: Tensor, rounds: int
) -> dict[str, tuple[Timing, Timing]]:
    """The latency of a batch in ms, and the speed-up over the first model."""
    seconds = time_models(models, images, rounds)
    first = next(iter(seconds.values()))
    return {name: (own.latency_ms, own.speedup_over(first)) for name, own in seconds.items()}


def _with_and_without(offered: OfferedModel, one: Tensor) -> tuple[dict[str, nn.Module], str]:
    if not offered.has_tokens:
        return {"as it is": offered.model}, "This model has no learned tokens to take out."
    with_tokens = {"with learned tokens": offered.model}
    plain = clone_structure(offered.model)
    try:
        remove(plain)
        with torch.inference_mode():
            plain(one)
    except (ValueError, AssertionError, RuntimeError) as error:
        return with_tokens, f"It does not run without its learned tokens ({error})."
    return {"without learned tokens": plain, **with_tokens}, ""


def _seconds_a_round(models: dict[str, nn.Module], one: Tensor) -> float:
    """How long all models take together."""
    return sum(min(own) for own in time_models(models, one, rounds=2).values())


def _fitting_rounds(seconds: float) -> int:
    return max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(_SECONDS / max(seconds, 1e-6))))


def _machine(device: Any) -> str:
    told = describe_machine(device)
    name = told["accelerator"] or told["cpu"]
    threads = counted(torch.get_num_threads(), "thread")
    return f"{name}, {device}, {threads}, torch {told['torch']}"
