"""Videos in files: which frames a clip has, that they are the right ones, what broken files say."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from files import make_image, make_video
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from tokenlearner.data import video_folder as videos
from tokenlearner.data.config import DataConfig
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.factory import load_data
from tokenlearner.data.video_folder import VideoFolderDataset
from tokenlearner.utils.limits import SECONDS, VARIABLE

N = 30  # frames of a numbered video
SMALL = {"img_size": 8, "frames": 4, "stride": 2}


def write_video(
    path: Path,
    images: Sequence[np.ndarray],
    codec: str = "ffv1",
    pixels: str = "gray",
    *,
    rate: int = 25,
    times: Sequence[int] | None = None,
    turned: int = 0,
    muxing: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """A video of `h w 3` images, shown at `rate`, or at those milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxing) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = pixels, 12
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turned:
            stream.set_display_rotation(turned)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(path: Path, n: int = N, size: tuple[int, int] = (8, 10), **options: Any) -> Path:
    """A video without loss: every byte of frame i is i."""
    return write_video(path, [np.full((*size, 3), i, np.uint8) for i in range(n)], **options)


def noisy(n: int = 40, size: tuple[int, int] = (32, 48)) -> list[np.ndarray]:
    """Images that differ from each other everywhere, and yet follow one another."""
    rng = np.random.default_rng(0)
    waves = rng.uniform(0, 255, (2, *size, 3))
    return [
        np.clip(waves[0] * (i / n) + waves[1] * (1 - i / n) + 9 * (i % 3), 0, 255).astype(np.uint8)
        for i in range(n)
    ]


def video_set(paths: Sequence[Path], split: str = "test", **wanted: Any) -> VideoFolderDataset:
    """A data set of those files, each of the same class."""
    asked = DataConfig(**{**SMALL, "in_chans": 3, **wanted})
    labels = torch.arange(len(paths)) % 2
    return VideoFolderDataset("videos", split, tuple(map(str, paths)), labels, ("a", "b"), asked)


def numbers(clip: Tensor) -> list[int]:
    """Which frames of a numbered video they are."""
    frames = clip.flatten(1)
    assert bool((frames == frames[:, :1]).all())
    return frames[:, 0].tolist()


def all_frames(path: Path) -> np.ndarray:
    """Every frame, decoded from the start."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("numbered") / "long.mkv")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two training videos and one other."""
    for split, names in {"train": "xy", "val": "z"}.items():
        for label in ("jump", "run"):
            for name in names:
                numbered(tmp_path / split / label / f"{name}.mkv", n=12)
    return tmp_path


# Which frames


def test_a_training_clip_lies_wherever_it_fits_and_nowhere_else(
    long_video: Path,
) -> None:
    data = video_set([long_video], "train", frames=5, stride=6)  # 25 frames of 30
    assert np.diff(numbers(data.load(0))).tolist() == [6, 6, 6, 6]
    starts = Counter(data._choose(N)[0, 0].item() for _ in range(600))
    assert sorted(starts) == [0, 1, 2, 3, 4, 5]
    assert min(starts.values()) > 60
    data = video_set([long_video], "train", frames=5, stride=0)  # one frame of each part
    drawn = np.array([data._choose(N)[0].tolist() for _ in range(200)])
    for i, part in enumerate(drawn.T):
        assert sorted(set(part)) == list(range(6 * i, 6 * i + 6))
    assert len(set(np.diff(numbers(data.load(0))))) > 1


@pytest.mark.parametrize("stride", [0, 2])
def test_torch_s_seed_says_which_clip_is_drawn(long_video: Path, stride: int) -> None:
    data = video_set([long_video], "train", stride=stride)

    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return numbers(data.load(0))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 2


