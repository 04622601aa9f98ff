"""The tables of docs/gpu.md, made of `results/gpu.json` as those of other pages are (tables.py)."""

from __future__ import annotations

from typing import Any

from printed import Row, cell, table, timed
from tables import read, show

CHANGES = ("V1.1", "V1", "image", "merging")  # how the names begin of what a model is changed by
PASSES = ("forward", "forward+backward")
GRAPHS = {  # forms of a model
    "compiled": "compiled",
    "eager, CUDA graph": "CUDA graph, eager",
    "compiled, CUDA graph": "CUDA graph, compiled",
}


def rows_of(*names: str) -> list[Row]:
    """The rows of tables, by models as they come and by batch."""
    rows = [row for name in names for row in read("gpu")["tables"][name]["rows"]]
    order = list(dict.fromkeys(row["model"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["model"]), row["batch"]))


def models(*names: str) -> None:
    """How fast models are against the plain one, and its milliseconds."""
    side_by_side(rows_of(*names), "ms", "times as fast")


def memory(*names: str) -> None:
    """The peak of models as a share of the plain one's, and its MiB."""
    side_by_side(rows_of(*names), "peak MiB", "of plain's")


def side_by_side(rows: list[Row], of_plain: str, of_others: str) -> None:
    """A row for each model and batch, a column for the plain one and for each change."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        label = row["model"].replace(" at 224", "").replace(", bf16", ""), str(row["batch"])
        change = row["tokens"].split()[0]
        value = row[of_plain if change == "plain" else of_others]
        found.setdefault(label, {})[change] = (size if change == "plain" else ratio)(value)
    cells = [
        [*k, *(own.get(name, "–") for name in ("plain", *CHANGES))] for k, own in found.items()
    ]
    columns = ("model", "batch", f"plain, {of_plain.split()[-1]}")
    show(table((*columns, "V1.1", "V1", "smaller image", "merging"), cells))


def size(value: Any) -> str:
    """A number to three digits, or the median of one."""
    return cell(value["median"] if isinstance(value, dict) else value)


def ratio(value: Any) -> str:
    """A number with two digits behind the point, with its quartiles if it has some."""
    return timed(value) if isinstance(value, dict) else f"{value:.2f}"


def graphs() -> None:
    """Models compiled and as CUDA graphs, against the plain one in the same form."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for form in GRAPHS:
        rows = [row for row in rows_of("compiled") if row["model"].endswith(f"bf16, {form}")]
        for plain, row in zip(rows[::2], rows[1::2], strict=True):
            key = row["model"].partition(" at")[0], row["tokens"], row["batch"]
            found.setdefault(key, []).append(timed(row["times as fast"]))
            if form == "compiled, CUDA graph":
                found[key].append(size(plain["ms"]))
    order = sorted(found, key=lambda key: (key[0], key[1] != "V1.1"))
    cells = [
        [name, str(batch), tokens, *found[name, tokens, batch]] for name, tokens, batch in order
    ]
    last = "plain as compiled CUDA graph, ms"
    show(table(("model", "batch", "tokens", *GRAPHS.values(), last), cells, "lrl"))


def learners() -> None:
    """Learners and the fuser: against the textbook form, reads of the input, and its memory."""
    cells = []
    for label, found in by_module("modules").items():
        narrow = [found["bf16", passes] for passes in PASSES]
        both = narrow + [found["TF32", passes] for passes in PASSES]
        own = [timed(row["times as fast as the textbook"]) for row in both]
        own += [f"{row['times the reads']['median']:.0f}" for row in narrow]
        own += [ratio(row["peak MiB"] / row["textbook's peak MiB"]) for row in narrow]
        cells.append([*label, *own])
    columns = ("bf16, forward", "bf16, both", "TF32, forward", "TF32, both")
    columns += ("reads, bf16, forward", "both", "memory, forward", "both")
    show(table(("input", "module", *columns), cells, "ll"))


def compiled_learners() -> None:
    """The same compiled, in bf16: against the textbook form compiled, and our own eager one."""
    against = ("times as fast as the textbook", "times as fast as itself, eager")
    cells = [
        [*label, *(timed(found["bf16", passes][name]) for name in against for passes in PASSES)]
        for label, found in by_module("compiled-modules").items()
    ]
    columns = ("textbook, forward", "both", "eager, forward", "both")
    show(table(("input", "module", *columns), cells, "ll"))


def by_module(name: str) -> dict[tuple[str, str], dict[tuple[str, str], Row]]:
    """The rows of a table by input and module, then by precision and passes."""
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in read("gpu")["tables"][name]["rows"]:
        shape, _, precision = row["input"].rpartition(", ")
        passes = row["passes"].partition(",")[0]
        found.setdefault((shape, row["module"]), {})[precision, passes] = row
    return found


def streams() -> None:
    """A new frame against the whole clip."""
    cells = []
    for row in read("gpu")["tables"]["stream"]["rows"]:
        faster, time = timed(row["times as fast"]), timed(row["ms a new frame"], 1)
        cells.append([row["model"].partition(",")[0], ratio(row["MACs ratio"]), faster, time])
    show(table(("model", "MACs ratio", "times as fast as the clip", "ms a new frame"), cells))
