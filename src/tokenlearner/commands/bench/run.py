"""Models of `tokenlearner bench`, measured interleaved, each against the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...evaluation.flops import count_macs
from ...evaluation.hardware import describe_machine, read_gigabytes_per_second
from ...evaluation.latency import Seconds, Timing, peak_memory_mib, time_models
from ...layers.onednn import use_onednn
from ...models.insertion import insert
from ...utils.modules import pick_device
from ...utils.validation import require
from .._models import load_sized
from .config import BenchConfig, BenchModel

Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Speed:
    """The speed of a model in one measurement, and over the first model's."""

    value: Timing
    """In the unit of the measurement."""
    speedup: Timing
    """Times as fast as the first model, round by round."""
    realized_speedup: float
    """The speed-up as a share of the theoretical one, which is the ratio of multiply-adds."""


@dataclass(frozen=True)
class Measurement:
    """A timing of all models.

    Args:
        name: `latency`, `throughput` or `training`.
        batch_size: Images at a time.
        unit: `ms` of a batch, `images/s` or `clips/s`.
        rounds: Timed runs of each model.
    """

    name: str
    batch_size: int
    unit: str
    rounds: int

    @property
    def label(self) -> str:
        """The measurement in words."""
        return f"{self.name} at batch {self.batch_size}, {self.unit}"

    def timing(self, seconds: Seconds) -> Timing:
        """Returns the time of a batch in the unit of the measurement."""
        return seconds.latency_ms if self.unit == "ms" else seconds.per_second(self.batch_size)


@dataclass(frozen=True)
class BenchRow:
    """The cost of one model."""

    name: str
    parameters: int
    weights_mib: float
    gmacs: float
    """Multiply-adds of one image, counted as 1, in 1e9."""
    gflops: float
    """Twice that."""
    macs_ratio: float
    """Multiply-adds of the first model over this one's: the theoretical speed-up."""
    peak_memory_mib: float
    """Tensors alive at once beyond model and input, at inference on the whole batch."""
    training_peak_memory_mib: float | None
    speeds: dict[str, Speed]
    """By the name of the measurement."""


@dataclass(frozen=True)
class BenchResult:
    """All that was measured; the first row is what the others are compared with."""

    config: BenchConfig
    machine: dict[str, str | int | None]
    read_gigabytes_per_second: float
    """Speed at which the device reads memory; what reads weights cannot be faster."""
    input_axes: list[int]
    """Axes of one image, `c h w`, or clip, `c t h w`."""
    measurements: list[Measurement]
    rows: list[BenchRow]


def bench(config: BenchConfig, report: Callable[[str], object] = lambda line: None) -> BenchResult:
    """Measures the models of a configuration interleaved.

    Args:
        config: What to measure, and how.
        report: Called with a line on what comes next.

    Raises:
        ValueError: There is no such model or device, tokens cannot be inserted, or the models do
            not take images of one size.
    """
    *_, result = bench_parts(config, report)
    return result


def bench_parts(config: BenchConfig, report: Callable[[str], object]) -> Iterator[BenchResult]:
    """Yields what `bench` returns as far as it is measured: after counting, and each measurement.

    Args:
        config: As in `bench`.
        report: As in `bench`.
    """
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    batch = config.batch_size
    with torch_threads(config.threads):
        report("building")
        models, axes = load_bench_models(config.parsed_models, config.img_size, device, dtype)
        images = torch.randn(batch, *axes).to(device, dtype)
        unit = "clips/s" if len(axes) == 4 else "images/s"
        planned = [("latency", 1, "ms"), ("throughput", batch, unit)]
        planned += [("training", batch, unit)] if config.training else []
        report("counting multiply-adds and memory")
        rows: list[BenchRow] = []
        for name, model in models.items():
            with _size_errors(name, config.img_size):
                rows.append(_count(name, model, images, config.training, rows[:1]))
        reading = read_gigabytes_per_second(device)
        result = BenchResult(config, describe_machine(device), reading, axes, [], rows)
        yield result
        for (name, count, unit), share in shares_of_time(planned, config.seconds):
            report(f"{name} at batch {count}, {unit}, {_duration(config)}")
            seconds = time_models(
                models,
                images[:count],
                config.rounds,
                training=name == "training",
                compiled=config.compile != "no" and config.compile,
                seconds=share,
            )
            measurement = Measurement(name, count, unit, len(seconds[rows[0].name]))
            for row in rows:
                speedup = seconds[row.name].speedup_over(seconds[rows[0].name])
                value = measurement.timing(seconds[row.name])
                realized = speedup.median / row.macs_ratio
                row.speeds[name] = Speed(value, speedup, realized)
            result.measurements.append(measurement)
            yield result


