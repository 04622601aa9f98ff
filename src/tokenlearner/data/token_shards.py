"""Shards of the tokens of videos: a manifest, and tar files as WebDataset reads them.

`manifest.json` says what the tokens are made by and how many shards there are. Shard `i` of a split
holds the same videos whoever wrote it: `train-000000.tar` has for each of them a `.safetensors`
with `tokens`, `t k c`, a `.cls` with the label, and a `.json`. `train-000000.json` beside it is its
index, names the videos that cannot be read, and is written last: a shard without one is not done.

Axes: `t` frames of a video, `k` tokens of a frame, `c` channels.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import read_json
from ..utils.io import atomic_write, write_json
from ..utils.validation import check_choice, check_count, counted, is_integer, require

MANIFEST, FORMAT = "manifest.json", "tokens of tokenlearner, 1"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BLOCK = 512  # bytes of a header in a tar file


@dataclass(frozen=True)
class SplitInfo:
    """One split of a set of tokens.

    Args:
        videos: How many videos were listed, those that cannot be read too.
        shards: Into how many shards they go.
        listing: SHA-256 of their names and labels.
    """

    videos: int
    shards: int
    listing: str


@dataclass(frozen=True)
class Manifest:
    """What a set of tokens is made by, and how it is cut into shards.

    Args:
        source: The model, the digest of its weights, the preprocessing, the stride: plain values.
        tokens_per_frame: Tokens of a frame, `k`.
        channels: Channels of a token, `c`.
        dtype: bfloat16, float16 or float32.
        shard_size: Videos of a shard.
        classes: The name of each label; none where videos have no labels.
        splits: By name, `train`, `val` and `test`.

    Raises:
        ValueError: A value is out of range.
    """

    source: Mapping[str, Any]
    tokens_per_frame: int
    channels: int
    dtype: str
    shard_size: int
    classes: tuple[str, ...]
    splits: Mapping[str, SplitInfo]

    def __post_init__(self) -> None:
        for name in ("tokens_per_frame", "channels", "shard_size"):
            check_count(name, getattr(self, name))
        check_choice("dtype", self.dtype, list(DTYPES))
        check_count("stride", self.source["stride"])
        require(
            all(isinstance(name, str) for name in self.classes),
            f"classes are {self.classes!r:.80}, expected names",
        )
        for name, split in self.splits.items():
            shards = -(-check_count("videos", split.videos) // self.shard_size)
            require(
                split.shards == shards,
                f"split {name!r:.80} has {split.shards!r:.80} shards, expected {shards} of "
                f"{self.shard_size} of its {split.videos} videos",
            )

    @property
    def stride(self) -> int:
        """Frames of the video from one frame with tokens to the next."""
        return self.source["stride"]

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        write_json(folder / MANIFEST, {"format": FORMAT} | asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        ValueError: There is none, or it is not as `encode` writes it.
    """
    path = folder / MANIFEST
    require(path.is_file(), f"{folder} has no {MANIFEST}; pass a folder that `encode` wrote")
    try:
        content = read_json(path)
        require(content.pop("format") == FORMAT, f"its format is not {FORMAT!r}")
        splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
        return Manifest(splits=splits, classes=tuple(content.pop("classes")), **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not as `encode` writes it ({error!r}); encode the videos anew"
        raise ValueError(message) from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Names what differs between two sources or manifests, and how; empty if nothing does."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return "; ".join(f"{n} {a!r:.90} against {b!r:.90}" for n, (a, b) in pairs.items() if a != b)


def check_same(manifest: Manifest, folder: Path) -> None:
    """Checks that a folder is new, or holds tokens of the same manifest.

    Raises:
        ValueError: It holds other tokens, or other files.
    """
    if not (folder / MANIFEST).is_file():
        if not folder.exists():
            return
        others = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
        require(
            not others,
            f"{folder} holds other files, such as {others[:1]}; pass a new folder as out",
        )
        return
    before = read_manifest(folder)
    found = differences(
        {**before.source, **_flat(before)},
        json.loads(json.dumps({**manifest.source, **_flat(manifest)})),
    )
    require(
        not found,
        f"{folder} holds tokens of other settings or videos: {found}; pass a new folder as out, or "
        "what it was begun with",
    )


def _flat(manifest: Manifest) -> dict[str, Any]:
    fields = asdict(manifest)
    splits = {f"split {name}": info for name, info in fields.pop("splits").items()}
    del fields["source"]
    return fields | splits | {"classes": list(manifest.classes)}


@dataclass(frozen=True)
class VideoRow:
    """A video in a shard, or one that cannot be read.

    Args:
        video: Its name, from the folder of the videos on.
        size: Its bytes; a video of another size is encoded anew.
        label: Of `classes`; None is none.
        frames: Frames with tokens, `t`.
        offset: Where its tokens begin in the tar file, in bytes.
        error: Names it and says why it cannot be read; it has no tokens then.
    """

    video: str
    size: int
    label: int | None = None
    frames: int = 0
    offset: int = 0
    error: str = ""


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """Returns the tar file of a shard."""
    return folder / f"{split}-{shard:06d}.tar"


def read_index(tar: Path) -> list[VideoRow] | None:
    """Reads the index of a shard; None where it is not done.

    Raises:
        ValueError: It is not as `encode` writes it.
    """
    path = tar.with_suffix(".json")
    if not path.is_file() or not tar.is_file():
        return None
    try:
        content = read_json(path)
        if content["bytes"] != tar.stat().st_size:
            return None
        rows = [VideoRow(**row) for row in content["videos"]]
        for row in rows:
            numbers = (row.size, row.frames, row.offset, row.label or 0)
            require(all(is_integer(n) and n >= 0 for n in numbers), f"{row} has no such numbers")
            require(isinstance(row.video, str) and isinstance(row.error, str), f"{row} is no text")
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} is not as `encode` writes it ({error!r}); remove it, and encode again"
        raise ValueError(message) from error


