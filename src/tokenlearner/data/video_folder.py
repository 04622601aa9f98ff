"""Labeled videos in files: of each only the frames of a clip are decoded, and what leads to them.

A video's frames are counted in the order in which they are shown, whatever their rate.
Axes: `t` frames of a clip, `v` views of a video, `c h w`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..utils.random import fixed_seed
from ..utils.validation import require
from .dataset import DataConfig, UnreadableFile
from .file_lists import list_labeled_files
from .image_folder import first_read
from .loader import eval_batches

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as timm has them
_PIXELS = {3: "rgb24", 1: "gray"}
# Files that keep the time of each frame. FFmpeg guesses it for others, and after a jump otherwise.
_TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def load_video_folder(name: str, split: str, wanted: DataConfig) -> VideoFolderDataset:
    """Gets ready to read the videos of a folder, `wanted.root`.

    It is laid out as a folder of images, with videos in it: see `folders.load_folder`.

    Raises:
        ValueError: PyAV or something in the folder is missing, classes differ between splits, or
            none of the first few videos can be read.
    """
    _check_av()
    require(wanted.root is not None, f"{name} needs the folder that holds the videos; pass root")
    paths, labels, classes = list_labeled_files(Path(str(wanted.root)), split, VIDEO_EXTENSIONS)
    wanted = replace(wanted, img_size=wanted.img_size or 224, in_chans=wanted.in_chans or 3)
    data = VideoFolderDataset(name, split, tuple(paths), torch.tensor(labels), classes, wanted)
    with fixed_seed(0):
        first_read((partial(data.read, i) for i in range(len(data))), f"{name} {split}")
    return data


@dataclass(frozen=True, eq=False)
class VideoFolderDataset:
    """One split of labeled videos, which are read when they are asked for.

    Clips of the split `"train"` start at random, drawn from torch's own generator; with stride 0
    one frame is drawn from each of `frames` equal parts of the video. Clips of the split `"test"`
    lie at fixed places: one view in the middle, several from the start to the end; with stride 0
    in the middle of each part. A video that is too short goes on with its last frame.

    A video that a phone marked as turned is turned upright; marks of mirroring are not followed.

    Args:
        name: What the data set is called.
        split: `"train"` or `"test"`.
        paths: The videos.
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
        classes: The name of each label.
        wanted: How clips are wanted, with `img_size` and `in_chans`.
    """

    name: str
    split: str
    paths: tuple[str, ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    wanted: DataConfig

    @property
    def mean(self) -> tuple[float, ...]:
        """ImageNet's, of gray videos the mean of these."""
        return _MEAN if self.wanted.in_chans == 3 else (sum(_MEAN) / 3,)

    @property
    def std(self) -> tuple[float, ...]:
        """ImageNet's, of gray videos the mean of these."""
        return _STD if self.wanted.in_chans == 3 else (sum(_STD) / 3,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one clip: `(c, t, h, w)`."""
        c, size = self.wanted.in_chans or 3, self.wanted.img_size or 224
        return c, self.wanted.frames, size, size

    @property
    def workers(self) -> int:
        """Processes that read videos."""
        return self.wanted.workers

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Decodes a clip: uint8 `t c h w`, where several squares are judged `v t c h w`.

        Raises:
            BrokenFile: The video cannot be read.
        """
        from av.error import FFmpegError

        path, (c, t, _, _) = self.paths[index], self.shape
        try:
            with ExitStack() as files:
                video = _Video(files, path)
                chosen = self._choose(len(video.times))
                clips = video.images(chosen.flatten().tolist(), _PIXELS[c])
        except (FFmpegError, OSError, ValueError) as error:
            message = f"{path} cannot be read ({error}); mend it, or take it out"
            raise UnreadableFile(message) from error
        clips = clips.unflatten(0, (-1, t))
        return clips if len(clips) * self._crops > 1 else clips[0]

    def plain(self, raw: Tensor) -> Tensor:
        """What `read` gives, as a model is judged on it: `c t h w`, of several squares first `v`.

        One crop is the middle of the frames at `img_size / crop_pct`; three lie side by side along
        the longer side, the shorter one being `img_size`. The crops of a view follow one another.
        """
        from torchvision.transforms.v2 import functional as TF

        size, views = self.shape[-1], raw[None] if raw.ndim == 4 else raw
        short = size if self._crops == 3 else round(size / self.wanted.crop_pct)
        resized = TF.resize(views, [short], antialias=True)
        squares = _three(resized) if self._crops == 3 else TF.center_crop(resized, [size])[:, None]
        clips = squares.flatten(0, 1).transpose(1, 2)
        mean, std = torch.tensor([self.mean, self.std]).reshape(2, -1, 1, 1, 1)
        clips = (clips.float() / 255 - mean) / std
        return clips if len(clips) > 1 else clips[0]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields plain batches and labels in order, without videos that cannot be read.

        Clips lie at the places of the split `"test"`, so the same ones come every time.

        Shape:
            float32 `b c t h w`, with several views or crops `b v c t h w`, and int64 `b`.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}, expected 1 or more")
        return eval_batches(replace(self, split="test"), batch_size, self.workers)

    def sample(self, n: int, seed: int = 0) -> VideoFolderDataset:
        """Returns `n` of the videos, drawn by a seed; fewer are the first of more.

        Raises:
            ValueError: There are not as many.
        """
        require(1 <= n <= len(self), f"{self.name} has {len(self)} videos, {n} are asked for")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        paths = tuple(self.paths[i] for i in order.tolist())
        return replace(self, paths=paths, labels=self.labels[order])

    @property
    def _crops(self) -> int:
        return self.wanted.crops if self.split == "test" else 1

    def _choose(self, n: int) -> Tensor:
        """The numbers of the frames of each view, `v t`, of a video of `n` frames."""
        t, stride, views = self.wanted.frames, self.wanted.stride, self.wanted.views
        steps = torch.arange(t, dtype=torch.float64)
        if self.split == "train":
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


