"""Opens files of users: regular ones, of bounded size, in formats that start no other program."""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .limits import check_unpacked
from .validation import require

if TYPE_CHECKING:
    from av.container import InputContainer
    from PIL import Image

# FFmpeg's names. None of them is a playlist or a list of other files, which would be opened too.
VIDEO_CONTAINERS = "mov,matroska,avi,mpeg,mpegvideo"
_STARTS_PROGRAMS = {"EPS", "WMF"}  # PIL gives them to Ghostscript and to Windows
_HAS_NO_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG"}  # but is recognized by PIL
_SCANS, _SCANNED = 20, 2**31  # of a JPEG, and pixels in all of more scans, which take seconds
_IN_PLACE_OF_A_FILE = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
    **dict.fromkeys((b"<!doctype", b"<html"), "a web page"),
}


def check_regular(path: str | Path) -> None:
    """Checks that a path is a file with content; opening a pipe or a device may wait for ever.

    Raises:
        OSError: It is a folder, a pipe, a socket or a device, or it is not there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OSError(f"it is {kind}, expected a file")


def check_downloaded(path: Path) -> None:
    """Checks that a file is not what often comes in its place.

    Raises:
        OSError: As in `check_regular`.
        ValueError: It is a pointer of Git LFS, or a web page.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(32).lower()
    if found := next((w for sign, w in _IN_PLACE_OF_A_FILE.items() if start.startswith(sign)), ""):
        raise ValueError(f"{path} is {found}; download the file again")


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Reads a text file.

    Raises:
        OSError: As in `check_regular`.
        ValueError: It is larger than `limits.max_unpacked_bytes()`, or not in the encoding.
    """
    check_regular(path)
    check_unpacked(f"{path} has", path.stat().st_size)
    return path.read_text(encoding=encoding, errors=errors)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: As in `check_regular`.
        ValueError: As in `read_text`, or it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def read_torch(file: str | Path | BytesIO) -> Any:
    """Reads what `torch.save` wrote to the CPU, and runs no code of it.

    Raises:
        ValueError: It is an archive that unpacks to more than its size, which torch's do not.
        Exception: Of many kinds; torch raises them on damaged files, and on code.
    """
    import torch

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = sum(entry.compress_size for entry in entries)
            plain = all(entry.file_size == entry.compress_size for entry in entries)
            size = len(file.getbuffer()) if isinstance(file, BytesIO) else os.path.getsize(file)
        require(plain and packed <= size, "its files are compressed, as torch's are not")
    if isinstance(file, BytesIO):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@cache
def image_formats() -> tuple[str, ...]:
    """Returns PIL's names of the formats that it decodes by itself."""
    from PIL import Image

    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in _STARTS_PROGRAMS | _HAS_NO_DECODER)


def open_image(file: str | Path | IO[bytes], formats: Sequence[str] = ()) -> Image.Image:
    """Opens an image, whatever its name ends in; it is not decoded yet.

    Args:
        file: A path, or an open file.
        formats: PIL's names of those that are taken; all of `image_formats()` if empty.

    Raises:
        OSError: As in `check_regular`, or it is of no such format.
        ValueError: It is a JPEG of far too many scans.
        Exception: Of many kinds; PIL raises them on damaged files.
    """
    from PIL import Image

    if isinstance(file, str | Path):
        check_regular(file)
    image = Image.open(file, formats=tuple(formats) or image_formats())
    if image.format in ("JPEG", "MPO"):
        try:
            _check_scans(image)
        except ValueError:
            image.close()
            raise
    return image


def _check_scans(image: Any) -> None:
    """Checks that a JPEG does not tell its pixels again and again, in as many scans as it likes."""
    place = image.fp.tell()
    image.fp.seek(0)
    scans = image.fp.read().count(b"\xff\xda")
    image.fp.seek(place)
    require(
        scans <= _SCANS or scans * math.prod(image.size) <= _SCANNED,
        f"it has {scans} scans, JPEGs have up to {_SCANS}; save it again",
    )


def open_video(path: str | Path, containers: str = VIDEO_CONTAINERS) -> InputContainer:
    """Opens a video, whatever its name ends in; FFmpeg opens nothing beside this file.

    Args:
        path: The file.
        containers: FFmpeg's names of those that are taken, with commas.

    Raises:
        OSError: As in `check_regular`, or it is in no such container.
        av.FFmpegError: It is damaged.
    """
    import av

    check_regular(path)
    options = {"format_whitelist": containers, "protocol_whitelist": "file"}
    try:
        return av.open(str(path), metadata_errors="ignore", container_options=options)
    except av.ArgumentError as error:  # of the whitelist
        raise OSError(f"it is no video in one of the containers {containers}") from error
