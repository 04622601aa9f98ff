"""Tokens of single frames: the part of a model up to where its tokens are learned.

That part is frozen where a transformer over time is trained on its tokens, so a frame has to go
through it once only. The model's own forward runs, and is left where the tokens are ready.

Axes: `b` frames, `k` tokens of a frame, `c` channels, `h w` pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.blocks import FusedBlock, ReducedBlock
from ..utils.modules import stream_device, stream_dtype
from ..utils.validation import require
from .features import wrapped_blocks
from .framevit import FrameViT
from .hosts import find_host
from .insertion import block_index
from .outputs import first_tensor
from .temporal import TemporalTransformer


class _Reached(Exception):  # no error: it leaves the forward of a host
    def __init__(self, tokens: Tensor):
        super().__init__("the tokens are ready")
        self.tokens = tokens


class FrameEncoder(nn.Module):
    """Turns each frame into tokens by itself, with the front of a model.

    Of a model with learned tokens these are the learned ones, as they are in front of the block
    that runs on them alone; of a model without, all positions. Prefix tokens are left out. Of a
    `FrameViT` they are what `model.encode` gives.

    Args:
        model: A ViT that `insert` knows, with or without learned tokens, or a `FrameViT`.
        at: Of a model without learned tokens: the block whose input is taken, counted from 0, or a
            share of the depth; None takes the output of the last block.

    Shape:
        `b c h w -> b k c`

    Raises:
        ValueError: The model's frames see each other, its tokens are put back on all positions
            (`fuse=True`), or `at` is given for a model that learns tokens.
    """

    def __init__(self, model: nn.Module, at: int | float | None = None):
        super().__init__()
        require(
            not isinstance(model, TemporalTransformer),
            "the model runs on tokens already; pass the model that makes them",
        )
        self.model, self._clips = model, isinstance(model, FrameViT)
        if isinstance(model, FrameViT):
            _check_frame_vit(model, at)
            return
        place = find_host(model)
        require(
            place.frames == 1 and not hasattr(model, "num_frames"),
            f"frames of {type(model).__name__} see each other from the first block on, so they "
            "have no tokens of their own; pass a model of images, or a FrameViT",
        )
        self.model = place.host
        learners = wrapped_blocks(place.host)
        self._prefix, self._count = place.num_prefix_tokens, 0
        self._block, self._is_output = _outlet(place.blocks, learners, at)
        if learners:
            last = learners[max(learners)].learners[0]
            self._count = last.active_tokens or last.num_tokens

    def forward(self, frames: Tensor) -> Tensor:
        """Encodes normalized frames, in the device and dtype of the model."""
        frames = frames.to(stream_device(self.model), stream_dtype(self.model))
        if self._clips:
            model: Any = self.model
            return model.encode(frames.unsqueeze(model.input_format.index("t")))[:, 0]
        with self._leaving():
            try:
                self.model(frames)
            except _Reached as reached:
                tokens = reached.tokens[:, self._prefix :]
                return tokens[:, : self._count] if self._count else tokens
        raise ValueError(
            f"{type(self.model).__name__} does not call its own blocks, as where it is compiled "
            "whole or exported; pass it as it was built"
        )

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Leaves the model's forward where the tokens are ready."""

        def leave_before(block: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        def leave_behind(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            raise _Reached(first_tensor(out))

        hook = (
            self._block.register_forward_hook(leave_behind)
            if self._is_output
            else self._block.register_forward_pre_hook(leave_before)
        )
        try:
            yield
        finally:
            hook.remove()


@torch.no_grad()
def count_tokens(encoder: FrameEncoder, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Returns how many tokens a frame `(c, h, w)` has, and their channels, by encoding a blank."""
    _, k, c = encoder(torch.zeros(1, *input_size, device="cpu")).shape
    return k, c


def _check_frame_vit(model: FrameViT, at: int | float | None) -> None:
    require(at is None, f"at is {at}, but the model learns tokens at a place of its own; omit it")
    for name, usual in {"tubelet_size": 1, "num_cameras": 1, "condition_dim": 0}.items():
        value = getattr(model, name)
        require(
            value == usual,
            f"the model has {name}={value}, and a video alone does not say its frames' tokens; "
            f"pass one with {name}={usual}, or call model.encode yourself",
        )


def _outlet(
    blocks: nn.Sequential | nn.ModuleList,
    learners: dict[int, ReducedBlock],
    at: int | float | None,
) -> tuple[nn.Module, bool]:
    """Returns the module whose input is the tokens, or whose output, and which of the two."""
    if not learners:
        index = None if at is None else block_index(at, len(blocks))
        return (blocks[-1], True) if index is None else (blocks[index], False)
    require(at is None, f"at is {at}, but the model learns tokens at a place of its own; omit it")
    last = max(learners)
    block = learners[last]
    require(
        not isinstance(block, FusedBlock),
        "the model puts its tokens back on all positions behind each block, so it has no few "
        "tokens; insert them without fuse=True",
    )
    if block.overlap:  # positions are among the tokens until they leave
        return blocks[last + block.overlap - 1], True
    return block.block, False
