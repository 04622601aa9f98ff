"""Files of users: what is no plain file, too large, or would open or start another thing."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from files import make_image, make_video
from PIL import Image, UnidentifiedImageError

from tokenlearner.utils.files import check_downloaded, open_image, open_video, read_json, read_text
from tokenlearner.utils.limits import VARIABLE

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
OPENERS: list[Callable[[Any], Any]] = [
    *(open_image, open_video, read_text, read_json, check_downloaded),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("opened", OPENERS)
def test_only_files_are_opened(opened: Callable[[Any], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="expected a file"):
            opened(path)


def test_no_image_starts_a_program(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(EPS)
    with Image.open(tmp_path / "0.png") as image:
        assert image.format == "EPS"  # whatever its name
    for file in (tmp_path / "0.png", io.BytesIO(EPS)):
        with pytest.raises(UnidentifiedImageError):
            open_image(file)
    make_image(tmp_path / "1.png")
    with open_image(tmp_path / "1.png") as image:
        assert image.size == (40, 30)


@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_of_thousands_of_scans_is_refused(progressive: bool) -> None:
    Image.new("L", (4000, 4000), 128).save(file := io.BytesIO(), "JPEG", progressive=progressive)
    content = file.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    assert open_image(io.BytesIO(content)).size == (4000, 4000)
    with pytest.raises(ValueError, match="scans"):
        open_image(io.BytesIO(content[:-2] + last * 2000))


def test_no_video_opens_another_file(tmp_path: Path) -> None:
    secret = make_video(tmp_path / "secret.mp4", (16, 16), 4)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    lists = {"hls": playlist, "ffconcat": "ffconcat version 1.0\nfile {}\n"}
    for name, text in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text.format(secret.name))
        with pytest.raises((OSError, av.FFmpegError)):
            open_video(path)
    for end in ("mp4", "mkv", "avi", "mov", "mpg"):
        codec = "mpeg1video" if end == "mpg" else "mpeg4"
        path = make_video(tmp_path / f"x.{end}", (16, 16), 4, codec, rate=25)
        shutil.copy(path, tmp_path / "any.name")
        with open_video(tmp_path / "any.name") as container:
            assert container.streams.video[0].width == 16


def test_text_is_bounded_and_nested_as_deeply_as_python_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested"):
        read_json(path)
    monkeypatch.setenv(VARIABLE, "0.0001")
    with pytest.raises(ValueError, match=VARIABLE):
        read_json(path)
