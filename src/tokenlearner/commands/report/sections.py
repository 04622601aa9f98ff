"""The sections of a report; one without content is left out."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...evaluation.hardware import describe_machine
from .confusion import Confusions, Reevaluation
from .figures import (
    Chart,
    bench_charts,
    comparison_charts,
    curve_charts,
    reduction_charts,
    runs_charts,
)
from .reader import ReportSource, ResultFile, Run
from .tables import (
    DASH,
    ReportTable,
    bench_tables,
    comparison_table,
    number_text,
    reduction_table,
    rows_table,
    runs_table,
)

_PACKAGES = ("tokenlearner", "torch", "torchvision", "timm")
_KINDS = {
    "comparison": "two models, side by side",
    "bench": "cost and speed of models",
    "reduction": "ways to make a model cheaper",
    "rows": "a benchmark",
}
_RESULTS = {  # how to read the tables of each kind of file
    "comparison": (
        "Held-out images are those that nothing was trained on; a ratio is the second model "
        "against the first, speeds are medians (quartiles)."
    ),
    "bench": "The other models are compared with the first one, interleaved in rounds.",
    "reduction": (
        "What a candidate leaves open is its share of the variance of the host's output on images "
        "that nothing was fitted on, after each round of fitting: 0 is a perfect copy, 1 the mean "
        "of all images. Only the best of a round are in the next. Tokens at 4-5 are learned in "
        "front of block 4, and are all that is left from block 5 on."
    ),
    "rows": "Numbers as the benchmark wrote them; of lists the median and the range.",
}
_CAPTIONS = {
    "maps": "Held-out images and where each learned token looks.",
    "maps-clothes": "Held-out images and where each learned token looks.",
    "maps-photographs": "The same weights on photographs of a kind that they were not trained on.",
}


@dataclass(frozen=True)
class MapsImage:
    """A PNG file's bytes, and what they show."""

    png: bytes
    caption: str


@dataclass
class Section:
    """A part of a report with its heading.

    Args:
        anchor: The target of links.
        title: The heading.
        lead: How to read it, in a sentence.
        notes: Conclusions, in sentences.
        problems: What could not be read or made, and why.
        folded: Whether tables open on a click.
    """

    anchor: str
    title: str
    lead: str
    notes: Sequence[str] = ()
    tables: Sequence[ReportTable] = ()
    charts: Sequence[Chart] = ()
    images: Sequence[MapsImage] = ()
    matrices: Sequence[Confusions] = ()
    problems: Sequence[str] = ()
    folded: bool = False

    @property
    def is_empty(self) -> bool:
        """True if nothing is in it."""
        parts = (self.notes, self.tables, self.charts, self.images, self.matrices, self.problems)
        return not any(parts)

    @property
    def legend(self) -> list[str]:
        """The names of all charts' lines, each once."""
        return [*dict.fromkeys(line.name for chart in self.charts for line in chart.lines)]


def make_sections(
    source: ReportSource, reevaluations: Sequence[Reevaluation], problems: Sequence[str]
) -> list[Section]:
    """Makes the sections that have content, in the order of the page.

    Args:
        source: What was read.
        reevaluations: Of the saved models.
        problems: Why there are no reevaluations, if there are none.
    """
    sections = (
        _what_ran(source),
        _results(source),
        _learning_curves(source),
        _accuracy_and_speed(source),
        _speed_and_macs(source),
        _error_and_cost(source),
        _maps(source, reevaluations),
        _confusion(reevaluations, problems),
        _environment(source),
        _options(source),
    )
    return [section for section in sections if not section.is_empty]


def _what_ran(source: ReportSource) -> Section:
    lead = "What this report is about, and the command that made it, with folders shortened."
    tables = []
    if source.runs:
        names, facts = [run.name for run in source.runs], [*map(_run_facts, source.runs)]
        tables.append(ReportTable.of_columns(names, facts, "Trainings", words=True))
    if source.files:
        names, facts = [*_by_label(source.files)], [*map(_file_facts, source.files)]
        tables.append(ReportTable.of_columns(names, facts, "Measurements", words=True))
    problems = [*source.problems, *(p for run in source.runs for p in _unreadable_files(run))]
    return Section("ran", "What ran", lead, tables=tables, problems=problems)


def _unreadable_files(run: Run) -> Iterator[str]:
    """Names the files that a training left out."""
    last = run.history[-1] if run.history else {}
    for key in ("broken_files", "test_broken_files"):
        names = last.get(key)
        for name in names if isinstance(names, list) else ():
            yield f"{run.name} left out: {name}"


