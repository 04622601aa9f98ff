"""The figures of a report: matplotlib draws them as SVG, in colors that the page's theme replaces.

What is drawn in a color of `COLORS` or `THEME` refers to the variable of that name in `report.css`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .._tables import in_unit
from .reader import ResultFile, Run, common_unit
from .tables import Row, finite, get_nested, measurements, number_text, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THEME = {"ink": "#1c2026", "quiet": "#59616d", "rule": "#d5d9df", "ground": "#fefefe"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b98600", "#3b9dd6", "#5b6470")
_MARKERS, _DASHES = "os^Dv", ("-", (0, (5, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))
_VARIABLES = {color: f"var(--{name})" for name, color in THEME.items()} | {
    color: f"var(--c{number})" for number, color in enumerate(COLORS)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": THEME["ink"],
    "text.parse_math": False,
    "axes.labelcolor": THEME["ink"],
    "axes.edgecolor": THEME["quiet"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": THEME["rule"],
    "xtick.color": THEME["quiet"],
    "ytick.color": THEME["quiet"],
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_BLACK_FROM = 0.47  # share from which black is read best on cividis, below it white
_CURVES = (  # a metric, the label of its axis, and its title
    ("train_loss", "training loss", "Training loss"),
    ("test_loss", "held-out loss, nats", "Held-out loss"),
    ("test_distill_loss", "held-out loss against the teacher", "Held-out loss against the teacher"),
    ("test_top1_percent", "held-out top-1, %", "Held-out top-1"),
)


@dataclass(frozen=True)
class Point:
    """A point of a chart, and the range of each of its numbers."""

    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"({number_text(self.x)}, {number_text(self.y)})"


@dataclass(frozen=True)
class Line:
    """Points under one name.

    Args:
        name: What the legend calls them.
        points: From left to right.
        joined: Whether a line goes through them.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True

    def __str__(self) -> str:
        first, last = self.points[0], self.points[-1]
        return f"{self.name} {first}" if first is last else f"{self.name} from {first} to {last}"


@dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Args:
        title: What it shows, in a few words.
        x_label: With its unit.
        y_label: With its unit.
        lines: Each has a point.
        diagonal: Whether to draw where y equals x.
        whole: Whether x has whole numbers only.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    diagonal: bool = False
    whole: bool = False

    @property
    def description(self) -> str:
        """The chart in words, for those who cannot see it."""
        lines = "; ".join(map(str, self.lines))
        return f"{self.title}: {self.y_label} against {self.x_label}: {lines}."

    def svg(self, styles: Mapping[str, int], salt: str) -> str:
        """Draws the chart.

        Args:
            styles: For each line's name the number of its color, dashes and marker.
            salt: Keeps ids apart from those of other figures.
        """
        return _svg(partial(self._draw, styles), (3.0, 2.1), salt)

    def _draw(self, styles: Mapping[str, int], axes: Axes) -> None:
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.margins(0.06)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.10g}")
        axes.locator_params("y", nbins=6)
        axes.locator_params("x", nbins=6, integer=self.whole)
        for line in self.lines:
            _draw_line(axes, line, line_style(styles[line.name]))
        if self.diagonal:
            axes.axline((1, 1), slope=1, color=THEME["quiet"], linewidth=1, linestyle="--")


