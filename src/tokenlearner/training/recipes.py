"""Recipes that come with the package, by name.

A recipe is a YAML file with options of `tokenlearner train`. Its first lines are comments: a title,
source, command, hardware, time and results.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any

from ..utils.files import read_text
from ..utils.validation import require, shortened

_MAX_SIZE, _MAX_NODES = 2**16, 10_000  # of a recipe: bytes, and values with those of aliases
_DEEPEST = 50  # lists in lists; reading takes time as the square of that


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


def check_recipe(path: Path) -> None:
    """Checks that a file is YAML with options, each once, and of a size that options have.

    Raises:
        ValueError: It is not; aliases may make a small file a huge one.
    """
    import yaml

    try:
        size = path.stat().st_size
        require(size <= _MAX_SIZE, f"it has {size:,} bytes, recipes at most {_MAX_SIZE:,}")
        text = read_text(path, "utf-8-sig")
        opened = accumulate(1 if mark in "[{" else -1 for mark in re.findall(r"[\[\]{}]", text))
        require(max(opened, default=0) <= _DEEPEST, f"lists in it are more than {_DEEPEST} deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        require(isinstance(root, yaml.MappingNode), "it holds no options")
        nodes = sum(1 for _ in islice(_walk(root), _MAX_NODES))
        require(nodes < _MAX_NODES, f"its aliases stand for more than {_MAX_NODES:,} values")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        message = f"{path}: no recipe ({reason}); write a line `option: value` for each option"
        raise ValueError(message) from error


def _walk(node: Any) -> Iterator[Any]:
    """Yields the nodes of a YAML file, those behind an alias each time."""
    yield node
    inner = [] if node.id == "scalar" else node.value
    if node.id == "mapping":
        keys = Counter(key.value for key, _ in inner if key.id == "scalar")
        twice = [key for key, times in keys.items() if times > 1]
        require(not twice, f"it gives {shortened(twice)} twice")
        inner = [part for pair in inner for part in pair]
    for part in inner:
        yield from _walk(part)


def header_lines(path: Path) -> Iterator[str]:
    """Yields the lines of the comment that a recipe starts with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return (line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))


def _shipped() -> list[Path]:
    folder = Path(str(files("tokenlearner") / "assets" / "recipes"))
    return sorted(folder.glob("*.yaml"))
