"""Lists labeled files: a folder a class, or a list as CSV; none of them is opened."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..utils.files import read_text
from ..utils.validation import counted, require, shortened
from .dataset import normalized

_LOGGER = logging.getLogger(__name__)
FOLDERS = {  # of each split, the first that is there
    "train": ("train",),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}
_SPLITS = tuple({name for names in FOLDERS.values() for name in names})
SYSTEM_FOLDERS = (
    frozenset(  # of copies and thumbnails that systems make; hidden ones are theirs too
        ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
    )
)
_LAYOUT = "make train/ and val/ with a folder a class, or write train.csv and val.csv"


def list_labeled_files(
    root: Path, split: str, extensions: Sequence[str], follow_links: bool = False
) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Lists the files of a split, their labels and the classes; opens none of them.

    Args:
        root: Holds folders of classes or lists, as `load_folder` says; one with a folder for each
            class and no split is `"train"`.
        split: `"train"`, `"val"` or `"test"`.
        extensions: Ends of file names that count, such as ".png", in lower case. What a list names
            counts whatever its name ends in.
        follow_links: Take files that are not in the root, where links or lists lead to them.

    Raises:
        ValueError: Something is missing, the classes are not those of the other split, or a file
            is not in the root.
    """
    require(
        root.is_dir(),
        f"{root} is not a folder; pass root, the folder of the data; for a new one, {_LAYOUT}",
    )
    others = "val" if split == "train" else "train"
    source, other = (_find_source(root, name) for name in (split, others))
    if source is None and split == "train" and _holds_classes_alone(root):
        source = root
    if source is None:
        raise ValueError(_missing_split(root, split))
    top = None if follow_links else root
    if source.suffix:
        files = _read_list(root, source, top)
    else:
        files = _read_folder(source, extensions, top)
    classes = sorted({label for _, label in files})
    if other is not None:
        listed = {label for *_, label in _list_rows(root, other)} if other.suffix else ()
        others = sorted(listed or _classes_of(_folders(other)))
        _check_same_classes(source, classes, other, others)
    number = {label: i for i, label in enumerate(classes)}
    return [path for path, _ in files], [number[label] for _, label in files], tuple(classes)


