"""Uploads: what is refused, and that the rest comes out as the model takes it."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from files import make_image, make_video, png_bomb
from PIL import Image

from tokenlearner.commands._inputs import InputPipeline
from tokenlearner.commands.app.uploads import IMAGE_FORMATS, UploadLimits, read_upload
from tokenlearner.utils.preprocessing import Preprocessing

LIMITS = UploadLimits(max_upload_mib=1, max_pixels=100_000, max_frames=40, max_seconds=10)
REST = (4, 2, False, "made up")
GRAY = InputPipeline((1, 8, 8), Preprocessing((0.5,), (0.5,), 1.0), *REST)
COLOR = InputPipeline((3, 8, 8), Preprocessing((0.5,) * 3, (0.5,) * 3, 1.0), *REST)
CLIPS = InputPipeline((1, 4, 8, 8), Preprocessing((0.5,), (0.5,), 1.0), *REST)


def refused(path: Path, pipeline: InputPipeline = GRAY) -> str:
    """The message, which names the file and no folder."""
    with pytest.raises(ValueError, match=path.name) as caught:
        read_upload(path, pipeline, LIMITS)
    message = str(caught.value)
    assert str(path.parent) not in message
    assert "/tmp" not in message
    return message


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_an_image_is_known_by_its_content_whatever_its_name(kind: str, tmp_path: Path) -> None:
    image, _ = read_upload(make_image(tmp_path / "video.mp4", format=kind), GRAY, LIMITS)
    assert not image.is_video


@pytest.mark.parametrize("end", [".mp4", ".mkv", ".avi", ".mov", ".webm"])
def test_a_clip_is_known_by_its_content_whatever_its_name(end: str, tmp_path: Path) -> None:
    codec = "libvpx" if end == ".webm" else "mpeg4"
    path = make_video(tmp_path / f"clip{end}", codec=codec).rename(tmp_path / "image.png")
    clip, remarks = read_upload(path, CLIPS, LIMITS)
    assert (clip.model_input.shape, clip.pixels.shape) == ((1, 1, 4, 8, 8), (4, 1, 8, 8))
    assert (clip.name, clip.is_video) == ("image.png", True)
    assert remarks == ["4 of the clip's 12 frames are used, from its middle, 2 apart."]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"no image", bytes(2**20), bytes(2**20 + 1), b"\0\0\0\x18ftypheic" + bytes(20)),
        *(b"\x89PNG\r\n\x1a\nno image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html><script>alert(1)</script></html>",
    ],
)
def test_what_is_neither_an_image_nor_a_clip_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    message = refused(tmp_path / "a.png")
    assert ("MiB" in message) == (len(content) in (0, 2**20 + 1))


def test_a_list_of_files_of_the_server_is_not_followed(tmp_path: Path) -> None:
    other = make_video(tmp_path / "other.mp4")
    for text in ("#EXTM3U\n#EXTINF:1,\n{}\n", "ffconcat version 1.0\nfile '{}'\n"):
        (tmp_path / "a.mp4").write_text(text.format(other))
        refused(tmp_path / "a.mp4", CLIPS)


def test_nothing_of_an_upload_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    read_upload(make_video(tmp_path / "a.mp4"), CLIPS, LIMITS)
    read_upload(make_image(tmp_path / "a.png"), GRAY, LIMITS)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    refused(tmp_path / "b.mp4", CLIPS)
    assert list(room.iterdir()) == []


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")],
)
@pytest.mark.parametrize("pipeline", [GRAY, COLOR])
def test_images_of_every_mode_come_out_as_the_model_takes_them(
    mode: str, kind: str, pipeline: InputPipeline, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "a", mode=mode, format=kind)
    image, remarks = read_upload(path, pipeline, LIMITS)
    assert image.model_input.shape == (1, *pipeline.size)
    assert (remarks, image.name) == ([], "a")
    assert image.pixels[..., :2].mean() < 0.25 < 0.75 < image.pixels[..., -2:].mean()


def test_an_image_is_normalized_and_gray_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "b.png")
    image, _ = read_upload(tmp_path / "b.png", GRAY, LIMITS)
    torch.testing.assert_close(image.pixels, torch.full((1, 1, 8, 8), 0.2))
    torch.testing.assert_close(image.model_input, torch.full((1, 1, 8, 8), -0.6))
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    image, _ = read_upload(tmp_path / "a.png", GRAY, LIMITS)
    ends = image.pixels[0, 0, 0, [0, 7]]
    torch.testing.assert_close(ends, torch.tensor([1, 15]) / 16, atol=0.03, rtol=0)


def test_an_image_is_upright_and_of_an_animated_one_the_first_frame(tmp_path: Path) -> None:
    upright = np.zeros((8, 8), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    image, _ = read_upload(tmp_path / "a.png", GRAY, LIMITS)
    assert image.pixels[0, 0, :4].min() > 0.9
    assert image.pixels[0, 0, 4:].max() < 0.1
    frames = [Image.new("L", (8, 8), value) for value in (255, 0, 128)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image, remarks = read_upload(tmp_path / "a.gif", GRAY, LIMITS)
    assert image.pixels.min() > 0.99
    assert remarks == ["a.gif is animated; its first frame is shown."]


@pytest.mark.parametrize("side", [400, 8000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bomb(side, side))
    assert "more than the 0.1 million pixels" in refused(tmp_path / "bomb.png")


def test_a_strip_that_would_become_huge_or_an_image_that_is_cut_off_is_refused(
    tmp_path: Path,
) -> None:
    whole = make_image(tmp_path / "a.jpg").read_bytes()
    for kept in (30, 300):
        (tmp_path / "a.jpg").write_bytes(whole[:kept])
        refused(tmp_path / "a.jpg")
    for size in ((3, 3), (8, 161), (161, 8)):
        assert f"{size[0]} x {size[1]}" in refused(make_image(tmp_path / "a.png", size))
    image, _ = read_upload(make_image(tmp_path / "a.png", (160, 8)), GRAY, LIMITS)
    assert image.model_input.shape == (1, 1, 8, 8)  # as long as is allowed


# --- clips --------------------------------------------------------------------------------------


def test_clips_of_few_or_many_frames_are_read_and_are_a_batch_of_images(tmp_path: Path) -> None:
    for frames, expected in ((3, "repeated up to 4"), (40, "40 frames")):
        _, [remark] = read_upload(make_video(tmp_path / "a.mp4", frames=frames), CLIPS, LIMITS)
        assert expected in remark
    clip, _ = read_upload(tmp_path / "a.mp4", GRAY, LIMITS)
    assert clip.model_input.shape == (4, 1, 8, 8)


def test_a_clip_above_a_limit_or_without_images_is_refused(tmp_path: Path) -> None:
    limits: dict[str, dict[str, Any]] = {
        "more than the 40 frames": {"frames": 41},
        "12 seconds, 10": {"frames": 12, "rate": 1},
        "more than the 0.1 million pixels": {"frames": 2, "size": (400, 300)},
    }
    for expected, kwargs in limits.items():
        assert expected in refused(make_video(tmp_path / "a.mp4", **kwargs), CLIPS)
    assert "takes clips of 4 frames" in refused(make_image(tmp_path / "a.png"), CLIPS)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "only sound" in refused(tmp_path / "a.mp4", CLIPS)


def test_a_clip_whose_frames_grow_on_the_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"  # mjpeg: each frame has its own size
    make_video(path, codec="mjpeg", frames=3)
    whole, large = path.read_bytes(), io.BytesIO()
    Image.new("RGB", (64, 48)).save(large, "JPEG")
    start = whole.index(b"\xff\xd8", whole.index(b"\xff\xd8") + 2)  # of the second frame
    at = start - 4
    (size,) = struct.unpack("<I", whole[at:start])
    assert len(large.getvalue()) <= size
    path.write_bytes(whole[:start] + large.getvalue().ljust(size, b"\0") + whole[start + size :])
    assert "changes its size" in refused(path, CLIPS)
