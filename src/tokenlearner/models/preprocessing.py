"""Preprocessing of a model: mean, std, crop and interpolation; and the names of its classes.

They are the model's, in timm's `pretrained_cfg`, where timm, our commands and exported files read
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..utils.preprocessing import NAMES, Preprocessing
from ..utils.validation import is_integer, require
from .pretrained import is_pretrained

CLIPS = "bilinear"  # how torchvision resizes clips
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # of PIL
_OF_CLASSES = ("label_names", "label_descriptions")  # in timm's configs
_SIZE = (3, 224, 224)  # of a model that says nothing
_TAKEN = (*NAMES, *_OF_CLASSES, "input_size", "num_classes", "license")  # of a file
_MOST_PIXELS, _MOST_FRAMES = 2**26, 1024  # of an image or a frame, and of a clip, that a file names
_MOST_LETTERS = 1000  # of a name


def get_preprocessing(model: nn.Module, channels: int = 3) -> Preprocessing | None:
    """Returns how images are made a model's input: by its `pretrained_cfg`, or its processor.

    The processor of a model of transformers is that in the folder, or of the name, that the model
    was loaded from, if it is on this computer.

    Args:
        model: Any; of a file that `export` wrote too.
        channels: Of its images. A gray image takes the means of mean and std in color.

    Returns:
        None for a model that says nothing.

    Raises:
        ValueError: The processor makes images of no fixed size, or the channels do not fit.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config and is_pretrained(model):
        config = getattr(getattr(model, "config", None), "pretrained_cfg", None)  # of a TimmWrapper
        if not config and (processor := _local_processor(model)):
            found = from_image_processor(processor)
            mean, std = (_of_channels(values, channels) for values in (found.mean, found.std))
            return replace(found, mean=mean, std=std)
    if not config:
        return None
    from timm.data import resolve_data_config

    kept = {key: value for key, value in config.items() if value is not None}
    kept |= {"input_size": (channels, *(kept.get("input_size") or (3, 224, 224))[1:])}
    resolved = resolve_data_config(pretrained_cfg=kept)
    mean, std = (_of_channels(resolved[key], channels) for key in ("mean", "std"))
    return Preprocessing(
        mean, std, *(resolved[n] for n in ("crop_pct", "interpolation", "crop_mode"))
    )


def from_image_processor(processor: Any) -> Preprocessing:
    """Returns what an image processor of transformers does, in timm's words.

    Args:
        processor: As `AutoImageProcessor.from_pretrained` returns it.

    Raises:
        ValueError: It makes images of no fixed size.
    """
    said: dict[str, Any] = processor.to_dict()
    size, crop = (
        {"height": given, "width": given} if isinstance(given, int) else dict(given or {})
        for given in (said.get("size"), said.get("crop_size"))
    )
    kept = crop if said.get("do_center_crop") else size
    to, crop_mode = size.get("height", 0), "squash"
    if "shortest_edge" in size and "longest_edge" not in size:
        to, crop_mode = size["shortest_edge"], "center"
    require(
        said.get("do_resize", True) and bool(to) and "height" in kept,
        f"{type(processor).__name__} resizes to {size} and crops to {kept or 'nothing'}, expected "
        "images of one size; pass a tokenlearner.models.Preprocessing to set_preprocessing",
    )
    scale, offset = 1.0, 0.0
    if said.get("do_rescale", True):
        scale, offset = 255 * said.get("rescale_factor", 1 / 255), float(said.get("offset") or 0)
    mean, std = ((0.0,) * 3, (1.0,) * 3)
    if said.get("do_normalize", True):
        mean, std = said["image_mean"], said["image_std"]
    share = kept["height"] / to
    if math.floor(kept["height"] / share) != to:  # timm's way back
        share = math.nextafter(share, 0)
    return Preprocessing(
        tuple((m + offset) / scale for m in mean),
        tuple(s / scale for s in std),
        share,
        _RESAMPLING[int(said.get("resample", 2))],
        crop_mode,
    )


