"""The tables that scripts print, as Markdown, from rows as they are kept in `results/`.

Standard library only: `tables.py` puts the same tables into the pages, which takes no time then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import mean, median, stdev
from typing import Any

Row = dict[str, Any]


# --- cells and lines -----------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]] = (), kinds: str = "l") -> str:
    """A table of cells; `kinds` has an l for a column of words, and columns behind are numbers."""
    ruler = [{"l": "---", "r": "--:"}[kind] for kind in kinds.ljust(len(columns), "r")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows))


def head(header: Sequence[str]) -> list[str]:
    """The first two lines of a table of numbers whose rows have a name."""
    return table(("", *header)).splitlines()


def line(label: str, cells: Sequence[str]) -> str:
    """A row of such a table."""
    return f"| {label} | {' | '.join(cells)} |"


def timed(time: Mapping[str, float], digits: int = 2) -> str:
    """A median and the quartiles around it."""
    return "{} ({}–{})".format(*(f"{time[name]:.{digits}f}" for name in ("median", "low", "high")))


def spread(values: Sequence[float], digits: int = 2, middle: Any = median) -> str:
    """The median or mean of seeds, and their range if there are several."""
    numbers = [middle(values)] + [min(values), max(values)] * (len(values) > 1)
    first, *ends = (f"{number:.{digits}f}" for number in numbers)
    return f"{first} ({'–'.join(ends)})" if ends else first


def cell(value: Any) -> str:
    """A word as it is, a number to three digits, a median with its quartiles."""
    if isinstance(value, dict):
        return f"{cell(value['median'])} ({cell(value['low'])}–{cell(value['high'])})"
    if isinstance(value, float) and value:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return str(value)


# --- insertion.py and reduce_picks.py ------------------------------------------------------------

INSERTION = ("share", "untrained", "left open", "agreement, %", "accuracy, %", "seeds", "s")
PICKS = ("picked", "left open then", "trained to the end", "best of all", "its", "rank", "s")


def insertion_table(rows: Sequence[Row], budget: float, costs: Row) -> str:
    """A row for each contender of a budget, with the better rate, the best first."""
    times = [f"ms, batch {batch}" for batch in costs.get("batches", ())]
    lines = head((*INSERTION, *times))
    for name, same in ranked(rows, budget).items():
        error = f" ± {middle(same, 'accuracy_error_percent'):.1f}"
        cells = [
            f"{same[0]['share']:.2f}",
            f"{middle(same, 'untrained'):.2f}",
            spread([row["error"] for row in same], 3),
            f"{middle(same, 'agreement_percent'):.1f}",
            f"{middle(same, 'accuracy_percent'):.1f}{error}",
            str(len(same)),
            f"{middle(same, 'seconds'):.0f}",
        ]
        cells += [f"{of_model['median']:.2f}" for of_model in costs.get(name, {}).values()]
        lines.append(line(name, cells))
    return "\n".join(lines)


def ranked(rows: Sequence[Row], budget: float) -> dict[str, list[Row]]:
    """The runs of a budget with the better rate, by contender, the one that leaves least first."""
    best: dict[str, list[Row]] = {}
    for row in rows:
        if row["budget"] == budget and row["rate"] == better_rate(rows, row["kind"]):
            best.setdefault(row["name"], []).append(row)
    return dict(sorted(best.items(), key=lambda kept: middle(kept[1], "error")))


def better_rate(rows: Sequence[Row], kind: str) -> float | None:
    """The rate with the lowest error on the images that stop a run; None where none has run.

    Rates are compared where several have run: with one seed and budget.
    """
    same = [row for row in rows if row["kind"] == kind]
    tried = Counter((row["budget"], row["seed"]) for row in same)
    fair = [row for row in same if tried[row["budget"], row["seed"]] > 1] or same
    return min(fair, key=lambda row: row["stopping_error"])["rate"] if fair else None


def middle(rows: Sequence[Row], column: str) -> float:
    """The median of a column."""
    return median(row[column] for row in rows)


def picks_table(name: str, rows: Sequence[Row]) -> str:
    """A row for each budget: what was picked of a set's candidates, and the best of them."""
    lines = head(PICKS)
    for found in rows:
        picked, errors = found["picked"], found["full_errors"]
        best = min(errors, key=errors.__getitem__)
        cells = [picked, f"{found['brief_errors'][picked][-1]:.3f}", f"{errors[picked]:.3f}"]
        cells += [best, f"{errors[best]:.3f}", f"{found['rank']} of {found['candidates']}"]
        lines.append(line(f"{name}, {found['budget']}", [*cells, f"{found['seconds']:.0f}"]))
    return "\n".join(lines)


