"""Labeled videos in files: of each only the frames of a clip are decoded, and what leads to them.

A video's frames are counted in the order of display, whatever their rate.
Axes: `t` frames of a clip, `v` views of a video, `c h w`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, groupby
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.files import open_video
from ..utils.imports import require_package
from ..utils.limits import SECONDS, check_unpacked, max_seconds
from ..utils.random import fixed_seed
from ..utils.validation import require
from .config import DataConfig
from .dataset import MapDataset, UnreadableFile
from .file_lists import list_labeled_files
from .image_folder import FromFiles, first_read
from .loader import eval_batches

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")
_COVER = 0x400  # FFmpeg's mark of a picture that belongs to a file of sound
_PIXELS = {3: "rgb24", 1: "gray"}
# Files that keep the time of each frame. FFmpeg guesses it for others, and after a jump otherwise.
_TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def load_video_folder(name: str, split: str, config: DataConfig) -> VideoFolderDataset:
    """Lists the videos of a folder, `config.root`.

    It is laid out as a folder of images, with videos in it: see `image_folder.load_folder`.

    Raises:
        ValueError: PyAV or something in the folder is missing, classes differ between splits, or
            none of the first few videos can be read.
    """
    require_package("av", "video", name)
    if config.folder is None:
        raise ValueError(f"{name} needs the folder that holds the videos; pass root")
    paths, labels, classes = list_labeled_files(
        config.folder, split, VIDEO_EXTENSIONS, config.follow_links
    )
    data = VideoFolderDataset(name, split, tuple(paths), torch.tensor(labels), classes, config)
    with fixed_seed(0):
        first_read((partial(data.load, i) for i in range(len(data))), f"{name} {split}")
    return data


@dataclass(frozen=True, eq=False)
class VideoFolderDataset(FromFiles, MapDataset):
    """One split of labeled videos, which are read one by one.

    Clips of the split `"train"` start at random, drawn from torch's global generator; with stride 0
    one frame is drawn from each of `frames` equal parts of the video. Other clips
    lie at fixed places: one view in the middle, several from the start to the end; with stride 0
    in the middle of each part. A video that is too short goes on with its last frame.

    A video that a phone marked as turned is turned upright; marks of mirroring are not followed.

    Args:
        name: What the data set is called.
        split: `"train"`, `"val"` or `"test"`.
        paths: The videos.
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
        classes: The name of each label.
        config: Size, channels, frames and views of clips.
    """

    name: str
    split: str
    paths: tuple[str, ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    config: DataConfig = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the size of one clip, `(c, t, h, w)`."""
        c, h, w = self.config.image_shape
        return c, self.config.clip_frames, h, w

    def load(self, index: int) -> Tensor:
        """Decodes a clip: uint8 `t c h w`, with several views or crops `v t c h w`.

        Raises:
            UnreadableFile: The video cannot be read.
        """
        path, (c, t, _, _) = self.paths[index], self.shape
        with ExitStack() as files, read_errors(path):
            video = _Video(files, path)
            chosen = self._choose(len(video.times))
            clips = video.images(chosen.flatten().tolist(), _PIXELS[c])
        clips = clips.unflatten(0, (-1, t))
        return clips if len(clips) * self._crops > 1 else clips[0]

    def eval_transform(self, raw: Tensor) -> Tensor:
        """Resizes, crops and normalizes a clip: `c t h w`, of several squares `v c t h w`.

        One crop is the middle of the frames at `img_size / crop_pct`; three lie side by side along
        the longer side, the shorter one being `img_size`. The crops of a view follow one another.
        """
        from torchvision.transforms.v2 import functional as TF

        size, views = self.shape[-1], raw[None] if raw.ndim == 4 else raw
        short = size if self._crops == 3 else round(size / self.crop_pct)
        resized = TF.resize(views, [short], antialias=True)
        squares = _three(resized) if self._crops == 3 else TF.center_crop(resized, [size])[:, None]
        clips = squares.flatten(0, 1).transpose(1, 2)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32).reshape(2, -1, 1, 1, 1)
        clips = (clips.float() / 255 - mean) / std
        return clips if len(clips) > 1 else clips[0]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields clips and labels in order, without unreadable videos.

        Clips are those of the split `"test"`, so they are the same every time.

        Shape:
            float32 `b c t h w`, with several views or crops `b v c t h w`, and int64 `b`.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        return eval_batches(replace(self, split="test"), batch_size, self.workers)

    def select(self, indices: Tensor) -> VideoFolderDataset:
        """Returns a data set of these videos."""
        paths = tuple(self.paths[i] for i in indices.tolist())
        return replace(self, paths=paths, labels=self.labels[indices])

    @property
    def _crops(self) -> int:
        return 1 if self.split == "train" else self.config.crops

    def _choose(self, n: int) -> Tensor:
        t, stride, views = self.config.clip_frames, self.config.stride, self.config.views
        return choose_frames(n, t, stride, None if self.split == "train" else views)


def choose_frames(n: int, t: int, stride: int, views: int | None) -> Tensor:
    """Returns the numbers of the frames of each clip, `v t`, of a video of `n` frames.

    Args:
        n: Frames of the video; a clip that is longer goes on with the last.
        t: Frames of a clip.
        stride: Frames of the video from one frame of a clip to the next; 0 spreads it over them.
        views: Clips at fixed places; None draws one from torch's global generator.
    """
    steps = torch.arange(t, dtype=torch.float64)
    if views is None:
        drawn = torch.rand(1, 1 if stride else t, dtype=torch.float64)
    elif stride and views > 1:
        drawn = torch.linspace(0, 1, views, dtype=torch.float64)[:, None]
    else:
        drawn = (torch.arange(views, dtype=torch.float64)[:, None] + 0.5) / views
    if stride == 0:
        return ((steps + drawn) * n / t).long().clamp(max=n - 1)
    last = max(n - 1 - (t - 1) * stride, 0)  # at which a clip may start
    starts = (drawn * (last + 1)).long().clamp(max=last)
    return (starts + steps.long() * stride).clamp(max=n - 1)


