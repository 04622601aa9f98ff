"""The cost of models, measured interleaved: `benchmark({"a": model_a, "b": model_b}, images)`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models.outputs import output_tensor
from ..utils.modules import training_mode
from ..utils.validation import check_count
from .flops import count_macs, live_peak_mib

Key = TypeVar("Key")

_LEAST_ROUNDS = 3  # where there is little time


@dataclass(frozen=True)
class Timing:
    """The median of several runs, and the quartiles around it.

    >>> f"{Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]):.1f}"
    '3.0 (2.0–4.0)'
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Summarizes at least two values."""
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


class Seconds(list[float]):
    """The seconds of a model's runs, one number a round."""

    @property
    def latency_ms(self) -> Timing:
        """The time of a run."""
        return Timing.of([1000 * s for s in self])

    def per_second(self, count: int) -> Timing:
        """Returns how many images a second there are, if a run takes `count` of them."""
        return Timing.of([count / s for s in self])

    def speedup_over(self, reference: Seconds) -> Timing:
        """Returns how many times as fast these runs are as others of the same rounds."""
        return Timing.of([r / s for r, s in zip(reference, self, strict=True)])


@dataclass(frozen=True)
class Cost:
    """The cost of one model; its runs are interleaved with those of the same call's other models.

    `speedup` and `training_speedup` compare with the first model, round by round.
    """

    parameters: int
    gmacs: float
    """Multiply-adds of one image, counted as 1, in 1e9; GFLOPs are twice that."""
    images_per_second: Timing
    speedup: Timing
    training_images_per_second: Timing
    training_speedup: Timing
    peak_memory_mib: float
    """Tensors alive at once beyond model and input, at inference on the whole batch."""
    training_peak_memory_mib: float


def benchmark(models: Mapping[str, nn.Module], images: Tensor, rounds: int = 15) -> dict[str, Cost]:
    """Measures models on the same images, interleaved, so that a busy machine slows all alike.

    A training step is forward and backward of the mean output; there is no optimizer in it. The
    models' modes and gradients are left as they were.

    Args:
        models: Names and models, all on the device of `images`.
        images: One batch, `b c h w`.
        rounds: Timed runs of each model, after two that are not counted.

    Raises:
        ValueError: There is no model or no image, or `rounds` is below 2.
    """
    inference = time_models(models, images, rounds)
    training = time_models(models, images, rounds, training=True)
    first = next(iter(models))
    return {
        name: Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            gmacs=count_macs(model, images[:1]) / 1e9,
            images_per_second=inference[name].per_second(len(images)),
            speedup=inference[name].speedup_over(inference[first]),
            training_images_per_second=training[name].per_second(len(images)),
            training_speedup=training[name].speedup_over(training[first]),
            peak_memory_mib=peak_memory_mib(model, images),
            training_peak_memory_mib=peak_memory_mib(model, images, training=True),
        )
        for name, model in models.items()
    }


def time_models(
    models: Mapping[str, nn.Module],
    images: Tensor,
    rounds: int = 15,
    *,
    training: bool = False,
    compiled: bool | str = False,
    seconds: float = math.inf,
) -> dict[str, Seconds]:
    """Times a forward pass, or a training step, of models interleaved on the same images.

    Args:
        models: As in `benchmark`.
        images: As in `benchmark`.
        rounds: As in `benchmark`.
        training: Measure forward and backward of the mean output, in training mode.
        compiled: Run what `torch.compile` makes of the models, each as one graph of fixed shapes,
            True in its default mode, or in one such as `"reduce-overhead"`; compiling happens in
            the runs that are not counted.
        seconds: As in `time_interleaved`.

    Returns:
        The seconds of each run, one number a round.

    Raises:
        ValueError: As in `benchmark`.
    """
    check_count("rounds", rounds, least=2)
    if not models or not len(images):
        raise ValueError(f"{len(models)} models and {len(images)} images, expected 1 or more")
    with ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            stack.enter_context(_ready(model, training))
            forward = _compiled(model, compiled) if compiled else model
            runs[name] = partial(_step if training else _pass, model, forward, images)
        return time_interleaved(runs, rounds, seconds)


def peak_memory_mib(model: nn.Module, images: Tensor, *, training: bool = False) -> float:
    """Measures the tensors that are alive at once beyond model and input, in MiB.

    Args:
        model: As in `benchmark`; it is not compiled for this.
        images: As in `benchmark`.
        training: As in `time_models`.
    """
    with _ready(model, training):
        return live_peak_mib(partial(_step if training else _pass, model, model, images))


@contextmanager
def _ready(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in its mode, and at inference turns gradients off."""
    with training_mode(model, training), torch.inference_mode(not training):
        yield


def _pass(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
    forward(images)


def _step(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(output_tensor(forward(images)).mean(), parameters, allow_unused=True)


def _compiled(model: nn.Module, mode: bool | str) -> Callable[[Tensor], Tensor]:
    """Compiles a model apart from all others.

    torch keeps what it compiled by code object, tries one after the other, and gives up at the
    ninth; models of one class would wait for each other's guards.
    """

    def forward(images: Tensor) -> Tensor:
        return model(images)

    forward.__code__ = forward.__code__.replace()
    mode = mode if isinstance(mode, str) else "default"
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)


def time_interleaved(
    runs: Mapping[Key, Callable[[], object]], rounds: int, seconds: float = math.inf
) -> dict[Key, Seconds]:
    """Times runs one after the other, round by round, so that a busy machine slows all alike.

    Every other round goes backwards, so that none always runs behind the same one. Each run is
    waited for, on an accelerator too.

    Args:
        runs: What to run, by name.
        rounds: Timed runs of each, after two that are not counted.
        seconds: Time for all of it, after which there are no further rounds, but 3 at least; where
            the first round takes a tenth of it, only that one is not counted.

    Returns:
        The seconds of each run, one number a round.
    """
    begun, skipped = time.perf_counter(), 2
    found = {name: Seconds() for name in runs}
    for i in itertools.count(1):
        for name in reversed([*runs]) if i % 2 else runs:
            _synchronize()
            start = time.perf_counter()
            runs[name]()
            _synchronize()
            found[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - begun
        if i == 1 and spent > seconds / 10:
            skipped = 1
        is_late = spent * (i + 1) / i > seconds and i - skipped >= _LEAST_ROUNDS
        if i - skipped >= rounds or is_late:
            break
    return {name: Seconds(values[skipped:]) for name, values in found.items()}


def _synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
