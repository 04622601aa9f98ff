"""Where the lines of a chart lie: numbers become places in a small image, for the template.

The image is SVG, sharp at every size, and takes its colors from the page, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .parts import Chart, ChartLine, Mark, number_text

WIDTH, HEIGHT = 380, 270
_RIGHT, _TOP, _BOTTOM = 12, 12, 44  # margins
_LABEL, _DIGIT = 32, 6.6  # the left margin: of the label, and of each digit beside the axis
COLORS = 7  # of the style sheet
_SHAPES = (  # of markers around the origin; color and shape together make 35 styles
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.6 3.6h-9.2z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.8L-4.6-3.6h9.2z",
)
_DASHES = ("none", "7 4", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class LineStyle:
    """How a line looks: a color's number, the shape of its markers, and its dashes."""

    color: int
    shape: str
    dashes: str


@dataclass(frozen=True)
class Tick:
    """A number beside an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A marker, what it says when it is pointed at, and the ends of its spread."""

    x: float
    y: float
    told: str
    spreads: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class DrawnLine:
    """A line as the template draws it; `points` is empty where none goes through the markers."""

    style: LineStyle
    points: str
    dots: list[Dot]


@dataclass(frozen=True)
class DrawnChart:
    """A chart as the template draws it, in units of the image."""

    left: float
    title: str
    told: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]
    diagonal: tuple[float, float, float, float] | None
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def line_style(number: int) -> LineStyle:
    """The look that goes with a number; neighbors differ in color, shape and dashes."""
    shape, dashes = _SHAPES[number % len(_SHAPES)], _DASHES[number % len(_DASHES)]
    return LineStyle(number % COLORS, shape, dashes)


def drawn_chart(chart: Chart) -> DrawnChart | None:
    """Places a chart; None where there is no point to show."""
    lines = [line for line in chart.lines if line.marks]
    if not lines:
        return None
    marks = [mark for line in lines for mark in line.marks]
    across, up = _Axis.of(_reach(marks, "x"), chart.whole), _Axis.of(_reach(marks, "y"))
    y_ticks = [(value, up.text(value)) for value in up.ticks]
    left = _LABEL + _DIGIT * max((len(text) for _, text in y_ticks), default=0)
    x, y = _Scale(across, left, WIDTH - _RIGHT), _Scale(up, HEIGHT - _BOTTOM, _TOP)
    return DrawnChart(
        left=round(left, 1),
        title=chart.title,
        told="; ".join(_summary(line) for line in lines),
        x_label=chart.x_label,
        y_label=chart.y_label,
        x_ticks=[Tick(x(value), across.text(value)) for value in across.ticks],
        y_ticks=[Tick(y(value), text) for value, text in y_ticks],
        lines=[_drawn_line(line, x, y) for line in lines],
        diagonal=_diagonal(x, y) if chart.diagonal else None,
    )


@dataclass(frozen=True)
class _Axis:
    """From `low` to `high`, with a number at every `step`."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, values: Sequence[float], whole: bool = False) -> _Axis:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        step = _round_step((high - low + 2 * room) / 6.5)
        step = max(1.0, step) if whole else step
        floor = 0.0 if low >= 0 else -math.inf
        return cls(max(floor, low - room), high + room, step)

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [number * self.step for number in range(first, last + 1)]

    def text(self, value: float) -> str:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return f"{value:,.{digits}f}"


@dataclass(frozen=True)
class _Scale:
    """From an axis' numbers to places between two ends."""

    axis: _Axis
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.axis.low) / (self.axis.high - self.axis.low)
        return round(self.start + share * (self.end - self.start), 1)


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... and of their tenths."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(one * power for one in (1, 2, 5, 10) if one * power >= rough * 0.999)


def _reach(marks: Sequence[Mark], axis: str) -> list[float]:
    """All numbers that an axis has to hold."""
    spans = (getattr(mark, f"{axis}_span") or () for mark in marks)
    return [getattr(mark, axis) for mark in marks] + [end for span in spans for end in span]


def _drawn_line(line: ChartLine, x: _Scale, y: _Scale) -> DrawnLine:
    dots = [
        Dot(x(mark.x), y(mark.y), f"{line.name}: {_pair(mark)}", [*_spreads(mark, x, y)])
        for mark in line.marks
    ]
    joined = line.joined and len(dots) > 1
    points = " ".join(f"{dot.x},{dot.y}" for dot in dots) if joined else ""
    return DrawnLine(line_style(line.style), points, dots)


def _spreads(mark: Mark, x: _Scale, y: _Scale) -> Iterator[tuple[float, float, float, float]]:
    if mark.x_span:
        yield x(mark.x_span[0]), y(mark.y), x(mark.x_span[1]), y(mark.y)
    if mark.y_span:
        yield x(mark.x), y(mark.y_span[0]), x(mark.x), y(mark.y_span[1])


def _diagonal(x: _Scale, y: _Scale) -> tuple[float, float, float, float] | None:
    """The part of `y = x` that is in the image."""
    low, high = max(x.axis.low, y.axis.low), min(x.axis.high, y.axis.high)
    return (x(low), y(low), x(high), y(high)) if low < high else None


def _summary(line: ChartLine) -> str:
    """The ends of a line in words."""
    first, last = line.marks[0], line.marks[-1]
    ends = _pair(first) if len(line.marks) == 1 else f"from {_pair(first)} to {_pair(last)}"
    return f"{line.name} {ends}"


def _pair(mark: Mark) -> str:
    return f"({number_text(mark.x)}, {number_text(mark.y)})"
