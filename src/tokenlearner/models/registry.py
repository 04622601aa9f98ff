"""Names for timm: a table of variants becomes functions that `timm.create_model` finds.

A variant is a name and the keyword arguments of a model class. Each file with a class has one table
and registers it once, when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..utils.validation import require
from .insertion import block_index

Model = TypeVar("Model", bound=nn.Module)

_SOURCES = ("file", "url", "hf_hub_id", "state_dict")  # of weights, in timm's configs
_NOT_ARCHITECTURE = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
)

_OF_PIXELS = ("in_chans", "img_size")
_OF_LEARNERS = ("num_tokens", "at", "learner", "fuse", "overlap")

SIZES = {  # width, heads, depth
    "mini": (64, 2, 6),
    "tiny": (192, 3, 12),
    "small": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
    "huge": (1280, 16, 32),
}


def register(
    cls: type[Model],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    first_conv: str,
    crop_pct: float = 0.9,
    is_video: bool = False,
    takes_pixels: bool = True,
    filter_fn: Callable[..., Any] | None = None,
) -> Callable[..., Model]:
    """Registers the variants of a class with timm, as functions of the file that defines the class.

    Args:
        cls: The model's class.
        variants: Names, and the arguments of the class for each.
        first_conv: The layer whose weights depend on `in_chans`, by its name in the model.
        crop_pct: Share of an image that timm's evaluation crops.
        is_video: Whether it takes clips: then it has no `features_only`, and its first layer is one
            that timm cannot adapt to other channels.
        takes_pixels: Whether it has a size and channels of images, as arguments too.
        filter_fn: Fits a checkpoint's state dict to a model, as timm's `pretrained_filter_fn`.

    Returns:
        `build(name, pretrained=False, **kwargs)`, which builds a variant as `timm.create_model`
        does. It has random weights unless `pretrained_cfg` or its overlay names a source, and keeps
        its name and arguments as `tokenlearner_config`. `ValueError` for weights without a source.
    """

    def build(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        _check_pretrained(name, pretrained, kwargs)
        if is_video:
            _check_video(cls, pretrained, kwargs)
        if not takes_pixels:
            _check_no_pixels(name, kwargs)
        kwargs = _checkpoint_kwargs(kwargs) | kwargs
        config = dict(variants[name]) | kwargs
        timm_options: dict[str, Any] = {"pretrained_filter_fn": filter_fn}
        if not takes_pixels:  # timm passes them to every model
            timm_options["kwargs_filter"] = _OF_PIXELS
        if kwargs.get("features_only"):
            timm_options["feature_cfg"] = _feature_cfg(config)
        model: Any = build_model_with_cfg(cls, name, pretrained, **timm_options, **config)
        architecture = {k: v for k, v in kwargs.items() if k not in _NOT_ARCHITECTURE}
        model.tokenlearner_config = {"name": name, "kwargs": architecture}
        return model

    module: Any = sys.modules[cls.__module__]
    cfgs: Any = {name: _default_cfg(row, first_conv, crop_pct) for name, row in variants.items()}
    module.default_cfgs = generate_default_cfgs(cfgs)  # the name under which timm looks for it
    for name in variants:
        setattr(module, name, register_model(_entry(module.__name__, name, build)))
    return build


def sized(size: str, patch: int, resolution: int, depth: int | None = None) -> dict[str, Any]:
    """Returns the arguments of a ViT in one of the usual sizes, with another depth if given."""
    width, heads, usual = SIZES[size]
    shape = {"embed_dim": width, "num_heads": heads, "depth": depth or usual}
    return {"img_size": resolution, "patch_size": patch, **shape}


def _entry(file: str, name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **kwargs)

    entry.__name__, entry.__module__ = name, file
    return entry


def _default_cfg(config: Mapping[str, Any], first_conv: str, crop_pct: float) -> dict[str, Any]:
    """Returns what timm's data code needs of a variant: input size, normalization, classifier."""
    size = config.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("in_chans", 3)
    return {
        "input_size": (channels, height, width),
        "num_classes": config.get("num_classes", 1000),
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "fixed_input_size": True,
        "first_conv": first_conv,
        "classifier": "head",
    }


def _feature_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's options for `features_only`: the last three blocks with a feature map."""
    end = depth = config["depth"] if "depth" in config else config["num_blocks"]
    if config.get("num_tokens") and not config.get("fuse"):
        end = max(1, block_index(config.get("at", 0.5), depth))
    return {"out_indices": tuple(range(max(0, end - 3), end)), "feature_cls": "getter"}


def _check_pretrained(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> None:
    """Refuses weights without a source: a file, a folder or a Hub id."""
    has_source = any(config.get(key) for config in _pretrained_cfgs(kwargs) for key in _SOURCES)
    require(
        has_source or not pretrained,
        f"there are no pretrained weights for {name}; pass pretrained=False, or load a checkpoint "
        "of yours with tokenlearner.load_model",
    )


def _check_no_pixels(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments about images, and about tokens that are learned from them."""
    given = [
        argument for argument in (*_OF_PIXELS, *_OF_LEARNERS) if kwargs.get(argument) is not None
    ]
    require(
        not given,
        f"{name} runs on tokens that were learned before and takes no {' and '.join(given)}; leave "
        "it out (tokens_per_frame is how many come), or take a model of images or clips",
    )


def _check_video(cls: type, pretrained: bool, kwargs: Mapping[str, Any]) -> None:
    """Refuses what timm offers for images only."""
    require(
        not kwargs.get("features_only"),
        f"features_only is for images; build the {cls.__name__} without it and call its methods "
        "for features",
    )
    channels = _checkpoint_kwargs(kwargs).get("in_chans", 3)
    require(
        not pretrained or kwargs.get("in_chans", channels) == channels,
        f"in_chans is {kwargs.get('in_chans')}, but the weights are for {channels} channels and "
        "timm cannot change tubelets; leave in_chans out",
    )


def _checkpoint_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the classes and input size in a checkpoint's config, such as timm's `local-dir:`.

    timm alone would keep the variant's and adapt the weights: drop the head, sum the channels.
    """
    result: dict[str, Any] = {}
    for config in _pretrained_cfgs(kwargs):
        if "num_classes" in config:
            result["num_classes"] = config["num_classes"]
        if "input_size" in config:
            result["in_chans"], *size = config["input_size"]
            result["img_size"] = tuple(size)
    return result


def _pretrained_cfgs(kwargs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    configs = [kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")]
    return [config for config in configs if isinstance(config, Mapping)]
