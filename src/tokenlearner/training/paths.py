"""Paths among the options of a run, which hold where the run's folder or its project was moved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.serialization import WEIGHTS
from .config import TrainConfig

PATHS = ("root", "model", "teacher", "init_from")  # options that may be paths, or names


def absolute_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options of a run with its local paths, `out` too, as absolute ones."""
    options, out = asdict(config), os.path.abspath(config.out)
    for name in PATHS:
        value = options[name]
        if isinstance(value, str) and _is_there(name, value, out):
            options[name] = os.path.abspath(os.path.expanduser(value))
    return options | {"out": out}


def candidate_paths(options: Mapping[str, Any], name: str, folder: str | Path) -> list[Path]:
    """Returns where the file or folder of an option may be, the likeliest place first.

    These are the place that was written, and the one that lies to the run's folder as that did.

    Args:
        options: As they were written.
        name: One of `PATHS`.
        folder: Where the run is now.
    """
    value, out = options.get(name), options.get("out")
    if not isinstance(value, str) or (name != "root" and "/" not in value):
        return []
    stored = Path(value).expanduser()
    if not isinstance(out, str) or os.path.isabs(out) != stored.is_absolute():
        return [stored]
    beside = Path(os.path.abspath(Path(folder, os.path.relpath(stored, out))))
    return [stored, beside] if stored.is_absolute() else [beside, stored]


def found_paths(options: Mapping[str, Any], folder: str | Path) -> dict[str, str]:
    """Returns the paths among the options of a run that are there, where they are now."""
    found = {}
    for name in PATHS:
        if path := next(filter(os.path.exists, candidate_paths(options, name, folder)), None):
            found[name] = str(path)
    return found


def is_same_path(options: Mapping[str, Any], name: str, folder: str | Path, value: Any) -> bool:
    """Returns whether a path is the one that a run was begun with, wherever that is now."""
    if not isinstance(value, str):
        return False
    now = os.path.realpath(os.path.expanduser(value))
    return any(os.path.realpath(path) == now for path in candidate_paths(options, name, folder))


def _is_there(name: str, value: str, out: str) -> bool:
    """Returns whether an option is a path: a folder may happen to have the name of a model."""
    path = Path(value).expanduser()
    if name == "root" or "/" in value:
        return path.exists()
    return path.is_file() or ((path / WEIGHTS).is_file() and os.path.abspath(path) != out)