@pytest.mark.parametrize(
    ("video", "wanted", "expected"),
    [
        ({}, {"frames": 4, "stride": 2}, [12, 14, 16, 18]),
        ({}, {"frames": 1, "stride": 2}, [15]),
        ({}, {"frames": 3, "stride": 0}, [5, 15, 25]),
        ({}, {"frames": 30, "stride": 0}, list(range(30))),
        ({}, {"frames": 30, "stride": 1}, list(range(30))),
        # Views lie from the start to the end.
        ({}, {"frames": 2, "stride": 2, "views": 3}, [[0, 2], [14, 16], [27, 29]]),
        ({}, {"frames": 2, "stride": 29, "views": 2}, [[0, 29], [0, 29]]),
        ({}, {"frames": 3, "stride": 0, "views": 2}, [[2, 12, 22], [7, 17, 27]]),
        # A short video goes on with its last frame.
        ({"n": 5}, {}, [0, 2, 4, 4]),
        ({"n": 5}, {"split": "train"}, [0, 2, 4, 4]),
        *(
            ({"n": 1}, {"split": split, "stride": stride}, [0, 0, 0, 0])
            for split in ("train", "test")
            for stride in (0, 3)
        ),
        # Frames are counted, whatever their rate or times, even times that they share.
        ({"rate": 1}, {}, [12, 14, 16, 18]),
        ({"rate": 60}, {}, [12, 14, 16, 18]),
        ({"times": [(i * i + 1) * 7 for i in range(N)]}, {"frames": 3, "stride": 9}, [6, 15, 24]),
        ({"times": [i // 2 * 40 for i in range(N)]}, {"frames": 3, "stride": 9}, [6, 15, 24]),
    ],
)
def test_clips_lie_at_fixed_places(
    tmp_path: Path, video: dict[str, Any], wanted: dict[str, Any], expected: list[Any]
) -> None:
    clips = video_set([numbered(tmp_path / "video.mkv", **video)], **wanted).load(0)
    assert (numbers(clips) if clips.ndim == 4 else list(map(numbers, clips))) == expected


@pytest.mark.parametrize(
    ("split", "crops", "views", "stride", "shape"),
    [
        ("test", 1, 1, 2, (4, 3, 8, 10)),
        ("test", 1, 2, 0, (2, 4, 3, 8, 10)),
        ("test", 3, 1, 2, (1, 4, 3, 8, 10)),
        ("train", 3, 4, 0, (4, 3, 8, 10)),
        ("train", 1, 1, 2, (4, 3, 8, 10)),
    ],
)
def test_a_clip_is_bytes_with_views_in_front_and_drawn_only_for_training(
    long_video: Path, split: str, crops: int, views: int, stride: int, shape: tuple[int, ...]
) -> None:
    before = torch.get_rng_state()
    clip = video_set([long_video], split, crops=crops, views=views, stride=stride).load(0)
    assert (clip.shape, clip.dtype) == (shape, torch.uint8)
    assert torch.equal(torch.get_rng_state(), before) == (split == "test")


# That they are the right ones

KINDS = {
    "b_frames.mp4": ("libx264", {"bf": "3"}),
    "open_gops.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1"}),
    "b_frames.mkv": ("libx264", {"bf": "3"}),
    "hidden.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "simple.avi": ("mpeg4", {"bf": "2"}),
    "b_frames.mpg": ("mpeg2video", {"bf": "2"}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossy video of each kind."""
    codec, options = KINDS[request.param]
    path = tmp_path_factory.mktemp("kind") / request.param
    return write_video(path, noisy(), codec, "yuv420p", **options)


def images_of(path: Path, wanted: Sequence[int]) -> np.ndarray:
    with ExitStack() as files:
        return videos._Video(files, str(path)).images(wanted, "rgb24").permute(0, 2, 3, 1).numpy()


def test_frames_alone_and_together_are_those_decoded_from_the_start(kind: Path) -> None:
    truth = all_frames(kind)
    assert len(truth) == 40
    together = [[0, 13, 26, 39], [37, 38, 39, 39], [20, 3, 20, 5]]
    for wanted in [*([i] for i in range(40)), *together]:
        assert np.array_equal(images_of(kind, wanted), truth[wanted]), wanted


@pytest.mark.parametrize(("wanted", "most"), [([39], 12), ([0, 38], 14)], ids=str)
def test_frames_far_from_the_wanted_ones_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[int], most: int
) -> None:
    path, decoded = write_video(tmp_path / "video.mp4", noisy(), "libx264", "yuv420p"), []
    real = videos._Video._decoded

    def counting(self: Any, container: Any) -> Iterator[tuple[int, Any]]:
        for time, frame in real(self, container):
            decoded.append(time)
            yield time, frame

    monkeypatch.setattr(videos._Video, "_decoded", counting)
    images_of(path, wanted)
    assert len(decoded) <= most


def test_odd_heights_and_widths_are_whole_and_colors_stay_in_order(tmp_path: Path) -> None:
    images = noisy(3, (33, 47))
    path = write_video(tmp_path / "video.mkv", images, pixels="bgr0")
    clip = video_set([path], frames=3, stride=1).load(0)
    assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), np.stack(images))


@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV is too old"
)
@pytest.mark.parametrize(("turned", "times"), [(90, 1), (180, 2), (-90, 3)])
def test_a_video_that_is_marked_as_turned_is_turned_upright(
    tmp_path: Path, turned: int, times: int
) -> None:
    write: Callable[..., Path] = write_video
    made = [
        write(tmp_path / f"{degrees}.mp4", noisy(3), "libx264", "yuv420p", turned=degrees)
        for degrees in (0, turned)
    ]
    plain, upright = (video_set([path], frames=3, stride=1).load(0) for path in made)
    assert torch.equal(upright, torch.rot90(plain, times, (2, 3)))


# What a model is given


def test_a_plain_clip_is_float32_of_the_shape_that_is_told_and_normalized(
    long_video: Path,
) -> None:
    data = video_set([long_video])
    clip = data.eval_transform(data.load(0))
    mean, std = torch.tensor([data.mean, data.std])[..., None, None, None]
    expected = (torch.tensor([12, 14, 16, 18])[:, None, None] / 255 - mean) / std
    assert clip.shape == data.shape == (3, 4, 8, 8)
    torch.testing.assert_close(clip, expected.expand(data.shape))
    assert (data.mean, data.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    gray = video_set([long_video], in_chans=1)
    assert gray.mean == pytest.approx([np.mean(IMAGENET_DEFAULT_MEAN)])
    assert gray.load(0)[:, 0, 0, 0].tolist() == pytest.approx([12, 14, 16, 18], abs=2)
    assert gray.eval_transform(gray.load(0)).shape == gray.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (37, 81), (100, 100)])
def test_frames_are_resized_and_cropped_as_timm_does_with_images(size: tuple[int, int]) -> None:
    raw = torch.from_numpy(np.stack(noisy(2, size))).permute(0, 3, 1, 2)
    data = video_set([], img_size=28, crop_pct=0.875)
    timms: Any = create_transform(28, interpolation="bilinear", crop_pct=0.875)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in raw]
    expected = torch.stack([timms(image) for image in images], 1)
    torch.testing.assert_close(data.eval_transform(raw), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("tall", [False, True])
def test_three_crops_lie_from_one_end_of_the_longer_side_to_the_other(tall: bool) -> None:
    columns = torch.arange(24, dtype=torch.uint8).expand(2, 3, 8, 24)
    data = video_set([], crops=3, img_size=8)
    clips = data.eval_transform((columns.transpose(2, 3) if tall else columns)[None])
    longer = (clips[:, 0, 0, :, 0] if tall else clips[:, 0, 0, 0]) * data.std[0] + data.mean[0]
    assert (longer * 255).round().int().tolist() == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 24)),
    ]


# Many of them


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_every_video_once_and_in_order(tmp_path: Path, workers: int) -> None:
    paths = [numbered(tmp_path / f"{i}.mkv", n=i + 1) for i in range(5)]
    data = video_set(paths, frames=1, workers=workers)
    seen = [(images, labels.tolist()) for images, labels in data.batches(2)]
    assert [labels for _, labels in seen] == [[0, 1], [0, 1], [0]]
    middles = torch.cat([images for images, _ in seen])[:, 0, 0, 0, 0]
    expected = (torch.tensor([0.0, 1, 1, 2, 2]) / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(middles, expected)
    with pytest.raises(ValueError, match="batch_size is 0"):
        data.batches(0)


def test_batches_have_views_behind_them_and_of_a_training_split_are_always_the_same(
    long_video: Path,
) -> None:
    data, before = video_set([long_video] * 2, "train", views=2, crops=3), torch.get_rng_state()
    first, second = (next(data.batches(2))[0] for _ in range(2))
    assert first.shape == (2, 6, 3, 4, 8, 8)  # the crops of a view follow one another
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


# Broken files


def sound(path: Path, has_video: bool) -> None:
    """Sound, perhaps with a video that has no frames."""
    with av.open(str(path), "w") as container:
        if has_video:
            stream: Any = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 8, 8, "gray"
        samples = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(samples.encode(frame))


def damaged(
    suffix: str, codec: str, pixels: str, damage: Callable[[bytes], bytes]
) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        whole = write_video(path.with_suffix(suffix), noisy(6), codec, pixels)
        path.write_bytes(damage(whole.read_bytes()))

    return write


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_text("this is no video at all\n" * 50), "Invalid data"),
    "empty": (lambda path: path.write_bytes(b""), "Invalid data|End of file"),
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "directory|Permission"),
    "sound only": (partial(sound, has_video=False), "it has no video stream"),
    "an image": (lambda path: make_image(path, format="JPEG"), "no video in one of"),
    "no frames": (partial(sound, has_video=True), "it has no frames"),
    "cut off": (
        damaged(".mp4", "libx264", "yuv420p", lambda raw: raw[: len(raw) // 2]),
        "Invalid data",
    ),
    "unknown codec": (
        damaged(".mov", "png", "rgb24", lambda raw: raw.replace(b"png ", b"zzz9")),
        "there is no decoder for it",
    ),
    "damaged": (
        damaged(".mov", "png", "rgb24", lambda raw: raw.replace(b"\x89PNG", bytes(4))),
        "its frames cannot be decoded",
    ),
}


def threads() -> int:
    return len(list(Path("/proc/self/task").glob("*")))


@pytest.mark.parametrize("what", ["video", *BROKEN])
def test_what_is_no_video_is_refused_by_its_name_and_reason_and_nothing_stays_open(
    tmp_path: Path, what: str
) -> None:
    path, before = tmp_path / "broken.mkv", threads()
    write, reason = BROKEN.get(what, (partial(write_video, images=noisy()), ""))
    write(path)
    message = rf"broken\.mkv cannot be read \(.*({reason})"
    for _ in range(3):
        with pytest.raises(UnreadableFile, match=message) if reason else nullcontext():
            video_set([path], stride=0).load(0)
        opened = map(os.path.realpath, Path("/proc/self/fd").glob("*"))
        assert str(path) not in opened
    assert threads() <= before


def test_a_video_that_was_cut_off_ends_where_it_was_cut(tmp_path: Path) -> None:
    raw = numbered(tmp_path / "video.mkv", size=(64, 64)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(raw[: len(raw) * 2 // 3])
    chosen = numbers(video_set([tmp_path / "cut.mkv"], frames=30, stride=1).load(0))
    last = max(chosen)
    assert 10 < last < 25
    assert chosen == [*range(last), *[last] * (30 - last)]


def test_frames_that_are_promised_but_cut_off_are_the_last_ones_again(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_video(path, noisy(), "libx264", "yuv420p", muxing={"movflags": "faststart"}, bf="0")
    truth, raw = all_frames(path), path.read_bytes()
    path.write_bytes(raw[: len(raw) * 3 // 4])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    clip = video_set([path], frames=40, stride=1).load(0).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(clip[:20], truth[:20])
    assert np.array_equal(clip[-1], clip[-2])


def test_in_place_of_a_frame_that_is_damaged_comes_the_next(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mov", noisy(12), "png", "rgb24")
    raw, truth = path.read_bytes(), all_frames(path)
    starts = [i for i in range(len(raw)) if raw.startswith(b"\x89PNG", i)]
    path.write_bytes(raw[: starts[4]] + bytes(64) + raw[starts[4] + 64 :])
    clip = video_set([path], frames=12, stride=1).load(0).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(clip, truth[[0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11]])


# Where they are looked for


def test_folders_become_classes(root: Path) -> None:
    before = torch.get_rng_state()
    data = load_data("video-folder", root=root)
    assert torch.equal(torch.get_rng_state(), before)
    assert data.classes == ("jump", "run")
    assert [Path(path).parent.name for path in data.paths] == ["jump", "jump", "run", "run"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert (len(data), data.name, data.split) == (4, "video-folder", "train")
    assert data.shape == (3, 8, 224, 224)
    held_out = load_data("video-folder", "test", root=root)
    assert [Path(path).name for path in held_out.paths] == ["z.mkv"] * 2


def test_without_a_root_or_pyav_the_way_out_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="root"):
        load_data("video-folder")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[video\]'"):
        load_data("video-folder", root=root)


def test_one_readable_video_is_enough_to_begin_with(root: Path) -> None:
    *others, last = sorted((root / "train").rglob("*.mkv"))
    for path in others:
        path.write_text("no video")
    assert len(load_data("video-folder", root=root)) == 4
    last.write_text("no video")
    with pytest.raises(ValueError, match=r"\.mkv cannot be read"):
        load_data("video-folder", root=root)


def test_a_picture_that_belongs_to_a_file_of_sound_is_no_video(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        with av.open(str(tmp_path / split / "a" / "song.mp4"), "w") as container:
            sound, cover = container.add_stream("aac", rate=44100), container.add_stream("mjpeg")
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 44100, 0
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            for packets in (sound.encode(frame), sound.encode(), cover.encode(black)):
                container.mux(packets)
            container.mux(cover.encode())
    with pytest.raises(ValueError, match="no video stream"):
        load_data("video-folder", root=tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("variable", "value"), [(VARIABLE, "1e-6"), (VARIABLE, "5e-6"), (SECONDS, "1e-8")]
)
def test_huge_and_endless_videos_are_unreadable_unless_the_limit_is_raised(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "0.mp4")
    data = VideoFolderDataset("v", "test", (str(path),), torch.zeros(1), ("",), DataConfig())
    clip = data.load(0)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UnreadableFile, match=variable):
        data.load(0)
    monkeypatch.setenv(variable, "60")
    assert data.load(0).equal(clip)