def _local_processor(model: Any) -> Any:
    """Returns the processor of a model of transformers, None if it is not on this computer."""
    if not (name := model.config.name_or_path):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def take_config(said: Any, source: str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns a `pretrained_cfg` with what a file says of preprocessing and classes.

    Args:
        said: What the file says; it may be of a stranger.
        source: Its name, for errors.
        base: The config of the model's name. Other keys of the file have its values.

    Raises:
        ValueError: A value is out of range.
    """
    try:
        require(isinstance(said, Mapping), f"it is {said!r:.80}, expected an object")
        taken = {key: said[key] for key in _TAKEN if key in said}
        _check_taken({key: value for key, value in taken.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{source}: {error}; correct it there") from error
    return {key: value for key, value in (base or {}).items() if key in said} | taken


def _check_taken(taken: Mapping[str, Any]) -> None:
    given: dict[str, Any] = {name: taken[name] for name in NAMES if name in taken}
    Preprocessing(**{"mean": (0.0,), "std": (1.0,), **given})
    if "input_size" in taken:
        check_input_size(taken["input_size"])
    for key in ("label_names", "label_descriptions"):
        names = taken.get(key, ())
        names = [*names, *names.values()] if isinstance(names, Mapping) else names
        require(
            isinstance(names, list | tuple) and all(map(_is_name, names)),
            f"{key} is {names!r:.80}, expected names of up to {_MOST_LETTERS} letters",
        )
    license = taken.get("license", "")
    require(_is_name(license), f"license is {license!r:.80}, expected a name")


def _is_name(value: Any) -> bool:
    is_text = isinstance(value, str) or is_integer(value)
    return is_text and len(str(value)) <= _MOST_LETTERS


def check_input_size(size: Any) -> None:
    """Checks the size of images or clips that a file names: `c h w` or `c t h w`.

    Raises:
        ValueError: It is none, or larger than any model's.
    """
    numbers = isinstance(size, list | tuple) and len(size) in (3, 4) and all(map(is_integer, size))
    fits = numbers and min(size) > 0 and size[-1] * size[-2] <= _MOST_PIXELS
    require(
        fits and (len(size) == 3 or size[1] <= _MOST_FRAMES),
        f"input_size is {size!r:.80}, expected channels, height and width of up to "
        f"{_MOST_PIXELS} pixels",
    )


def get_input_size(model: Any) -> list[int]:
    """Returns the size of a model's images, `c h w`, clips, `c t h w`, or tokens, `t k c`.

    Args:
        model: Any; of a file that `export` wrote too. One that does not show it has the size of its
            `pretrained_cfg`, or `3 224 224`.
    """
    if hasattr(model, "token_shape"):  # of a model that runs on tokens
        return list(model.token_shape)
    for _, *size in getattr(model, "inputs", {}).values():  # of an exported file
        if all(isinstance(axis, int) for axis in size):
            return size
    channels, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or _SIZE
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    channels = next((m.in_channels for m in convolutions), channels)
    tubelet = getattr(model, "tubelet_size", 1)  # a FrameViT counts frames in tubelets
    frames = [model.num_frames * tubelet] if hasattr(model, "num_frames") else []
    return [channels, *frames, *(_embedded_size(model) or size)]


def has_fixed_size(model: Any) -> bool:
    """Returns whether a model is built for images of one size."""
    return bool(getattr(model, "inputs", None) or _embedded_size(model))


def _embedded_size(model: Any) -> Sequence[int] | None:
    owner = getattr(model, "encoder", model)  # of a FrameViT
    embed = getattr(owner, "patch_embed", getattr(owner, "stem", None))  # a Mixer's is its stem
    return getattr(embed, "img_size", None)


@contextmanager
def size_errors(name: str, model: Any, shape: Sequence[int]) -> Iterator[None]:
    """Explains an error in the block by the sizes of a model, if it is of other images than come.

    Args:
        name: Of the model.
        model: Any.
        shape: `c h w` of the images, or `c t h w` of the clips.

    Raises:
        ValueError: In place of the errors of timm, torch and our own models.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        hint = _size_hint(get_input_size(model), shape)
        if isinstance(error, ValueError) and not hint:
            raise
        kind = "clips" if len(shape) == 4 else "images"
        raise ValueError(
            f"{name} does not take {kind} of {list(shape)} ({' '.join(str(error).split())}); "
            f"{hint or 'take another model, or a smaller batch_size where memory is short'}"
        ) from error


def _size_hint(taken: Sequence[int], shape: Sequence[int]) -> str:
    """Returns the options for images of another size; nothing where sizes are the same."""
    if len(taken) != len(shape):
        return f"take data of {'clips' if len(taken) == 4 else 'images'}"
    names = ("--in_chans", *(["--frames"] if len(taken) == 4 else []), "--img_size")
    pairs = zip(names, taken, shape, strict=False)
    options = " ".join(f"{name} {size}" for name, size, given in pairs if size != given)
    return f"pass {options}" if options else ""


def set_preprocessing(
    model: Any, preprocessing: Preprocessing, classes: Sequence[str] | None = None
) -> None:
    """Writes how images are made a model's input, and the names of its classes, to the model.

    `save_model`, the commands, exported files and timm's `resolve_model_data_config` take it from
    there.

    Args:
        model: Any module; it gets a `pretrained_cfg` of its own.
        preprocessing: What it is trained with.
        classes: The names of its classes, in the order of its logits.
    """
    values = preprocessing.to_kwargs()
    if classes is not None:
        values |= {"label_names": list(classes), "num_classes": len(classes)}
    model.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {}) | values
    model.default_cfg = model.pretrained_cfg


def get_classes(model: nn.Module) -> tuple[str, ...] | None:
    """Returns the names of a model's classes, in the order of its logits; None if unknown.

    They are the `label_names` of its `pretrained_cfg`, or those of a transformers config.
    """
    names: Any = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not names and labels and list(labels.values()) != [f"LABEL_{i}" for i in range(len(labels))]:
        names = [labels[i] for i in sorted(labels)]
    if not names or len(names) != getattr(model, "num_classes", len(names)):
        return None  # timm keeps those of the head that the weights came with
    return tuple(map(str, names))


def without_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `pretrained_cfg` without the names of classes, for another classifier."""
    return {key: value for key, value in config.items() if key not in _OF_CLASSES}


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(set(values)) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise ValueError(f"the model's images have {channels} channels, its mean or std is {values}")
