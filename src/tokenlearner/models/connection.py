"""Fewer image tokens in a vision-language model: `connect(model, processor)`, `disconnect`.

These models write the projected positions of an image over as many placeholders in the text. Here
the projector is wrapped by a `TokenConnector`, which makes `k` tokens of an image, and the
processor writes `k` placeholders. No code of the model runs differently but where images are cut
into tiles: their tokens are put one tile after the other, as they lie on no grid.
`vision_language.py` has the families.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers.token_connector import NeighborPooling, NeighborTokenLearner, TokenConnector
from ..utils.imports import require_package
from ..utils.modules import stream_device, stream_dtype
from ..utils.validation import Grid, check_choice, check_count, require
from .pretrained import guard_saving, remove_saving_guard
from .vision_language import VisionLanguage, find_vision_language

Model = TypeVar("Model", bound=nn.Module)

KEY = "tokenlearner_connection"  # in a model's config.json, and in the file of what was learned
_CONNECTORS = ("v11", "pool")


@dataclass(frozen=True)
class ConnectionConfig:
    """Holds the arguments of `connect`, and what the processor counted by before.

    Args:
        num_tokens: As in `connect`.
        learner: As in `connect`.
        video_tokens: As in `connect`.
        num_frames: As in `connect`.
        processor: Values of the processor's attributes, by their paths; empty without a processor.
    """

    num_tokens: int
    learner: str = "v11"
    video_tokens: int | None = None
    num_frames: int | None = None
    processor: dict[str, Any] = field(default_factory=dict)

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the arguments of `connect`, without model and processor."""
        return {key: value for key, value in asdict(self).items() if key != "processor"}


def connect(
    model: Model,
    processor: Any,
    num_tokens: int = 64,
    *,
    learner: str = "v11",
    video_tokens: int | None = None,
    num_frames: int | None = None,
) -> Model:
    """Makes a vision-language model read `num_tokens` tokens an image; changes it in place.

    The model's projector is wrapped by a `TokenConnector`, and its processor writes as many
    placeholders. Tokens start as means of neighboring positions: the model works at once, and
    `fit_connector` makes it better. `generate`, batches, padding and several images are as before.
    `save_pretrained` writes the whole, for `load_connected`; `save_model(only="learned")` what was
    learned, for `load_adapter`.

    Args:
        model: LLaVA, LLaVA-NeXT, LLaVA-OneVision, PaliGemma, Gemma 3, Idefics3, SmolVLM or InternVL
            of transformers, with or without its head.
        processor: The model's, changed in place too; None where there is none yet, as in the
            `__init__` of a class.
        num_tokens: Tokens `k` of an image; of each tile where images are cut into tiles, and of
            each frame of a video.
        learner: `"v11"` learns them; `"pool"` averages neighbors, without a parameter.
        video_tokens: LLaVA-OneVision only: tokens of a clip, learned over time from those of its
            frames; 16 to 32 are usual. None leaves `num_tokens` a frame.
        num_frames: With `video_tokens`, the frames of every clip.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is of no such family or connected already, the processor is of
            another, or an argument is out of range. Nothing is changed then.
    """
    base, family = find_vision_language(model)
    require(
        not isinstance(getattr(base, family.projector), TokenConnector),
        "this model is connected already; call disconnect(model, processor) first",
    )
    check_choice("learner", learner, _CONNECTORS)
    connector = _build(base, family, num_tokens, learner, video_tokens, num_frames)
    num_tokens = int(num_tokens)
    before = _counts(processor, family.counts, num_tokens)
    config = ConnectionConfig(num_tokens, learner, video_tokens, num_frames, before)
    _attach(base, family, connector, config)
    keep_connection(base, config)
    guard_saving(model)
    if processor is not None:
        _set_counts(processor, family, config)
    return model


def disconnect(model: Model, processor: Any = None) -> Model:
    """Makes a connected model and its processor what they were before; changes them in place.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not connected, or was without this processor.
    """
    base, family, connector, config = _connected(model)
    _restore_counts(processor, config)
    remove_saving_guard(model)
    _detach(base, family, connector)
    delattr(base.config, KEY)
    return model


@contextmanager
def disconnected(model: nn.Module, processor: Any = None) -> Iterator[None]:
    """Lets a connected model run on all image tokens in the block, such as for a comparison.

    Raises:
        ValueError: As in `disconnect`.
    """
    base, family, connector, config = _connected(model)
    _restore_counts(processor, config)
    _detach(base, family, connector)
    try:
        yield
    finally:
        _attach(base, family, connector, config)
        if processor is not None:
            _set_counts(processor, family, config)


def connect_processor(processor: Any, model: nn.Module) -> Any:
    """Makes a processor write the placeholders of a connected model, such as of one just loaded.

    Returns:
        The processor itself.

    Raises:
        ValueError: The model is not connected, or the processor is of another family.
    """
    base, family, _, config = _connected(model)
    before = _counts(processor, family.counts, config.num_tokens) or config.processor
    keep_connection(base, replace(config, processor=before))
    _set_counts(processor, family, config)
    return processor


