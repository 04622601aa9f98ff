"""What a report tells of how it came about: what ran, on which machine, with which options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ...evaluation.hardware import describe_machine
from .parts import ReportTable, Section, number_text
from .reader import Found, FoundFile, FoundRun

_PACKAGES = ("tokenlearner", "torch", "torchvision", "timm")
_NOTHING = "–"
_MANY = 4  # columns; of more things each gets a row
_KINDS = {
    "contest": "two models, side by side",
    "bench": "cost and speed of models",
    "compare": "models at several budgets",
    "rows": "a benchmark",
}


def run_section(found: Found) -> Section:
    """Trainings and measurements, in a few words each."""
    lead = "What this report is about, and the command that makes the same again."
    section = Section("ran", "What ran", lead, problems=found.problems)
    if found.runs:
        facts = {run.name: _training(run) for run in found.runs}
        section.tables.append(_by_name(facts, "Trainings"))
    if found.files:
        facts = {name: _measurement(file) for name, file in _by_label(found.files).items()}
        section.tables.append(_by_name(facts, "Measurements"))
    return section


def _training(run: FoundRun) -> dict[str, str]:
    """What distinguishes a training."""
    told = {"data": "data", "epochs": "epochs", "batch size": "batch_size", "learning rate": "lr"}
    return {
        "model": _option(run.options.get("model")),
        "learned tokens": _tokens(run.options),
        "teacher": _option(run.options.get("teacher")),
        **{label: _option(run.options.get(key)) for label, key in told.items()},
        "seed": _option(run.options.get("seed")),
        "finished": run.finished or "no epoch yet",
    }


def _tokens(options: Mapping[str, Any]) -> str:
    """How many tokens are learned, and where."""
    inserted, built = options.get("insert"), options.get("num_tokens")
    if not inserted and not built:
        return "as the name says" if "_tl" in str(options.get("model")) else _NOTHING
    how = "inserted" if inserted else "learned"
    fuse = ", with a fuser" if options.get("fuse") else ""
    return f"{inserted or built} {how} at {_option(options.get('at'))}{fuse}"


def _by_label(files: Sequence[FoundFile]) -> dict[str, FoundFile]:
    """Files by their names, with their folders' where names alone are not unique."""
    names = [file.path.name for file in files]
    labels = [
        f"{file.path.parent.name}/{name}" if names.count(name) > 1 else name
        for file, name in zip(files, names, strict=True)
    ]
    return dict(zip(labels, files, strict=True))


def _measurement(file: FoundFile) -> dict[str, str]:
    return {"what it is": _KINDS[file.kind], "command": _command(file), "written": file.written}


def _command(file: FoundFile) -> str:
    """What makes the file again, as far as it tells."""
    told, config = file.content.get("command"), file.content.get("config")
    if isinstance(told, str):
        return told
    if file.kind != "contest":
        return _NOTHING
    if isinstance(config, Mapping) and "tokens" in config:  # of the demo
        words = [w for k, v in config.items() if k != "out" for w in (f"--{k}", str(v))]
        return shlex.join(["tokenlearner", "demo", *words])
    return "tokenlearner train train.json --out ANOTHER"


def environment_section(found: Found) -> Section:
    """The machines that files tell of, and the one that the report was written on."""
    lead = "Speeds hold for the machine that they were measured on; accuracy hardly depends on it."
    section = Section("environment", "Environment", lead)
    for label, file in _by_label(found.files).items():
        told = file.content.get("environment") or file.content.get("machine")
        if isinstance(told, Mapping):
            facts = {str(k): number_text(v) for k, v in told.items() if v is not None}
            if read := file.content.get("read_gigabytes_per_second"):
                facts["memory read, 1e9 bytes/s"] = number_text(read)
            section.tables.append(_facts_table(facts, f"Recorded in {label}"))
    machine = describe_machine(torch.device("cpu"))
    facts = {key: number_text(machine[key]) for key in ("cpu", "cores", "system", "python")}
    facts |= {name: _version(name) for name in _PACKAGES}
    section.tables.append(_facts_table(facts, "Where this report was written"))
    return section


def options_section(found: Found) -> Section:
    """Everything that commands were told, to be unfolded."""
    lead = "Everything that the commands were told, defaults included; rows that differ stand out."
    section = Section("options", "All options", lead, folded=True)
    runs = {run.name: run.options for run in found.runs if run.options}
    if runs:
        section.tables.append(_options_table(runs, "train"))
    for label, file in _by_label(found.files).items():
        config = file.content.get("config") or file.content.get("recipe")
        if isinstance(config, Mapping) and config not in runs.values():
            section.tables.append(_options_table({"value": config}, label))
    return section


def _options_table(columns: Mapping[str, Mapping[str, Any]], caption: str) -> ReportTable:
    keys = [*dict.fromkeys(key for options in columns.values() for key in options)]
    rows = [[key, *(_option(one.get(key)) for one in columns.values())] for key in keys]
    differ = frozenset(i for i, row in enumerate(rows) if len(set(row[1:])) > 1)
    return ReportTable(("option", *columns), rows, caption, differ, words=True)


def _by_name(facts: Mapping[str, Mapping[str, str]], caption: str) -> ReportTable:
    """A column for each name, or a row if there are many."""
    labels = next(iter(facts.values()))
    if len(facts) > _MANY:
        rows = [[name, *told.values()] for name, told in facts.items()]
        return ReportTable(("", *labels), rows, caption, words=True)
    rows = [[label, *(told[label] for told in facts.values())] for label in labels]
    return ReportTable(("", *facts), rows, caption, words=True)


def _facts_table(facts: Mapping[str, str], caption: str) -> ReportTable:
    return ReportTable((), [*facts.items()], caption, words=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _NOTHING


def _option(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return _NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
