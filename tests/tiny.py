"""Sizes of the small hosts that several tests build: 16 positions, 16 channels, 3 blocks.

And parameters for them that hide nothing: as they start, fusers add nothing and heads are 0.
"""

from __future__ import annotations

from typing import Any

from torch import nn

TIMM: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 5,
}
HF: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


def drawn(module: nn.Module, std: float) -> Any:
    """The module with every parameter drawn at random, so that no path hides behind a constant."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def randomized(model: nn.Module) -> Any:
    """The model with every parameter drawn at random: head and fusers then do something."""
    return drawn(model, 0.2).eval()
