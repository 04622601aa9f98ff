"""Live video: every frame is encoded once, and the learned tokens of the last ones are kept.

As a `FrameViT` processes each frame alone until it is tokens, the tokens of old frames do not
change with a new one. In a `ViViT` frames attend to each other from the first block on, so there
every new frame needs the whole clip again.

Both halves of a step are modules of tensors alone, with shapes that are the same from the first
frame on: slots without a frame are masked. So they compile once, and can be exported.

Axes: `b` videos, such as robots, `t` frames that are kept, `k` tokens of a frame, `c` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.modules import uncompiled
from ..utils.preprocessing import Preprocessing
from ..utils.validation import check_choice, require
from .compilation import MODES, CompileMode
from .framevit import FrameViT
from .preprocessing import get_preprocessing

_STATE = ("tokens", "present", "ages")


class StreamEncoder(nn.Module):
    """Turns the newest frame of each video into tokens: `b c h w -> b k c`.

    Args:
        model: A `FrameViT`. A frame of several cameras is `b n c h w`; one of several images, a
            tubelet, has their axis in the model's format.
    """

    def __init__(self, model: FrameViT):
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor, condition: Tensor | None = None) -> Tensor:
        """Encodes a frame; `condition` is `b d`, of models that take one."""
        model = self.model
        more = int(model.num_cameras > 1)
        axis = model.input_format.index("t") + more
        clip = frame.unsqueeze(axis) if frame.ndim == 4 + more else frame
        if clip.ndim == 5 + more and clip.shape[axis] != model.tubelet_size:
            raise ValueError(
                f"a frame is {list(frame.shape)}, expected {model.tubelet_size} images; "
                "push one frame or tubelet at a time"
            )
        return model.encode(clip, condition)[:, 0]


class StreamStep(nn.Module):
    """Adds the tokens of a new frame to those of the last ones, and classifies.

    Args:
        model: A `FrameViT`.
    """

    def __init__(self, model: FrameViT):
        super().__init__()
        self.model = model

    def forward(
        self,
        new: Tensor,
        arrived: Tensor,
        elapsed: Tensor,
        tokens: Tensor,
        present: Tensor,
        ages: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Runs everything behind the encoder; the oldest slot leaves, the new one is the last.

        Args:
            new: Tokens of the new frame, `b k c`.
            arrived: Whether there is a new frame, `b` bool.
            elapsed: Intervals between frames since the last call, `b`.
            tokens: Of the last frames, oldest first, `b t k c`.
            present: Whether there was a frame, `b t` bool.
            ages: How old frames are, in intervals, `b t`.

        Returns:
            The prediction, the features of all slots behind the last block, `b t k c`, and the
            three to pass next time.
        """
        tokens = torch.cat([tokens[:, 1:], new[:, None]], dim=1)
        present = torch.cat([present[:, 1:], arrived[:, None]], dim=1)
        aged = ages[:, 1:] + elapsed[:, None]
        ages = torch.cat([aged, torch.zeros_like(elapsed)[:, None]], dim=1)
        seen = present.logical_and(
            ages < self.model.num_frames - 0.5
        )  # older ones have no embedding
        features = self.model.forward_token_features(tokens, seen, ages)
        out = self.model.predict(features, seen)
        return out, features.unflatten(1, (tokens.shape[1], -1)), tokens, present, ages


@dataclass(frozen=True)
class StreamShape:
    """What a stream keeps of each video.

    Args:
        num_frames: Slots for frames.
        tokens_per_frame: Tokens of one, of all cameras.
        embed_dim: Channels of a token.
        input_size: `(c, h, w)` of an image.
    """

    num_frames: int
    tokens_per_frame: int
    embed_dim: int
    input_size: tuple[int, int, int]


