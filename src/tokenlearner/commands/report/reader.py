"""What a report is about, found by the files that the commands write; damaged ones are named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...models.serialization import WEIGHTS
from ...training.checkpointing import METRICS
from ...utils.validation import require

RECIPE, CONTEST, RESULTS = "train.json", "metrics.json", "results.json"
_OF_A_FOLDER = (METRICS, RECIPE, CONTEST, WEIGHTS, "checkpoint.pt", "table.txt")
_LOOKED_FOR = (
    f"looked for {METRICS} or {RECIPE} (of train), {CONTEST} (of demo and train --insert), a JSON "
    f"file of `bench --json`, and {RESULTS} of a benchmark, there and one folder below"
)
_KINDS: dict[str, dict[str, type]] = {  # what each kind of JSON file has
    "bench": {"models": list, "measurements": list},
    "contest": {"models": list, "config": dict},
    "compare": {"runs": list, "costs": dict, "host": dict},
    "rows": {"rows": list},
}


@dataclass(frozen=True)
class FoundRun:
    """A training.

    Args:
        name: What the report calls it.
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


@dataclass(frozen=True)
class FoundFile:
    """A JSON file of a known kind, and what is in it."""

    name: str
    path: Path
    kind: str
    content: Mapping[str, Any]

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """Of a contest or a bench: what was measured of each model that has a name."""
        rows = (row for row in self.content["models"] if isinstance(row, Mapping))
        return [row for row in rows if isinstance(row.get("name"), str)]

    @property
    def notes(self) -> list[str]:
        """What the command made of the numbers, in sentences."""
        notes = self.content.get("notes")
        return [str(note) for note in notes] if isinstance(notes, list) else []

    @property
    def written(self) -> str:
        """When, in UTC."""
        return _time_of(self.path)


@dataclass(frozen=True)
class Found:
    """Everything that a report is made of.

    Args:
        source: The folder or file that was named.
        runs: Trainings, in the order of the contest that they belong to, then of their folders.
        files: What was measured.
        problems: What could not be read, in sentences.
    """

    source: Path
    runs: list[FoundRun]
    files: list[FoundFile]
    problems: list[str]

    def of_kind(self, kind: str) -> list[FoundFile]:
        """The files of one kind: `contest`, `bench`, `compare` or `rows`."""
        return [file for file in self.files if file.kind == kind]

    @property
    def folders(self) -> list[Path]:
        """Where images may be: the contests' and the runs' folders, each once."""
        places = [file.path.parent for file in self.of_kind("contest")]
        return [*dict.fromkeys([*places, *(run.folder for run in self.runs)])]


def read_source(source: str | Path) -> Found:
    """Reads what the commands left in a folder and one level below, or in one file.

    A file of a run's folder, such as `metrics.jsonl`, stands for the folder.

    Raises:
        ValueError: There is nothing, or nothing that is known.
    """
    path = Path(source).expanduser()
    require(path.exists(), f"there is no {path}; name a folder that a command wrote, or a file")
    if path.is_file() and path.name in _OF_A_FOLDER:
        path = path.parent
    problems: list[str] = []
    if path.is_dir():
        below = sorted(one for one in path.iterdir() if one.is_dir() and one.name[0] != ".")
        folders = {path: path.resolve().name, **{one: one.name for one in below}}
        files = [f for one, name in folders.items() for f in _files(one, name, problems)]
        runs = [run for one, name in folders.items() if (run := _run(one, name, problems))]
    else:
        files, runs = [*_one_file(path, path.stem, problems)], []
    if not runs and not files:
        said = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(f"{path} holds nothing for a report{said}; {_LOOKED_FOR}")
    files = _apart(files)
    return Found(path, _named(runs, files), files, problems)


def _files(folder: Path, name: str, problems: list[str]) -> Iterator[FoundFile]:
    for path in sorted(folder.glob("*.json")):
        own = path.name in (CONTEST, RESULTS)
        yield from _one_file(path, name if own else path.stem, problems if own else [])


def _one_file(path: Path, name: str, problems: list[str]) -> Iterator[FoundFile]:
    """The file if its kind is known; a file that can be read and is of another is passed over."""
    content = read_object(path, problems)
    if kind := next((kind for kind, has in _KINDS.items() if _fits(content, has)), None):
        yield FoundFile(name, path, kind, content)


def _fits(content: Mapping[str, Any], has: Mapping[str, type]) -> bool:
    return all(isinstance(content.get(key), form) for key, form in has.items())


def _run(folder: Path, name: str, problems: list[str]) -> FoundRun | None:
    metrics, recipe = folder / METRICS, folder / RECIPE
    if not metrics.is_file() and not recipe.is_file():
        return None
    options = read_object(recipe, problems) if recipe.is_file() else {}
    if not recipe.is_file():
        problems.append(f"{folder} has no {RECIPE}, so that its options are not known")
    history = _history(metrics, problems) if metrics.is_file() else []
    finished = _time_of(metrics) if history else ""
    return FoundRun(name, folder, options, history, finished)


def _history(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without lines that are none."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path} cannot be read ({error})")
        return []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            problems.append(f"line {number} of {path} cannot be read and is left out")
    if not rows:
        problems.append(f"{path} holds no epoch")
    return rows


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file; an empty one, and a problem, where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error})")
        return {}
    if isinstance(content, dict):
        return content
    problems.append(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return {}


def _named(runs: list[FoundRun], files: list[FoundFile]) -> list[FoundRun]:
    """The runs, called as the contest calls what came of them, and in its order.

    No two have the same name, and none that of a contest's model which it is not.
    """
    contests = (file for file in files if file.kind == "contest")
    models = [model for contest in contests for model in contest.models]
    own: dict[int, FoundRun] = {}
    for run in runs:
        for number, model in enumerate(models):
            if run.history and model.get("epochs") == run.history and number not in own:
                own[number] = replace(run, name=model["name"])
                break
    taken = {model["name"] for model in models}
    folders = {run.folder for run in own.values()}
    named = [own[number] for number in sorted(own)]
    for run in (run for run in runs if run.folder not in folders):
        name = run.name
        while name in taken:
            name += "/"
        taken.add(name)
        named.append(replace(run, name=name))
    return named


def _apart(files: list[FoundFile]) -> list[FoundFile]:
    """Several contests call their models alike: their folders' names then tell them apart."""
    contests = [file for file in files if file.kind == "contest"]
    if len(contests) < 2:
        return files
    return [_told_apart(file) if file in contests else file for file in files]


def _told_apart(file: FoundFile) -> FoundFile:
    models = [{**model, "name": f"{file.name}: {model['name']}"} for model in file.models]
    return replace(file, content={**file.content, "models": models})


def _time_of(path: Path) -> str:
    changed = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return changed.strftime("%Y-%m-%d %H:%M UTC")