@dataclass(frozen=True)
class ListedFiles:
    """Files of a split; labels are empty where the folder tells none."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]


def list_splits(
    root: Path, extensions: Sequence[str], follow_links: bool = False
) -> tuple[dict[str, ListedFiles], tuple[str, ...]]:
    """Lists the files of every split of a folder, and the classes; opens none of them.

    A folder with no split is one, `"train"`: of folders of classes, or of files without labels if
    some lie in it directly.

    Args:
        root: As in `list_labeled_files`, or without splits.
        extensions: As in `list_labeled_files`.
        follow_links: As in `list_labeled_files`.

    Raises:
        ValueError: As in `list_labeled_files`, or there is no such file.
    """
    require(root.is_dir(), f"{root} is not a folder; pass the one that holds the files")
    sources = {split: _find_source(root, split) for split in FOLDERS}
    first = {source: split for split, source in reversed(sources.items()) if source is not None}
    found: dict[str, ListedFiles] = {}
    classes: tuple[str, ...] = ()
    for split in sorted(first.values(), key=list(FOLDERS).index):
        paths, labels, classes = list_labeled_files(root, split, extensions, follow_links)
        found[split] = ListedFiles(tuple(paths), tuple(labels))
    return (found, classes) if found else _without_splits(root, extensions, follow_links)


def _without_splits(
    root: Path, extensions: Sequence[str], follow_links: bool
) -> tuple[dict[str, ListedFiles], tuple[str, ...]]:
    top, ends = None if follow_links else root, tuple(extensions)
    paths, others = split_by_suffix(walk_files(root, top), ends)
    require(
        bool(paths), f"{root} holds no file that ends in {', '.join(ends)}; pass another folder"
    )
    if any(os.path.dirname(path) == str(root) for path in paths):
        warn_left_out(root, others)
        return {"train": ListedFiles(tuple(paths), ())}, ()
    pairs = _read_folder(root, extensions, top)
    classes = sorted({label for _, label in pairs})
    labels = tuple(classes.index(label) for _, label in pairs)
    return {"train": ListedFiles(tuple(path for path, _ in pairs), labels)}, tuple(classes)


def _find_source(root: Path, split: str) -> Path | None:
    """Returns the list or the folder of a split."""
    paths = [root / f"{name}{suffix}" for name in FOLDERS[split] for suffix in (".csv", "")]
    return next((p for p in paths if (p.is_file() if p.suffix else p.is_dir())), None)


def _holds_classes_alone(root: Path) -> bool:
    """Returns whether a folder has several folders, and none that a split may be called by."""
    folders = _folders(root)
    lists = any((root / f"{name}.csv").is_file() for name in _SPLITS)
    may_be_splits = any(name.lower().startswith(_SPLITS) for name in folders)
    return len(folders) > 1 and not lists and not may_be_splits


def _missing_split(root: Path, split: str) -> str:
    if _holds_classes_alone(root):
        return (
            f"{root} has one part, folders of classes; hold a share of its images out for "
            f"{split!r} in training, with held_out=0.1, or {_LAYOUT}"
        )
    expected = ", ".join(f"{name}/ or {name}.csv" for name in FOLDERS[split])
    others = [name for name in _folders(root) if name not in _SPLITS]
    hint = f"it holds {shortened(others)}: if these are classes, " if others else ""
    return f"{root} has nothing for split {split!r}, expected {expected}; {hint}{_LAYOUT}"


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_of_system(e.name))


def is_of_system(name: str) -> bool:
    """Returns whether a folder is hidden, or one that a system made beside what users have."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _classes_of(folders: Iterable[str]) -> dict[str, str]:
    """Returns the folder of each class, whose name is that of the folder in Unicode's NFC.

    Raises:
        ValueError: The names of two differ in their Unicode form alone, and look the same.
    """
    classes: dict[str, str] = {}
    for folder in folders:
        other = classes.setdefault(normalized(folder), folder)
        require(
            other == folder,
            f"the folders {other!a} and {folder!a} are one name, {normalized(folder)}, "
            "in two forms of Unicode; put their files in one",
        )
    return classes


def _check_same_classes(
    source: Path, classes: Sequence[str], other: Path, others: Sequence[str]
) -> None:
    pairs = (other, set(classes) - set(others)), (source, set(others) - set(classes))
    missing = [f"{path} lacks {shortened(sorted(names))}" for path, names in pairs if names]
    require(
        not missing,
        f"{source} and {other} have different classes: {'; '.join(missing)}; both need the same",
    )


def _read_folder(
    folder: Path, extensions: Sequence[str], top: Path | None
) -> list[tuple[str, str]]:
    classes = _classes_of(_folders(folder))
    require(bool(classes), f"{folder} holds no folder; make one for each class")
    pairs, others, ends = [], list[str](), tuple(extensions)
    for label, name in classes.items():
        files, left_out = split_by_suffix(walk_files(folder / name, top), ends)
        others += left_out
        require(
            bool(files),
            f"{folder / name} holds no file that ends in {', '.join(ends)}; put some there, or "
            "remove the folder",
        )
        pairs += [(path, label) for path in files]
    warn_left_out(folder, others)
    if system := sorted(SYSTEM_FOLDERS & {*os.listdir(folder)}):
        _LOGGER.warning("%s: %s left out, which a system made", folder, shortened(system))
    return pairs


