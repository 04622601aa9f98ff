"""Live video: every frame is looked at once, and its learned tokens are kept for a while.

As a `FrameViT` looks at no frame together with another before it is tokens, the tokens of old
frames stay as they are when a new one comes. In `ViViT` frames see each other from the first block
on, so there every new frame means the whole clip again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .framevit import FrameViT


class TokenStream:
    """Keeps the learned tokens of the last frames of a live video, and looks at each frame once.

    Tokens and predictions are those of the whole clip at once, to rounding. The model should be in
    evaluation mode; nothing here is differentiated.

    Args:
        model: A `FrameViT`.

    Raises:
        ValueError: The model looks at several frames together before they are tokens.

    >>> model = FrameViT(img_size=32, embed_dim=32, num_heads=2, depth=2, num_frames=3).eval()
    >>> stream = TokenStream(model)
    >>> for _ in range(5):
    ...     logits = stream.push(torch.ones(1, 3, 32, 32))
    >>> logits.shape, stream.tokens.shape
    (torch.Size([1, 400]), torch.Size([1, 3, 8, 32]))
    """

    def __init__(self, model: FrameViT):
        if not isinstance(model, FrameViT):
            raise ValueError(
                f"a {type(model).__name__} looks at several frames together before they are "
                "tokens, so old tokens change with every new frame; use a FrameViT, or run the "
                "whole clip"
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
        one = frame.unsqueeze(self.model.input_format.index("t")) if frame.ndim == 4 else frame
        if one.ndim == 5 and self._images(one) != self.model.tubelet_size:
            raise ValueError(
                f"a frame is {list(frame.shape)}, expected {self.model.tubelet_size} images; "
                "push one frame or tubelet at a time"
            )
        if self._ring is not None and len(one) != len(self._ring):
            raise ValueError(
                f"a batch of {len(one)} videos, {len(self._ring)} before; call reset() first"
            )
        (tokens,) = self.model.encode(one).unbind(1)
        if self._ring is None:
            self._ring = tokens.new_empty(len(one), self.model.num_frames, *tokens.shape[1:])
        self._ring[:, self._seen % self.model.num_frames] = tokens
        self._seen += 1
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
        if self._seen <= size:
            return self._ring[:, : self._seen]
        return self._ring.roll(-(self._seen % size), dims=1)

    def reset(self) -> None:
        """Forgets all frames, for another video."""
        self._ring: Tensor | None = None
        self._seen = 0

    def _images(self, frame: Tensor) -> int:
        return frame.shape[self.model.input_format.index("t")]
