"""Fitting a student to what a teacher made of images: the steps, and when they end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.insertion import get_insertion, set_num_tokens
from ..utils.modules import check_plain, training_mode
from ..utils.validation import check_count, check_rate, require
from .config import EVALUATIONS
from .meter import CalibrationRow, Report
from .optim import MasterWeights


class Teacher(Protocol):
    """What a student is compared with, as `TeacherCache`; examples go by their indices."""

    def rows(self, images: Tensor, /) -> Tensor:
        """Returns what to draw batches from for some examples."""
        ...

    def losses(self, student: nn.Module, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        """Returns the losses of features and of outputs; their sum is minimized."""
        ...

    def error(self, student: nn.Module, rows: Tensor, /) -> float:
        """Returns what the best state is chosen by."""
        ...


Group = tuple[Sequence[nn.Parameter], float]
"""Parameters, and their highest learning rate."""


@dataclass(frozen=True)
class FitConfig:
    """How parameters of a student are fitted.

    Args:
        steps: Updates by Adam at most.
        batch_size: Images an update.
        warmup: Share of the steps in which learning rates rise; then they fall as a cosine.
        clip_grad: Longest gradient, of all parameters together; 0 leaves it as it is.
        ema_decay: Of a moving average of the parameters, which is the result then; 0 is none.
        patience: Evaluations without a lower held-out error that end the fit; 0 lets it run.
        evaluations: How many there are within all steps.
        seed: Of the images' order.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 300
    batch_size: int = 64
    warmup: float = 0.1
    clip_grad: float = 3.0
    ema_decay: float = 0.0
    patience: int = 10
    evaluations: int = EVALUATIONS
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size, least=2)
        check_count("patience", self.patience, least=0)
        check_count("evaluations", self.evaluations)
        check_rate(self.warmup, "warmup")
        check_rate(self.ema_decay, "ema_decay")
        require(self.clip_grad >= 0, f"clip_grad is {self.clip_grad}, expected 0 or more")


@dataclass(frozen=True)
class Fit:
    """The result of fitting.

    Args:
        steps: Updates that were made.
        best_step: The one after which the error was lowest, and whose parameters were kept.
        history: Steps, and the error on held-out images after them; the first is before all steps.
    """

    steps: int
    best_step: int
    history: list[tuple[int, float]]

    @property
    def error_before(self) -> float:
        """The held-out error before the first step."""
        return self.history[0][1]

    @property
    def error(self) -> float:
        """The held-out error of the parameters that were kept."""
        return dict(self.history)[self.best_step]


def fit(
    student: nn.Module,
    cache: Teacher,
    groups: Sequence[Group],
    config: FitConfig,
    training: Tensor,
    held_out: Tensor,
    report: Report | None = None,
) -> Fit:
    """Fits parameters of a student, in evaluation mode, and keeps their best state.

    Args:
        student: Changed in place.
        cache: What it is compared with.
        groups: What to fit; nothing else changes. Half precision is fitted by float32 copies.
        config: How.
        training: Images to fit on, as indices of the cache's; all of their views are used.
        held_out: Images to evaluate on; without any all steps are made, and the last state is kept.
        report: Called with a `CalibrationRow` after every step.

    Raises:
        ValueError: Weights are quantized, or no gradient comes back to any.
        RuntimeError: The loss is no longer finite.
    """
    parameters = [p for group, _ in groups for p in group]
    for parameter in parameters:
        check_plain("a weight to fit", parameter, "calibrate")
    master = MasterWeights(parameters)
    optimizer = torch.optim.Adam(_with_rates(master.weights, groups))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_one_cycle, config))
    elastic = _ElasticTokens(student, config.seed)
    best = _BestState(student, cache, parameters, held_out, config.ema_decay, elastic)
    rows = cache.rows(training)
    order, start = torch.Generator("cpu").manual_seed(config.seed), time.perf_counter()
    every, step = math.ceil(config.steps / config.evaluations), 0
    with training_mode(student, training=False), _trainable(student, parameters):
        for step in range(1, config.steps + 1):
            drawn = torch.randperm(len(rows), generator=order, device="cpu")
            index = rows[drawn[: config.batch_size]]
            value = 0.0
            for _ in elastic.drawn(student):
                loss = torch.stack(cache.losses(student, index)).sum() / elastic.draws
                _check_finite(part := loss.item(), step, config.steps)
                loss.backward()
                value += part
            if step == 1 and value:
                _check_gradients(parameters)
            if config.clip_grad:
                nn.utils.clip_grad_norm_(parameters, config.clip_grad)
            master.step(optimizer)
            schedule.step()
            best.update_average(step)
            speed = step * len(index) / (time.perf_counter() - start)
            row = CalibrationRow(step=step, steps=config.steps, loss=value, images_per_second=speed)
            if len(held_out) and (step % every == 0 or step == config.steps):
                row["held_out_error"] = best.evaluate(step)
            if report:
                report(row)
            if config.patience and best.since >= config.patience:
                break
        best.restore()
    return Fit(step, best.step if len(held_out) else step, best.history)


