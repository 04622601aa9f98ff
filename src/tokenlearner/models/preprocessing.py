"""Preprocessing of a model: mean, std, crop and interpolation; and the names of its classes.

They are the model's, in timm's `pretrained_cfg`, where timm, our commands and exported files read
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

CLIPS = "bilinear"  # how torchvision resizes clips
_SIZE = (3, 224, 224)  # of a model that says nothing


@dataclass(frozen=True)
class Preprocessing:
    """Holds how an image becomes the input of a model.

    Args:
        mean: Subtracted from pixels in [0, 1], one number a channel.
        std: Divided by, one number above 0 a channel.
        crop_pct: Share of the resized image's side that is kept.
        interpolation: How it is resized, in timm's words, such as bicubic.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the fields by name, as timm's configs have them."""
        return asdict(self)


def get_preprocessing(model: nn.Module, channels: int = 3) -> Preprocessing | None:
    """Returns how a model's `pretrained_cfg` says that images are made its input.

    Args:
        model: Any; of a file that `export` wrote too.
        channels: Of its images. A gray image takes the means of mean and std in color.

    Returns:
        None for a model that says nothing.
    """
    if not (config := getattr(model, "pretrained_cfg", None)):
        return None
    from timm.data import resolve_data_config

    kept = {key: value for key, value in config.items() if value is not None}
    kept |= {"input_size": (channels, *(kept.get("input_size") or (3, 224, 224))[1:])}
    resolved = resolve_data_config(pretrained_cfg=kept)
    mean, std = (_of_channels(resolved[key], channels) for key in ("mean", "std"))
    return Preprocessing(mean, std, resolved["crop_pct"], resolved["interpolation"])


def get_input_size(model: Any) -> list[int]:
    """Returns the size of a model's images, `c h w`, or clips, `c t h w`.

    Args:
        model: Any; of a file that `export` wrote too. One that does not show it has the size of its
            `pretrained_cfg`, or `3 224 224`.
    """
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
    values = preprocessing.to_kwargs() | {"crop_mode": "center"}
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


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(set(values)) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise ValueError(f"the model's images have {channels} channels, its mean or std is {values}")
