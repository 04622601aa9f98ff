"""Which files a data set has, and what they show: a folder a class, or a list of paths and labels.

Files are listed and never opened, so a million of them take seconds.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..utils.validation import require, shortened

FOLDERS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
_HEADER = ["path", "label"]
_LAYOUT = "make train/ and val/ with a folder a class, or write train.csv and val.csv"


def list_labeled_files(
    root: Path, split: str, extensions: Sequence[str]
) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Lists the files of a split, their labels and the classes; opens none of them.

    Args:
        root: Holds folders of classes or lists, as `load_folder` says.
        split: `"train"` or `"test"`.
        extensions: Ends of the names of files that count, such as ".png", in lower case. What a
            list names counts whatever its name ends in.

    Raises:
        ValueError: Something is missing, or the classes are not those of the other split.
    """
    require(root.is_dir(), f"{root} is {'a file' if root.exists() else 'not there'}, expected a "
            f"folder; {_LAYOUT}")  # fmt: skip
    place = _place(root, split)
    if place is None:
        raise ValueError(_nothing_for(root, split))
    listed = _read_list(root, place) if place.suffix else _read_folder(place, extensions)
    classes = tuple(sorted({label for _, label in listed}))
    other = _place(root, next(s for s in FOLDERS if s != split))
    if other is not None:
        _check_same(place, classes, other, _classes(root, other))
    number = {label: i for i, label in enumerate(classes)}
    return [path for path, _ in listed], [number[label] for _, label in listed], classes


def _place(root: Path, split: str) -> Path | None:
    """The list or folder of a split."""
    places = [root / f"{name}{suffix}" for name in FOLDERS[split] for suffix in (".csv", "")]
    return next((p for p in places if (p.is_file() if p.suffix else p.is_dir())), None)


def _nothing_for(root: Path, split: str) -> str:
    looked = ", ".join(f"{name}/ or {name}.csv" for name in FOLDERS[split])
    known = {name for names in FOLDERS.values() for name in names}
    found = [name for name in _folders(root) if name not in known]
    hint = f"it holds {shortened(found)}: if these are classes, " if found else ""
    return f"{root} has nothing for split {split!r}, expected {looked}; {hint}{_LAYOUT}"


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _classes(root: Path, place: Path) -> tuple[str, ...]:
    if place.suffix:
        return tuple(sorted({label for _, label in _read_list(root, place)}))
    return tuple(_folders(place))


def _check_same(place: Path, classes: Sequence[str], other: Path, others: Sequence[str]) -> None:
    missing = [
        f"{lacking} lacks {shortened(names)}"
        for lacking, names in (
            (other, sorted(set(classes) - set(others))),
            (place, sorted(set(others) - set(classes))),
        )
        if names
    ]
    require(
        not missing,
        f"{place} and {other} have different classes: {'; '.join(missing)}; both need the same",
    )


def _read_folder(folder: Path, extensions: Sequence[str]) -> list[tuple[str, str]]:
    classes = _folders(folder)
    require(bool(classes), f"{folder} holds no folder; make one for each class")
    listed, ends = [], tuple(extensions)
    for name in classes:
        files = [path for path in _files(folder / name) if path.lower().endswith(ends)]
        require(
            bool(files),
            f"{folder / name} holds no file that ends in {', '.join(ends)}; "
            "put some there, or take the folder away",
        )
        listed += [(path, name) for path in files]
    return listed


def _files(folder: Path) -> Iterator[str]:
    """Every file below a folder, in the order of torchvision; each folder once, hidden ones not."""
    seen, found = set(), {}
    for place, folders, names in os.walk(folder, followlinks=True):
        key = os.stat(place)
        if (key.st_dev, key.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((key.st_dev, key.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found[place] = sorted(name for name in names if not name.startswith("."))
    return (os.path.join(place, name) for place in sorted(found) for name in found[place])


def _read_list(root: Path, path: Path) -> list[tuple[str, str]]:
    rows = _rows(path)
    require(
        bool(rows) and [cell.strip() for cell in rows[0][1]] == _HEADER,
        f"{path} does not start with the line {','.join(_HEADER)}; write it there",
    )
    rows = rows[1:]
    odd = [f"line {line}" for line, cells in rows if len(cells) != 2 or not all(cells)]
    require(not odd, f"{path} has {shortened(odd)} without a path and a label; write path,label")
    require(bool(rows), f"{path} lists no file; write a line path,label for each")
    listed = [(line, os.path.join(root, cells[0]), cells[1]) for line, cells in rows]
    gone = [f"{name} (line {line})" for line, name, _ in listed if not os.path.isfile(name)]
    require(
        not gone, f"{path} lists files that are not there: {shortened(gone)}; correct the paths"
    )
    return [(name, label) for _, name, label in listed]


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The number and the cells of every line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"{path} cannot be read as a list ({error}); save it as CSV in UTF-8"
        raise ValueError(message) from error
