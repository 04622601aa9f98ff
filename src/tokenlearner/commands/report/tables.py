"""The tables and charts of a report, one function for each kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from .parts import Chart, ChartLine, Mark, ReportTable, finite, get_nested, number_text, spread_text
from .reader import FoundFile, FoundRun

Row = Mapping[str, Any]

_COSTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("top-1 on held-out images, %", ("top1_percent",)),
    ("GMACs an image", ("cost", "gmacs")),
    ("images/s, inference", ("cost", "images_per_second")),
    ("images/s, forward and backward", ("cost", "training_images_per_second")),
    ("peak memory, inference, MiB", ("cost", "peak_memory_mib")),
    ("peak memory, training, MiB", ("cost", "training_peak_memory_mib")),
    ("parameters", ("cost", "parameters")),
)
_CURVES = (  # a metric, what its axis says, and what it is called
    ("train_loss", "training loss", "Training loss"),
    ("test_loss", "held-out loss, nats", "Held-out loss"),
    ("test_top1_percent", "held-out top-1, %", "Held-out top-1"),
)


def comparison_table(contest: FoundFile) -> ReportTable:
    """Two models side by side, as the commands print them, with their ratio."""
    models = contest.models
    pair = len(models) == 2
    rows = []
    for label, keys in (*_COSTS, ("seconds of training", ("train_seconds",))):
        values = [_seconds(m.get("epochs")) if keys[0] == "train_seconds" else get_nested(m, *keys)
                  for m in models]  # fmt: skip
        if all(value is None for value in values):
            continue
        cells = [spread_text(v) if isinstance(v, Mapping) else number_text(v) for v in values]
        rows.append([label, *cells, *([_ratio(label, values)] if pair else [])])
    head = ("", *(m["name"] for m in models), *(["ratio"] if pair else []))
    return ReportTable(head, rows)


def runs_table(runs: Sequence[FoundRun]) -> ReportTable:
    """What came of trainings, a column for each; of many a row for each."""
    columns = {run.name: _summary(run.history) for run in runs if run.history}
    labels = [*dict.fromkeys(label for column in columns.values() for label in column)]
    if len(columns) > 3:
        rows = [[n, *(number_text(c.get(one)) for one in labels)] for n, c in columns.items()]
        return ReportTable(("", *labels), rows)
    pair = len(columns) == 2
    rows = []
    for label in labels:
        values = [column.get(label) for column in columns.values()]
        ratio = [_ratio(label, values)] if pair else []
        rows.append([label, *map(number_text, values), *ratio])
    return ReportTable(("", *columns, *(["ratio"] if pair else [])), rows)


def _summary(history: Sequence[Row]) -> dict[str, float | None]:
    """A training in a few numbers; None what its rows do not have."""
    last = history[-1]
    top1s = _numbers(history, "test_top1_percent")
    rates = _numbers(history, "images_per_second")
    found = {
        "epochs": finite(last.get("epoch")),
        "held-out top-1, last epoch, %": finite(last.get("test_top1_percent")),
        "held-out top-1, best epoch, %": max(top1s) if top1s else None,
        "held-out top-5, last epoch, %": finite(last.get("test_top5_percent")),
        "held-out loss, last epoch, nats": finite(last.get("test_loss")),
        "training images/s, median": median(rates) if rates else None,
        "seconds of training": _seconds(history),
        "steps left out": finite(last.get("skipped_steps")),
        "files that cannot be read": finite(last.get("broken")),
    }
    rare = ("steps left out", "files that cannot be read")
    return {k: value for k, value in found.items() if value is not None or k not in rare}


def _ratio(label: str, values: Sequence[Any]) -> str:
    """The second against the first; of shares in percent the difference."""
    numbers = [finite(get_nested(v, "median") if isinstance(v, Mapping) else v) for v in values]
    first, second = numbers
    if first is None or second is None or label == "epochs":
        return ""
    if "top-" in label:
        return f"{second - first:+.1f} points"
    return f"{second / first:.2f}" if first else ""


def curve_charts(histories: Mapping[str, tuple[int, Sequence[Row]]]) -> list[Chart]:
    """Loss and top-1 against epochs, then against seconds of training.

    Args:
        histories: For each name the number of its style, and its rows.
    """
    charts = []
    for key, label, title in _CURVES:
        lines = [_line(name, one, _by_epoch(rows, key)) for name, (one, rows) in histories.items()]
        charts.append(Chart(f"{title}, by epochs", "epoch", label, lines, whole=True))
    for key, label, title in _CURVES:
        lines = [_line(name, one, _by_time(rows, key)) for name, (one, rows) in histories.items()]
        charts.append(Chart(f"{title}, by time", "seconds of training", label, lines))
    return [chart for chart in charts if any(line.marks for line in chart.lines)]


def _line(name: str, style: int, marks: Sequence[Mark]) -> ChartLine:
    return ChartLine(name, style, marks)


def _by_epoch(rows: Sequence[Row], key: str) -> list[Mark]:
    pairs = ((finite(row.get("epoch")), finite(row.get(key))) for row in rows)
    return [Mark(x, y) for x, y in pairs if x is not None and y is not None]


def _by_time(rows: Sequence[Row], key: str) -> list[Mark]:
    """Nothing where a row does not tell its seconds, or came out of order."""
    seconds = _numbers(rows, "train_seconds")
    if len(seconds) != len(rows):
        return []
    pairs = zip(accumulate(seconds), (finite(row.get(key)) for row in rows), strict=True)
    return [Mark(x, y) for x, y in pairs if y is not None]


def comparison_charts(contest: FoundFile) -> list[Chart]:
    """Top-1 against images a second, at inference and in training."""
    charts = []
    for key, label, what in (
        ("images_per_second", "images/s, inference", "inference speed"),
        ("training_images_per_second", "images/s, forward and backward", "training speed"),
    ):
        lines = [
            ChartLine(model["name"], number, [mark], joined=False)
            for number, model in enumerate(contest.models)
            if (mark := _mark(get_nested(model, "cost", key), model.get("top1_percent")))
        ]
        charts.append(Chart(f"Top-1 against {what}", label, "held-out top-1, %", lines))
    return [chart for chart in charts if len(chart.lines) > 1]


def runs_charts(runs: Sequence[FoundRun]) -> list[Chart]:
    """Top-1 against the speed of training, of runs side by side."""
    lines = []
    for number, run in enumerate(runs):
        rates, tops = (_numbers(run.history, key) for key in
                       ("images_per_second", "test_top1_percent"))  # fmt: skip
        if rates and tops:
            lines.append(ChartLine(run.name, number, [Mark(median(rates), tops[-1])], False))
    title, speed = "Top-1 against training speed", "training images/s, median of epochs"
    return [Chart(title, speed, "held-out top-1, %", lines)] if len(lines) > 1 else []


def bench_tables(bench: FoundFile) -> list[ReportTable]:
    """What is counted, then what is timed."""
    columns: dict[str, Callable[[Row], str]] = {
        "parameters, M": lambda row: _scaled(row.get("parameters"), 1e-6),
        "GMACs": lambda row: number_text(row.get("gmacs")),
        "MACs ratio": lambda row: _scaled(row.get("macs_ratio")),
        "peak MiB": lambda row: number_text(row.get("peak_memory_mib")),
        "peak MiB, training": lambda row: number_text(row.get("training_peak_memory_mib")),
    }
    rows = [[row["name"], *(cell(row) for cell in columns.values())] for row in bench.models]
    tables = [ReportTable(("model", *columns), rows, "Counted")]
    for name, label in _measurements(bench):
        rows = []
        for row in bench.models:
            one = get_nested(row, "speeds", name)
            spreads = (
                spread_text(get_nested(one, "value")),
                spread_text(get_nested(one, "speedup"), 2),
            )
            rows.append([row["name"], *spreads, _scaled(get_nested(one, "of_macs_ratio"))])
        head = ("model", "median (quartiles)", "speed-up", "of the MACs ratio")
        tables.append(ReportTable(head, rows, label[:1].upper() + label[1:]))
    return tables


def bench_charts(bench: FoundFile) -> list[Chart]:
    """The speed-up against what fewer multiply-adds promise, for each measurement."""
    charts = []
    for name, label in _measurements(bench):
        lines = []
        for number, row in enumerate(bench.models):
            ratio, speedup = (
                finite(row.get("macs_ratio")),
                get_nested(row, "speeds", name, "speedup"),
            )
            mark = None if ratio is None else _mark(ratio, speedup)
            lines += [ChartLine(row["name"], number, [mark], False)] if mark else []
        across = "times fewer multiply-adds"
        title = f"Speed-up in {label.rpartition(',')[0]}"
        charts.append(Chart(title, across, "times as fast", lines, diagonal=True))
    return [chart for chart in charts if chart.lines]


def _measurements(bench: FoundFile) -> Iterator[tuple[str, str]]:
    """The name of each measurement, and what it is in words, with the unit."""
    for one in bench.content["measurements"]:
        name, batch, unit = (get_nested(one, key) for key in ("name", "batch_size", "unit"))
        if isinstance(name, str):
            yield name, f"{name} at batch {batch}, {unit}"


def rows_table(file: FoundFile) -> ReportTable:
    """Rows of any benchmark as they are: of lists the median and the range."""
    rows = [row for row in file.content["rows"] if isinstance(row, Mapping)]
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    heads = [key.replace("_", " ").replace(" percent", ", %") for key in keys]
    return ReportTable(heads, [[_any_text(row.get(key)) for key in keys] for row in rows])


def _any_text(value: Any) -> str:
    if isinstance(value, list):
        numbers = [number for one in value if (number := finite(one)) is not None]
        if numbers and len(numbers) == len(value):
            return range_text(numbers)
    if isinstance(value, Mapping) and "median" in value:
        return spread_text(value)
    return number_text(value)


def range_text(numbers: Sequence[float]) -> str:
    """The median, and the range in brackets if there are several."""
    if len(numbers) == 1:
        return number_text(numbers[0])
    low, high = number_text(min(numbers)), number_text(max(numbers))
    return f"{number_text(median(numbers))} ({low}–{high})"


def _mark(x: Any, y: Any) -> Mark | None:
    """A point of two numbers, either of which may be a median with quartiles."""
    (across, x_span), (up, y_span) = map(_with_span, (x, y))
    return None if across is None or up is None else Mark(across, up, x_span, y_span)


def _with_span(value: Any) -> tuple[float | None, tuple[float, float] | None]:
    if not isinstance(value, Mapping):
        return finite(value), None
    middle, low, high = (finite(value.get(key)) for key in ("median", "low", "high"))
    return middle, None if low is None or high is None else (low, high)


def _scaled(value: Any, factor: float = 1.0) -> str:
    number = finite(value)
    return "–" if number is None else f"{number * factor:.2f}"


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    found = (finite(row.get(key)) for row in rows)
    return [number for number in found if number is not None]


def _seconds(rows: Any) -> float | None:
    """Seconds of training of all epochs, if they tell."""
    told = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    seconds = _numbers(told, "train_seconds")
    return sum(seconds) if seconds and len(seconds) == len(told) else None