def _run_facts(run: Run) -> dict[str, str]:
    """Collects what distinguishes a training."""
    labels = {"data": "data", "epochs": "epochs", "steps": "steps"}
    labels |= {"batch_size": "batch size", "lr": "learning rate"}
    return {
        "model": _option(run.options.get("model")),
        "learned tokens": _tokens(run.options),
        "teacher": _option(run.options.get("teacher")),
        **{label: _option(run.options.get(key)) for key, label in labels.items()},
        "seed": _option(run.options.get("seed")),
        "finished": run.finished or "no epoch yet",
    }


def _tokens(options: Mapping[str, Any]) -> str:
    """Writes how many tokens are learned, and where."""
    inserted, built = options.get("insert"), options.get("num_tokens")
    if not inserted and not built:
        return "as in the model's name" if "_tl" in str(options.get("model")) else DASH
    how = "inserted" if inserted else "learned"
    fuse = ", with a fuser" if options.get("fuse") else ""
    overlap = f", overlap {value}" if (value := options.get("overlap")) else ""
    return f"{inserted or built} {how} at {_option(options.get('at'))}{fuse}{overlap}"


def _file_facts(file: ResultFile) -> dict[str, str]:
    return {"kind": _KINDS[file.kind], "command": _command(file), "written": file.written}


def _command(file: ResultFile) -> str:
    """Writes the command that makes the file again, as far as the file says."""
    command, config = file.content.get("command"), file.content.get("config")
    if isinstance(command, str):
        return command
    if file.kind != "comparison":
        return DASH
    if isinstance(config, Mapping) and "tokens" in config:  # of the demo
        words = [w for k, v in config.items() if k != "out" for w in (f"--{k}", str(v))]
        return shlex.join(["tokenlearner", "demo", *words])
    return "tokenlearner train train.json --out ANOTHER"


def _by_label(files: Sequence[ResultFile]) -> dict[str, ResultFile]:
    """Labels files by their names, with the folder's where names alone are not unique."""
    names = [file.path.name for file in files]
    return {
        f"{file.path.parent.name}/{name}" if names.count(name) > 1 else name: file
        for file, name in zip(files, names, strict=True)
    }


def _results(source: ReportSource) -> Section:
    kinds = [kind for kind in _RESULTS if source.of_kind(kind)] or ["comparison"]
    comparisons, benches = source.of_kind("comparison"), source.of_kind("bench")
    compared = {model["name"] for file in comparisons for model in file.models}
    rest = [run for run in source.finished_runs if run.name not in compared]
    tables = [
        *map(comparison_table, comparisons),
        *([runs_table(rest)] if rest else []),
        *(table for bench in benches for table in bench_tables(bench)),
        *map(reduction_table, source.of_kind("reduction")),
        *map(rows_table, source.of_kind("rows")),
    ]
    noted = (*comparisons, *benches, *source.of_kind("reduction"))
    notes = [note for file in noted for note in file.notes]
    lead = " ".join(_RESULTS[kind] for kind in kinds)
    return Section("results", "Results", lead, tables=tables, notes=notes)


def _learning_curves(source: ReportSource) -> Section:
    lead = (
        "Each point is an evaluation, after an epoch or, where steps are counted, a twentieth of "
        "them. A curve that still rises or falls at its end was cut off by their number; losses "
        "compare only where trainings have the same objective."
    )
    models = [model for file in source.of_kind("comparison") for model in file.models]
    histories: dict[str, Any] = {model["name"]: model.get("epochs") for model in models}
    histories |= {run.name: run.history for run in source.finished_runs}
    curves = {
        name: [row for row in history if isinstance(row, Mapping)]
        for name, history in histories.items()
        if isinstance(history, list)
    }
    return Section("curves", "Learning curves", lead, charts=curve_charts(curves))


def _accuracy_and_speed(source: ReportSource) -> Section:
    lead = "Higher is more accurate, further right is faster; bars are quartiles."
    comparisons = source.of_kind("comparison")
    charts = [chart for file in comparisons for chart in comparison_charts(file)]
    charts = charts if comparisons else runs_charts(source.finished_runs)
    return Section("speed", "Accuracy against speed", lead, charts=charts)