def line_style(number: int) -> dict[str, Any]:
    """Returns the look that goes with a number; neighbors differ in color, marker and dashes."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markeredgecolor": THEME["ground"],
        "markersize": 6,
    }


def legend_svg(number: int, salt: str) -> str:
    """Draws a sample of the style that goes with a number."""

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        axes.plot([0, 1, 2], [0, 0, 0], **line_style(number), markevery=[1])

    return _svg(draw, (0.42, 0.12), salt)


def percent(share: float) -> str:
    """Writes a share in whole percent, halves up, as a table beside a matrix has to too."""
    return f"{math.floor(100 * share + 0.5 + 1e-9)}"


def matrix_svg(names: Sequence[str], shares: np.ndarray, salt: str) -> str:
    """Draws a confusion matrix, in percent of each row.

    Args:
        names: Of the classes.
        shares: From 0 to 1, `[true, predicted]`.
        salt: Keeps ids apart from those of other figures.
    """

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="none")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=THEME["ink"], labeltop=True, labelbottom=False)
        labels = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90)
        axes.set_yticks(range(len(names)), labels)
        for row, column in zip(*shares.nonzero(), strict=True):
            share = float(shares[row, column])
            text = percent(share)
            axes.text(column, row, text, color=cell_ink(share), ha="center", va="center_baseline")

    side = 0.34 * len(names)
    return _svg(draw, (side, side), salt)


def cell_ink(share: float) -> str:
    """Returns black or white, whichever can be read on the color of a share."""
    return "black" if share >= _BLACK_FROM else "white"


def curve_charts(histories: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """Makes charts of loss and top-1 against epochs, then against seconds, of each name's rows."""
    charts = []
    for axis, x_label, get_x in (
        ("epochs", "epoch", _epochs),
        ("time", "seconds of training", _elapsed_seconds),
    ):
        for key, y_label, title in _CURVES:
            lines = [
                Line(name, points)
                for name, rows in histories.items()
                if (points := _points(get_x(rows), [row.get(key) for row in rows]))
            ]
            title = f"{title}, by {axis}"
            xs = [point.x for line in lines for point in line.points]
            whole = axis == "epochs" and all(float(x).is_integer() for x in xs)
            charts.append(Chart(title, x_label, y_label, lines, whole=whole))
    return [chart for chart in charts if chart.lines]


def comparison_charts(file: ResultFile) -> list[Chart]:
    """Makes charts of top-1 against images a second, at inference and in training."""
    charts = []
    for key, x_label, title in (
        ("images_per_second", "images/s, inference", "inference speed"),
        ("training_images_per_second", "images/s, forward and backward", "training speed"),
    ):
        models = [
            (model["name"], get_nested(model, "cost", key), model.get("top1_percent"))
            for model in file.models
        ]
        labels = (f"Top-1 against {title}", in_unit(x_label, file.unit), "held-out top-1, %")
        charts.append(Chart(*labels, _single_points(models)))
    return [chart for chart in charts if len(chart.lines) > 1]


def runs_charts(runs: Sequence[Run]) -> list[Chart]:
    """Makes a chart of top-1 against the speed of training, of runs side by side."""
    trained = []
    for run in runs:
        speeds, top1s = (
            numbers(run.history, key) for key in ("images_per_second", "test_top1_percent")
        )
        if speeds and top1s:
            trained.append((run.name, median(speeds), top1s[-1]))
    x_label = in_unit("training images/s, median of epochs", common_unit(runs))
    labels = ("Top-1 against training speed", x_label)
    chart = Chart(*labels, "held-out top-1, %", _single_points(trained))
    return [chart] if len(chart.lines) > 1 else []


def reduction_charts(file: ResultFile) -> list[Chart]:
    """Makes charts of what candidates leave open of the host's output, against their cost."""
    charts, rows = [], file.models
    batches = get_nested(rows[0], "latency_ms") if rows else None
    costs: dict[str, tuple[str, tuple[str, ...]]] = {
        "multiply-adds": ("GMACs an image", ("gmacs",))
    }
    for batch in batches if isinstance(batches, Mapping) else ():
        costs[f"time at batch {batch}"] = ("ms a batch", ("latency_ms", batch))
    for title, (label, keys) in costs.items():
        found: dict[str, tuple[list[Any], list[Any]]] = {}
        for i, row in enumerate(rows):
            errors = row.get("errors")
            name = f"best: {row['name']}" if i == 1 else _way(row)
            xs, ys = found.setdefault(name, ([], []))
            xs.append(get_nested(row, *keys))
            ys.append(errors[-1] if isinstance(errors, list) and errors else 0.0)
        lines = [Line(name, _points(*values), joined=False) for name, values in found.items()]
        labels = (f"Error against {title}", label, "variance left open")
        charts.append(Chart(*labels, [line for line in lines if line.points]))
    return [chart for chart in charts if chart.lines]


