"""Tokens of all videos of a folder, in shards: `encode(model, "videos", "tokens")`.

What a shard holds depends on the list of videos alone, and a video is encoded by itself. So one
process or several write the same bytes, and a run that was cut off goes on with the next shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import data as torch_data
from torch.utils.data import DataLoader, get_worker_info

from ..data.config import DataConfig
from ..data.dataset import UnreadableFile
from ..data.file_lists import ListedFiles, list_splits
from ..data.image_folder import imagenet_mean_std
from ..data.loader import as_it_is, ignore_signals
from ..data.token_shards import (
    DTYPES,
    Manifest,
    ShardWriter,
    SplitInfo,
    VideoRow,
    check_same,
    is_done,
    read_index,
    shard_path,
)
from ..data.video_folder import VIDEO_EXTENSIONS, VideoFolderDataset, iterate_frames
from ..models.frame_encoder import FrameEncoder, count_tokens
from ..models.framevit import FrameViT
from ..models.preprocessing import get_input_size, get_preprocessing
from ..utils.digest import digest_tensors
from ..utils.imports import require_package
from ..utils.io import check_output_folder
from ..utils.modules import training_mode
from ..utils.preprocessing import Preprocessing
from ..utils.validation import check_choice, check_count, require, shortened
from .accuracy import warn_assumed


class EncodeRow(NamedTuple):
    """What `encode` reports of a video: how many it has done, its frames, why it was left out."""

    video: str
    done: int
    total: int
    frames: int
    error: str


@dataclass
class EncodeResult:
    """What one process did, and found done.

    Args:
        folder: With the shards.
        videos: Videos in the shards of this process, with tokens.
        frames: Frames of these with tokens.
        shards: Shards of this process.
        written: How many of these it wrote; the others were done.
        broken: For each video that cannot be read its name and the reason.
    """

    folder: Path
    videos: int = 0
    frames: int = 0
    shards: int = 0
    written: int = 0
    broken: list[str] = field(default_factory=list)


class _Task(NamedTuple):
    """A shard to write: the tar file, the number of its first video, its videos and labels."""

    tar: Path
    first: int
    videos: Sequence[str]
    labels: Sequence[int]


def encode(
    model: nn.Module,
    videos: str | Path,
    out: str | Path,
    *,
    at: int | float | None = None,
    stride: int = 4,
    dtype: str = "bfloat16",
    shard_size: int = 100,
    batch_size: int = 32,
    workers: int | None = None,
    max_broken: int = 10,
    follow_links: bool = False,
    name: str | None = None,
    process: int | None = None,
    num_processes: int | None = None,
    report: Callable[[EncodeRow], object] = lambda row: None,
) -> EncodeResult:
    """Writes the tokens of every frame in `stride` of all videos of a folder, each by itself.

    Several processes that torchrun started each take every so many-th shard; on several computers
    they need `out` in common. What is in `out` already is not done again, and has to be of the same
    model, settings and videos. The videos of a folder with splits (`train`, `val`, `test`, as
    folders or lists) keep them; of one without, folders are classes, and files have no labels.

    Args:
        model: What `FrameEncoder` takes; frames are prepared as it says.
        videos: Folder.
        out: Folder for `manifest.json` and the shards.
        at: As in `FrameEncoder`, of a model without learned tokens.
        stride: Frames of a video from one that is encoded to the next.
        dtype: bfloat16, float16 or float32, of the tokens as they are written.
        shard_size: Videos of a shard.
        batch_size: Frames at a time. The same tokens may differ in the last bit for another.
        workers: Processes that decode for this one; None is one a processor, 0 decodes in this one.
        max_broken: Videos that may be unreadable, over all shards; they are left out, counted, and
            named in the index of their shard.
        follow_links: Read videos out of the folder too, where links in it lead there.
        name: What the model is called in the manifest; None is the name that it was built by.
        process: Which of several processes this is, from 0; None is what torchrun says.
        num_processes: How many there are; None is what torchrun says.
        report: Called with an `EncodeRow` after every video.

    Returns:
        What this process did.

    Raises:
        ValueError: Something does not fit, before anything is written; or no video can be read.
        RuntimeError: More videos than max_broken cannot be read; shards that are done stay.
    """
    require_package("av", "video", "reading videos")
    for key, value in {
        "stride": stride,
        "shard_size": shard_size,
        "batch_size": batch_size,
    }.items():
        check_count(key, value)
    check_count("max_broken", max_broken, least=0)
    check_choice("dtype", dtype, list(DTYPES))
    process = int(os.environ.get("RANK", 0)) if process is None else process
    world = int(os.environ.get("WORLD_SIZE", 1)) if num_processes is None else num_processes
    require(
        0 <= process < world,
        f"process is {process} of {world}, expected 0 to below num_processes",
    )
    root, folder = Path(videos).expanduser(), check_output_folder(out)
    encoder = FrameEncoder(model, at)
    pixels = _Pixels.of(model)
    splits, classes = list_splits(root, VIDEO_EXTENSIONS, follow_links)
    with training_mode(model, training=False):
        k, c = count_tokens(encoder, pixels.size)
        source = _source(model, name, at, pixels, stride)
        infos = {
            split: SplitInfo(
                len(files.paths), -(-len(files.paths) // shard_size), _digest(files, root)
            )
            for split, files in splits.items()
        }
        manifest = Manifest(source, k, c, dtype, shard_size, classes, infos)
        check_same(manifest, folder)
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write(folder)
        tasks = _tasks(folder, splits, shard_size)
        config = DataConfig(workers=workers)
        run = _Run(encoder, root, folder, manifest, pixels, batch_size, max_broken, report)
        return run.run(tasks[process::world], tasks, config.reading_workers if workers != 0 else 0)


@dataclass(frozen=True)
class _Pixels:
    """How a frame becomes a model's input: uint8 `c h w` to float32 `c h w`."""

    size: tuple[int, int, int]
    preprocessing: Preprocessing
    is_clip: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Pixels:
        channels, *_, height, width = get_input_size(model)
        require(
            channels in (1, 3),
            f"the model takes {channels} channels; videos have 3 (color) or 1 (gray)",
        )
        found = get_preprocessing(model, channels)
        is_clip = isinstance(model, FrameViT)
        if found is None:
            found = Preprocessing(*imagenet_mean_std(channels))
            warn_assumed(model, _dataset(found, (channels, height, width)))
        require(
            not is_clip or height == width,
            f"the model takes frames of {height} x {width}, and videos are cut to squares; pass "
            "one of squares",
        )
        return cls((channels, height, width), found, is_clip)

    def transform(self) -> Callable[[Tensor], Tensor]:
        """Returns what prepares a frame: as in training on clips, or as timm prepares images."""
        if self.is_clip:
            data = _dataset(self.preprocessing, self.size)
            return lambda frame: data.eval_transform(frame[None])[:, 0]
        from torchvision.transforms.functional import to_pil_image

        of_image = self.preprocessing.eval_transform(self.size)
        return lambda frame: of_image(to_pil_image(frame))


