"""Check the rules of this project that no other tool knows. Standard library only.

`python scripts/check_project.py` prints one line per problem and exits with 1 if there are any.
Each check is a function from the project's folder to a list of problems.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_SOURCE_LINES = 500
MAX_TRACKED_MB = 4.5
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")
RELEASE_HEADING = re.compile(r"^## \[?v?(\d+\.\d+\.\d+[^\s\]]*)", re.MULTILINE)


def check_names_are_unique(root: Path) -> list[str]:
    """No public function or class is defined in two modules of one package."""
    places: dict[tuple[Path, str], set[str]] = {}
    for path in _sources(root):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_"):
                key = path.parent, node.name
                places.setdefault(key, set()).add(path.relative_to(root).as_posix())
    return [
        f"`{name}` is defined in {' and '.join(sorted(files))}; keep one, or rename one"
        for (_, name), files in sorted(places.items())
        if len(files) > 1
    ]


def check_changelog(root: Path) -> list[str]:
    """The newest release in CHANGELOG.md is the version of the package."""
    return _compare_version(root, "CHANGELOG.md", RELEASE_HEADING)


def check_citation(root: Path) -> list[str]:
    """The version in CITATION.cff is the version of the package."""
    pattern = re.compile(r"^version:\s*[\"']?([^\s\"']+)", re.MULTILINE)
    return _compare_version(root, "CITATION.cff", pattern)


def check_source_length(root: Path) -> list[str]:
    """Source files stay short enough to read in a sitting."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _sources(root)}
    return [
        f"{path.relative_to(root).as_posix()} has {n} lines, {MAX_SOURCE_LINES} are allowed"
        for path, n in lengths.items()
        if n > MAX_SOURCE_LINES
    ]


def check_nothing_unfinished(root: Path) -> list[str]:
    """The source holds no reminders: finish the work or write it into an issue."""
    return [
        f"{path.relative_to(root).as_posix()}:{number} says {match[1]}"
        for path in _sources(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := UNFINISHED.search(line))
    ]


def check_file_sizes(root: Path) -> list[str]:
    """Git tracks no large file. Outside a git checkout there is nothing to look at."""
    if not (root / ".git").exists():
        return []
    command = ["git", "-C", str(root), "ls-files", "-z"]
    listing = subprocess.run(command, capture_output=True, check=False)
    if listing.returncode:
        return [f"cannot list the tracked files: {listing.stderr.decode().strip()}"]
    files = [root / name for name in listing.stdout.decode().split("\0") if name]
    sizes = {path: path.stat().st_size / 1e6 for path in files if path.is_file()}
    return [
        f"{path.relative_to(root).as_posix()} has {mb:.1f} MB, {MAX_TRACKED_MB} are allowed"
        for path, mb in sizes.items()
        if mb > MAX_TRACKED_MB
    ]


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_names_are_unique,
    check_changelog,
    check_citation,
    check_source_length,
    check_nothing_unfinished,
    check_file_sizes,
)


def main(root: Path = ROOT) -> int:
    """Run every check, print the problems, return the exit code."""
    problems = [problem for check in CHECKS for problem in check(root)]
    for problem in problems:
        print(problem)
    print(f"check_project: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0


def _sources(root: Path) -> Iterator[Path]:
    yield from sorted((root / "src").rglob("*.py"))


def _compare_version(root: Path, name: str, pattern: re.Pattern[str]) -> list[str]:
    source = root / "src" / "tokenlearner" / "__init__.py"
    expected = _first(source, re.compile(r"^__version__\s*=\s*[\"'](.+?)[\"']", re.MULTILINE))
    if expected is None:
        return [f"{source.relative_to(root).as_posix()} sets no __version__"]
    found = _first(root / name, pattern)
    if found is None:
        return [f"{name} names no version, the package is at {expected}"]
    return [] if found == expected else [f"{name} says {found}, the package is at {expected}"]


def _first(path: Path, pattern: re.Pattern[str]) -> str | None:
    match = pattern.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return match[1] if match else None


if __name__ == "__main__":
    sys.exit(main())
