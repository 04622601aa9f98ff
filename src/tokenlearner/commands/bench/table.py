"""Models side by side as a person and a program read it: what `tokenlearner bench` leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...utils.io import atomic_write, write_json
from .._tables import plain_table
from .config import BenchConfig
from .run import BenchResult, BenchRow, Measurement, bench

PAYS = 0.95  # of what the multiply-adds promise; below it a line says so
_COLORS = {"latency": "#0072b2", "throughput": "#e69f00", "training": "#009e73"}  # Okabe and Ito's


def bench_table(
    config: BenchConfig, report: Callable[[str], object] = lambda line: None
) -> tuple[Any, ...]:
    """Measures, writes the files that are asked for, and makes tables for rich, and lines.

    Args:
        config: What to measure, and how.
        report: As in `bench`.

    Returns:
        A table of sizes, a table of speeds, and lines on what does not pay and how it was measured.

    Raises:
        ValueError: As in `bench`, or rich, or matplotlib for a plot, is missing.
    """
    _check_packages(bool(config.plot))
    from rich.markup import escape

    found = bench(config, report)
    lines = [*bench_notes(found), _how(found)]
    if config.json:
        write_json(config.json, bench_json(found))
    if config.plot:
        plot_bench(config.plot, found)
    return size_table(found), speed_table(found), *map(escape, lines)


def size_table(found: BenchResult) -> Any:
    """What is counted, as a table for rich."""
    head = ("model", "params M", "GMACs", "GFLOPs", "MACs ratio", "peak MiB", "train MiB")
    table = _table(head)
    for row in found.rows:
        training = row.training_peak_memory_mib
        table.add_row(
            _plain(row.name.replace("+", "\n+")),
            f"{row.parameters / 1e6:.2f}",
            f"{row.gmacs:.3f}",
            f"{row.gflops:.3f}",
            f"{row.macs_ratio:.2f}",
            f"{row.peak_memory_mib:.1f}",
            "–" if training is None else f"{training:.1f}",
        )
    return table


def speed_table(found: BenchResult) -> Any:
    """What is timed, as a table for rich with a part for each measurement."""
    table = _table(("", "median (quartiles)", "speed-up", "of MACs"))
    for one in found.measurements:
        table.add_row(f"[bold]{one.label}[/]")
        for row in found.rows:
            speed = row.speeds[one.name]
            cells = (
                f"{speed.value:.{1 if speed.value.median < 100 else 0}f}",
                f"{speed.speedup:.2f}",
            )
            table.add_row(_plain(row.name), *cells, f"{speed.of_macs_ratio:.2f}")
        table.add_section()
    return table


def bench_notes(found: BenchResult) -> list[str]:
    """Says in a line for each model where fewer multiply-adds do not pay, and what is known why."""
    return [note for row in found.rows[1:] if (note := _note(found, row))]


def bench_json(found: BenchResult) -> dict[str, Any]:
    """All of it as plain values, with the command and the machine."""
    named = {c.text: {"base": c.base, "insert": dict(c.tokens)} for c in found.config.candidates}
    speeds = [asdict(one) for one in found.measurements]
    return {
        "command": found.config.command,
        "machine": found.machine,
        "read_gigabytes_per_second": found.read_gigabytes_per_second,
        "config": asdict(found.config),
        "input_axes": found.input_axes,
        "measurements": speeds,
        "models": [named[row.name] | asdict(row) for row in found.rows],
        "notes": bench_notes(found),
    }


def plot_bench(path: str | Path, found: BenchResult) -> Path:
    """Draws how many times as fast each model is, beside what its multiply-adds promise.

    Args:
        path: The PNG to write.
        found: What was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.9 * len(found.rows)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(found.measurements)
    for i, one in enumerate(found.measurements):
        _bars(axis, found, one, (i + 0.5) * height - 0.4, height)
    for i, row in enumerate(found.rows):
        promised = "promised by multiply-adds" if i == 0 else ""
        axis.vlines(row.macs_ratio, i - 0.45, i + 0.45, color="black", lw=2, label=promised)
    axis.set_yticks(range(len(found.rows)), [row.name for row in found.rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"times as fast as {found.rows[0].name} (median, quartiles)")
    axis.set_title(_where(found), fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return Path(path)


def _bars(axis: Any, found: BenchResult, one: Measurement, offset: float, height: float) -> None:
    """The bars of one measurement, with quartiles and numbers."""
    speedups = [row.speeds[one.name].speedup for row in found.rows]
    medians = [spread.median for spread in speedups]
    errors = [[s.median - s.low for s in speedups], [s.high - s.median for s in speedups]]
    bars = axis.barh(
        [i + offset for i in range(len(found.rows))],
        medians,
        height,
        xerr=errors,
        color=_COLORS[one.name],
        label=f"{one.name} at batch {one.batch_size}",
        error_kw={"lw": 1, "capsize": 2},
    )
    axis.bar_label(bars, fmt=" %.2f", fontsize=7, padding=3)


def _note(found: BenchResult, row: BenchRow) -> str | None:
    first = found.rows[0]
    if row.macs_ratio == 1 and all(s.speedup.median >= 1 for s in row.speeds.values()):
        return None  # another form of the same model, and a faster one
    if row.macs_ratio <= 1:
        return (
            f"{row.name} has {1 / row.macs_ratio:.2f} times the multiply-adds of {first.name}: "
            "there is no reduction that could pay."
        )
    poor = [
        one
        for one in found.measurements
        if row.speeds[one.name].speedup.median < max(1, PAYS * row.macs_ratio)
    ]
    if not poor:
        return None
    verdicts = "; ".join(_verdict(row, one) for one in poor)
    return " ".join(
        (
            f"{row.name} has {row.macs_ratio:.2f} times fewer multiply-adds than {first.name}, "
            f"but {verdicts}.",
            *_reasons(found, row, {one.name for one in poor}),
        )
    )


def _verdict(row: BenchRow, one: Measurement) -> str:
    """How much of what is promised a measurement gains."""
    speed = row.speeds[one.name]
    verb = "does not pay in" if speed.speedup.median < 1 else "gains less in"
    noise = ", within the noise" if speed.speedup.high >= row.macs_ratio else ""
    return (
        f"{verb} {one.name} at batch {one.batch_size}: {speed.speedup:.2f} times as "
        f"fast, {speed.of_macs_ratio:.2f} of that{noise}"
    )


def _reasons(found: BenchResult, row: BenchRow, poor: set[str]) -> Iterator[str]:
    """What the time goes into besides multiply-adds, as far as the numbers tell."""
    own, first = (r.speeds["latency"].value.median for r in (row, found.rows[0]))
    reading = row.weights_mib * 2**20 / 1e6 / found.read_gigabytes_per_second
    missing = own - first / row.macs_ratio
    if "latency" in poor and reading >= missing / 4:
        yield (
            f"At batch 1 reading {row.weights_mib:.0f} MiB of weights takes about {reading:.1f} of "
            f"{own:.1f} ms, whatever the tokens."
        )
    faster = row.speeds["throughput"].value.median * own / 1000
    if faster >= 1.1 and poor & {"latency", "throughput"}:
        yield (
            f"At batch {found.config.batch_size} it does {faster:.1f} times as many multiply-adds "
            "a second as at batch 1, where starting operations takes time too: larger batches may "
            "gain more."
        )


def _how(found: BenchResult) -> str:
    return (
        f"{_where(found)}; medians (quartiles) of {found.config.rounds} rounds in turn. GMACs are "
        f"of one input, MiB of tensors alive at once at batch {found.config.batch_size}, beyond "
        f"weights and input. Ratios are to {found.rows[0].name}; of MACs: the speed-up as a share "
        "of the MACs ratio."
    )


def _where(found: BenchResult) -> str:
    """The input, the machine and the form of the models."""
    machine, config = found.machine, found.config
    chip = machine["accelerator"] or f"{machine['cpu']}, threads: {machine['threads']}"
    compiled = ", compiled" if config.compile else ""
    axes = " x ".join(map(str, found.input_axes))
    form = f"torch {machine['torch']}, {config.dtype}{compiled}"
    return f"{axes} on {machine['device']} ({chip}), {form}"


def _table(names: tuple[str, ...]) -> Any:
    """A table whose first column has names, which may be long."""
    table = plain_table(names)
    table.columns[0].justify, table.columns[0].overflow = "left", "fold"
    return table


def _plain(name: str) -> Any:
    """A name that is not read as rich's markup."""
    from rich.text import Text

    return Text(name)


def _check_packages(plot: bool) -> None:
    """Refuses to measure what could not be shown."""
    for name in ("rich", *(["matplotlib"] if plot else [])):
        if find_spec(name) is None:
            raise ValueError(f"bench needs {name}; run pip install 'tokenlearner[train]'")
