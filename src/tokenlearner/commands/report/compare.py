"""A comparison of many models at several budgets, from the results of benchmarks/compare.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from .parts import Chart, ChartLine, Mark, ReportTable, finite, get_nested, number_text
from .reader import FoundFile
from .tables import range_text

_HOST = "host"


def compare_tables(file: FoundFile) -> list[ReportTable]:
    """A table for each budget: accuracy, and what it costs at each batch size."""
    tables = []
    for budget, costs in _budgets(file):
        batches = [*_batches(costs)]
        rows = [_row(file, budget, name, costs, batches) for name in costs]
        head = (
            "model",
            "top-1, %",
            "against host, points",
            "GMACs",
            *(f"images/s, batch {batch}" for batch in batches),
            *(f"speed-up, batch {batch}" for batch in batches),
            "training images",
        )
        host = frozenset(i for i, name in enumerate(costs) if name == _HOST)
        caption = f"Budget {budget}: median (range) over seeds"
        tables.append(ReportTable(head, rows, caption, host))
    return tables


def compare_charts(file: FoundFile) -> list[Chart]:
    """Top-1 against the time of an image, a chart for each batch size."""
    batches = dict.fromkeys(batch for _, costs in _budgets(file) for batch in _batches(costs))
    names = [*dict.fromkeys(name for _, costs in _budgets(file) for name in costs)]
    charts = []
    for batch in batches:
        lines = []
        for number, name in enumerate(names):
            marks = sorted(_marks(file, name, batch), key=lambda mark: mark.x)
            lines += [ChartLine(name, number, marks)] if marks else []
        title, across = f"Top-1 against latency, batch {batch}", f"ms an image, batch {batch}"
        charts.append(Chart(title, across, "held-out top-1, %", lines))
    return [chart for chart in charts if chart.lines]


def _budgets(file: FoundFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for budget, costs in file.content["costs"].items():
        if isinstance(costs, Mapping):
            yield budget, costs


def _batches(costs: Mapping[str, Any]) -> dict[str, None]:
    return dict.fromkeys(
        batch for one in costs.values() if isinstance(one, Mapping) for batch in one
    )


def _top1s(file: FoundFile, name: str, budget: str) -> list[float]:
    """Over the seeds; of the host there is one number for all budgets."""
    if name == _HOST:
        found = [finite(get_nested(file.content, "host", "test_top1_percent"))]
    else:
        found = [finite(run.get("top1_percent")) for run in _runs(file, name, budget)]
    return [number for number in found if number is not None]


def _runs(file: FoundFile, name: str, budget: str) -> list[Mapping[str, Any]]:
    runs = (run for run in file.content["runs"] if isinstance(run, Mapping))
    return [run for run in runs if (run.get("contender"), run.get("budget")) == (name, budget)]


def _row(
    file: FoundFile, budget: str, name: str, costs: Mapping[str, Any], batches: list[str]
) -> list[str]:
    found, host = _top1s(file, name, budget), _top1s(file, _HOST, budget)
    gap = f"{median(found) - host[0]:+.2f}" if found and host and name != _HOST else ""
    runs = _runs(file, name, budget)
    return [
        name,
        range_text(found) if found else "–",
        gap,
        number_text(get_nested(costs, name, *batches[:1], "gmacs")),
        *(number_text(get_nested(costs, name, b, "images_per_second", "median")) for b in batches),
        *(_digits(get_nested(costs, name, batch, "speedup", "median")) for batch in batches),
        number_text(runs[0].get("images")) if runs else "",
    ]


def _marks(file: FoundFile, name: str, batch: str) -> Iterator[Mark]:
    """A point for each budget at which a model was trained and timed; one of the host."""
    for budget, costs in _budgets(file):
        found = _top1s(file, name, budget)
        speed = finite(get_nested(costs, name, batch, "images_per_second", "median"))
        if found and speed:
            span = (min(found), max(found)) if len(found) > 1 else None
            yield Mark(1000 / speed, median(found), y_span=span)
        if name == _HOST and found and speed:
            return


def _digits(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.2f}"
