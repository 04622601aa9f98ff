"""Results of `tokenlearner bench` as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...evaluation.latency import Timing
from ...utils.imports import require_package
from ...utils.io import atomic_write, write_json
from .._tables import REALIZED, filled_table, realized_text
from .config import BenchConfig
from .run import BenchResult, BenchRow, bench_parts

_COLORS = {"latency": "#0072b2", "throughput": "#e69f00", "training": "#009e73"}  # Okabe and Ito's


def bench_tables(
    config: BenchConfig, report: Callable[[str], object] = lambda line: None
) -> Iterator[Any]:
    """Measures, and yields tables for rich as they are done; writes the given files, in the end.

    Args:
        config: What to measure, and how.
        report: As in `bench`.

    Yields:
        A table of sizes, a table of speeds for each measurement, and a line on how it was measured.

    Raises:
        ValueError: As in `bench`, or rich, or matplotlib for a plot, is missing.
    """
    for package in ("rich", "matplotlib") if config.plot else ("rich",):
        require_package(package, "train", "bench")

    for result in bench_parts(config, report):
        if not result.measurements:
            yield filled_table(SIZE_COLUMNS, result.rows)
            continue
        one = result.measurements[-1]
        yield speed_table(result, one.name, one.label)
    if config.json:
        write_json(config.json, bench_json(result))
    if config.plot:
        plot_bench(config.plot, result)
    yield _summary(result)


SIZE_COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "model": lambda row: row.name.replace("+", "\n+"),
    "params M": lambda row: f"{row.parameters / 1e6:.2f}",
    "GMACs": lambda row: f"{row.gmacs:.3f}",
    "GFLOPs": lambda row: f"{row.gflops:.3f}",
    "MACs ratio": lambda row: f"{row.macs_ratio:.2f}",
    "peak MiB": lambda row: f"{row.peak_memory_mib:.1f}",
    "train MiB": lambda row: (
        "–" if row.training_peak_memory_mib is None else f"{row.training_peak_memory_mib:.1f}"
    ),
}


def speed_table(result: BenchResult, measurement: str, label: str) -> Any:
    """Makes a table for rich of the speeds in one measurement."""

    def value(row: BenchRow) -> str:
        timing: Timing = row.speeds[measurement].value
        return f"{timing:.1f}" if timing.median < 100 else f"{timing:.0f}"

    columns: dict[str, Callable[[BenchRow], str]] = {
        "": lambda row: row.name,
        "median (quartiles)": value,
        "speed-up": lambda row: f"{row.speeds[measurement].speedup:.2f}",
        "realized": lambda row: realized_text(row.speeds[measurement].realized_speedup),
    }
    table = filled_table(columns, result.rows)
    table.title, table.title_justify = label, "left"
    return table


def bench_json(result: BenchResult) -> dict[str, Any]:
    """Returns all of it as plain values, with the command and the machine."""
    parsed = {
        m.text: {"base": m.base, "insert": dict(m.tokens)} for m in result.config.parsed_models
    }
    models = [parsed[row.name] | asdict(row) for row in result.rows]
    for speed in (speed for model in models for speed in model["speeds"].values()):
        speed["of_macs_ratio"] = speed["realized_speedup"]  # its name in version 0.3
    values = asdict(result)
    del values["rows"]
    return {"command": result.config.command, **values, "models": models}


def plot_bench(path: str | Path, result: BenchResult) -> Path:
    """Draws how many times as fast each model is, beside the theoretical speed-up.

    Args:
        path: The PNG to write.
        result: What was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result.rows
    figure = Figure(figsize=(9, 1.6 + 0.9 * len(rows)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(result.measurements)
    for i, one in enumerate(result.measurements):
        speedups = [row.speeds[one.name].speedup for row in rows]
        errors = [[s.median - s.low for s in speedups], [s.high - s.median for s in speedups]]
        bars = axis.barh(
            [row + (i + 0.5) * height - 0.4 for row in range(len(rows))],
            [s.median for s in speedups],
            height,
            xerr=errors,
            color=_COLORS[one.name],
            label=f"{one.name} at batch {one.batch_size}",
            error_kw={"lw": 1, "capsize": 2},
        )
        axis.bar_label(bars, fmt=" %.2f", fontsize=7, padding=3)
    for i, row in enumerate(rows):
        label = "" if i else "ratio of multiply-adds"
        axis.vlines(row.macs_ratio, i - 0.45, i + 0.45, color="black", lw=2, label=label)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"times as fast as {rows[0].name} (median, quartiles)")
    axis.set_title(_setting(result), fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return Path(path)


def _summary(result: BenchResult) -> str:
    rounds = sorted({one.rounds for one in result.measurements})
    return (
        f"{_setting(result)}; medians (quartiles) of {'–'.join(map(str, rounds))} interleaved "
        "rounds. "
        "GMACs are of one input, MiB of tensors alive at once at batch "
        f"{result.config.batch_size}, beyond weights and input. Ratios are to "
        f"{result.rows[0].name}; realized: the speed-up as a share of the MACs ratio, "
        f"* where it is below {REALIZED}."
    )


def _setting(result: BenchResult) -> str:
    """Names the input, the machine and the form of the models."""
    machine, config = result.machine, result.config
    chip = machine["accelerator"] or f"{machine['cpu']}, threads: {machine['threads']}"
    compiled = "" if config.compile == "no" else f", compiled ({config.compile})"
    axes = " x ".join(map(str, result.input_axes))
    form = f"torch {machine['torch']}, {config.dtype}{compiled}"
    return f"{axes} on {machine['device']} ({chip}), {form}"