def shares_of_time(planned: Sequence[Planned], seconds: float) -> Iterator[tuple[Planned, float]]:
    """Yields what is planned, each with an equal share of the time that is left then."""
    end = time.perf_counter() + seconds
    for i, one in enumerate(planned):
        yield one, (end - time.perf_counter()) / (len(planned) - i)


def _duration(config: BenchConfig) -> str:
    rounds = f"{config.rounds} rounds and 2 to warm up"
    return f"in up to {rounds}, {config.time} in all" if config.time else f"in {rounds}"


def load_bench_models(
    given: Sequence[BenchModel], img_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], list[int]]:
    """Builds models that take images of one size.

    Args:
        given: What to build.
        img_size: Height and width; 0 leaves them as the models have them.
        device: Where to put them.
        dtype: What to turn them into.

    Returns:
        The models by their text on the command line, and the axes of one image, `c h w`, or clip,
        `c t h w`.

    Raises:
        ValueError: There is no such model, tokens cannot be inserted, oneDNN is given on another
            device than a CPU, or sizes differ.
    """
    models, sizes = {}, {}
    for model in given:
        require(
            not model.onednn or device.type == "cpu",
            f"{model.text!r} uses oneDNN, which computes on a CPU, and the device is {device}; "
            "leave out +onednn, or pass device cpu",
        )
        with _size_errors(model.text, img_size):
            built, sizes[model.text] = load_sized(model.base, img_size, str(device))
        try:
            if model.tokens:
                insert(built, **model.tokens)
        except ValueError as error:
            raise ValueError(f"{model.text}: {error}") from error
        models[model.text] = (use_onednn(built) if model.onednn else built).to(dtype)
    if len({tuple(size) for size in sizes.values()}) > 1:
        all_sizes = ", ".join(f"{name} {' x '.join(map(str, s))}" for name, s in sizes.items())
        hint = "measure them separately" if img_size else "pass img_size"
        raise ValueError(f"the models take images of different sizes ({all_sizes}); {hint}")
    return models, next(iter(sizes.values()))


def _count(
    name: str, model: Any, images: Tensor, training: bool, first: Sequence[BenchRow]
) -> BenchRow:
    """Counts all but the speeds."""
    gmacs = count_macs(model, images[:1]) / 1e9
    parameters = list(model.parameters())
    trained = peak_memory_mib(model, images, training=True) if training else None
    return BenchRow(
        name=name,
        parameters=sum(p.numel() for p in parameters),
        weights_mib=sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        gmacs=gmacs,
        gflops=2 * gmacs,
        macs_ratio=first[0].gmacs / gmacs if first else 1.0,
        peak_memory_mib=peak_memory_mib(model, images),
        training_peak_memory_mib=trained,
        speeds={},
    )


@contextmanager
def _size_errors(name: str, img_size: int) -> Iterator[None]:
    """Explains errors of timm and torch where the size was changed."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if not img_size:
            raise
        message = f"{name} does not take img_size {img_size} ({error}); pass another"
        raise ValueError(message) from error


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Gives torch so many threads inside the block; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