def iterate_frames(path: str, stride: int, channels: int = 3) -> Iterator[Tensor]:
    """Decodes every `stride`-th frame of a video from the first on, one at a time: uint8 `c h w`.

    They are those that a clip has at the same places. No more than one of them is kept.

    Raises:
        UnreadableFile: The video cannot be read, or not to its end.
    """
    with ExitStack() as files, read_errors(path):
        video = _Video(files, path)
        first: VideoFrame | None = None
        for _, frame in video.decode(video.times[::stride]):
            first = first or frame
            yield video.image(frame, first, _PIXELS[channels])
            video.until = monotonic() + max_seconds()  # the limit is of a frame here


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turns the errors of reading a video into `UnreadableFile`."""
    from av.error import FFmpegError

    try:
        yield
    except (FFmpegError, OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}); replace it, or take it out"
        raise UnreadableFile(message) from error


def _three(frames: Tensor) -> Tensor:
    """Three squares side by side along the longer side, `v t c h w -> v 3 t c h w`."""
    h, w = frames.shape[-2:]
    size, axis = min(h, w), -1 if w > h else -2
    starts = (0, (max(h, w) - size) // 2, max(h, w) - size)
    return torch.stack([frames.narrow(axis, start, size) for start in starts], 1)


class _Video:
    """An open video, and the times of display of its frames, in order.

    Decoding starts at the last keyframe before the frame. In files that do not keep the time of
    each frame, such as avi and mpg, it starts at the first frame and counts.

    Args:
        files: Closes what is opened.
        path: The file.
    """

    def __init__(self, files: ExitStack, path: str):
        self.files, self.path = files, path
        self.until = monotonic() + max_seconds()
        self.container = self._open()
        displayed = (p for p in self._packets(self.container) if p.size and not p.is_discard)
        packets = [(p.pts, p.is_keyframe) for p in displayed]
        require(len(packets) > 0, "it has no frames")
        self.times = sorted(pts for pts, _ in packets if pts is not None)
        self.timed = self.container.format.name in _TIMED and len(set(self.times)) == len(packets)
        if not self.timed:
            self.times = list(range(len(packets)))
        self.keys = sorted(pts or 0 for pts, is_key in packets if is_key) if self.timed else []

    def images(self, numbers: Sequence[int], pixels: str) -> Tensor:
        """Decodes the frames of those numbers, uint8 `t c h w`."""
        check_unpacked(f"its {len(numbers)} frames have", len(numbers) * self.frame_bytes)
        times = [self.times[number] for number in numbers]
        frames = dict(self.decode(sorted(set(times))))
        first = frames[times[0]]
        images = {time: self.image(frame, first, pixels) for time, frame in frames.items()}
        return torch.stack([images[time] for time in times])

    def image(self, frame: VideoFrame, first: VideoFrame, pixels: str) -> Tensor:
        """Returns a frame in the size of another and turned as that is, uint8 `c h w`."""
        array = frame.to_ndarray(format=pixels, width=first.width, height=first.height)
        image = torch.from_numpy(array)
        image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
        return torch.rot90(image, round(first.rotation / 90), (-2, -1))

    def decode(self, times: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Yields the frames of rising times; for a missing one the next, at the end the last."""
        last = None
        for key, group in groupby(times, self._key_before):
            waiting = list(group)
            for time, last in self._frames_from(key):
                while waiting and waiting[0] <= time:
                    yield waiting.pop(0), last
                if not waiting:
                    break
            if last is None:
                raise ValueError("its frames cannot be decoded")
            yield from ((time, last) for time in waiting)

    def _key_before(self, time: int) -> int | None:
        before = bisect_right(self.keys, time)
        return self.keys[before - 1] if before else None

    def _frames_from(self, key: int | None) -> Iterator[tuple[int, VideoFrame]]:
        """Frames and their times from a keyframe on, or from the first if there is none."""
        from av.error import FFmpegError

        if key is not None:
            with suppress(FFmpegError):
                self.container.seek(key, stream=self.container.streams[self.index])
                frames = self._decoded(self.container)
                first = next(frames, None)
                if first is not None and first[0] <= key:  # it did not land behind it
                    return chain([first], frames)
        return self._decoded(self._open())

    def _decoded(self, container: InputContainer) -> Iterator[tuple[int, VideoFrame]]:
        """Frames and their times; damaged packets are passed over, as by players."""
        from av.error import InvalidDataError

        counted = count()
        for packet in self._packets(container):
            with suppress(InvalidDataError):
                for frame in packet.decode():
                    time = frame.pts if self.timed else next(counted)
                    if time is not None:
                        yield time, frame

    def _packets(self, container: InputContainer) -> Iterator[Any]:
        for packet in container.demux(container.streams[self.index]):
            require(
                monotonic() < self.until,
                f"its clip takes more than {max_seconds():g} s; if it is meant to be so long, set "
                f"{SECONDS} in the environment",
            )
            yield packet

    def _open(self) -> InputContainer:
        container = self.files.enter_context(open_video(self.path))
        streams = [s for s in container.streams.video if not s.disposition & _COVER]
        require(len(streams) > 0, "it has no video stream")
        stream = streams[0]
        self.index = stream.index
        require(stream.codec_context is not None, "there is no decoder for it")
        self.frame_bytes = 3 * stream.width * stream.height
        check_unpacked("each of its frames has", self.frame_bytes)
        # With threads a clip took as long or longer; videos are read by several processes instead.
        stream.thread_type = "NONE"
        return container