class FrameStream:
    """Keeps the tokens of the last frames of live videos, for two halves that compute.

    `TokenStream` has those of a model, `load_stream` those of files.

    Args:
        shape: What is kept.
        encoder: As `StreamEncoder`.
        step: As `StreamStep`.
        preprocessing: How pixels become the encoder's input; None if unknown.
    """

    def __init__(
        self,
        shape: StreamShape,
        encoder: Callable[..., Tensor],
        step: Callable[..., tuple[Tensor, ...]],
        preprocessing: Preprocessing | None = None,
    ):
        self.shape, self._encoder, self._step = shape, encoder, step
        self._preprocessing = preprocessing
        self.reset()

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that the halves compute with."""
        return torch.empty(0)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pixels become the encoder's input; None if unknown."""
        return self._preprocessing

    @torch.no_grad()
    def push(
        self,
        frame: Tensor,
        condition: Tensor | None = None,
        *,
        arrived: Tensor | None = None,
        elapsed: float | Tensor = 1.0,
    ) -> Tensor:
        """Adds the newest frame, forgets the oldest if need be, and classifies.

        Args:
            frame: `b c h w`, normalized as the model takes it; of several cameras `b n c h w`; or
                with the axis of a tubelet in the model's format. Pixels, uint8, have any size and
                may be `b h w c`; they are resized, cut and normalized by `prepare_frames`.
            condition: `b d`, of models that take one.
            arrived: False for videos without a new frame, `b` bool; theirs is not looked at.
            elapsed: Time since the push before, in intervals between frames as the model was
                trained; one number, or `b`. Frames that are too old are not seen any more.

        Returns:
            The prediction for the frames so far, at most the shape's `num_frames`: `b classes`.

        Raises:
            ValueError: The frame does not fit the model or the frames before it.
        """
        like = self.like
        if frame.dtype == torch.uint8:
            frame = prepare_frames(frame, self.shape.input_size, self.preprocessing)
        frame = frame.to(like.device, like.dtype)
        if self._state and len(frame) != len(self._state["tokens"]):
            raise ValueError(
                f"got a batch of {len(frame)} videos, expected {len(self._state['tokens'])} as "
                "before; call reset() first"
            )
        b = len(frame)
        if arrived is None:
            arrived = torch.ones(b, dtype=torch.bool)
        require(
            list(arrived.shape) == [b] and arrived.dtype == torch.bool,
            f"arrived is {arrived.dtype} {list(arrived.shape)}, expected bool of {b} videos",
        )
        elapsed = torch.as_tensor(elapsed, dtype=torch.float32)
        require(
            elapsed.ndim == 0 or list(elapsed.shape) == [b],
            f"elapsed is {list(elapsed.shape)}, expected one number or one a video, [{b}]",
        )
        new = self._encoder(frame, condition)
        state = self._state or self.empty_state(b)
        kept = [state[name].to(like.device) for name in _STATE]
        arrived, elapsed = arrived.to(like.device), elapsed.to(like.device).expand(b)
        kept[0] = kept[0].to(new.dtype)
        logits, self._features, *kept = self._step(new, arrived, elapsed, *kept)
        self._state = dict(zip(_STATE, kept, strict=True))
        self._count = min(self._count + 1, self.shape.num_frames)
        return logits

    @property
    def tokens(self) -> Tensor:
        """The tokens of the last frames, oldest first: `b t k c`.

        Raises:
            ValueError: There was no frame yet.
        """
        return self._kept("tokens")

    @property
    def present(self) -> Tensor:
        """Which of `tokens` are of a frame: `b t`, False where it did not arrive or was reset."""
        return self._kept("present")

    @property
    def features(self) -> Tensor:
        """What the last push made of `tokens` behind the last block and norm: `b t k c`."""
        self._kept("tokens")
        return self._features[:, -self._count :].clone()

    def reset(self, videos: Tensor | list[int] | None = None) -> None:
        """Forgets all frames of some videos, or of all, which may be another number then.

        Args:
            videos: Their numbers, or `b` bool.

        Raises:
            ValueError: There are no such videos.
        """
        if videos is None or not getattr(self, "_state", None):
            self._state: dict[str, Tensor] = {}
            self._features, self._count = torch.empty(0), 0
            return
        present = self._state["present"].clone()
        try:
            present[torch.as_tensor(videos, device=present.device)] = False
        except (IndexError, TypeError) as error:
            raise ValueError(
                f"videos is {videos}, expected numbers below {len(present)}, or {len(present)} bool"
            ) from error
        self._state["present"] = present

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what is kept of the frames so far, to go on from; the model is not in it."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where another stream of the same model was.

        Raises:
            ValueError: It is no state of a stream of such a model.
        """
        if not state:
            self.reset()
            return
        got = {name: list(value.shape) for name, value in state.items()}
        b = got.get("tokens", [0])[0]
        expected = {name: list(value.shape) for name, value in self.empty_state(b).items()}
        require(got == expected, f"state is {got}, expected {expected} of such a model")
        self._state = {name: value.clone() for name, value in state.items()}
        self._count, self._features = self.shape.num_frames, torch.empty(0)

    def empty_state(self, b: int) -> dict[str, Tensor]:
        """Returns the state of videos without frames."""
        shape, like = self.shape, self.like
        t = shape.num_frames
        return {
            "tokens": like.new_zeros(b, t, shape.tokens_per_frame, shape.embed_dim),
            "present": like.new_zeros(b, t, dtype=torch.bool),
            "ages": torch.arange(t - 1.0, -1, -1, device=like.device).repeat(b, 1),
        }

    def _kept(self, name: str) -> Tensor:
        if not self._state:
            raise ValueError("there are no tokens before the first frame; push one")
        return self._state[name][:, -self._count :].clone()  # the caller's, whatever comes later


class TokenStream(FrameStream):
    """Keeps the learned tokens of the last frames of live videos, and encodes each frame once.

    Tokens and predictions are those of the whole clip at once, to rounding. The model should be in
    evaluation mode; there are no gradients. A stream follows its model to another device or dtype.

    Args:
        model: A `FrameViT`.
        compile: As in `compile_model`; both halves are compiled for one batch size, once.
        options: Further arguments of `torch.compile`, such as `backend`.

    Raises:
        ValueError: The model is no `FrameViT`, or compiled.

    >>> model = FrameViT(img_size=32, embed_dim=32, num_heads=2, depth=2, num_frames=3).eval()
    >>> stream = TokenStream(model)
    >>> for _ in range(5):
    ...     logits = stream.push(torch.ones(1, 3, 32, 32))
    >>> logits.shape, stream.tokens.shape
    (torch.Size([1, 400]), torch.Size([1, 3, 8, 32]))
    """

    def __init__(self, model: FrameViT, compile: CompileMode = "no", **options: Any):
        if model is not uncompiled(model):
            raise ValueError(
                "model is compiled, which a stream's calls would not use; pass the FrameViT itself"
            )
        if not isinstance(model, FrameViT):
            raise ValueError(
                f"model is a {type(model).__name__}, expected a FrameViT: in others old tokens "
                "change with every new frame; run them on the whole clip"
            )
        check_choice("compile", compile, ("no", *MODES))
        self.model, encoder, step = model, StreamEncoder(model), StreamStep(model)
        if compile != "no":
            for half in (encoder, step):
                half.compile(**{"mode": compile, "fullgraph": True, "dynamic": False} | options)
        super().__init__(stream_shape(model), encoder, step)

    @property
    def like(self) -> Tensor:
        """A parameter of the model."""
        return self.model.time_embed

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pixels become the model's input, as the model says now; None if it does not."""
        return get_preprocessing(self.model, self.shape.input_size[0])


