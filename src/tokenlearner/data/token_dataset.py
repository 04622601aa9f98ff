"""Clips of tokens that `tokenlearner encode` wrote, for training and evaluation.

Axes: `t` frames of a clip, `v` views of a video, `k` tokens of a frame, `c` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.preprocessing import NAMES
from ..utils.validation import require
from .config import DataConfig
from .dataset import MapDataset, UnreadableFile
from .file_lists import FOLDERS
from .image_folder import first_read
from .loader import eval_batches
from .token_shards import (
    Manifest,
    VideoRow,
    differences,
    read_manifest,
    read_split,
    read_tokens,
    shard_path,
)
from .video_folder import choose_frames

_OF_PIXELS = ("img_size", "in_chans", *NAMES)


def load_tokens(name: str, split: str, config: DataConfig) -> TokenDataset:
    """Lists the videos of a folder of tokens, `config.root`; those that could not be read are out.

    Raises:
        ValueError: The folder has no such split, is not written to its end, has videos without
            labels, or an option does not go with tokens.
    """
    root = config.folder
    if root is None:
        raise ValueError(f"{name} needs the folder that `tokenlearner encode` wrote; pass root")
    manifest = read_manifest(root)
    given = [option for option in _OF_PIXELS if getattr(config, option) is not None]
    given += ["crops"] if config.crops != 1 else []
    require(
        not given, f"{' and '.join(given)} are of pixels, which tokens have no more; leave them out"
    )
    require(
        config.stride % manifest.stride == 0,
        f"stride is {config.stride}, but the tokens in {root} are of every frame in "
        f"{manifest.stride}; pass a multiple of it, or 0 to spread clips over their videos",
    )
    found = next((part for part in FOLDERS[split] if part in manifest.splits), None)
    require(
        found is not None,
        f"{root} has nothing for split {split!r}, only {', '.join(manifest.splits)}; hold a share "
        "of the training videos out with held_out=0.1, or encode a folder with that split",
    )
    require(
        len(manifest.classes) > 0,
        f"the videos of {root} have no labels; put them in folders of classes, or read the tokens "
        "yourself, by tokenlearner.data.token_shards",
    )
    part = str(found)
    shards = read_split(root, part, manifest.splits[part])
    rows = [(i, row) for i, index in enumerate(shards) for row in index if not row.error]
    require(bool(rows), f"no video of split {part!r} in {root} could be read")
    labels = torch.tensor([row.label for _, row in rows], device="cpu")
    low, high, top = int(labels.min()), int(labels.max()), len(manifest.classes) - 1
    require(
        low >= 0 and high <= top,
        f"labels of {root} run from {low} to {high}, expected 0 to {top}; encode the videos anew",
    )
    paths = tuple(shard_path(root, part, i) for i in range(len(shards)))
    data = TokenDataset(name, split, manifest.classes, labels, config, manifest, paths, tuple(rows))
    first_read((partial(data.load, i) for i in range(len(data))), f"{name} {split}")
    return data


@dataclass(frozen=True, eq=False)
class TokenDataset(MapDataset):
    """One split of clips of tokens, which are read one by one.

    Clips lie in their videos as those of `VideoFolderDataset`, and `stride` counts frames of the
    video there too.

    Args:
        name: What the data set is called.
        split: `"train"`, `"val"` or `"test"`.
        classes: The name of each label.
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
        config: Frames, stride and views of clips.
        manifest: What the tokens are made by.
        shards: The tar files.
        rows: For each video the number of its shard, and its place there.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: Tensor = field(repr=False)
    config: DataConfig = field(repr=False)
    manifest: Manifest = field(repr=False)
    shards: tuple[Path, ...] = field(repr=False)
    rows: tuple[tuple[int, VideoRow], ...] = field(repr=False)

    # Tokens are a model's own, and not normalized.
    mean, std = (0.0,), (1.0,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the size of one clip, `(t, k, c)`."""
        return self.config.clip_frames, self.manifest.tokens_per_frame, self.manifest.channels

    @property
    def workers(self) -> int:
        """Processes that read files."""
        return self.config.reading_workers

    @property
    def source(self) -> Mapping[str, Any]:
        """What the tokens are made by."""
        return self.manifest.source

    def load(self, index: int) -> Tensor:
        """Reads a clip, `t k c` in the dtype of the files, with several views `v t k c`.

        Raises:
            UnreadableFile: The file cannot be read.
        """
        shard, row = self.rows[index]
        t, views = self.config.clip_frames, self.config.views
        stride = self.config.stride // self.manifest.stride
        chosen = choose_frames(row.frames, t, stride, None if self.split == "train" else views)
        try:
            clips = [read_tokens(self.shards[shard], row, clip, self.manifest) for clip in chosen]
        except (OSError, ValueError) as error:
            message = f"{self.shards[shard]} cannot be read ({error}); encode its videos again"
            raise UnreadableFile(message) from error
        return clips[0] if len(clips) == 1 else torch.stack(clips)

    def eval_transform(self, raw: Tensor) -> Tensor:
        """Returns tokens in float32: `t k c`, of several views `v t k c`."""
        return raw.float()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields clips and labels in order, without unreadable ones; the same every time.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        return eval_batches(replace(self, split="test"), batch_size, self.workers)

    def select(self, indices: Tensor) -> TokenDataset:
        """Returns a data set of these videos."""
        rows = tuple(self.rows[i] for i in indices.tolist())
        return replace(self, rows=rows, labels=self.labels[indices])

    def with_preprocessing(self, **values: Any) -> TokenDataset:
        """Returns the same clips, as there are no pixels to prepare."""
        return self


def check_token_source(model: Any, data: Any) -> None:
    """Checks that tokens go into a model of tokens, and into one that was trained on such tokens.

    Args:
        model: Any; one of tokens has a `token_shape`, and a `token_source` if it was trained.
        data: Any.

    Raises:
        ValueError: They do not go together.
    """
    if not isinstance(data, TokenDataset):
        return
    require(
        hasattr(model, "token_shape"),
        f"{type(model).__name__} takes pixels, and {data.name} has tokens; take a model that was "
        "trained on them, or is named temporal_*",
    )
    if model.token_source is None:
        return
    found = differences(model.token_source, dict(data.source))
    require(
        not found,
        f"the model was trained on other tokens than those in {data.config.root}: {found}; encode "
        "the videos with what it was trained on",
    )
