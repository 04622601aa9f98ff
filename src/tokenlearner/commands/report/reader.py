"""Reads what the commands wrote to a folder or a file; damaged pieces are listed as problems."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...data.config import unit_of
from ...models.serialization import WEIGHTS
from ...training.checkpointing import METRICS
from ...training.paths import found_paths
from ...utils.files import read_json, read_text
from ...utils.validation import require

RECIPE, COMPARISON, RESULTS = "train.json", "metrics.json", "results.json"
REDUCTION = "reduction.json"
_RUN_FILES = (METRICS, RECIPE, COMPARISON, WEIGHTS, "checkpoint.pt", "table.txt")
_EXPECTED = (
    f"expected {METRICS} or {RECIPE} (of train), {COMPARISON} (of demo and train --insert), a JSON "
    f"file of `bench --json`, or {RESULTS} of a benchmark, there or one folder below"
)
_KINDS: dict[str, dict[str, type]] = {  # the keys that each kind of JSON file has
    "bench": {"models": list, "measurements": list},
    "comparison": {"models": list, "config": dict},
    "reduction": {"candidates": list, "config": dict},
    "budgets": {"runs": list, "costs": dict, "host": dict},
    "rows": {"rows": list},
}
_LISTS = {"reduction": "candidates"}  # where other kinds have `models`


@dataclass(frozen=True)
class Run:
    """A training.

    Args:
        name: Its title in the report.
        folder: Where it is.
        options: Those of `train.json`; empty where there is none.
        history: A row of metrics for every epoch that can be read.
        finished: When the last epoch was written, in UTC.
    """

    name: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: str = ""

    @property
    def unit(self) -> str:
        """What it trained on, images or clips."""
        return unit_of(self.options.get("data"))


@dataclass(frozen=True)
class ResultFile:
    """A JSON file of a known kind: `bench`, `comparison`, `reduction` or `rows`.

    Args:
        path: Where it is.
        kind: One of the four.
        content: The JSON object in it.
        prefix: Precedes the names of its models, where several files name theirs alike.
    """

    path: Path
    kind: str
    content: Mapping[str, Any]
    prefix: str = ""

    @property
    def models(self) -> list[dict[str, Any]]:
        """The measurements of each model that has a name, of other files than `rows`."""
        rows = (
            row for row in self.content[_LISTS.get(self.kind, "models")] if isinstance(row, Mapping)
        )
        named = (row for row in rows if isinstance(row.get("name"), str))
        return [{**row, "name": self.prefix + row["name"]} for row in named]

    @property
    def notes(self) -> list[str]:
        """The command's conclusions, in sentences."""
        notes = self.content.get("notes")
        return [str(note) for note in notes] if isinstance(notes, list) else []

    @property
    def unit(self) -> str:
        """What a comparison is of, images or clips."""
        config = self.content.get("config")
        return unit_of(config.get("data") if isinstance(config, Mapping) else None)

    @property
    def written(self) -> str:
        """The time of the last change, in UTC."""
        return _time_of(self.path)


@dataclass(frozen=True)
class ReportSource:
    """Everything that a report is made of.

    Args:
        path: The folder or file that was given.
        runs: Trainings, those of comparisons first.
        files: Measurements.
        problems: What could not be read, in sentences.
    """

    path: Path
    runs: list[Run]
    files: list[ResultFile]
    problems: list[str]

    def of_kind(self, kind: str) -> list[ResultFile]:
        """Returns the files of one kind."""
        return [file for file in self.files if file.kind == kind]

    @property
    def finished_runs(self) -> list[Run]:
        """The runs with at least one epoch."""
        return [run for run in self.runs if run.history]

    @property
    def folders(self) -> list[Path]:
        """The folders of comparisons and runs, each once; images may be in them."""
        kinds = (*self.of_kind("comparison"), *self.of_kind("reduction"))
        folders = [file.path.parent for file in kinds]
        return [*dict.fromkeys([*folders, *(run.folder for run in self.runs)])]


