"""Sizes of the small hosts that several tests build: 16 positions, 16 channels, 3 blocks."""

from __future__ import annotations

from typing import Any

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
