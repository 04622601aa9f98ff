"""The sections of a report, each from what was found; those with nothing to tell are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .compare import compare_charts, compare_tables
from .confusion import Reevaluation, confusion_matrix
from .parts import Figure, Section
from .provenance import environment_section, options_section, run_section
from .reader import Found
from .tables import (
    bench_charts,
    bench_tables,
    comparison_charts,
    comparison_table,
    curve_charts,
    rows_table,
    runs_charts,
    runs_table,
)

_CAPTIONS = {
    "maps": "Held-out images and where each learned token looks.",
    "maps-clothes": "Held-out images and where each learned token looks.",
    "maps-photographs": "The same weights on photographs of a kind that they never saw.",
}


def all_sections(found: Found, looks: Sequence[Reevaluation], problems: list[str]) -> list[Section]:
    """What there is to tell, in the order of the page.

    Args:
        found: What was read.
        looks: What the saved models did once more.
        problems: Why there was no such look, if there was none.
    """
    sections = (
        run_section(found),
        _table(found),
        _curves(found),
        _accuracy_and_speed(found),
        _maps(found, looks),
        _confusion(looks, problems),
        environment_section(found),
        options_section(found),
    )
    return [section for section in sections if not section.is_empty]


def _table(found: Found) -> Section:
    lead = (
        "Held-out images are those that nothing was trained on; a ratio is the second model "
        "against the first, speeds are medians (quartiles)."
    )
    section = Section("results", "Results", lead)
    contests = found.of_kind("contest")
    for contest in contests:
        section.tables.append(comparison_table(contest))
        section.notes += contest.notes
    own = {model["name"] for contest in contests for model in contest.models}
    if rest := [run for run in found.runs if run.history and run.name not in own]:
        section.tables.append(runs_table(rest))
    for file in found.of_kind("bench"):
        section.lead = "The first model is what the others are compared with, in turn, by rounds."
        section.tables += bench_tables(file)
        section.notes += file.notes
    for file in found.of_kind("compare"):
        section.lead = "The host is what all are compared with; a budget is a share of its cost."
        section.tables += compare_tables(file)
    for file in found.of_kind("rows"):
        section.lead = "Numbers as the benchmark wrote them; of lists the median and the range."
        section.tables.append(rows_table(file))
    return section


def _curves(found: Found) -> Section:
    lead = (
        "Each point is an epoch. A curve that still rises or falls at its end was cut off by the "
        "number of epochs; losses compare only where trainings have the same objective."
    )
    section = Section("curves", "Learning curves", lead)
    named = {run.name: run.history for run in found.runs if run.history}
    order = [*dict.fromkeys([*_names(found), *named])]
    told = {
        model["name"]: [row for row in model["epochs"] if isinstance(row, Mapping)]
        for contest in found.of_kind("contest")
        for model in contest.models
        if isinstance(model.get("epochs"), list)
    }
    rows = {name: named.get(name) or told.get(name) for name in order}
    histories = {name: (order.index(name), one) for name, one in rows.items() if one}
    section.charts = curve_charts(histories)
    return section


def _names(found: Found) -> list[str]:
    """Those of the contests' models, which have the same color everywhere."""
    return [model["name"] for contest in found.of_kind("contest") for model in contest.models]


def _accuracy_and_speed(found: Found) -> Section:
    lead = "Higher is more accurate, further right is faster; bars are quartiles."
    section = Section("speed", "Accuracy against speed", lead)
    for contest in found.of_kind("contest"):
        section.charts += comparison_charts(contest)
    if not found.of_kind("contest"):
        section.charts += runs_charts([run for run in found.runs if run.history])
    for file in found.of_kind("compare"):
        section.lead = (
            "Higher is more accurate, further left is faster; a line joins one model's budgets, "
            "bars are the range over seeds."
        )
        section.charts += compare_charts(file)
    for file in found.of_kind("bench"):
        section.title = "Speed against multiply-adds"
        section.lead = (
            "On the dashed line a model is as many times faster as it has fewer multiply-adds; "
            "below it, some of that is lost. Bars are quartiles."
        )
        section.charts += bench_charts(file)
    return section


def _maps(found: Found, looks: Sequence[Reevaluation]) -> Section:
    lead = (
        "Each column is one learned token. Yellow is where it takes much of the image from, "
        "dark blue where it takes nothing."
    )
    section = Section("maps", "Where the learned tokens look", lead)
    for folder in found.folders:
        for path in sorted(folder.glob("maps*.png")):
            png = path.read_bytes()
            if not is_whole_png(png):
                section.problems.append(f"{path} is no complete PNG file and is left out")
                continue
            caption = _CAPTIONS.get(path.stem, path.stem)
            section.images.append(Figure(png, f"A sheet of maps. {caption}", caption))
    for look in looks:
        if look.sheet:
            caption = f"{look.name}: {_CAPTIONS['maps'][0].lower()}{_CAPTIONS['maps'][1:]}"
            section.images.append(Figure(look.sheet, f"A sheet of maps. {caption}", caption))
    section.problems += [p for look in looks if look.confusions for p in look.problems]
    return section


def is_whole_png(data: bytes) -> bool:
    """Whether a file's bytes begin and end as a PNG's do."""
    return data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:]


def _confusion(looks: Sequence[Reevaluation], problems: list[str]) -> Section:
    lead = (
        "Rows are what an image is, columns what it was taken for, in percent of the row; a "
        "perfect model has 100 along the diagonal."
    )
    section = Section("confusion", "Confusion matrix", lead, problems=list(problems))
    for look in looks:
        if look.confusions:
            section.matrices.append(confusion_matrix(look.name, look.confusions))
        else:
            section.problems += [f"Not shown for {reason}" for reason in look.problems]
    return section


def title_of(found: Found) -> str:
    """What the report is called if it is told nothing else."""
    source = Path(found.source).resolve()
    return source.name if source.is_dir() else source.stem