def read_source(source: str | Path) -> ReportSource:
    """Reads what the commands left in a folder and one level below, or in one file.

    A file of a run's folder, such as `metrics.jsonl`, stands for the folder.

    Raises:
        ValueError: There is nothing, or nothing that is known.
    """
    path = Path(source).expanduser()
    require(path.exists(), f"there is no {path}; name a folder that a command wrote, or a file")
    if path.is_file() and path.name in _RUN_FILES:
        path = path.parent
    problems: list[str] = []
    runs: list[Run] = []
    if path.is_dir():
        below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [f for folder in (path, *below) for f in _result_files(folder, problems)]
        runs = [run for folder in (path, *below) if (run := _read_run(folder, problems))]
    else:
        files = [*_result_file(path, problems)]
    if not runs and not files:
        reasons = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(f"{path} holds nothing for a report{reasons}; {_EXPECTED}")
    comparisons = [file for file in files if file.kind == "comparison"]
    if len(comparisons) > 1:
        for file in comparisons:
            prefix = f"{file.path.parent.resolve().name}: "
            files[files.index(file)] = replace(file, prefix=prefix)
    return ReportSource(path, _join(runs, files), files, problems)


def common_unit(runs: Sequence[Run]) -> str:
    """Returns what runs trained on: images, clips, or both."""
    return " or ".join(sorted({run.unit for run in runs}, reverse=True))


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """Reads a JSON object; an empty one, and a problem, where that fails."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error})")
        return {}
    if isinstance(content, dict):
        return content
    problems.append(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return {}


def _result_files(folder: Path, problems: list[str]) -> Iterator[ResultFile]:
    """Finds the result files of a folder; files under other names may be damaged or foreign."""
    for path in sorted(folder.glob("*.json")):
        yield from _result_file(
            path, problems if path.name in (COMPARISON, RESULTS, REDUCTION) else []
        )


def _result_file(path: Path, problems: list[str]) -> Iterator[ResultFile]:
    content = read_object(path, problems)
    for kind, keys in _KINDS.items():
        if all(isinstance(content.get(key), type_) for key, type_ in keys.items()):
            if kind != "budgets":
                yield ResultFile(path, kind, content)
                return
            hint = f"`python benchmarks/compare_report.py {path}` makes its table and plot"
            problems.append(f"{path} was written by benchmarks/compare.py; {hint}")


def _read_run(folder: Path, problems: list[str]) -> Run | None:
    metrics, recipe = folder / METRICS, folder / RECIPE
    if not metrics.is_file() and not recipe.is_file():
        return None
    options = read_object(recipe, problems) if recipe.is_file() else {}
    for name, path in ({"out": options.get("out")} | found_paths(options, folder)).items():
        if isinstance(path, str) and Path(path).is_relative_to(Path.cwd()):
            options[name] = os.path.relpath(path)
        elif path is not None:
            options[name] = path
    if not recipe.is_file():
        problems.append(f"{folder} has no {RECIPE}, so that its options are not known")
    history = _read_history(metrics, problems) if metrics.is_file() else []
    finished = _time_of(metrics) if history else ""
    return Run(folder.resolve().name, folder, options, history, finished)


def _read_history(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Reads the rows of `metrics.jsonl`; a line that is no JSON object is left out."""
    rows = []
    try:
        text = read_text(path, errors="replace")
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error})")
        return []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            problems.append(f"line {number} of {path} cannot be read and is left out")
    if not rows:
        problems.append(f"{path} holds no epoch")
    return rows


def _join(runs: Sequence[Run], files: Sequence[ResultFile]) -> list[Run]:
    """Names each run as the comparison that it belongs to, in its order; then the other runs.

    No two runs have the same name, and no other run that of a comparison's model.
    """
    comparisons = [file for file in files if file.kind == "comparison"]
    models = [(file, model) for file in comparisons for model in file.models]
    rest, joined = [*runs], []
    for file, model in models:
        if run := next((run for run in rest if _is_run_of(run, model, file.path.parent)), None):
            rest.remove(run)
            joined.append(replace(run, name=model["name"]))
    names = {model["name"] for _, model in models}
    for run in rest:
        name = run.name
        while name in names:
            name += "/"
        names.add(name)
        joined.append(replace(run, name=name))
    return joined


def _is_run_of(run: Run, model: Mapping[str, Any], folder: Path) -> bool:
    """Compares the folder of a run with the one that the comparison in `folder` recorded.

    Version 0.3 did not record one; its runs are known by their metrics.
    """
    if "run" not in model:
        return bool(run.history) and model.get("epochs") == run.history
    recorded = model["run"]
    return isinstance(recorded, str) and os.path.normpath(folder / recorded) == os.path.normpath(
        run.folder
    )


def _time_of(path: Path) -> str:
    changed = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return changed.strftime("%Y-%m-%d %H:%M UTC")