def _dataset(how: Preprocessing, size: tuple[int, int, int]) -> VideoFolderDataset:
    """Returns a data set of no video, which prepares frames."""
    channels: Any = size[0]
    config = DataConfig(
        in_chans=channels,
        img_size=size[1],
        frames=1,
        crop_pct=min(1.0, how.crop_pct),
        mean=list(how.mean),
        std=list(how.std),
    )
    return VideoFolderDataset("videos", "test", (), torch.empty(0).long(), (), config)


def _source(
    model: Any, name: str | None, at: int | float | None, pixels: _Pixels, stride: int
) -> dict[str, Any]:
    """Returns what tokens are made by, as plain values: another of these makes other tokens."""
    built = getattr(model, "tokenlearner_config", None) or {}
    return {
        "model": name or built.get("name") or type(model).__name__,
        "weights": digest_tensors(model.state_dict()),
        "at": at,
        "stride": stride,
        "size": list(pixels.size),
        "preprocessing": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in pixels.preprocessing.to_kwargs().items()
        },
    }


def _digest(files: ListedFiles, root: Path) -> str:
    """Returns SHA-256 of the names of videos, from the folder on, and their labels."""
    labels = files.labels or ("",) * len(files.paths)
    lines = (f"{_name(p, root)}\t{label}\n" for p, label in zip(files.paths, labels, strict=True))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _name(path: str, root: Path) -> str:
    return os.path.relpath(path, root)


