"""Live video: every frame is encoded once, and its learned tokens are kept in a ring buffer.

As a `FrameViT` processes each frame alone until it is tokens, the tokens of old frames do not
change with a new one. In a `ViViT` frames attend to each other from the first block on, so there
every new frame needs the whole clip again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.modules import uncompiled
from .framevit import FrameViT


class TokenStream:
    """Keeps the learned tokens of the last frames of a live video, and encodes each frame once.

    Tokens and predictions are those of the whole clip at once, to rounding. The model should be in
    evaluation mode; there are no gradients.

    Args:
        model: A `FrameViT`.

    Raises:
        ValueError: The model is no `FrameViT`, or compiled.

    >>> model = FrameViT(img_size=32, embed_dim=32, num_heads=2, depth=2, num_frames=3).eval()
    >>> stream = TokenStream(model)
    >>> for _ in range(5):
    ...     logits = stream.push(torch.ones(1, 3, 32, 32))
    >>> logits.shape, stream.tokens.shape
    (torch.Size([1, 400]), torch.Size([1, 3, 8, 32]))
    """

    def __init__(self, model: FrameViT):
        if model is not uncompiled(model):
            raise ValueError(
                "model is compiled, which a stream's calls would not use; pass the FrameViT itself"
            )
        if not isinstance(model, FrameViT):
            raise ValueError(
                f"model is a {type(model).__name__}, expected a FrameViT: in others old tokens "
                "change with every new frame; run them on the whole clip"
            )
        self.model = model
        self.reset()

    @torch.no_grad()
    def push(self, frame: Tensor) -> Tensor:
        """Adds the newest frame, forgets the oldest if need be, and classifies.

        Args:
            frame: `b c h w`, or with the axis of a tubelet in the model's format (5 axes).

        Returns:
            The prediction for the frames so far, at most the model's `num_frames`: `b classes`.

        Raises:
            ValueError: The frame does not fit the model or the frames before it.
        """
        axis = self.model.input_format.index("t")
        clip = frame.unsqueeze(axis) if frame.ndim == 4 else frame
        if clip.ndim == 5 and clip.shape[axis] != self.model.tubelet_size:
            raise ValueError(
                f"a frame is {list(frame.shape)}, expected {self.model.tubelet_size} images; "
                "push one frame or tubelet at a time"
            )
        if self._ring is not None and len(clip) != len(self._ring):
            raise ValueError(
                f"got a batch of {len(clip)} videos, expected {len(self._ring)} as before; call "
                "reset() first"
            )
        (tokens,) = self.model.encode(clip).unbind(1)
        if self._ring is None:
            self._ring = tokens.new_empty(len(clip), self.model.num_frames, *tokens.shape[1:])
        self._ring[:, self._count % self.model.num_frames] = tokens
        self._count += 1
        return self.model.forward_tokens(self.tokens)

    @property
    def tokens(self) -> Tensor:
        """The tokens of the last frames, oldest first: `b t k c`.

        Raises:
            ValueError: There was no frame yet.
        """
        if self._ring is None:
            raise ValueError("there are no tokens before the first frame; push one")
        size = self.model.num_frames
        if self._count <= size:
            return self._ring[:, : self._count].clone()  # the caller's, whatever is pushed later
        return self._ring.roll(-(self._count % size), dims=1)

    def reset(self) -> None:
        """Forgets all frames, for another video."""
        self._ring: Tensor | None = None
        self._count = 0
