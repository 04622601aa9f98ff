"""What a report is made of: sections of sentences, tables, charts, images and matrices.

They are plain values, and the template in `assets/report` draws them. All text is escaped there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# 17 points of cividis, which is lightest where there is most; Nuñez, Anderton and Renslow, 2018.
_CIVIDIS = bytes.fromhex(
    "00224d 002d69 1a386f 31436c 434e6b 52596c 61646f 6e7073 7c7b78 "
    "8b8778 9b9376 aba072 bbad6c ccbb63 dec957 efd846 fde737"
)
_READ_IN_BLACK = 0.179  # luminance from which black stands out more than white


@dataclass(frozen=True)
class ReportTable:
    """A table whose first column names the rows.

    Args:
        head: Names of the columns, the first of which may be empty; none where rows say it all.
        rows: Texts, as many as columns.
        caption: What stands above it.
        marked: Rows, counted from 0, that stand out.
        words: The cells are words, not numbers, which stand to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: frozenset[int] = frozenset()
    words: bool = False


@dataclass(frozen=True)
class Mark:
    """A point of a chart, and how far it is spread."""

    x: float
    y: float
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None


@dataclass(frozen=True)
class ChartLine:
    """Points of one name.

    Args:
        name: What the legend calls them.
        style: Number of the color, the dashes and the marker; a name has one in all charts.
        marks: From left to right.
        joined: Whether a line goes through them.
    """

    name: str
    style: int
    marks: Sequence[Mark]
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Args:
        title: What is shown, in a few words.
        x_label: With its unit.
        y_label: With its unit.
        lines: Those without points are left out.
        diagonal: Whether to draw where y equals x.
        whole: Whether x has whole numbers only.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[ChartLine]
    diagonal: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Figure:
    """A PNG file's bytes, and what they show for those who cannot see it."""

    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class MatrixCell:
    """A share in color: `text` on `ground`, and what it counts in words."""

    text: str
    ground: str
    ink: str
    told: str


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: a row for each true class, a column for each that it was taken for."""

    title: str
    names: Sequence[str]
    cells: Sequence[Sequence[MatrixCell]]
    worst: ReportTable
    remark: str


@dataclass
class Section:
    """A part of a report with its heading.

    Args:
        anchor: What links lead to.
        title: The heading.
        lead: How to read it, in a sentence.
        notes: Sentences on what came out.
        problems: What could not be read or made, and why.
        folded: Whether tables open on a click.
    """

    anchor: str
    title: str
    lead: str
    notes: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    images: list[Figure] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    folded: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        parts = (self.notes, self.tables, self.charts, self.images, self.matrices)
        return not any((*parts, self.problems))

    @property
    def legend(self) -> dict[str, int]:
        """The names of all charts' lines, and their styles."""
        return {line.name: line.style for chart in self.charts for line in chart.lines}


def cividis(share: float) -> tuple[str, str]:
    """The color of a share from 0 to 1, and black or white, whichever is read on it."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) // 3 - 1)
    first = min(int(place), len(_CIVIDIS) // 3 - 2)
    ends = (_CIVIDIS[3 * number : 3 * number + 3] for number in (first, first + 1))
    color = [round(a + (b - a) * (place - first)) for a, b in zip(*ends, strict=True)]
    ink = "#000" if _luminance(color) > _READ_IN_BLACK else "#fff"
    return f"#{bytes(color).hex()}", ink


def _luminance(color: Sequence[int]) -> float:
    """How light a color of sRGB is, from 0 to 1, as WCAG defines it."""
    shares = (part / 255 for part in color)
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(a * b for a, b in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def finite(value: object) -> float | None:
    """The value if it is a finite number, otherwise None: files may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def get_nested(content: object, *keys: str) -> Any:
    """The value below a path of keys, or None where the path ends early."""
    for key in keys:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def number_text(value: object) -> str:
    """A number with the digits that matter, anything else as it is, nothing as a dash."""
    if value is None:
        return "–"
    number = finite(value)
    if number is None:
        return str(value)
    if isinstance(number, int) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:#.4g}"


def spread_text(spread: object, digits: int | None = None) -> str:
    """A median and its quartiles, as far as they are there."""

    def told(value: object) -> str:
        number = finite(value)
        return number_text(value) if digits is None or number is None else f"{number:.{digits}f}"

    middle, low, high = (get_nested(spread, key) for key in ("median", "low", "high"))
    if finite(low) is None or finite(high) is None:
        return told(middle)
    return f"{told(middle)} ({told(low)}–{told(high)})"
