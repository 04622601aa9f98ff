"""Atomic writes, JSON files, unused paths, locks, and checks of places to write to."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = ".lock"  # file in a folder that a process holds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST),
)


_FOLDERS = re.compile(r"""(?<![^\s'"(=])~?(/[^/\s'"]+)+/(?=[^/\s'"])""")  # of an absolute path


class WriteError(OSError):
    """A file that cannot be written, as on a full disk; what was there before is left."""

    def __init__(self, number: int, path: str | Path):
        super().__init__(number, os.strerror(number), str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` when the block ends.

    The folder is created. After an error the old file is left, and no temporary one.

    Raises:
        WriteError: The system refuses to write, or no space is left.
    """
    path = Path(path).expanduser()
    stem = path.stem if len(os.fsencode(path.name)) < 200 else f"{hash(path.name):x}"
    temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if (number := system_error(error)) in _REFUSED:
            raise WriteError(number, path) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def system_error(error: BaseException | None) -> int:
    """Returns the system's number of an error or of its cause, 0 if it has none."""
    while error:
        if number := getattr(error, "errno", None):
            return number
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
            return int(found[1])
        error = error.__cause__ or error.__context__
    return 0


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON; raises ValueError for NaN and infinity."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        # What is no UTF-8, as in names of files, becomes JSON's own escapes.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def unique_path(path: str | Path) -> Path:
    """Returns `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    path, number = Path(path).expanduser(), 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def without_folders(value: Any, root: str | Path = "") -> Any:
    """Returns text, or what JSON holds, without the folders of absolute paths: others will see it.

    Paths in `root` are relative to it. Subclasses of str, such as HTML that is ready, are left as
    they are.
    """
    if isinstance(value, dict):
        return {key: without_folders(item, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item, root) for item in value]
    if type(value) is not str:
        return value
    if os.path.isabs(root):
        value = value.replace(os.path.join(root, ""), "")
    return f"…/{Path(value).name}" if os.path.isabs(value) else _FOLDERS.sub("…/", value)


def is_model_path(name: str) -> bool:
    """Returns whether the name of a model is a path, or a place on the Hub."""
    return "/" in name or name.endswith(".safetensors") or Path(name).expanduser().exists()


def check_output_folder(path: str | Path, name: str = "out", size: int = 0) -> Path:
    """Checks that files of `size` bytes can be written to a folder, which may have to be made.

    Returns it, with `~` expanded.

    Raises:
        ValueError: It is a file or in one, cannot be written to, or has too little space.
    """
    folder = Path(path).expanduser()
    _check_place(folder, f"{name} is {str(path)!r}", size)
    return folder


def check_output_file(path: str | Path, name: str = "out", size: int = 0) -> Path:
    """Checks that a file of `size` bytes can be written, whose folder may have to be made.

    Returns it, with `~` expanded.

    Raises:
        ValueError: It is a folder, or as in `check_output_folder`.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, which is a folder; name a file")
    _check_place(file.parent, f"{name} is {str(path)!r}", size)
    return file


def _check_place(folder: Path, given: str, size: int) -> None:
    """Tries to write in a folder, or in the one that it has to be made in."""
    present = next(
        place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)
    )
    if not present.is_dir():
        raise ValueError(f"{given}, but {present} is no folder; pass another place")
    try:
        with tempfile.TemporaryFile(dir=present):
            free = shutil.disk_usage(present).free
    except OSError as error:
        reason = error.strerror
        raise ValueError(
            f"{given}, but {present} cannot be written to ({reason}); pass another place"
        ) from error
    if size > free:
        raise ValueError(
            f"{given}, and about {_mib(size)} are to be written there, but {_mib(free)} are free; "
            "make room, or pass another place"
        )


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Holds a folder, which is made, for this process while the block or the process lasts.

    The file `.lock` stays: a process that has just opened it would else hold a file that is gone,
    beside one that makes it anew. It names the holder, and is empty afterwards.

    Raises:
        ValueError: Another process holds it; it is named.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by {_owner(file)}; wait until it ends, or pass another folder"
        ) from error
    try:
        with suppress(OSError):  # a full disk; the lock holds without the name
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            file.write_text("")
        lock.release()


def _owner(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        return "another process"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