def _tasks(folder: Path, splits: dict[str, ListedFiles], size: int) -> list[_Task]:
    return [
        _Task(
            shard_path(folder, split, first // size),
            first,
            files.paths[first : first + size],
            files.labels[first : first + size],
        )
        for split, files in splits.items()
        for first in range(0, len(files.paths), size)
    ]


class _Chunk(NamedTuple):
    """Some prepared frames of a video, `n c h w`; the last has none, and says what went wrong."""

    video: int
    frames: Tensor | None
    error: str = ""


@dataclass(frozen=True)
class _Chunks(torch_data.IterableDataset[_Chunk]):
    """Reads videos one after the other in parts; of several workers each reads whole videos."""

    paths: Sequence[str]
    pixels: _Pixels
    stride: int
    size: int

    def __iter__(self) -> Iterator[_Chunk]:
        info, transform = get_worker_info(), self.pixels.transform()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for video in range(start, len(self.paths), step):
            yield from self._of_video(video, transform)

    def _of_video(self, video: int, transform: Callable[[Tensor], Tensor]) -> Iterator[_Chunk]:
        frames: list[Tensor] = []
        try:
            for frame in iterate_frames(self.paths[video], self.stride, self.pixels.size[0]):
                frames.append(transform(frame))
                if len(frames) == self.size:
                    yield _Chunk(video, torch.stack(frames))
                    frames = []
        except UnreadableFile as error:
            yield _Chunk(video, None, str(error))
            return
        if frames:
            yield _Chunk(video, torch.stack(frames))
        yield _Chunk(video, None)


@dataclass
class _Run:
    """Writes the shards of one process."""

    encoder: FrameEncoder
    root: Path
    folder: Path
    manifest: Manifest
    pixels: _Pixels
    batch_size: int
    max_broken: int
    report: Callable[[EncodeRow], object]

    def run(self, tasks: list[_Task], of_all: list[_Task], workers: int) -> EncodeResult:
        self.result = EncodeResult(self.folder, shards=len(tasks))
        indexes = {task.tar: read_index(task.tar) for task in of_all}
        open_tasks = [task for task in tasks if not is_done(indexes[task.tar], self._size)]
        opened = {task.tar for task in open_tasks}
        kept = {tar: index or [] for tar, index in indexes.items() if tar not in opened}
        self.broken = {row.error for index in kept.values() for row in index if row.error}
        for task in tasks:
            for row in kept.get(task.tar, ()):
                self._count(row)
        for task in open_tasks:
            for stale in self.folder.glob(f".{task.tar.stem}.*"):  # of a process that was killed
                with suppress(OSError):
                    stale.unlink()
        self.done, self.total = 0, sum(len(task.videos) for task in open_tasks)
        paths = [path for task in open_tasks for path in task.videos]
        encoded = self._encode(paths, workers)
        for task in open_tasks:
            self._write(task, encoded)
            self.result.written += 1
        require(
            self.result.videos > 0 or not self.result.broken,
            f"none of {len(self.result.broken)} videos can be read: "
            f"{shortened(self.result.broken, 2)}",
        )
        return self.result

    def _write(self, task: _Task, encoded: Iterator[tuple[Tensor | None, str]]) -> None:
        with ShardWriter(task.tar, task.first, self.manifest.classes) as shard:
            for i, path in enumerate(task.videos):
                label = task.labels[i] if task.labels else None
                tokens, error = next(encoded)
                name = _name(path, self.root)
                row = VideoRow(name, self._size(name), label, error=error)
                shard.add(row, tokens)
                self._count(shard.rows[-1])
                self._check_broken(shard.rows[-1])
                self.done += 1
                frames = shard.rows[-1].frames
                self.report(EncodeRow(name, self.done, self.total, frames, error))

    def _count(self, row: VideoRow) -> None:
        if row.error:
            self.result.broken.append(row.error)
        else:
            self.result.videos += 1
            self.result.frames += row.frames

    def _check_broken(self, row: VideoRow) -> None:
        if not row.error:
            return
        self.broken.add(row.error)
        if len(self.broken) > self.max_broken:
            raise RuntimeError(
                f"{len(self.broken)} videos cannot be read, max_broken is {self.max_broken}: "
                f"{shortened(sorted(self.broken))}. Fix them, or raise max_broken; the shards that "
                "are done stay"
            )

    def _encode(self, paths: list[str], workers: int) -> Iterator[tuple[Tensor | None, str]]:
        """Yields the tokens of each video in order, `t k c`, or why there are none."""
        chunks = _Chunks(paths, self.pixels, self.manifest.stride, self.batch_size)
        loader = DataLoader(
            chunks,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=min(workers, len(paths)),
            worker_init_fn=ignore_signals,
            generator=torch.Generator("cpu"),  # torch's global one is left as it is
        )
        parts: dict[int, list[Tensor]] = {}
        ready: dict[int, tuple[Tensor | None, str]] = {}
        waiting = 0
        for video, frames, error in loader:
            if frames is not None:
                parts.setdefault(video, []).append(self._tokens(frames))
                continue
            tokens = parts.pop(video, [])
            error = self._without_root(error or ("" if tokens else f"{paths[video]} has no frames"))
            ready[video] = (None if error else torch.cat(tokens), error)
            while waiting in ready:
                yield ready.pop(waiting)
                waiting += 1

    @torch.inference_mode()
    def _tokens(self, frames: Tensor) -> Tensor:
        tokens = self.encoder(frames)
        require(
            bool(tokens.isfinite().all()),
            "the model's tokens are NaN or infinite; take other weights, or another precision",
        )
        return tokens.to("cpu", DTYPES[self.manifest.dtype])

    def _without_root(self, error: str) -> str:
        """Returns an error without the folder, so that it is the same wherever the videos are."""
        return error.replace(os.path.join(str(self.root), ""), "")

    def _size(self, name: str) -> int:
        try:
            return os.path.getsize(self.root / name)
        except OSError:
            return 0