def split_by_suffix(paths: Iterable[str], ends: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns the paths that end in one of these, in lower case, and the others."""
    fitting: list[str] = []
    others: list[str] = []
    for path in paths:
        (fitting if path.lower().endswith(ends) else others).append(path)
    return fitting, others


def warn_left_out(folder: Path, others: Sequence[str]) -> None:
    """Logs how many files of a folder are of other kinds, and of which, if there are any."""
    if others:
        kinds = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in others})
        left_out = counted(len(others), "file")
        _LOGGER.warning(
            "%s: %s of other kinds left out (%s)", *(folder, left_out, shortened(kinds))
        )


def walk_files(folder: Path, top: Path | None) -> list[str]:
    """Lists files in the order of torchvision; each folder once, though links may lead back.

    What is hidden, and folders that systems make, such as `__MACOSX`, are passed over.

    Raises:
        ValueError: A link leads out of the folder `top`; with None it is followed.
    """
    visited, files = set(), {}
    for path, folders, names in os.walk(folder, followlinks=True):
        if top is not None:
            check_inside(path, top)
        stat = os.stat(path)
        key = (stat.st_dev, stat.st_ino)
        folders[:] = [n for n in folders if key not in visited and not is_of_system(n)]
        if key not in visited:
            files[path] = sorted(name for name in names if not name.startswith("."))
        visited.add(key)
    found = [os.path.join(path, name) for path in sorted(files) for name in files[path]]
    if top is not None:
        _check_links(found, top)
    return found


def _check_links(paths: Iterable[str], top: Path) -> None:
    for path in filter(os.path.islink, paths):
        check_inside(path, top)


def check_inside(path: str, top: Path) -> None:
    """Checks that a path stays in a folder when its links are followed.

    Raises:
        ValueError: It does not.
    """
    target, folder = os.path.realpath(path), os.path.realpath(top)
    require(
        os.path.commonpath([target, folder]) == folder,
        f"{path} leads to {target}, which is not in {top}; pass follow_links if it is meant to be "
        "read",
    )


def _read_list(root: Path, path: Path, top: Path | None = None) -> list[tuple[str, str]]:
    rows = _list_rows(root, path)
    _check_listed_twice(path, rows)
    files = [(name, label) for _, name, label in rows]
    if top is not None:
        for folder in {os.path.dirname(name) for name, _ in files}:
            check_inside(folder, top)
        _check_links((name for name, _ in files), top)
    return files


def _list_rows(root: Path, path: Path) -> list[tuple[int, str, str]]:
    """Reads a list: the number of a line, the file, which is there, and its label."""
    (_, header), *rows = _read_rows(path) or [(0, [])]
    require(
        [cell.strip() for cell in header] == ["path", "label"],
        f"{path} does not start with the line path,label; write it there",
    )
    odd = [f"line {line}" for line, cells in rows if len(cells) != 2 or not all(cells)]
    require(not odd, f"{path} has {shortened(odd)} without a path and a label; write path,label")
    require(bool(rows), f"{path} lists no file; write a line path,label for each")
    files = [(line, os.path.join(root, name), normalized(label)) for line, (name, label) in rows]
    gone = [f"{name} (line {line})" for line, name, _ in files if not os.path.isfile(name)]
    require(not gone, f"{path} lists files that do not exist: {shortened(gone)}; correct the paths")
    return files


def _check_listed_twice(path: Path, files: Sequence[tuple[int, str, str]]) -> None:
    """Logs how many files a list names more than once.

    Raises:
        ValueError: It names one with two labels.
    """
    seen: dict[str, tuple[int, str]] = {}
    twice = set[str]()
    for line, name, label in files:
        before, first = seen.setdefault(os.path.normpath(name), (line, label))
        require(
            first == label,
            f"{path} lists {name} as {first!r} (line {before}) and as {label!r} (line {line}); "
            "keep one of them",
        )
        if before != line:
            twice.add(name)
    if twice:
        more, some = counted(len(twice), "file"), shortened(sorted(twice))
        _LOGGER.warning("%s lists %s more than once, which count as often: %s", path, more, some)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of every line that is not empty."""
    try:
        lines = StringIO(read_text(path, "utf-8-sig"), newline="")
        reader = csv.reader(lines, skipinitialspace=True)
        return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, ValueError, csv.Error) as error:
        message = f"{path} cannot be read as a list ({error}); save it as CSV in UTF-8"
        raise ValueError(message) from error