def _speed_and_macs(source: ReportSource) -> Section:
    lead = (
        "On the dashed line a model is as many times faster as it has fewer multiply-adds; "
        "below it, some of that is lost. Bars are quartiles."
    )
    charts = [chart for file in source.of_kind("bench") for chart in bench_charts(file)]
    return Section("macs", "Speed against multiply-adds", lead, charts=charts)


def _error_and_cost(source: ReportSource) -> Section:
    lead = "Lower is closer to the host, further left is cheaper; bars are quartiles."
    charts = [chart for file in source.of_kind("reduction") for chart in reduction_charts(file)]
    return Section("reduction", "Error against cost", lead, charts=charts)


def _maps(source: ReportSource, reevaluations: Sequence[Reevaluation]) -> Section:
    lead = (
        "Each column is one learned token. Yellow is where it takes much of the image from, "
        "dark blue where it takes nothing."
    )
    images, problems = [], []
    for folder in source.folders:
        for path in sorted(folder.glob("maps*.png")):
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
            if inside and path.is_file() and is_whole_png(png := path.read_bytes()):
                images.append(MapsImage(png, _CAPTIONS.get(path.stem, path.stem)))
            else:
                reason = "no complete PNG file" if inside else "a link out of the folder"
                problems.append(f"{path} is {reason} and is left out")
    for result in reevaluations:
        if result.maps:
            caption = f"{result.name}: {_CAPTIONS['maps'][0].lower()}{_CAPTIONS['maps'][1:]}"
            images.append(MapsImage(result.maps, caption))
        problems += result.problems if result.confusions else []
    title = "Where the learned tokens look"
    return Section("maps", title, lead, images=images, problems=problems)


def is_whole_png(data: bytes) -> bool:
    """Checks that a file's bytes begin and end as a PNG's do."""
    return data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:]


def _confusion(reevaluations: Sequence[Reevaluation], problems: Sequence[str]) -> Section:
    lead = (
        "Rows are the true classes, columns the predicted ones, in percent of the row; a perfect "
        "model has 100 along the diagonal."
    )
    matrices = [result.confusions for result in reevaluations if result.confusions]
    failed = [f for result in reevaluations if not result.confusions for f in result.problems]
    problems = [*problems, *(f"Missing for {reason}" for reason in failed)]
    return Section("confusion", "Confusion matrix", lead, matrices=matrices, problems=problems)


def _environment(source: ReportSource) -> Section:
    lead = "Speeds hold for the machine that they were measured on; accuracy hardly depends on it."
    tables = []
    for label, file in _by_label(source.files).items():
        recorded = file.content.get("environment") or file.content.get("machine")
        if isinstance(recorded, Mapping):
            facts = {str(k): number_text(v) for k, v in recorded.items() if v is not None}
            if read := file.content.get("read_gigabytes_per_second"):
                facts["memory read, 1e9 bytes/s"] = number_text(read)
            tables.append(ReportTable((), [*facts.items()], f"Recorded in {label}", words=True))
    machine = describe_machine(torch.device("cpu"))
    facts = {key: number_text(machine[key]) for key in ("cpu", "cores", "system", "python")}
    facts |= {name: _version(name) for name in _PACKAGES}
    title = "Where this report was written"
    tables.append(ReportTable((), [*facts.items()], title, words=True))
    return Section("environment", "Environment", lead, tables=tables)


def _options(source: ReportSource) -> Section:
    lead = "Every option of the commands, defaults included; rows that differ stand out."
    runs = {run.name: run.options for run in source.runs if run.options}
    tables = [_options_table(runs, "train")] if runs else []
    for label, file in _by_label(source.files).items():
        config = file.content.get("config")
        if isinstance(config, Mapping) and config not in runs.values():
            tables.append(_options_table({"value": config}, label))
    return Section("options", "All options", lead, tables=tables, folded=True)


def _options_table(columns: Mapping[str, Mapping[str, Any]], caption: str) -> ReportTable:
    keys = [*dict.fromkeys(key for options in columns.values() for key in options)]
    rows = [[key, *(_option(o.get(key)) for o in columns.values())] for key in keys]
    differ = frozenset(i for i, row in enumerate(rows) if len(set(row[1:])) > 1)
    return ReportTable(("option", *columns), rows, caption, differ, words=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return DASH


def _option(value: Any) -> str:
    """Writes a value as on the command line."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def default_title(source: ReportSource) -> str:
    """Returns the name of the folder or file."""
    path = Path(source.path).resolve()
    return path.name if path.is_dir() else path.stem
