"""Tar files of WebDataset: the files of each image by the ends of their names."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, cast

from ..utils.files import check_regular
from ..utils.limits import check_unpacked
from ..utils.validation import require
from .dataset import UnreadableFile

_OF_TOOLS = re.compile(
    r"(^|/)(\._[^/]*|__[^/]*__/.*|(__MACOSX|@eaDir)/.*)$"
)  # of systems and WebDataset
_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_MAX_RATIO = 100  # of what a tar file unpacks to, to its size
_TAR_ERRORS = (OSError, EOFError, ValueError, RecursionError, tarfile.TarError)


def read_tar(path: str) -> Iterator[tuple[str, dict[str, bytes] | UnreadableFile]]:
    """Yields the files of each image by the ends of their names; at last what cannot be read.

    Files that follow one another belong together if their names without the last suffix are equal,
    or one goes on with a dot behind the other: 7.jpg, 7.cls and 7.mask.png.
    """
    key, group, unreadable = "", dict[str, bytes](), []
    try:
        check_regular(path)
        with (
            open(path, "rb") as packed,
            tarfile.open(fileobj=cast(Any, _Unpacked(path, packed)), mode="r|") as opened,
        ):
            tar: Any = opened
            for entry in tar:
                sparse = f"{entry.name} is a sparse file; pack it without --sparse"
                require(not entry.issparse(), sparse)
                tar.members = []  # it would keep all of them
                check_unpacked(f"{entry.name} has", entry.size)
                stem, end = os.path.splitext(entry.name)
                if not end or _OF_TOOLS.search(entry.name):
                    continue
                if entry.islnk() or entry.issym():
                    reason = f"{path} holds {entry.name} as a link; pack it with --dereference"
                    unreadable.append(f"{reason} --hard-dereference")
                if not entry.isreg():
                    continue
                ends = f"{stem}.", f"{key}."
                if group and (ends[0].startswith(ends[1]) or ends[1].startswith(ends[0])):
                    key = min(key, stem, key=len)
                else:
                    if group:
                        yield key, _by_end(key, group)
                    key, group = stem, {}
                if entry.name in group:
                    unreadable.append(f"{path} holds {entry.name} twice")
                else:
                    group[entry.name] = tar.extractfile(entry).read()
    except (*_TAR_ERRORS, zlib.error, lzma.LZMAError) as error:
        unreadable.append(f"{path} cannot be read to its end ({error})")
    if group:
        yield key, _by_end(key, group)
    for reason in unreadable:
        yield "", UnreadableFile(reason)


def _by_end(key: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name[len(key) + 1 :].lower(): content for name, content in files.items()}


class _Unpacked:
    """What a tar file unpacks to, up to `_MAX_RATIO` times its size."""

    def __init__(self, path: str, packed: IO[bytes]):
        start = packed.peek(2)[:2]  # pyright: ignore[reportAttributeAccessIssue]
        self._file: Any = _COMPRESSED[start](packed) if start in _COMPRESSED else packed
        self._left = max(_MAX_RATIO * os.path.getsize(path), 2**26)

    def read(self, size: int) -> bytes:
        """Reads on."""
        content = self._file.read(size)
        self._left -= len(content)
        ratio = f"it unpacks to more than {_MAX_RATIO} times its size, as images do not"
        require(self._left >= 0, ratio)
        return content
