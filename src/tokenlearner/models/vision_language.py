"""The vision-language models that can be connected: a table, and the function that reads it.

A family is a row in `VISION_LANGUAGE`: where positions are projected, what grid they lie on, and
what its processor counts placeholders by. Classes are given by name, so that nothing has to be
imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..utils.modules import uncompiled
from ..utils.validation import Grid, require

_NO_PATCHES = 2**30  # pixels: no image has a patch of that size, so a processor counts none


@dataclass(frozen=True)
class VisionLanguage:
    """Describes a family of vision-language models: where positions are projected and counted.

    Args:
        projector: Attribute of the base model.
        grid: Function of the config: height and width of the projected positions of an image, and
            tokens in front of them.
        counts: Function of a processor and `k`: what its attributes, by path, have to be.
        tiles: Whether images are cut into tiles whose positions are put together on a grid.
        videos: Whether tokens of a clip can be learned over time.
    """

    projector: str
    grid: Callable[[Any], tuple[Grid, int]]
    counts: Callable[[Any, int], dict[str, Any]]
    tiles: bool = False
    videos: bool = False


def _side(vision: Any) -> int:
    size, patch = vision.image_size, vision.patch_size
    size, patch = (x if isinstance(x, int) else x[0] for x in (size, patch))
    return size // patch


def _square(scale: Callable[[Any], float]) -> Callable[[Any], tuple[Grid, int]]:
    """Returns a function from a config to a square grid: the patches' side, times a scale."""

    def grid(config: Any) -> tuple[Grid, int]:
        side = int(_side(config.vision_config) * scale(config))
        return (side, side), 0

    return grid


_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def _of_strategy(config: Any) -> tuple[Grid, int]:
    """Returns the grid of LLaVA's towers, whose class token may be kept."""
    kind = config.vision_config.model_type
    require(
        kind in _CLASS_TOKENS,
        f"its vision tower is a {kind}, whose positions are not known to be a grid of fixed size; "
        f"supported: {', '.join(_CLASS_TOKENS)}",
    )
    side, prefix = _side(config.vision_config), _CLASS_TOKENS[kind]
    if config.vision_feature_select_strategy == "default":
        require(
            prefix == 1,
            'vision_feature_select_strategy is "default", which drops a position of a tower that '
            'has no class token; set it to "full" in the config',
        )
        prefix = 0
    return (side, side), prefix


def _per_tile(attribute: str) -> Callable[[Any, int], dict[str, Any]]:
    return lambda processor, k: {attribute: k}


def _llava_counts(processor: Any, k: int) -> dict[str, Any]:
    """Lets a processor of LLaVA count no patches, and `k` tokens besides."""
    return {
        "patch_size": _NO_PATCHES,
        "num_additional_image_tokens": k,
        "vision_feature_select_strategy": "full",
    }


def _gemma3_counts(processor: Any, k: int) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    tokens = f"{tokenizer.boi_token}{tokenizer.image_token * k}{tokenizer.eoi_token}"
    return {"image_seq_length": k, "full_image_sequence": f"\n\n{tokens}\n\n"}


_LLAVA = VisionLanguage("multi_modal_projector", _of_strategy, _llava_counts)
_TILED = replace(
    _LLAVA, counts=lambda processor, k: {"vision_feature_select_strategy": "full"}, tiles=True
)
_IDEFICS3 = VisionLanguage(
    "connector", _square(lambda config: 1 / config.scale_factor), _per_tile("image_seq_len")
)
VISION_LANGUAGE: dict[str, VisionLanguage] = {
    "llava.modeling_llava.LlavaModel": _LLAVA,
    "llava_next.modeling_llava_next.LlavaNextModel": _TILED,
    "llava_onevision.modeling_llava_onevision.LlavaOnevisionModel": replace(
        _TILED,
        counts=lambda processor, k: {
            "vision_feature_select_strategy": "full",
            "num_image_tokens": k,
        },
        videos=True,
    ),
    "paligemma.modeling_paligemma.PaliGemmaModel": VisionLanguage(
        "multi_modal_projector",
        _square(lambda config: 1),
        lambda processor, k: {"image_seq_length": k, "image_processor.image_seq_length": k},
    ),
    "gemma3.modeling_gemma3.Gemma3Model": VisionLanguage(
        "multi_modal_projector",
        lambda config: ((round(config.mm_tokens_per_image**0.5),) * 2, 0),
        _gemma3_counts,
    ),
    "idefics3.modeling_idefics3.Idefics3Model": _IDEFICS3,
    "smolvlm.modeling_smolvlm.SmolVLMModel": _IDEFICS3,
    "internvl.modeling_internvl.InternVLModel": VisionLanguage(
        "multi_modal_projector",
        _square(lambda config: config.downsample_ratio),
        _per_tile("image_seq_length"),
    ),
}


def find_vision_language(model: nn.Module) -> tuple[Any, VisionLanguage]:
    """Finds the base model of a family in a model, and its row.

    Raises:
        ValueError: There is none.
    """
    for part in uncompiled(model).modules():
        for cls in type(part).__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.")
            if name in VISION_LANGUAGE:
                return part, VISION_LANGUAGE[name]
    names = ", ".join(name.rpartition(".")[2].removesuffix("Model") for name in VISION_LANGUAGE)
    raise ValueError(
        f"{type(model).__name__} is no vision-language model whose projector is known: {names} of "
        "transformers; for another, wrap its projector by tokenlearner.layers.TokenConnector"
    )
