"""`tokenlearner encode`: a folder of videos becomes the tokens of their frames, in shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..evaluation.encoding import EncodeRow, encode
from ..models.factory import create_model, load_model
from ..utils.io import check_output_folder, is_model_path
from ..utils.modules import pick_device
from ..utils.processors import local_process
from ..utils.random import fixed_seed
from ..utils.validation import check_count, check_literals, counted
from ._arguments import read_config
from ._console import say, show_progress


@dataclass(frozen=True)
class EncodeConfig:
    """Writes the tokens of the frames of videos, to train a transformer over time on.

    Args:
        videos: Folder of videos, with splits or without, in folders of classes or not.
        out: Folder for the shards; where one is there already it goes on.
        model: A file or folder of a trained model, or a name that `create_model` knows: a ViT, with
            learned tokens or without, or a FrameViT.
        at: Of a model without learned tokens, the block whose input is taken, or a share of the
            depth; None takes the output of the last one.
        pretrained: Whether a name has trained weights.
        stride: Frames of a video from one that is encoded to the next.
        dtype: Of the tokens as they are written.
        shard_size: Videos of a shard.
        batch_size: Frames at a time.
        workers: Processes that decode, in each process that encodes; None is one a processor.
        max_broken: Videos that may be unreadable; they are left out, counted and named.
        follow_links: Read videos out of the folder too, where links in it lead there.
        device: Such as cpu or cuda; auto takes a GPU where there is one, each process its own.

    Raises:
        ValueError: A number is out of range, or out cannot be written.
    """

    videos: str
    out: str
    model: str = ""
    at: int | float | None = None
    pretrained: bool = True
    stride: int = 4
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    shard_size: int = 100
    batch_size: int = 32
    workers: int | None = None
    max_broken: int = 10
    follow_links: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_literals(self)
        if not self.model:
            raise ValueError("model is missing; pass --model, a trained model or a name")
        for name in ("stride", "shard_size", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("workers", "max_broken"):
            check_count(name, getattr(self, name) or 0, least=0)
        check_output_folder(self.out)


def encode_command(arguments: Sequence[str]) -> None:
    """Encodes a folder of videos."""
    config = read_config("encode", EncodeConfig, arguments)
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = pick_device(f"cuda:{local_process()}")
    is_path = is_model_path(config.model)
    options: dict[str, Any] = {"pretrained": True} if config.pretrained and not is_path else {}
    with fixed_seed(0):  # in every process the same, where a name has no trained weights
        model = load_model(config.model) if is_path else create_model(config.model, **options)
    names = ("at", "stride", "dtype", "shard_size", "batch_size", "workers", "max_broken")
    kept = {name: getattr(config, name) for name in (*names, "follow_links")}
    with show_progress(f"encoding {config.videos}", None) as advance:

        def report(row: EncodeRow) -> None:
            if row.error:
                say(f"left out: {row.error}", file=sys.stderr)
            advance(f"encoding {config.videos}, {row.done} of {row.total}")

        result = encode(model.to(device), config.videos, config.out, **kept, report=report)
    shards, done = counted(result.shards, "shard"), result.shards - result.written
    say(
        f"{counted(result.videos, 'video')} with {counted(result.frames, 'frame')} in {shards} of "
        f"{config.out}" + (f", {done} of them done before" if done else "")
    )
    if result.broken:
        print(f"{counted(len(result.broken), 'video')} cannot be read", file=sys.stderr)