def load_connected(folder: Any, processor: Any = None, **kwargs: Any) -> nn.Module:
    """Reads a connected model that its `save_pretrained` wrote, in evaluation mode.

    Args:
        folder: The folder, or a repository on the Hub, as `from_pretrained` takes them.
        processor: Counts as the model does afterwards; the one that `processor.save_pretrained`
            wrote does so already but for images in tiles and videos.
        kwargs: For `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: The folder has no connected model.
    """
    transformers = require_package("transformers", "hf", "load_connected")
    config = transformers.AutoConfig.from_pretrained(folder)
    require(
        hasattr(config, KEY) and bool(config.architectures),
        f"{folder} has no connected model; read it by from_pretrained, and call connect",
    )
    name, saved = config.architectures[0], ConnectionConfig(**getattr(config, KEY))
    plain: Any = getattr(transformers, name, None)
    require(plain is not None, f"{folder} is a {name}, which this transformers does not have")

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        plain.__init__(self, config, *args, **options)
        connect(self, None, **saved.to_kwargs())

    connected: Any = type(name, (plain,), {"__init__": build, "__module__": plain.__module__})
    model = connected.from_pretrained(folder, **kwargs)
    model.__class__ = plain  # which can be pickled; the connector stays
    keep_connection(model, saved)
    if processor is not None:
        connect_processor(processor, model)
    return model


def keep_connection(model: nn.Module, connection: ConnectionConfig) -> None:
    """Keeps what a model was connected with in its config, from where it is saved."""
    setattr(find_vision_language(model)[0].config, KEY, asdict(connection))


def get_connection(model: nn.Module) -> ConnectionConfig | None:
    """Returns the arguments of `connect` that a model was connected with, None if it was not."""
    for part in model.modules():
        saved = getattr(getattr(part, "config", None), KEY, None)
        if saved is not None:
            return ConnectionConfig(**saved)
    return None


def connector_of(model: nn.Module) -> TokenConnector:
    """Returns the connector of a model.

    Raises:
        ValueError: The model is not connected.
    """
    return _connected(model)[2]


def learners_of(model: nn.Module) -> list[nn.Module]:
    """Returns the learners of a model's connectors, of images and of clips."""
    connector = connector_of(model)
    both = (connector.learner, connector.clip_learner)
    return [learner for learner in both if learner is not None]


def _connected(
    model: nn.Module,
) -> tuple[Any, VisionLanguage, TokenConnector, ConnectionConfig]:
    """Returns the base of a connected model, its family, its connector, and its arguments."""
    base, family = find_vision_language(model)
    connector, saved = getattr(base, family.projector), getattr(base.config, KEY, None)
    if not isinstance(connector, TokenConnector) or saved is None:
        raise ValueError("this model is not connected; connect(model, processor) does it")
    return base, family, connector, ConnectionConfig(**saved)


def _build(
    base: Any,
    family: VisionLanguage,
    num_tokens: int,
    learner: str,
    video_tokens: int | None,
    num_frames: int | None,
) -> TokenConnector:
    """Builds a connector around a model's projector, in its device, dtype and mode."""
    config, projector = base.config, getattr(base, family.projector)
    grid, prefix = family.grid(config)
    width, clip_learner = config.get_text_config().hidden_size, None
    if (video_tokens is None) != (num_frames is None):
        raise ValueError(
            f"video_tokens is {video_tokens} and num_frames is {num_frames}; pass both, or neither"
        )
    is_meta = stream_device(projector).type == "meta"
    with torch.device("meta" if is_meta else "cpu"), torch.inference_mode(False):
        new = _learner(learner, width, check_count("num_tokens", num_tokens), grid, prefix)
        if video_tokens is not None:
            require(
                family.videos,
                f"video_tokens is {video_tokens}, but {type(base).__name__} puts text between the "
                "frames of a video; leave it out for num_tokens a frame",
            )
            frames = check_count("num_frames", num_frames or 0), num_tokens
            clip_learner = _learner(learner, width, video_tokens, frames, 0)
        connector = TokenConnector(projector, new, clip_learner).train(projector.training)
    for part in (connector.learner, connector.clip_learner):
        if part is not None:
            part.to(stream_device(projector), stream_dtype(projector))
    return connector


def _learner(kind: str, width: int, num_tokens: int, grid: Grid, prefix: int) -> nn.Module:
    if kind == "pool":
        return NeighborPooling(num_tokens, grid, prefix)
    return NeighborTokenLearner(width, num_tokens, grid, prefix)


def _attach(base: Any, family: VisionLanguage, connector: TokenConnector, config: Any) -> None:
    """Puts a connector in its place, and what goes with it."""
    setattr(base, family.projector, connector)
    if family.tiles:
        base.pack_image_features = _TilesInTurn()
    else:
        check = _CountCheck(config.num_tokens, base.config.image_token_id)
        base.register_forward_pre_hook(check, with_kwargs=True)
    if family.videos:
        base.apply_pooling = _unchanged
    if connector.clip_learner is not None:
        base.get_video_features = _ClipFeatures(base, family.projector)