class _ElasticTokens:
    """The numbers of tokens that an elastic student is fitted and evaluated with; else its own.

    Each iteration sets the next number, and the one from before at its end.

    Args:
        student: Inserted with `elastic=True`, or not.
        seed: Of the numbers between.
    """

    def __init__(self, student: nn.Module, seed: int):
        insertion = get_insertion(student) or {}
        counts = insertion.get("num_tokens", 1)
        self._most = max(counts) if isinstance(counts, list) else counts
        self._active = insertion.get("active_tokens") or self._most
        self._is_elastic, self._random = bool(insertion.get("elastic")), Random(seed)  # noqa: S311
        self.draws = min(3, self._most) if self._is_elastic else 1

    def drawn(self, student: nn.Module) -> Iterator[None]:
        """Goes through the largest number, the smallest, and one between."""
        between = [self._random.randint(2, self._most - 1)] if self._most > 2 else []
        return self._each(student, [self._most, 1, *between][: self.draws])

    def halved(self, student: nn.Module) -> Iterator[None]:
        """Goes through the largest number, a half and a quarter of it."""
        return self._each(student, sorted({max(1, self._most // part) for part in (1, 2, 4)}))

    def _each(self, student: nn.Module, counts: Sequence[int]) -> Iterator[None]:
        if not self._is_elastic:
            yield
            return
        try:
            for count in counts:
                set_num_tokens(student, count)
                yield
        finally:
            set_num_tokens(student, self._active)


def _with_rates(weights: Sequence[nn.Parameter], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the weights of each group with its rate, as an optimizer takes them."""
    rest = iter(weights)
    return [{"params": [next(rest) for _ in group], "lr": lr} for group, lr in groups if group]


def _one_cycle(config: FitConfig, step: int) -> float:
    """Returns the factor of learning rates at a step, counted from 0."""
    rising = config.warmup * config.steps
    return min(1, (step + 1) / (rising + 1)) * (1 + math.cos(math.pi * step / config.steps)) / 2


class _BestState:
    """Keeps the parameters, or their moving average, that had the lowest held-out error."""

    def __init__(
        self,
        student: nn.Module,
        cache: Teacher,
        parameters: Sequence[nn.Parameter],
        held_out: Tensor,
        ema_decay: float,
        elastic: _ElasticTokens,
    ):
        self._student, self._cache, self._held_out = student, cache, held_out
        self._elastic = elastic
        self._parameters, self._decay = [p.detach() for p in parameters], ema_decay
        self._average = [p.float() for p in self._clones()] if ema_decay else None
        self._state = self._clones() if len(held_out) else None
        self.step = self.since = 0
        self.history = [(0, self._error())] if len(held_out) else []

    def update_average(self, step: int) -> None:
        """Lets the moving average follow, more closely in the first steps."""
        if self._average is not None:
            decay = min(self._decay, step / (step + 10))
            for mean, new in zip(self._average, self._parameters, strict=True):
                mean.lerp_(new.float(), 1 - decay)

    def evaluate(self, step: int) -> float:
        """Evaluates the student on held-out images, and keeps a state that is better."""
        current = self._clones() if self._average else None
        self._load(self._average)
        error, self.since = self._error(), self.since + 1
        if error < min(error for _, error in self.history):
            self.step, self.since, self._state = step, 0, self._clones()
        self._load(current)
        self.history.append((step, error))
        return error

    def restore(self) -> None:
        """Gives the student its best state; without held-out images the last one."""
        self._load(self._state or self._average)

    def _error(self) -> float:
        """Returns the held-out error; of elastic tokens the mean of all, a half and a quarter."""
        each = self._elastic.halved(self._student)
        return fmean([self._cache.error(self._student, self._held_out) for _ in each])

    def _clones(self) -> list[Tensor]:
        return [p.clone() for p in self._parameters]

    def _load(self, state: list[Tensor] | None) -> None:
        for parameter, value in zip(self._parameters, state or self._parameters, strict=True):
            if parameter is not value:
                parameter.copy_(value)


def _check_finite(loss: float, step: int, steps: int) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss} at step {step} of {steps} of calibrating; insert anew, and try a "
            "lower lr"
        )


def _check_gradients(parameters: Sequence[nn.Parameter]) -> None:
    if not any(p.grad is not None and p.grad.any() for p in parameters):
        raise ValueError(
            "no gradient comes back to the learners through the blocks behind them, as where these "
            "round their inputs to int8; calibrate the model before it is quantized"
        )


@contextmanager
def _trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets gradients go to some of the parameters only; restores all gradients afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad
