"""How a table of variants becomes names that timm knows.

A variant is a name and the keyword arguments of a model class. `vit.py`, `mixer.py` and `video.py`
have one table each, and register it when they are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from .insertion import block_index

_SOURCES = ("file", "url", "hf_hub_id", "state_dict")  # of weights, in timm's configs
_NOT_ARCHITECTURE = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
)

SIZES = {  # width, heads, depth
    "tiny": (192, 3, 12),
    "small": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
    "huge": (1280, 16, 32),
}


def sized(size: str, patch: int, resolution: int, depth: int | None = None) -> dict[str, Any]:
    """Arguments of a ViT in one of the usual sizes, with another depth if it is told."""
    width, heads, usual = SIZES[size]
    shape = {"embed_dim": width, "num_heads": heads, "depth": depth or usual}
    return {"img_size": resolution, "patch_size": patch, **shape}


def variant_cfg(config: Mapping[str, Any], first_conv: str, **more: Any) -> dict[str, Any]:
    """Returns what timm's data code asks of a variant: input size, normalization, classifier."""
    size = config.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("in_chans", 3)
    return {
        "input_size": (channels, height, width),
        "num_classes": config.get("num_classes", 1000),
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "fixed_input_size": True,
        "first_conv": first_conv,
        "classifier": "head",
        **more,
    }


def build_variant(
    cls: type[nn.Module],
    name: str,
    config: Mapping[str, Any],
    pretrained: bool,
    arguments: dict[str, Any],
    **timms: Any,
) -> Any:
    """Builds a variant as timm builds its own, with random weights unless a source is named.

    Args:
        cls: The model's class.
        name: The variant.
        config: Its arguments for the class.
        pretrained: Load weights from the source in `arguments["pretrained_cfg"]`, as timm's
            `local-dir:` and `hf-hub:` names have it.
        arguments: The caller's, which go before `config`.
        timms: For timm's `build_model_with_cfg`.

    Returns:
        The model, which knows its name and arguments as `tokenlearner_config`.

    Raises:
        ValueError: Weights are asked for, and there are none.
    """
    if pretrained and not _has_source(arguments):
        raise ValueError(
            f"there are no pretrained weights for {name}; pass pretrained=False, or load a "
            "checkpoint of yours with tokenlearner.load_model"
        )
    arguments = _told(arguments) | arguments
    model: Any = build_model_with_cfg(cls, name, pretrained, **timms, **(dict(config) | arguments))
    own = {key: value for key, value in arguments.items() if key not in _NOT_ARCHITECTURE}
    model.tokenlearner_config = {"name": name, "kwargs": own}
    return model


def blocks_with_grid(config: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """The last three blocks of a variant that give a feature map, for `features_only=True`."""
    last = depth
    if config.get("num_tokens") and not config.get("fuse"):
        last = max(1, block_index(config.get("at", 0.5), depth))
    return tuple(range(max(0, last - 3), last))


def source_channels(arguments: Mapping[str, Any]) -> int:
    """The channels of the images that a checkpoint is for, as its config says."""
    return _told(arguments).get("in_chans", 3)


def register_variants(file: str, names: Iterable[str], build: Callable[..., nn.Module]) -> None:
    """Registers a function with timm for each name, and puts it in the file's module.

    Args:
        file: `__name__` of the file with the table, which has timm's `default_cfgs` too.
        names: The variants.
        build: `build(name, pretrained, **kwargs)`.
    """
    for name in names:
        setattr(sys.modules[file], name, register_model(_entry(file, name, build)))


def _entry(file: str, name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **kwargs)

    entry.__name__, entry.__module__ = name, file
    return entry


def _has_source(arguments: Mapping[str, Any]) -> bool:
    """Whether timm was told where weights are: a file, a folder or a Hub id."""
    return any(config.get(key) for config in _configs(arguments) for key in _SOURCES)


def _told(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config, as in timm's `local-dir:`, says of the model's two ends.

    timm alone would keep the variant's own and adapt the weights: drop the head, sum the channels.
    """
    told: dict[str, Any] = {}
    for config in _configs(arguments):
        if "num_classes" in config:
            told["num_classes"] = config["num_classes"]
        if "input_size" in config:
            told["in_chans"], *size = config["input_size"]
            told["img_size"] = tuple(size)
    return told


def _configs(arguments: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    configs = [arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")]
    return [config for config in configs if isinstance(config, Mapping)]
