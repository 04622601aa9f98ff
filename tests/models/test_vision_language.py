"""Vision-language models that reserve a place in the text for every position of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import HF
from torch import nn

from tokenlearner import insert
from tokenlearner.models.hosts import find_host
from tokenlearner.models.insertion import get_insertion

IMAGE, K, AT = 39, 4, 1
VISION = HF | {"hidden_size": 24, "intermediate_size": 48}
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 8}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "projection_dim": 24}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
}
GEMMA = TEXT | {"model_type": "gemma", "head_dim": 12}
GEMMA3 = GEMMA | {"model_type": "gemma3_text"}
EVA: dict[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 16, "patch_size": 4},
}
PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}
COUNTING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Llava": (CLIP, TEXT, {"image_token_index": IMAGE}),
    "VipLlava": (CLIP, TEXT, {"image_token_index": IMAGE, "vision_feature_layers": [-1, -2]}),
    "LlavaNext": (CLIP, TEXT, {"image_token_index": IMAGE, **PINPOINTS}),
    "LlavaNextVideo": (CLIP, TEXT, {"image_token_index": IMAGE, **PINPOINTS}),
    "LlavaOnevision": (SIGLIP, TEXT, {"image_token_index": IMAGE, **PINPOINTS}),
    "VideoLlava": (CLIP, TEXT, {"image_token_index": IMAGE, "video_token_index": 38}),
    "PaliGemma": (SIGLIP, GEMMA, {"image_token_index": IMAGE, "projection_dim": 24}),
    "Gemma3": (SIGLIP, GEMMA3, {"image_token_index": IMAGE, "mm_tokens_per_image": 4}),
    "AyaVision": (SIGLIP, TEXT, {"image_token_index": IMAGE, "downsample_factor": 2}),
    "Cohere2Vision": (SIGLIP, TEXT, {"image_token_id": IMAGE, "downsample_factor": 2}),
    "DeepseekVL": (SIGLIP, TEXT, {"image_token_id": IMAGE}),
    "PerceptionLM": (EVA, TEXT, {"image_token_id": IMAGE}),
}
FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Idefics3": (VISION, TEXT, {"image_token_id": IMAGE}),
    "SmolVLM": (VISION, TEXT, {"image_token_id": IMAGE}),
    "InternVL": (
        VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        TEXT,
        {"image_token_id": IMAGE},
    ),
    "Qwen2VL": ({"depth": 1, "embed_dim": 24, "hidden_size": 24, "num_heads": 2}, TEXT, {}),
}


def built(name: str) -> Any:
    vision, text, options = (COUNTING | FOREIGN)[name]
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    return model(config(vision_config=vision, text_config=text, **options)).eval()


@pytest.mark.parametrize("name", COUNTING)
def test_a_model_that_counts_image_tokens_is_refused_before_anything_is_changed(name: str) -> None:
    model = built(name)
    modules = [module for module, _ in model.named_modules()]
    with pytest.raises(ValueError, match=rf"{name}\w* .*fuse=True"):
        insert(model, K, AT)
    assert [module for module, _ in model.named_modules()] == modules


def test_a_module_around_such_a_model_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"Llava\w* .*fuse=True"):
        insert(nn.ModuleDict({"wrapped": built("Llava")}), K, AT)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_whose_tower_is_no_host_is_refused(name: str, fuse: bool) -> None:
    with pytest.raises(ValueError, match=f"{name}ForConditionalGeneration is no model"):
        insert(built(name), K, AT, fuse=fuse)


@torch.no_grad()
def test_fused_tokens_give_such_a_model_all_its_positions() -> None:
    model = insert(built("Llava"), K, AT, fuse=True)
    text = torch.tensor([[1, *[IMAGE] * 16, 5]])
    images = torch.rand(2, 1, 3, 16, 16)
    one, other = (model(input_ids=text, pixel_values=image).logits for image in images)
    assert one.shape == (1, 18, 40)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "PerceptionLM"])
@torch.no_grad()
def test_its_tower_alone_runs_on_learned_tokens(name: str) -> None:
    tower = built(name).model.vision_tower
    insert(tower, K, AT)
    prefix = find_host(tower).num_prefix_tokens
    assert get_insertion(tower) is not None
    assert tower(torch.rand(1, 3, 16, 16)).last_hidden_state.shape == (1, prefix + K, 24)