def _detach(base: Any, family: VisionLanguage, connector: TokenConnector) -> None:
    setattr(base, family.projector, connector.projector)
    for name in ("pack_image_features", "apply_pooling", "get_video_features"):
        vars(base).pop(name, None)
    hooks = base._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _CountCheck)]:
        del hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


@dataclass
class _CountCheck:
    """Checks in front of a model that each text has the placeholders of whole images.

    The model itself compares the placeholders of all texts with the tokens of all images.
    """

    num_tokens: int
    image_token_id: int

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("pixel_values") is None or torch.compiler.is_compiling():
            return
        for row, count in enumerate((ids == self.image_token_id).sum(1).tolist()):
            require(
                count % self.num_tokens == 0,
                f"text {row} has {count} placeholders of image tokens, expected {self.num_tokens} "
                "an image; make it with the processor that was passed to connect, or pass yours to "
                "tokenlearner.models.connect_processor",
            )


class _TilesInTurn:
    """Stands for `pack_image_features`: the tokens of all tiles in turn, and the end of a line."""

    def __call__(
        self, image_features: Any, image_sizes: Any, *args: Any, image_newline: Any = None, **_: Any
    ) -> tuple[list[Tensor], Tensor]:
        packed = [tiles.flatten(0, 1) for tiles in image_features]
        if image_newline is not None:
            packed = [torch.cat([tokens, image_newline[None].to(tokens)]) for tokens in packed]
        counts = [len(tokens) for tokens in packed]
        return packed, torch.tensor(counts, device=packed[0].device)


def _unchanged(features: Tensor) -> Tensor:
    """Stands for `apply_pooling` of frames, whose tokens are few already."""
    return features


class _ClipFeatures:
    """Stands for `get_video_features`: what it returns, with the frames' tokens made fewer.

    Args:
        base: The model; kept here so that a copy of the model has a copy of this.
        projector: The attribute with its connector.
    """

    def __init__(self, base: nn.Module, projector: str):
        self.base, self.projector = base, projector

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own, which `generate` chooses its inputs by."""
        method: Any = type(self.base)
        return inspect.signature(MethodType(method.get_video_features, self.base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns features `b (t k + 1) c` as `b (k + 1) c`; the last is the end of a line."""
        method: Any = type(self.base)
        result = method.get_video_features(self.base, *args, **kwargs)
        features = getattr(result, "pooler_output", result)
        learner = getattr(self.base, self.projector).clip_learner
        fewer = torch.cat([learner(features[:, :-1]), features[:, -1:]], dim=1)
        if features is result:
            return fewer
        result.pooler_output = fewer
        return result


def _counts(processor: Any, counts: Any, num_tokens: int) -> dict[str, Any]:
    """Returns what a processor counts by now; nothing if that is `num_tokens` already."""
    if processor is None:
        return {}
    try:
        wanted = counts(processor, num_tokens)
        before = {path: _read(processor, path) for path in wanted}
    except AttributeError as error:
        raise ValueError(
            f"the processor is a {type(processor).__name__}, which does not count image tokens as "
            f"this model needs ({error}); pass the model's own"
        ) from error
    return {} if before == wanted else before


def _read(owner: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), owner)


def _write(owner: Any, path: str, value: Any) -> None:
    *steps, name = path.split(".")
    setattr(reduce(getattr, steps, owner), name, value)


def _set_counts(processor: Any, family: VisionLanguage, config: ConnectionConfig) -> None:
    for path, value in family.counts(processor, config.num_tokens).items():
        _write(processor, path, value)
    if family.tiles:
        processor._get_number_of_features = _TileCount(config.num_tokens, processor.image_processor)
    if family.videos:
        processor.replace_video_token = _ClipCount(config, processor.video_token)


def _restore_counts(processor: Any, config: ConnectionConfig) -> None:
    if processor is None:
        return
    require(
        bool(config.processor),
        "the model was connected without its processor, so what that counted by is not known; load "
        "the processor again, and call disconnect(model)",
    )
    for path, value in config.processor.items():
        _write(processor, path, value)
    for name in ("_get_number_of_features", "replace_video_token"):
        vars(processor).pop(name, None)


@dataclass
class _TileCount:
    """Stands for a processor's `_get_number_of_features`: `k` a tile, and the end of a line."""

    num_tokens: int
    image_processor: Any

    def __call__(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        processing = require_package("transformers.image_processing_utils", "hf", "connect")
        sizes = self.image_processor.image_grid_pinpoints
        best = processing.select_best_resolution([orig_height, orig_width], sizes)
        tiles = 1 + (best[0] // height) * (best[1] // width)
        return tiles * self.num_tokens + 1


@dataclass
class _ClipCount:
    """Stands for a processor's `replace_video_token`."""

    config: ConnectionConfig
    video_token: str

    def __call__(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        if self.config.video_tokens is None:
            return self.video_token * (frames * self.config.num_tokens + 1)
        require(
            frames == self.config.num_frames,
            f"video {video_idx} has {frames} frames, but the model was connected with "
            f"num_frames={self.config.num_frames}; sample as many, or connect it anew",
        )
        return self.video_token * (self.config.video_tokens + 1)