def stream_shape(model: FrameViT) -> StreamShape:
    """Returns what a stream of a model keeps.

    Raises:
        ValueError: The model has no encoder of frames.
    """
    require(
        hasattr(model, "encoder"),
        f"a {type(model).__name__} has no encoder of frames; pass a FrameViT",
    )
    embed: Any = model.encoder.patch_embed
    size = (embed.proj.in_channels, *embed.img_size)
    return StreamShape(model.num_frames, model.tokens_per_frame, model.embed_dim, size)


def prepare_frames(frames: Tensor, size: tuple[int, int, int], how: Preprocessing | None) -> Tensor:
    """Makes pixels a model's input, as its preprocessing for evaluation does, on their device.

    Args:
        frames: uint8 `... c h w` or `... h w c`, of any size.
        size: `(c, h, w)` of the model's input.
        how: As `get_preprocessing` returns it.

    Returns:
        float32 `... c h w` of the model's size. To what `Preprocessing.eval_transform` makes of the
        same images it differs by rounding to whole pixels.

    Raises:
        ValueError: They are no such frames, or nothing says how.
    """
    c, h, w = size
    if frames.ndim >= 4 and frames.shape[-3] != c and frames.shape[-1] == c:
        frames = frames.movedim(-1, -3)
    got = f"{frames.dtype} {list(frames.shape)}"
    is_image = frames.dtype == torch.uint8 and frames.ndim >= 4 and frames.shape[-3] == c
    require(is_image, f"frames are {got}, expected uint8 of {c} channels, b c h w or b h w c")
    if how is None:
        raise ValueError(
            "the model does not say how images are normalized; call set_preprocessing(model, "
            "Preprocessing(mean, std)) once, or pass normalized frames, b c h w"
        )
    require(how.crop_mode != "border", "frames with a border are not made here; normalize yourself")
    sides = h / how.crop_pct, w / how.crop_pct
    height, width = frames.shape[-2:]
    if how.crop_mode == "center":
        scale = max(sides[0] / height, sides[1] / width)
        sides = scale * height, scale * width
    resized = max(h, int(sides[0] + 1e-6)), max(w, int(sides[1] + 1e-6))
    pixels = frames.reshape(-1, *frames.shape[-3:]).float()
    if resized != (height, width):
        pixels = _resize(pixels, resized, how.interpolation)
    top, left = round((resized[0] - h) / 2), round((resized[1] - w) / 2)
    pixels = pixels[..., top : top + h, left : left + w] / 255
    mean, std = pixels.new_tensor([how.mean, how.std])[..., None, None]
    return ((pixels - mean) / std).reshape(*frames.shape[:-2], h, w)


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resizes `b c h w`, 0 to 255, as PIL does: first the width, then the height, clipped each."""
    if interpolation == "nearest":
        return F.interpolate(pixels, size, mode="nearest-exact")
    (h, w), height = size, pixels.shape[-2]
    if interpolation == "lanczos":  # not in every torch
        pixels = (pixels @ _lanczos(pixels.shape[-1], w).to(pixels).T).clamp(0, 255)
        return (_lanczos(height, h).to(pixels) @ pixels).clamp(0, 255)
    for sides in ((height, w), (h, w)):
        pixels = F.interpolate(pixels, sides, mode=interpolation, antialias=True).clamp(0, 255)
    return pixels


def _lanczos(length: int, size: int) -> Tensor:
    """Returns the part of each of `length` pixels in each of `size` new ones: `size length`."""
    step = length / size
    centers = (torch.arange(size, dtype=torch.float64) + 0.5) * step - 0.5
    x = (torch.arange(length, dtype=torch.float64) - centers[:, None]) / max(step, 1.0)
    weights = (torch.sinc(x) * torch.sinc(x / 3)).where(x.abs() < 3, 0)
    return weights / weights.sum(1, keepdim=True)