def _three(frames: Tensor) -> Tensor:
    """Three squares side by side along the longer side, `v t c h w -> v 3 t c h w`."""
    h, w = frames.shape[-2:]
    size, axis = min(h, w), -1 if w > h else -2
    starts = (0, (max(h, w) - size) // 2, max(h, w) - size)
    return torch.stack([frames.narrow(axis, start, size) for start in starts], 1)


def _check_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        message = "reading videos needs PyAV; run pip install 'tokenlearner[video]'"
        raise ValueError(message) from error


class _Video:
    """An open video, and the time at which each of its frames is shown, in order.

    Decoding starts at the last keyframe before a wanted frame. In files that do not keep the time
    of each frame, such as avi and mpg, it starts at the first frame and counts.

    Args:
        files: Closes what is opened.
        path: The file.
    """

    def __init__(self, files: ExitStack, path: str):
        self.files, self.path = files, path
        self.container = self._open()
        shown = (p for p in self.container.demux(video=0) if p.size and not p.is_discard)
        packets = [(p.pts, p.is_keyframe) for p in shown]
        require(len(packets) > 0, "it has no frames")
        self.times = sorted(pts for pts, _ in packets if pts is not None)
        self.timed = self.container.format.name in _TIMED and len(set(self.times)) == len(packets)
        if not self.timed:
            self.times = list(range(len(packets)))
        self.keys = sorted(pts or 0 for pts, is_key in packets if is_key) if self.timed else []

    def images(self, numbers: Sequence[int], pixels: str) -> Tensor:
        """Decodes the frames of those numbers, uint8 `t c h w`."""
        times = [self.times[number] for number in numbers]
        frames = self._at(sorted(set(times)))
        first = frames[times[0]]
        same = dict[str, Any](format=pixels, width=first.width, height=first.height)
        arrays = {time: frame.to_ndarray(**same) for time, frame in frames.items()}
        clip = torch.from_numpy(np.stack([arrays[time] for time in times]))
        clip = clip[:, None] if clip.ndim == 3 else clip.movedim(-1, 1)
        return torch.rot90(clip, round(first.rotation / 90), (-2, -1))

    def _at(self, times: Sequence[int]) -> dict[int, VideoFrame]:
        """The frames of rising times; for what is missing the next one, at the end the last."""
        found: dict[int, VideoFrame] = {}
        last = None
        for key, group in groupby(times, self._key_before):
            waiting = list(group)
            for time, last in self._frames_from(key):
                while waiting and waiting[0] <= time:
                    found[waiting.pop(0)] = last
                if not waiting:
                    break
            if last is None:
                raise ValueError("its frames cannot be decoded")
            found |= dict.fromkeys(waiting, last)
        return found

    def _key_before(self, time: int) -> int | None:
        before = bisect_right(self.keys, time)
        return self.keys[before - 1] if before else None

    def _frames_from(self, key: int | None) -> Iterator[tuple[int, VideoFrame]]:
        """Frames and their times from a keyframe on, or from the first if it is not found."""
        from av.error import FFmpegError

        if key is not None:
            with suppress(FFmpegError):
                self.container.seek(key, stream=self.container.streams.video[0])
                frames = self._decoded(self.container)
                first = next(frames, None)
                if first is not None and first[0] <= key:  # it did not land behind it
                    return chain([first], frames)
        return self._decoded(self._open())

    def _decoded(self, container: InputContainer) -> Iterator[tuple[int, VideoFrame]]:
        """Frames and their times; damaged packets are passed over, as by players."""
        from av.error import InvalidDataError

        counted = count()
        for packet in container.demux(video=0):
            with suppress(InvalidDataError):
                for frame in packet.decode():
                    time = frame.pts if self.timed else next(counted)
                    if time is not None:
                        yield time, frame

    def _open(self) -> InputContainer:
        import av

        container = self.files.enter_context(av.open(self.path, metadata_errors="ignore"))
        require(len(container.streams.video) > 0, "it has no video stream")
        stream = container.streams.video[0]
        require(stream.codec_context is not None, "there is no decoder for it")
        # With threads a clip took as long or longer; videos are read by several processes instead.
        stream.thread_type = "NONE"
        return container
