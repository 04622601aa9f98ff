"""Atomic writes, JSON files and unused paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` when the block ends.

    The folder is created. After an error the old file is left, and no temporary one.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON; raises ValueError for NaN and infinity."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def unique_path(path: str | Path) -> Path:
    """Returns `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    path, number = Path(path).expanduser(), 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def is_model_path(name: str) -> bool:
    """Returns whether the name of a model is a path, or a place on the Hub."""
    return "/" in name or name.endswith(".safetensors") or Path(name).expanduser().exists()
