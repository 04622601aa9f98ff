"""Recipes that come with the package, by name.

A recipe is a YAML file with options of `tokenlearner train`. Its first lines are comments: a title,
source, command, hardware, time and results.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

from ..utils.validation import require


def list_recipes() -> dict[str, str]:
    """Returns the recipes that come with the package, with their titles."""
    return {path.stem: next(header_lines(path)) for path in _shipped()}


def find_recipe(name: str) -> Path:
    """Returns the path of a recipe of the package, or of the file with that name.

    Raises:
        ValueError: There is neither.
    """
    shipped = {path.stem: path for path in _shipped()}
    path = shipped.get(name) or Path(name).expanduser()
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    require(
        path.is_file(),
        f"there is no recipe {name!r}, expected a YAML file or one of: {', '.join(shipped)}{hint}",
    )
    return path


def header_lines(path: Path) -> Iterator[str]:
    """Yields the lines of the comment that a recipe starts with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return (line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))


def _shipped() -> list[Path]:
    folder = Path(str(files("tokenlearner") / "assets" / "recipes"))
    return sorted(folder.glob("*.yaml"))
