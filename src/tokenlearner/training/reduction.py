"""The cheaper model that is closest to a host on images of yours: `reduce(model, images, 0.5)`.

Candidates are fitted to the host's output on images without labels, in rounds that only the best of
the round before take part in, and ranked by their error on images that were held out.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.latency import time_interleaved
from ..models.features import wrapped_blocks
from ..models.hosts import find_host
from ..models.outputs import output_tensor
from ..utils.digest import digest_tensors
from ..utils.modules import clone_structure, eager_gradients, training_mode, uncompiled
from ..utils.validation import check_above_zero, check_count, require
from .calibration import Rates, split_held_out
from .candidate_store import CandidateRow, CandidateStore
from .candidates import (
    DEFAULT_TOKENS,
    Candidate,
    ResizedInput,
    check_budget,
    find_candidates,
    resize,
)
from .distillation import mixed_blocks
from .fitting import FitConfig, fit
from .teacher import TeacherCache

_FORMAT = 2  # of what is kept; a later call goes on from the same only
_ROUNDS = ((0.35, 1.0), (0.3, 0.4), (0.35, 0.0))  # share of the time, and of the candidates
_NEW_LR, _HOST_LR = 1e-3, 1e-4  # the host's for batches of _RATED_BATCH; smaller ones take less
_RATED_BATCH = 64
_LEAST_IMAGES, _LEAST_HELD_OUT = 16, 4
_MOST_VIEWS, _HOST_SHARE = 4, 0.1  # share of the time, that a host takes on views
_FEWEST_STEPS, _LEAST_STEPS, _MOST_STEPS = 3, 10, 3000
_EVALUATED_SHARE = 0.25  # of a candidate's time, that its evaluations take at most
_TIMED_STEPS, _SLOW = 4, 2.0  # updates, and seconds, after which no other is timed
_TIMED_ROUNDS, _TIMED_SHARE = 11, 0.05  # of latency, and of the time that it may take
_LEAST_TIMED_RUNS = 4  # of a model, one of them not counted


@dataclass(frozen=True)
class Reduction:
    """The result of `reduce`.

    Args:
        model: The best candidate as a model of its own, in evaluation mode.
        rows: The host, then the candidates, those of more rounds and of a lower error first; where
            time is short only the first of them have a latency.
        untried: Names of candidates that there was no time for.
        images: Images that candidates were fitted on.
        held_out: Images that errors are of.
        seconds: Time of all of it.
    """

    model: nn.Module
    rows: list[CandidateRow]
    untried: list[str]
    images: int
    held_out: int
    seconds: float

    @property
    def best(self) -> CandidateRow:
        """The row of the model."""
        return self.rows[1]


@eager_gradients()
def reduce(
    model: nn.Module,
    images: Tensor,
    budget: float = 0.5,
    *,
    seconds: float = 1800,
    num_tokens: Sequence[int] = DEFAULT_TOKENS,
    views: int | None = None,
    batch_size: int | None = None,
    latency_batches: Sequence[int] = (1, 32),
    train_best: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Reduction:
    """Finds the cheaper model that is closest to a host on images of yours, and trains it.

    Candidates are numbers of learned tokens, a smaller image, and both. All are fitted to the host
    for as long, the best of them once more, and the best of those to the end. Without time for all,
    one of each kind is still tried, and the others are named.

    Args:
        model: A ViT as `insert` takes it, classifier or not, without learned tokens; it is left as
            it is.
        images: Normalized images as it takes them, `b c h w`; hundreds, better thousands.
        budget: Share of its multiply-adds.
        seconds: Time to take, about; running the model on all views of all images is in it.
        num_tokens: Numbers of tokens to try.
        views: As in `calibrate`; None is 4, or as many as the model runs on in a tenth of the time.
        batch_size: Images an update; None is 64, on a CPU 16.
        latency_batches: Images at a time that the time is measured of.
        train_best: Go on with the best candidate to the end; without, it is as far as the others.
        folder: Where to keep what is done, for a later call to go on from; deleted by none.
        seed: Of what is drawn.
        report: Called after each update with `candidate`, `round` of `rounds`, `step` of `steps`,
            and `seconds` so far; while the model runs on views of images, the candidate is "host"
            and they are the steps, and while times are measured "times", of so many batch sizes.

    Raises:
        ValueError: There are fewer than 16 images, nothing meets the budget, the model is unknown,
            or the folder has what another call left.

    >>> import torch, tokenlearner
    >>> vit, images = tokenlearner.create_model("vit_mini_patch4_28"), torch.rand(20, 1, 28, 28)
    >>> options = {"num_tokens": [8], "views": 1, "batch_size": 2, "latency_batches": [1]}
    >>> done = tokenlearner.reduce(vit, images, 0.7, seconds=1, **options)
    >>> done.best.macs_share < 0.7
    True
    """
    model = uncompiled(model)
    check_budget(budget)
    check_above_zero("seconds", seconds)
    counts = [check_count("num_tokens", k) for k in num_tokens]
    batches = [check_count("latency_batches", count) for count in latency_batches]
    require(not wrapped_blocks(model), "the model has learned tokens; pass it without, as `remove`")
    got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
    require(
        isinstance(images, Tensor) and images.ndim == 4 and len(images) >= _LEAST_IMAGES,
        f"images is {got}, expected a tensor of {_LEAST_IMAGES} images or more, b c h w",
    )
    if views is not None:
        check_count("views", views)
    if batch_size is None:
        batch_size = 16 if images.device.type == "cpu" else 64
    config = FitConfig(batch_size=batch_size, patience=0, seed=seed)
    start = time.perf_counter()
    with training_mode(model, training=False):
        candidates = find_candidates(model, images[:1], budget, counts)
        options = (_FORMAT, budget, counts, views, config)
        given = {**model.state_dict(), "": images}
        store = CandidateStore(folder, "" if folder is None else digest_tensors(given, *options))
        rounds = len(_ROUNDS) - (not train_best)
        store.views = store.views or views or _views_within(model, images, _HOST_SHARE * seconds)
        race = _Race(model, images, candidates, store, config, rounds, report)
        race.run((1 - _TIMED_SHARE) * seconds)
        rows = race.timed(batches, _TIMED_SHARE * seconds)
    return Reduction(
        model=race.student(race.ranked()[0]),
        rows=rows,
        untried=[row.name for row in race.rows if not row.errors],
        images=len(race.training),
        held_out=len(race.held_out),
        seconds=store.seconds + time.perf_counter() - start,
    )


class _Race:
    """Fits candidates to a host in rounds."""

    def __init__(
        self,
        host: nn.Module,
        images: Tensor,
        candidates: Sequence[tuple[Candidate, int]],
        store: CandidateStore,
        config: FitConfig,
        rounds: int,
        report: Callable[[dict[str, Any]], None] | None,
    ):
        self.host, self.images, self.store, self.config = host, images, store, config
        self._report, self._start, self._rounds = report, time.perf_counter(), rounds
        self._round, self._latest = 0, None
        self.host_lr = _HOST_LR * min(1, config.batch_size / _RATED_BATCH)
        (_, whole), *rest = candidates
        self.host_row = CandidateRow(None, whole / 1e9, 1.0)
        self.rows = store.rows or [CandidateRow(c, n / 1e9, n / whole) for c, n in rest]
        share = max(0.1, _LEAST_HELD_OUT / len(images))
        self.training, self.held_out = split_held_out(len(images), share, config.seed)
        options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
        options |= {"targets": store.load_targets(images.device), "report": self._tell_of_host}
        options |= {"views": store.views, "shares_front": False}
        self.cache = TeacherCache(host, images, 0, **options)
        if options["targets"] is None:
            store.keep_targets(self.cache.targets(), self.rows, time.perf_counter() - self._start)

    def run(self, seconds: float) -> None:
        """Runs the rounds within a time; what an earlier call did is left out."""
        for number in range(self._rounds):
            entered, self._round = self._entered(number), number
            if str(number) not in self.store.rounds:
                front = self._front_seconds(entered)
                left = max(0, seconds - self._elapsed() - front)
                left *= _ROUNDS[number][0] / sum(s for s, _ in _ROUNDS[number : self._rounds])
                end = self._elapsed() + front + left
                self.store.rounds[str(number)] = (left / len(entered), end)
            of_each, end = self.store.rounds[str(number)]
            kinds = set[tuple[bool, bool]]()
            for i in sorted(entered, key=self._turn):
                candidate: Any = self.rows[i].candidate
                kind = candidate.num_tokens > 0, candidate.img_size is not None
                is_first = kind not in kinds
                kinds.add(kind)
                in_time = number or is_first or self._elapsed() < end
                if len(self.rows[i].errors) == number and in_time:
                    self._fit(i, of_each)
            self._latest = None

    def _elapsed(self) -> float:
        """Returns the seconds of this call and those before."""
        return self.store.seconds + time.perf_counter() - self._start

    def _turn(self, i: int) -> tuple[int, int, int]:
        """Returns when a candidate is fitted, in a round.

        Those with the shortest fronts come first, each front going on from the one before; without
        a front, the smaller image alone, and then those with few tokens.
        """
        candidate: Any = self.rows[i].candidate
        return self._first(i), candidate.num_tokens, i

    def _first(self, i: int) -> int:
        """Returns the first block that a candidate's front ends at; without a front the depth."""
        candidate: Any = self.rows[i].candidate
        first = candidate.first
        return len(self.cache.features) if first is None else first

    def _front_seconds(self, entered: Sequence[int]) -> float:
        """Returns how long the host takes up to the deepest front, which the others are within."""
        depth = len(self.cache.features)
        deepest = max([first for i in entered if (first := self._first(i)) < depth], default=0)
        return self.store.host_seconds * deepest / depth

    def _entered(self, number: int) -> list[int]:
        """Returns the candidates of a round, by their errors in the round before."""
        count = max(1, math.ceil(_ROUNDS[number][1] * len(self.rows)))
        ready = [i for i, row in enumerate(self.rows) if len(row.errors) >= number]
        return sorted(ready, key=lambda i: self.rows[i].errors[number - 1] if number else i)[:count]

    def _fit(self, i: int, seconds: float) -> None:
        """Fits a candidate for a time, and keeps what became of it."""
        start, row, model = time.perf_counter(), self.rows[i], self.student(i)
        candidate: Any = row.candidate
        skipped = mixed_blocks(find_host(model))
        if candidate.first is None:
            half = len(self.cache.features) // 2
            cache = self.cache.from_block(half, None, skipped)
            student: nn.Module = ResizedInput(model, candidate.img_size)
            front_lr = self.host_lr
        else:
            cache = self.cache.from_block(candidate.first, self.host, skipped, self._latest)
            self._latest, student, front_lr = cache, model, 0.0
        rates = Rates(new=_NEW_LR, tail=self.host_lr, front=front_lr)
        groups = rates.groups(model, candidate.first or 0)
        config = self._config_within(seconds, student, cache)

        def report(of_fit: Any) -> None:
            self._tell(row.name, of_fit["step"], config.steps)

        done = fit(student, cache, groups, config, self.training, self.held_out, report)
        self.rows[i] = replace(
            row,
            errors=[*row.errors, done.error],
            agreement=cache.agreement(student, self.held_out),
            steps=row.steps + done.steps,
            seconds=row.seconds + time.perf_counter() - start,
        )
        elapsed = time.perf_counter() - self._start
        self.store.keep(i, model, [p for group, _ in groups for p in group], self.rows, elapsed)

    def _tell_of_host(self, done: int, views: int) -> None:
        self._tell("host", done, views)

    def _tell(self, name: str, step: int, steps: int) -> None:
        if self._report:
            place = {"candidate": name, "round": self._round, "rounds": self._rounds}
            self._report({**place, "step": step, "steps": steps, "seconds": self._elapsed()})

    def _config_within(self, seconds: float, student: nn.Module, cache: TeacherCache) -> FitConfig:
        """Times updates, and returns how many of them and of evaluations a time suffices for.

        The fastest update counts, as other programs may run beside.
        """
        rows, times = cache.rows(self.training)[: self.config.batch_size], list[list[float]]()
        while len(times) < _TIMED_STEPS and sum(map(sum, times)) < _SLOW:
            start = time.perf_counter()
            loss = torch.stack(cache.losses(student, rows)).sum()
            loss.item()  # waits for an accelerator
            forward = time.perf_counter() - start
            loss.backward()
            gradients = [p.grad for p in student.parameters() if p.grad is not None]
            gradients[0].sum().item()
            times.append([forward, time.perf_counter() - start - forward])
        for parameter in student.parameters():
            parameter.grad = None
        forward, backward = map(min, zip(*times, strict=True))
        evaluation = forward * len(self.held_out) / len(rows)
        ends = 2 * evaluation  # one in front of all steps, and the share of equal classes
        left = seconds - sum(map(sum, times)) - ends
        evaluations = int(_EVALUATED_SHARE * left / evaluation)
        evaluations = max(1, min(self.config.evaluations, evaluations))
        steps = int((left - evaluations * evaluation) / (forward + backward))
        least = max(_FEWEST_STEPS, min(_LEAST_STEPS, 2 * steps))  # which may overrun the time
        steps = min(_MOST_STEPS, max(least, steps))
        return replace(self.config, steps=steps, evaluations=evaluations)

    def student(self, i: int) -> nn.Module:
        """Builds a candidate's model, with the weights that it has come to."""
        return self.store.load(i, self._apply(i, copy.deepcopy(self.host).requires_grad_(True)))

    def _apply(self, i: int, host: nn.Module) -> nn.Module:
        candidate: Any = self.rows[i].candidate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return candidate.apply(host).eval()

    def ranked(self) -> list[int]:
        """Returns the candidates that were tried, those of more rounds and a lower error first."""
        return sorted(
            (i for i, row in enumerate(self.rows) if row.errors),
            key=lambda i: (-len(self.rows[i].errors), self.rows[i].errors[-1]),
        )

    def timed(self, batches: Sequence[int], seconds: float) -> list[CandidateRow]:
        """Returns the rows of the host and the ranked candidates, with the times of the first."""
        rows = [self.host_row, *(self.rows[i] for i in self.ranked())]
        shared = [clone_structure(self.host) for _ in rows[1:]]  # the host's weights, not copies
        models = [self.host, *map(self._apply, self.ranked(), shared)]
        for step, batch in enumerate(batches, 1):
            self._tell("times", step, len(batches))
            images = self.images[torch.arange(batch) % len(self.images)]
            runs = {
                i: partial(model.eval(), _resized(images, rows[i].candidate))
                for i, model in enumerate(models)
            }
            with torch.inference_mode():
                of_batch = seconds / len(batches)
                runs = dict(itertools.islice(runs.items(), _models_within(runs[0], rows, of_batch)))
                times = time_interleaved(runs, _TIMED_ROUNDS, of_batch)
            for i, of_model in times.items():
                rows[i] = replace(
                    rows[i],
                    latency_ms={**rows[i].latency_ms, batch: of_model.latency_ms},
                    speedup={**rows[i].speedup, batch: of_model.speedup_over(times[0])},
                )
        return rows


def _models_within(host: Callable[[], Any], rows: Sequence[CandidateRow], seconds: float) -> int:
    """Returns of how many rows the models can be timed in a time: the host, the best, and more."""
    for _ in range(2):  # the first takes longer than the next
        start = time.perf_counter()
        output_tensor(host()).sum().item()
    affordable = seconds / _LEAST_TIMED_RUNS / (time.perf_counter() - start)
    costs = itertools.accumulate(row.macs_share for row in rows)
    return max(2, sum(cost <= affordable for cost in costs))


@torch.no_grad()
def _views_within(host: nn.Module, images: Tensor, seconds: float) -> int:
    """Returns how many views of images a host can be run on in a time: 1 to 4."""
    start = 0.0
    for batch in (images[:2], images[:_LEAST_IMAGES]):  # the first takes longer than the next
        start = time.perf_counter()
        output_tensor(host(batch)).sum().item()
    views = seconds * _LEAST_IMAGES / (time.perf_counter() - start) / len(images)
    return max(1, min(_MOST_VIEWS, int(views)))


def _resized(images: Tensor, candidate: Candidate | None) -> Tensor:
    size = candidate.img_size if candidate else None
    return images if size is None else resize(images, size)