class ShardWriter:
    """Writes one shard, as a context: whole at its end, or not at all.

    The bytes depend on what is added alone.

    Args:
        tar: The file, as `shard_path` names it.
        first: Number of its first video in the split.
        classes: The name of each label.
    """

    def __init__(self, tar: Path, first: int, classes: Sequence[str]):
        self.path, self.first, self.classes = tar, first, classes
        self.rows: list[VideoRow] = []

    def __enter__(self) -> ShardWriter:
        self._writing = atomic_write(self.path)
        self._file: Any = self._writing.__enter__().open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._tar.close()
        finally:
            self._file.close()
            self._writing.__exit__(*error)
        if error[0] is None:
            size = self.path.stat().st_size
            rows = [asdict(row) for row in self.rows]
            write_json(self.path.with_suffix(".json"), {"bytes": size, "videos": rows})

    def add(self, row: VideoRow, tokens: Tensor | None) -> None:
        """Adds the next video: its tokens `t k c`, or None where it cannot be read."""
        from safetensors.torch import save

        number = self.first + len(self.rows)
        if tokens is None:
            self.rows.append(row)
            return
        said: dict[str, Any] = {"video": row.video, "frames": len(tokens)}
        if row.label is not None:
            said |= {"label": row.label, "class": self.classes[row.label]}
            self._member(f"{number:09d}.cls", str(row.label).encode())
        self._member(f"{number:09d}.json", json.dumps(said).encode())
        content = save({"tokens": tokens.contiguous()})
        begin = self._member(f"{number:09d}.safetensors", content)
        header = 8 + int.from_bytes(content[:8], "little")
        self.rows.append(replace(row, frames=len(tokens), offset=begin + header))

    def _member(self, name: str, content: bytes) -> int:
        """Adds a file; returns where its content begins."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        begin = self._tar.offset + _BLOCK
        self._tar.addfile(info, io.BytesIO(content))
        return begin


def is_done(rows: Sequence[VideoRow] | None, sizes: Callable[[str], int]) -> bool:
    """Returns whether an index is there, of videos that are as large as they are now."""
    return rows is not None and all(sizes(row.video) == row.size for row in rows)


def read_split(folder: Path, split: str, info: SplitInfo) -> list[list[VideoRow]]:
    """Reads the index of every shard of a split.

    Raises:
        ValueError: Some are not written yet, or damaged.
    """
    shards: list[list[VideoRow]] = []
    for shard in range(info.shards):
        tar = shard_path(folder, split, shard)
        index = read_index(tar)
        if index is None:
            raise ValueError(
                f"{tar.name}, one of {counted(info.shards, 'shard')} of split {split!r} in "
                f"{folder}, is not written yet; run encode again, which goes on"
            )
        shards.append(index)
    return shards


def read_tokens(tar: Path, row: VideoRow, frames: Tensor, manifest: Manifest) -> Tensor:
    """Reads the tokens of some frames of a video, `t k c`, and no more bytes than they span.

    Args:
        tar: The shard.
        row: The video.
        frames: Numbers of frames with tokens, in any order, int64 `t`.
        manifest: Of the folder.

    Raises:
        OSError: The file cannot be read.
        ValueError: It ends before.
    """
    dtype, k, c = DTYPES[manifest.dtype], manifest.tokens_per_frame, manifest.channels
    first, last = int(frames.min()), int(frames.max())
    size = k * c * dtype.itemsize
    with tar.open("rb") as file:
        file.seek(row.offset + first * size)
        content = file.read((last - first + 1) * size)
    whole = len(content) == (last - first + 1) * size
    require(whole, f"it ends before the tokens of {row.video}")
    tokens = torch.frombuffer(bytearray(content), dtype=dtype).reshape(-1, k, c)
    return tokens[frames - first]
