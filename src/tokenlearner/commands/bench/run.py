"""What `tokenlearner bench` does: models measured in turn, and how each compares to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...evaluation.flops import count_macs
from ...evaluation.hardware import describe_machine, read_gigabytes_per_second
from ...evaluation.latency import Seconds, Timing, peak_memory_mib, time_models
from ...utils.modules import pick_device
from .config import DTYPES, BenchConfig
from .models import load_bench_models


@dataclass(frozen=True)
class Speed:
    """How fast a model is in one measurement, and against the first one."""

    value: Timing
    """In the unit of the measurement."""
    speedup: Timing
    """How many times as fast as the first model, round by round."""
    of_macs_ratio: float
    """How much of what the multiply-adds promise becomes speed; 1 is all of it."""


@dataclass(frozen=True)
class Measurement:
    """What was timed.

    Args:
        name: `latency`, `throughput` or `training`.
        batch_size: Images at a time.
        unit: `ms` of a batch, or `images/s`.
    """

    name: str
    batch_size: int
    unit: str

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.name} at batch {self.batch_size}, {self.unit}"

    def timing(self, seconds: Seconds) -> Timing:
        """Returns the time of a batch in the unit of the measurement."""
        return seconds.latency_ms if self.unit == "ms" else seconds.per_second(self.batch_size)


@dataclass(frozen=True)
class BenchRow:
    """What one model costs; `speeds` are by the name of the measurement."""

    name: str
    parameters: int
    weights_mib: float
    gmacs: float
    """Multiply-adds of one image, counted as 1, in 1e9."""
    gflops: float
    """Twice that."""
    macs_ratio: float
    """How many times as many the first model takes."""
    peak_memory_mib: float
    """Tensors alive at once beyond model and input, at inference on the whole batch."""
    training_peak_memory_mib: float | None
    speeds: dict[str, Speed]


@dataclass(frozen=True)
class BenchResult:
    """All that was measured; the first row is what the others are compared with."""

    config: BenchConfig
    machine: dict[str, str | int | None]
    read_gigabytes_per_second: float
    """How fast the device reads memory; what reads weights cannot be faster."""
    input_axes: list[int]
    """Of one image, `c h w`, or clip, `c t h w`."""
    measurements: list[Measurement]
    rows: list[BenchRow]


def bench(config: BenchConfig, report: Callable[[str], object] = lambda line: None) -> BenchResult:
    """Measures the models of a configuration in turn.

    Args:
        config: What to measure, and how.
        report: Is told what comes next, in a line.

    Raises:
        ValueError: There is no such model or device, tokens cannot be inserted, the models take
            images of different sizes, or none of the size that is asked for.
    """
    device, dtype = pick_device(config.device), DTYPES[config.dtype]
    with _threads(config.threads):
        report("building")
        models, axes = load_bench_models(config.candidates, config.img_size, device, dtype)
        images = torch.randn(config.batch_size, *axes).to(device, dtype)
        report("counting multiply-adds and memory")
        counted = {name: _count(name, model, images, config) for name, model in models.items()}
        measurements, seconds = _measurements(config), {}
        for one in measurements:
            report(f"{one.label}, in {config.rounds + 2} rounds")
            seconds[one.name] = time_models(
                models,
                images[: one.batch_size],
                config.rounds,
                training=one.name == "training",
                compiled=config.compile,
            )
        return BenchResult(
            config=config,
            machine=describe_machine(device),
            read_gigabytes_per_second=read_gigabytes_per_second(device),
            input_axes=axes,
            measurements=measurements,
            rows=_rows(models, counted, measurements, seconds),
        )


def _measurements(config: BenchConfig) -> list[Measurement]:
    found = [
        Measurement("latency", 1, "ms"),
        Measurement("throughput", config.batch_size, "images/s"),
    ]
    return found + (
        [Measurement("training", config.batch_size, "images/s")] if config.training else []
    )


CountedCost = tuple[int, float, float | None]  # multiply-adds, and MiB at inference and in training


def _count(name: str, model: nn.Module, images: Tensor, config: BenchConfig) -> CountedCost:
    try:
        macs = count_macs(model, images[:1])
    except (AssertionError, RuntimeError) as error:  # timm's and torch's, where sizes do not fit
        axes = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"{name} cannot take {axes} ({error}); pass another img_size") from error
    training = peak_memory_mib(model, images, training=True) if config.training else None
    return macs, peak_memory_mib(model, images), training


def _rows(
    models: Mapping[str, nn.Module],
    counted: Mapping[str, CountedCost],
    measurements: Sequence[Measurement],
    seconds: Mapping[str, Mapping[str, Seconds]],
) -> list[BenchRow]:
    first, rows = next(iter(models)), []
    for name, model in models.items():
        macs, inference_mib, training_mib = counted[name]
        ratio, speeds = counted[first][0] / macs, {}
        for one in measurements:
            own = seconds[one.name][name]
            speedup = own.speedup_over(seconds[one.name][first])
            speeds[one.name] = Speed(one.timing(own), speedup, speedup.median / ratio)
        parameters = list(model.parameters())
        rows.append(
            BenchRow(
                name=name,
                parameters=sum(p.numel() for p in parameters),
                weights_mib=sum(p.numel() * p.element_size() for p in parameters) / 2**20,
                gmacs=macs / 1e9,
                gflops=2 * macs / 1e9,
                macs_ratio=ratio,
                peak_memory_mib=inference_mib,
                training_peak_memory_mib=training_mib,
                speeds=speeds,
            )
        )
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Gives torch so many threads for as long as this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
