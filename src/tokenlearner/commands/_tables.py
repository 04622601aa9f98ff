"""How the commands' tables look, for rich, and how they print what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def plain_table(heads: Iterable[str], **how: Any) -> Any:
    """Makes an empty table with a line under its head, whose columns stand to the right.

    Args:
        heads: Names of the columns.
        **how: What else rich's `Column` is told of each.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    columns = (Column(head, justify="right", **how) for head in heads)
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
