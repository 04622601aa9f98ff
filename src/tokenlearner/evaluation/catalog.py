"""The table of all named models: input size, parameters, multiply-adds.

`docs/models.md` is what `tokenlearner models --markdown` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.factory import create_model, list_models
from ..models.preprocessing import get_input_size
from ..utils.modules import building_on_meta
from .flops import count_macs

_HEADER = ("model", "input", "parameters, M", "GMACs", "GFLOPs")


@dataclass(frozen=True)
class CatalogRow:
    """A named model, as it is built without arguments."""

    name: str
    input_size: tuple[int, ...]
    """Axes of one image, `c h w`, or clip, `c t h w`."""
    parameters: int
    gmacs: float
    """Multiply-adds of one input, counted as 1, in 1e9; GFLOPs are twice that."""


def catalog(pattern: str = "*") -> list[CatalogRow]:
    """Builds every named model on the meta device, runs it there, and counts.

    Args:
        pattern: As in `list_models`.

    Raises:
        ValueError: No name matches.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; list_models() names all of them")
    return [_row(name) for name in names]


def catalog_markdown(rows: Sequence[CatalogRow]) -> str:
    """Formats the catalog as a Markdown table."""
    lines = [_HEADER, ("---", "---", "--:", "--:", "--:")]
    lines += [(f"`{name}`", *rest) for name, *rest in map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def catalog_text(rows: Sequence[CatalogRow]) -> str:
    """Formats the catalog in columns."""
    table = [_HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row) for row in table)


def _cells(row: CatalogRow) -> tuple[str, ...]:
    size = " x ".join(map(str, row.input_size))
    digits = 3 if row.gmacs < 100 else 1
    counts = f"{row.gmacs:.{digits}f}", f"{2 * row.gmacs:.{digits}f}"
    return row.name, size, f"{row.parameters / 1e6:.1f}", *counts


def _row(name: str) -> CatalogRow:
    with building_on_meta():
        model: Any = create_model(name).eval()
    size = tuple(get_input_size(model))
    gmacs = count_macs(model, torch.empty(1, *size, device="meta")) / 1e9
    return CatalogRow(name, size, sum(p.numel() for p in model.parameters()), gmacs)
