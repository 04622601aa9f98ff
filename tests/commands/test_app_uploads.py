"""Uploads: what is refused, with which words, and that the rest comes out as the model takes it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearner.commands._inputs import InputPipeline
from tokenlearner.commands.app.uploads import UploadLimits, read_upload, upload_kind

LIMITS = UploadLimits(mib=1, pixels=100_000, frames=40, seconds=10)
PLAIN = ((0.5,), (0.5,), 1.0, 4, 2, False, "made up")
GRAY, CLIPS = InputPipeline((1, 8, 8), *PLAIN), InputPipeline((1, 4, 8, 8), *PLAIN)
_PIXELS = {"mjpeg": "yuvj420p"}
COLOR = InputPipeline((3, 8, 8), (0.5,) * 3, (0.5,) * 3, *PLAIN[2:])


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def make_image(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any
) -> Path:
    width, height = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)  # from black at the left to white
    pixels = np.broadcast_to(ramp[:, None], (height, width, 3)).copy()
    return saved(path, Image.fromarray(pixels).convert(mode), **options)


def make_video(
    path: Path,
    size: tuple[int, int] = (32, 24),
    frames: int = 12,
    codec: str = "mpeg4",
    rate: int = 8,
) -> Path:
    draw, (width, height) = np.random.default_rng(0), size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, _PIXELS.get(codec, "yuv420p")
        for _ in range(frames):
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", empty) + chunk(b"IEND", b"")


def refused(path: Path, intake: InputPipeline = GRAY) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_upload(path, intake, LIMITS)
    return str(caught.value)


# --- the kind of a file -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_an_image_is_known_by_its_content_whatever_its_name(kind: str, tmp_path: Path) -> None:
    assert upload_kind(make_image(tmp_path / "video.mp4", format=kind), LIMITS) == kind


@pytest.mark.parametrize(("end", "kind"), [(".mp4", ".mp4"), (".mov", ".mp4"), (".mkv", ".mkv")])
def test_a_clip_is_known_by_its_content_whatever_its_name(
    end: str, kind: str, tmp_path: Path
) -> None:
    path = make_video(tmp_path / f"clip{end}").rename(tmp_path / "image.png")
    assert upload_kind(path, LIMITS) == kind


def test_an_avi_is_a_clip(tmp_path: Path) -> None:
    assert upload_kind(make_video(tmp_path / "clip.avi"), LIMITS) == ".avi"


@pytest.mark.parametrize(
    "content",
    [b"no image", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0"],
)
def test_what_is_neither_is_refused_with_what_is_expected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    said = "a.png is neither an image nor a clip by its content; choose an image (PNG, JPEG"
    assert refused(path).startswith(said)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "a.png is empty; choose an image" in refused(tmp_path / "a.png")


def test_a_file_that_is_too_large_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(bytes(2**20 + 2**19))
    assert "a.png has 1.5 MiB, 1 are allowed" in refused(path)


def test_a_file_of_the_size_that_is_allowed_is_not_refused_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(bytes(2**20))
    assert "neither" in refused(path)


def test_images_in_the_form_of_videos_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    assert "save it as JPEG or PNG" in refused(path)


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")],
)
@pytest.mark.parametrize("intake", [GRAY, COLOR])
def test_images_of_every_mode_come_out_as_the_model_takes_them(
    mode: str, kind: str, intake: InputPipeline, tmp_path: Path
) -> None:
    seen, said = read_upload(make_image(tmp_path / "a", mode=mode, format=kind), intake, LIMITS)
    assert seen.taken.shape == (1, *intake.size)
    assert (said, seen.name, seen.is_video) == ([], "a", False)
    assert seen.seen[..., :2].mean() < 0.25 < 0.75 < seen.seen[..., -2:].mean()


def test_gray_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(np.tile(ramp, (256, 1))))
    seen, _ = read_upload(path, GRAY, LIMITS)
    torch.testing.assert_close(
        seen.seen[0, 0, 0, [0, 7]], torch.tensor([1, 15]) / 16, atol=0.03, rtol=0
    )


def test_an_image_is_what_the_model_takes_normalized(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("L", (8, 8), 51))
    seen, _ = read_upload(path, GRAY, LIMITS)
    torch.testing.assert_close(seen.seen, torch.full((1, 1, 8, 8), 0.2))
    torch.testing.assert_close(seen.taken, torch.full((1, 1, 8, 8), -0.6))


def test_an_image_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    upright = np.zeros((8, 8), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(np.rot90(upright).copy()), exif=exif)
    seen, _ = read_upload(path, GRAY, LIMITS)
    assert seen.seen[0, 0, :4].min() > 0.9
    assert seen.seen[0, 0, 4:].max() < 0.1


def test_of_an_image_that_moves_the_first_frame_is_taken_and_told(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (255, 0, 128)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    seen, said = read_upload(path, GRAY, LIMITS)
    assert seen.seen.min() > 0.99
    assert said == ["a.gif moves; its first frame of 3 is shown."]


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(8000, 8000))
    assert "bomb.png, 8000 x 8000, has more than the 0.1 million pixels" in refused(path)


def test_what_pil_calls_a_bomb_is_refused_with_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(60_000, 60_000))
    assert "bomb.png has more than the 0.1 million pixels that are allowed" in refused(path)


@pytest.mark.parametrize("size", [(3, 3), (8, 161), (161, 8)])
def test_a_strip_that_would_become_huge_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    told = refused(make_image(tmp_path / "a.png", size))
    assert f"a.png is {size[0]} x {size[1]} pixels, expected sides of 4 or more" in told


def test_a_long_image_that_is_allowed_is_read(tmp_path: Path) -> None:
    seen, _ = read_upload(make_image(tmp_path / "a.png", (160, 8)), GRAY, LIMITS)
    assert seen.taken.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("kept", [30, 300])
def test_an_image_that_is_cut_off_is_refused_with_its_name(kept: int, tmp_path: Path) -> None:
    whole = make_image(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:kept])
    told = refused(tmp_path / "a.jpg")
    assert told.startswith("a.jpg")
    assert "cannot be read" in told


def test_a_model_of_clips_takes_no_image(tmp_path: Path) -> None:
    told = refused(make_image(tmp_path / "a.png"), CLIPS)
    assert told == (
        "a.png is an image, but this model takes clips of 4 frames; choose a clip, or another model"
    )


# --- clips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".mp4", ".mkv", ".avi", ".mov", ".webm"])
def test_clips_come_out_as_the_model_takes_them(end: str, tmp_path: Path) -> None:
    codec = "libvpx" if end == ".webm" else "mpeg4"
    seen, said = read_upload(make_video(tmp_path / f"a{end}", codec=codec), CLIPS, LIMITS)
    assert (seen.taken.shape, seen.seen.shape) == ((1, 1, 4, 8, 8), (4, 1, 8, 8))
    assert (seen.name, seen.is_video) == (f"a{end}", True)
    assert said == ["4 of the clip's 12 frames are looked at, from its middle, 2 apart."]


def test_a_model_of_images_takes_the_frames_of_a_clip_as_a_batch(tmp_path: Path) -> None:
    seen, _ = read_upload(make_video(tmp_path / "a.mp4"), GRAY, LIMITS)
    assert seen.taken.shape == (4, 1, 8, 8)


def test_a_clip_that_is_too_short_says_so(tmp_path: Path) -> None:
    _, said = read_upload(make_video(tmp_path / "a.mp4", frames=3), CLIPS, LIMITS)
    assert said == ["The clip has 3 frames; its last one is repeated up to 4."]


def test_a_clip_of_too_many_frames_is_refused(tmp_path: Path) -> None:
    told = refused(make_video(tmp_path / "a.mp4", frames=41), CLIPS)
    assert told == "a.mp4 has more than 40 frames, which is the most allowed; cut it"


def test_a_clip_of_as_many_frames_as_allowed_is_read(tmp_path: Path) -> None:
    _, said = read_upload(make_video(tmp_path / "a.mp4", frames=40), CLIPS, LIMITS)
    assert "40 frames" in said[0]


def test_a_clip_that_is_too_long_is_refused(tmp_path: Path) -> None:
    told = refused(make_video(tmp_path / "a.mp4", frames=12, rate=1), CLIPS)
    assert told == "a.mp4 lasts 12 seconds, 10 are allowed; cut it"


def test_a_clip_of_too_large_frames_is_refused(tmp_path: Path) -> None:
    told = refused(make_video(tmp_path / "a.mp4", (400, 300), frames=2), CLIPS)
    assert "a.mp4, 400 x 300, has more than the 0.1 million pixels" in told


def test_a_clip_without_images_is_refused(tmp_path: Path) -> None:
    assert refused(sound(tmp_path / "a.mp4"), CLIPS) == "a.mp4 has no images, only sound"


def test_a_damaged_clip_is_refused_with_its_name(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[:200])
    assert refused(tmp_path / "a.mp4", CLIPS).startswith("a.mp4 cannot be read as a clip")


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
    assert refused(path, CLIPS) == "a.avi changes its size on the way; choose another clip"


def test_nothing_of_an_upload_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    read_upload(make_video(tmp_path / "a.mp4"), CLIPS, LIMITS)
    read_upload(make_image(tmp_path / "a.png"), GRAY, LIMITS)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    refused(tmp_path / "b.mp4", CLIPS)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("name", ["mib", "pixels", "frames", "seconds"])
def test_a_limit_below_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected an integer of 1 or more"):
        UploadLimits(**{name: 0})
