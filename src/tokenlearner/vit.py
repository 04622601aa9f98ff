"""ViTs that run on learned tokens, by name: timm's layers and our wrappers.

Importing this file registers the names below with timm. As in the paper's code there is no class
token: the final LayerNorm is followed by the mean over the tokens that remain.

Names follow timm: `vit_{size}_patch{p}[_tl{tokens}at{block}]_{resolution}`.
Source: scenic `TokenLearnerViT`; the layers are timm's, with flax's numbers (eps 1e-6, tanh GELU).
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from .insert import insert

_OFFICIAL: dict[str, Any] = {
    "class_token": False,
    "global_pool": "avg",
    "final_norm": True,
    "fc_norm": False,
    "act_layer": "gelu_tanh",
}
_MINI: dict[str, Any] = {
    "img_size": 28,
    "in_chans": 1,
    "num_classes": 10,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_mini_patch4_28": {"vit": _MINI},
    "vit_mini_patch4_tl8at3_28": {"vit": _MINI, "insert": {"num_tokens": 8, "at": 3}},
}

default_cfgs = generate_default_cfgs(  # the name under which timm looks for it
    {
        name: {
            "input_size": (v["vit"]["in_chans"], v["vit"]["img_size"], v["vit"]["img_size"]),
            "num_classes": v["vit"]["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, v in VARIANTS.items()
    }
)


def build_vit(name: str, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Builds a named ViT with random weights.

    Args:
        name: A key of `VARIANTS`.
        pretrained: Not on offer: there are no published weights.
        kwargs: What timm's VisionTransformer takes; goes before the variant's own.

    Raises:
        ValueError: Pretrained weights are asked for.
    """
    if pretrained:
        raise ValueError(f"there are no pretrained weights for {name}; pass pretrained=False")
    variant = VARIANTS[name]
    config = _OFFICIAL | variant["vit"] | kwargs
    model = build_model_with_cfg(VisionTransformer, name, pretrained=False, **config)
    return insert(model, **variant["insert"]) if "insert" in variant else model


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return build_vit(name, pretrained, **kwargs)

    entry.__name__, entry.__module__ = name, __name__
    globals()[name] = register_model(entry)


for _name in VARIANTS:
    _register(_name)