def _way(row: Row) -> str:
    """Names how a candidate of `reduce` is cheaper; what is no candidate is the host."""
    candidate = row.get("candidate")
    if not isinstance(candidate, Mapping):
        return "host"
    ways = (candidate.get("img_size"), "smaller image"), (candidate.get("num_tokens"), "tokens")
    return " and ".join(way for has_it, way in ways if has_it) or "other"


def bench_charts(bench: ResultFile) -> list[Chart]:
    """Makes charts of the speed-up against the ratio of multiply-adds, for each measurement."""
    charts = []
    for name, label, _ in measurements(bench):
        models = [
            (row["name"], row.get("macs_ratio"), get_nested(row, "speeds", name, "speedup"))
            for row in bench.models
        ]
        labels = (f"Speed-up in {label}", "times fewer multiply-adds", "times as fast")
        charts.append(Chart(*labels, _single_points(models), diagonal=True))
    return [chart for chart in charts if chart.lines]


def _epochs(rows: Sequence[Row]) -> list[Any]:
    return [row.get("epoch") for row in rows]


def _elapsed_seconds(rows: Sequence[Row]) -> list[float]:
    """Adds up the seconds of the epochs; returns nothing where a row has none."""
    seconds = numbers(rows, "train_seconds")
    return [*accumulate(seconds)] if len(seconds) == len(rows) else []


def _points(xs: Sequence[Any], ys: Sequence[Any]) -> list[Point]:
    """Makes points of pairs of numbers, each of which may be a median with quartiles."""
    pairs = ((_with_range(x), _with_range(y)) for x, y in zip(xs, ys, strict=False))
    return [
        Point(x, y, x_range, y_range)
        for (x, x_range), (y, y_range) in pairs
        if x is not None and y is not None
    ]


def _single_points(models: Sequence[tuple[str, Any, Any]]) -> list[Line]:
    """Makes a line of one point for each name that has both numbers."""
    lines = (Line(name, _points([x], [y]), joined=False) for name, x, y in models)
    return [line for line in lines if line.points]


def _with_range(value: Any) -> tuple[float | None, tuple[float, float] | None]:
    if not isinstance(value, Mapping):
        return finite(value), None
    middle, low, high = (finite(value.get(key)) for key in ("median", "low", "high"))
    return middle, None if low is None or high is None else (low, high)


def _draw_line(axes: Axes, line: Line, style: Mapping[str, Any]) -> None:
    drawn = style if line.joined else {**style, "linestyle": "none"}
    axes.plot([p.x for p in line.points], [p.y for p in line.points], **drawn)
    bar = partial(axes.plot, color=style["color"], linewidth=1.5)
    for point in line.points:
        if point.x_range:
            bar(point.x_range, (point.y, point.y))
        if point.y_range:
            bar((point.x, point.x), point.y_range)


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], salt: str) -> str:
    """Draws on new axes and returns an `<svg>` element for a page.

    Args:
        draw: Fills the axes.
        size: Of the axes in inches.
        salt: Makes the ids in it those of this figure only, and the same every time.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    stream = StringIO()
    with style.context(_STYLE | {"svg.hashsalt": salt}, after_reset=True):
        figure = Figure(figsize=size)
        draw(figure.add_axes((0, 0, 1, 1)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # measured in a font that has no such letter
            figure.savefig(
                stream,
                format="svg",
                transparent=True,
                bbox_inches="tight",
                pad_inches=0.03,
                metadata=_METADATA,
            )
    return _for_page(stream.getvalue())


def _for_page(svg: str) -> str:
    """Keeps the element and the ids that are referred to, and puts in the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' clip-path="url\(#\w+\)"', "", svg)
    return re.sub(r"(?<=: )#\w{6}", lambda match: _VARIABLES.get(match[0], match[0]), svg)


def _short(name: str, most: int = 30) -> str:
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= most else f"{name[: most - 1]}…"
