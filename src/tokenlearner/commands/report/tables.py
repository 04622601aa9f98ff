"""The tables of a report, a function for each kind of file, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .._tables import in_unit
from .reader import ResultFile, Run, common_unit

Row = Mapping[str, Any]

DASH = "–"
_MANY = 4  # columns; with more names each is a row
_LARGEST = 1e100  # numbers beyond are damage, and overflow where they are drawn
_COSTS: dict[str, tuple[str, ...]] = {
    "top-1 on held-out images, %": ("top1_percent",),
    "GMACs an image": ("cost", "gmacs"),
    "images/s, inference": ("cost", "images_per_second"),
    "images/s, forward and backward": ("cost", "training_images_per_second"),
    "peak memory, inference, MiB": ("cost", "peak_memory_mib"),
    "peak memory, training, MiB": ("cost", "training_peak_memory_mib"),
    "parameters": ("cost", "parameters"),
}
_SPEEDUPS = {  # over the first model, by the label of the speed
    "images/s, inference": "speedup",
    "images/s, forward and backward": "training_speedup",
}
_OPTIONAL = (  # values that most runs do not have
    *("steps left out", "files that cannot be read"),
    *("held-out loss against the teacher, last epoch", "held-out loss against the teacher, lowest"),
)
_SPEEDS = {"value": None, "speedup": 2, "of_macs_ratio": 2}  # of a bench, and their digits


@dataclass(frozen=True)
class ReportTable:
    """A table whose first column names the rows.

    Args:
        head: Names of the columns, the first of which may be empty; none for pairs of words.
        rows: Texts, as many as columns.
        caption: The title above it.
        marked: Rows, counted from 0, that stand out.
        words: The cells are words and not numbers, which are aligned to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: frozenset[int] = frozenset()
    words: bool = False

    @classmethod
    def of_columns(
        cls,
        names: Sequence[str],
        columns: Sequence[Mapping[str, str]],
        caption: str = "",
        words: bool = False,
    ) -> ReportTable:
        """Makes a table with a column for each name, or a row if there are many.

        Args:
            names: Of the columns.
            columns: Texts by their labels, which are the same in all.
            caption: As in the class.
            words: As in the class.
        """
        labels = [*columns[0]] if columns else []
        if len(columns) > _MANY:
            rows = [[name, *texts.values()] for name, texts in zip(names, columns, strict=True)]
            return cls(("", *labels), rows, caption, words=words)
        rows = [[label, *(texts[label] for texts in columns)] for label in labels]
        return cls(("", *names), rows, caption, words=words)


