"""Tables that commands print, made for rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..utils.validation import plain_text

REALIZED = 0.95  # share of the theoretical speed-up below which a mark is set


def plain_table(heads: Iterable[str], **options: Any) -> Any:
    """Makes an empty table with a line under its head and columns aligned to the right.

    Args:
        heads: Names of the columns.
        **options: Further arguments of rich's `Column`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    columns = (Column(head, justify="right", **options) for head in heads)
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def filled_table(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> Any:
    """Makes a table with the cells that `columns` format of each row; names stand on the left."""
    from rich.text import Text

    table = plain_table(columns)
    table.columns[0].justify, table.columns[0].overflow = "left", "fold"
    for row in rows:
        table.add_row(*(Text(plain_text(cell(row))) for cell in columns.values()))
    return table


def in_unit(text: str, unit: str) -> str:
    """Returns a text on images, in which these are clips where the unit is."""
    return text if unit == "images" else text.replace("an image", "a clip").replace("images", unit)


def realized_text(share: float) -> str:
    """Formats the share of a theoretical speed-up, with a mark where it is below `REALIZED`."""
    return f"{share:.2f}" if share >= REALIZED else f"* {share:.2f}"