# --- other scripts -------------------------------------------------------------------------------

POLICY = ("MMACs a step", "success, %", "of each seed", "steps", "ms a step", "times as fast")
ACCURACY = ("data", "tokens", "GMACs", "top-1, % (mean ± std)", "fastest epoch, s")
SCALING = ("point", "GMACs without", "with", "ms without", "with", "speed-up", "of the MACs ratio")
SCALING += ("MiB without", "with", "in training without", "with")
FLAX = ("model, form", "batch", "ms", "times as fast as eager", "times as fast as plain")
CAPTIONS = ("tokens", "contender", "divergence, nats", "right, %", "garments, %")
FIRST_TOKEN = ("tokens", "to the first token, ms", "language model, ms", "cache, KiB an image")


def policy_table(runs: Sequence[Row], costs: Mapping[str, Row]) -> str:
    """A row a contender; the standard error is of all of its held-out episodes."""
    lines = head(POLICY)
    for name, cost in costs.items():
        own = [one for one in runs if one["contender"] == name]
        if own:
            each = ", ".join(f"{one['success_percent']:.0f}" for one in own)
            steps = f"{mean(one['steps_where_reached'] for one in own):.1f}"
            cells = [f"{cost['macs'] / 1e6:.1f}", success(own), each, steps]
            cells += [timed(cost["latency_ms"]), timed(cost["speedup"])]
            lines.append(line(name, cells))
    return "\n".join(lines)


def success(runs: Sequence[Row]) -> str:
    """The share of episodes that a contender ended well in, with its standard error."""
    share = mean(one["success_percent"] for one in runs)
    error = sqrt(share * (100 - share) / sum(len(one["reached"]) for one in runs))
    return f"{share:.1f} ± {error:.1f}"


def accuracy_table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over seeds; of epochs the fastest of all seeds."""
    found = []
    for row in rows:
        cells = [row["data"], row["tokens"], f"{row['gmacs']:.4f}", deviating(row["top1_percent"])]
        found.append([*cells, f"{min(row['seconds_an_epoch']):.1f}"])
    return table(ACCURACY, found, "ll")


def deviating(values: Sequence[float]) -> str:
    """The mean of seeds, and their standard deviation."""
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"


def scaling_table(points: Sequence[Row]) -> str:
    """A row for each point, both forms side by side."""
    return "\n".join([table(SCALING), *map(scaling_line, points)])


def scaling_line(point: Row) -> str:
    """A row of it."""
    forms = point["forms"]["plain"], point["forms"]["learned"]
    cells = [f"{one['gmacs']:.3g}" for one in forms]
    cells += [timed(one["latency_ms"], 1) for one in forms]
    cells += [timed(point["speedup"]), f"{point['share_of_macs_ratio']:.2f}"]
    for key in ("peak_memory_mib", "training_peak_memory_mib"):
        cells += [f"{one[key]:.{1 if one[key] < 100 else 0}f}" for one in forms]
    return line(f"{point['axis']} {point['value']}", cells)


def flax_table(rows: Sequence[Row]) -> str:
    """How fast all forms of a model are."""
    return "\n".join([table(FLAX), *map(flax_line, rows)])


def flax_line(row: Row) -> str:
    """A row of it."""
    ratios = [timed(row[f"times_as_fast_as_{one}"]) for one in ("eager", "plain")]
    cells = [str(row["batch"]), f"{row['latency_ms']['median']:.0f}", *ratios]
    return line(f"{row['model']}, {row['form']}", cells)


def captions_table(rows: Sequence[Row]) -> str:
    """What connectors lose: means over seeds, and the range, the most tokens first."""
    kept: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        kept.setdefault((row["tokens"], row["contender"]), []).append(row)
    columns = {"kl": 3, "exact_percent": 1, "found_percent": 1}  # and digits
    found = [
        [str(k), name, *(spread([row[c] for row in same], n, mean) for c, n in columns.items())]
        for (k, name), same in sorted(kept.items(), key=lambda one: -one[0][0])
    ]
    return table(CAPTIONS, found, "rl")


def first_token_table(costs: Mapping[Any, Row]) -> str:
    """What connectors gain, the most tokens first."""
    found = []
    for k, cost in sorted(costs.items(), key=lambda one: -int(one[0])):
        times = [timed(cost[name], 1) for name in ("prefill_ms", "language_ms")]
        found.append([str(k), *times, f"{cost['cache_kib']:.0f}"])
    return table(FIRST_TOKEN, found, "r")