def finite(value: object) -> float | None:
    """Returns the value if it is a finite number, otherwise None: files may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _LARGEST else None  # NaN is not


def get_nested(content: object, *keys: str) -> Any:
    """Returns the value below a path of keys, or None where the path ends early."""
    for key in keys:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def numbers(rows: Sequence[Row], key: str) -> list[float]:
    """Returns the finite values of a key."""
    values = (finite(row.get(key)) for row in rows)
    return [value for value in values if value is not None]


def number_text(value: object, digits: int | None = None) -> str:
    """Writes a number with the digits that matter, anything else as it is, None as a dash."""
    number = finite(value)
    if number is None:
        return DASH if value is None else str(value)
    if digits is not None:
        return f"{number:.{digits}f}"
    if isinstance(number, int) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:#.4g}"


def value_text(value: object, digits: int | None = None) -> str:
    """Writes any value; a median with its quartiles, a list of numbers as median and range."""
    if isinstance(value, list) and value and all(finite(item) is not None for item in value):
        value = {"median": median(value), "low": min(value), "high": max(value)}
        value = value if value["low"] < value["high"] else value["median"]
    if not isinstance(value, Mapping) or "median" not in value:
        return number_text(value, digits)
    middle, low, high = (number_text(value.get(key), digits) for key in ("median", "low", "high"))
    has_range = all(finite(value.get(key)) is not None for key in ("low", "high"))
    return f"{middle} ({low}–{high})" if has_range else middle


def comparison_table(file: ResultFile) -> ReportTable:
    """Makes the table of two models side by side, as the commands print it, with their ratio."""
    columns = [
        {label: get_nested(model, *keys) for label, keys in _COSTS.items()}
        | {"seconds of training": _seconds(model.get("epochs"))}
        for model in file.models
    ]
    names, optional = [model["name"] for model in file.models], (*_COSTS, "seconds of training")
    measured = {label: get_nested(file.models[-1], "cost", key) for label, key in _SPEEDUPS.items()}
    return _value_table(names, columns, file.unit, optional, measured)


def runs_table(runs: Sequence[Run]) -> ReportTable:
    """Makes the table of trainings; of two with their ratio."""
    names, columns = [run.name for run in runs], [_summary(run.history) for run in runs]
    return _value_table(names, columns, common_unit(runs))


def _value_table(
    names: Sequence[str],
    columns: Sequence[Row],
    unit: str,
    optional: Sequence[str] = _OPTIONAL,
    measured: Mapping[str, Any] | None = None,
) -> ReportTable:
    """Makes a table of values; one of `optional` that nobody has is left out.

    Ratios that were measured round by round stand in place of those of the values.
    """
    rows = {label: [column[label] for column in columns] for label in (columns or [{}])[0]}
    left_out = {k for k in rows if k in optional and all(value is None for value in rows[k])}
    texts = [
        {
            in_unit(label, unit): value_text(value)
            for label, value in column.items()
            if label not in left_out
        }
        for column in columns
    ]
    if len(columns) != 2:
        return ReportTable.of_columns(names, texts)
    kept = [label for label in rows if label not in left_out]
    known = {k: value_text(v, 2) for k, v in (measured or {}).items() if isinstance(v, Mapping)}
    ratios = {
        in_unit(label, unit): known.get(label) or _ratio(label, rows[label]) for label in kept
    }
    return ReportTable.of_columns([*names, "ratio"], [*texts, ratios])


def _ratio(label: str, values: Sequence[Any]) -> str:
    """Writes the second against the first; of shares in percent the difference."""
    first, second = (finite(v.get("median") if isinstance(v, Mapping) else v) for v in values)
    if first is None or second is None or label == "epochs":
        return ""
    if "top-" in label:
        return f"{second - first:+.1f} points"
    return f"{second / first:.2f}" if first else ""


def _summary(history: Sequence[Row]) -> dict[str, float | None]:
    """Sums a training up in a few numbers; None where its rows do not have them."""
    last = history[-1]
    top1s, speeds = (numbers(history, key) for key in ("test_top1_percent", "images_per_second"))
    broken = [finite(last.get(key)) or 0 for key in ("broken", "test_broken")]
    return {
        "epochs": finite(last.get("epoch")),
        "held-out top-1, last epoch, %": finite(last.get("test_top1_percent")),
        "held-out top-1, best epoch, %": max(top1s, default=None),
        "held-out top-5, last epoch, %": finite(last.get("test_top5_percent")),
        "held-out loss, last epoch, nats": finite(last.get("test_loss")),
        "held-out loss against the teacher, last epoch": finite(last.get("test_distill_loss")),
        "held-out loss against the teacher, lowest": min(
            numbers(history, "test_distill_loss"), default=None
        ),
        "training images/s, median": median(speeds) if speeds else None,
        "seconds of training": _seconds(history),
        "steps left out": finite(last.get("skipped_steps")),
        "files that cannot be read": sum(broken) if any(broken) else None,
    }


def _seconds(history: Any) -> float | None:
    """Sums the seconds of all epochs, if each has some."""
    rows = [row for row in history if isinstance(row, Mapping)] if isinstance(history, list) else []
    seconds = numbers(rows, "train_seconds")
    return sum(seconds) if seconds and len(seconds) == len(rows) else None


def bench_tables(bench: ResultFile) -> list[ReportTable]:
    """Makes a table of what is counted, then one for each measurement."""
    columns: dict[str, Callable[[Row], str]] = {
        "parameters, M": lambda row: _millions(row.get("parameters")),
        "GMACs": lambda row: number_text(row.get("gmacs")),
        "MACs ratio": lambda row: number_text(row.get("macs_ratio"), 2),
        "peak MiB": lambda row: number_text(row.get("peak_memory_mib")),
        "peak MiB, training": lambda row: number_text(row.get("training_peak_memory_mib")),
    }
    rows = [[row["name"], *(text(row) for text in columns.values())] for row in bench.models]
    tables = [ReportTable(("model", *columns), rows, "Counted")]
    head = ("model", "median (quartiles)", "speed-up", "of the MACs ratio")
    for name, label, unit in measurements(bench):
        rows = []
        for row in bench.models:
            speeds = [get_nested(row, "speeds", name, key) for key in _SPEEDS]
            texts = map(value_text, speeds, _SPEEDS.values())
            rows.append([row["name"], *texts])
        tables.append(ReportTable(head, rows, f"{label[:1].upper()}{label[1:]}, {unit}"))
    return tables


def _millions(value: object) -> str:
    number = finite(value)
    return DASH if number is None else f"{number / 1e6:.2f}"


def measurements(bench: ResultFile) -> Iterator[tuple[str, str, str]]:
    """Yields the name of each measurement, what it is in words, and its unit."""
    for entry in bench.content["measurements"]:
        name, batch, unit = (get_nested(entry, key) for key in ("name", "batch_size", "unit"))
        if isinstance(name, str):
            yield name, f"{name} at batch {batch}", str(unit)


def reduction_table(file: ResultFile) -> ReportTable:
    """Makes the table of a host and the ways to make it cheaper, the best first."""
    rows = []
    for model in file.models:
        errors = model.get("errors")
        history = [finite(error) for error in errors] if isinstance(errors, list) else []
        speedups = model.get("speedup")
        speeds = speedups if isinstance(speedups, Mapping) else {}
        rows.append(
            {
                "GMACs": value_text(model.get("gmacs"), 3),
                "share": value_text(model.get("macs_share"), 2),
                "left open": " → ".join(number_text(e, 3) for e in history) or "0",
                "in the host's class": value_text(model.get("agreement"), 2),
                "steps": value_text(model.get("steps")),
                **{f"times as fast at {batch}": value_text(v, 2) for batch, v in speeds.items()},
            }
        )
    known = [label for row in rows for label, cell in row.items() if cell != DASH]
    labels = [*dict.fromkeys(known)]
    cells = [
        [model["name"], *(row.get(label, DASH) for label in labels)]
        for model, row in zip(file.models, rows, strict=True)
    ]
    return ReportTable(
        ("", *labels), cells, marked=frozenset({1}) if len(rows) > 1 else frozenset()
    )


def rows_table(file: ResultFile) -> ReportTable:
    """Makes a table of the rows of any benchmark as they are."""
    rows = [row for row in file.content["rows"] if isinstance(row, Mapping)]
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    head = [key.replace("_", " ").replace(" percent", ", %") for key in keys]
    return ReportTable(head, [[value_text(row.get(key)) for key in keys] for row in rows])
