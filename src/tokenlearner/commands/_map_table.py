"""Numbers about maps as a person reads them: what `tokenlearner maps` prints and keeps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..evaluation.map_stats import AttentionStats
from ._tables import plain_table

ByKind = dict[str, dict[int, AttentionStats]]  # by "image" and "video", then by block


def stats_table(stats: ByKind) -> Any:
    """Makes a table for rich: a row for each block, means over its tokens."""
    heads = ("of", "block", "tokens", "overlap", "most alike", "bits", "spread", "next", "other")
    table = plain_table(heads, no_wrap=True)
    for kind, by_block in stats.items():
        for i, one in by_block.items():
            table.add_row(counted(one.images, kind), str(i), *_cells(one))
    return table


def stats_remarks(stats: ByKind) -> list[str]:
    """Says what is wrong with tokens, and at which block."""
    return [
        f"warning, block {i}, {kind}s: {said}"
        for kind, by_block in stats.items()
        for i, one in by_block.items()
        for said in one.warnings()
    ]


def stats_numbers(stats: ByKind) -> dict[str, Any]:
    """The same for JSON, of each token and each pair of tokens, to 4 digits."""
    return {
        kind: {
            str(i): _rounded(asdict(one) | {"collapsed": one.collapsed})
            for i, one in by_block.items()
        }
        for kind, by_block in stats.items()
        if by_block
    }


def counted(n: int, what: str) -> str:
    """A number and its noun, such as `2 videos`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _cells(one: AttentionStats) -> list[str]:
    alike = "–"
    if one.alike:
        value, (first, second) = one.alike
        alike = f"{value:.2f} ({first}, {second})"
    each = (one.entropy_bits, one.effective_share, one.over_frames, one.across_images)
    means = [sum(values) / len(values) if values else None for values in each]
    return [str(len(one.pairs)), _two(one.overlap), alike, *map(_two, means)]


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _rounded(value: Any) -> Any:
    """Rounds the numbers in whatever holds them."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value
