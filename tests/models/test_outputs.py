"""Outputs of models as tensors: logits or features, and what can be compared of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from tiny import torchvision_vit, transformers_vit
from torch import nn

from tokenlearner import create_model
from tokenlearner.models.hosts import find_host
from tokenlearner.models.outputs import (
    check_classifier,
    has_classifier,
    output_tensor,
    outputs_logits,
    summarize_tokens,
)


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**tiny.TIMM | changes)


def test_the_summary_is_the_prefix_or_else_the_mean_or_both_for_heads_that_pool() -> None:
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(summarize_tokens(tokens, 2), tokens[:, :2])
    torch.testing.assert_close(summarize_tokens(tokens, 0), tokens.sum(1, keepdim=True) / 7)
    expected = torch.stack([tokens[:, 0], tokens[:, 1], tokens[:, 2:].mean(1)], dim=1)
    torch.testing.assert_close(summarize_tokens(tokens, 2, pools_positions=True), expected)


@pytest.mark.parametrize(
    ("pooling", "pools"), [("token", False), ("avg", True), ("", False), ("max", True)]
)
def test_a_host_knows_whether_its_head_pools_positions(pooling: str, pools: bool) -> None:
    assert find_host(vit(global_pool=pooling)).pools_positions is pools


def test_the_output_is_the_tensor_the_class_token_or_the_mean_of_the_tokens() -> None:
    tokens = torch.randn(2, 7, 5)
    assert output_tensor(x := torch.randn(2, 5)) is x
    output = SimpleNamespace(last_hidden_state=tokens)
    assert torch.equal(output_tensor(output, 2), tokens[:, 0])
    torch.testing.assert_close(output_tensor(output, 0), tokens.mean(1))
    with pytest.raises(ValueError, match="list"):
        output_tensor([tokens])


@pytest.mark.parametrize(
    "given",
    [
        {"logits": 0, "last_hidden_state": 1},
        {"image_embeds": 0, "last_hidden_state": 1},
        {"pooler_output": 0, "last_hidden_state": 1},
        {"logits": None, "pooler_output": 0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_of_an_output_of_transformers_the_last_that_was_made_is_taken(
    given: dict[str, Any],
) -> None:
    tensors = torch.randn(2, 3, 5)
    result = SimpleNamespace(**{k: None if v is None else tensors[v] for k, v in given.items()})
    assert torch.equal(output_tensor(result), tensors[0])


@pytest.mark.parametrize(
    ("build", "width", "expected"),
    [
        (vit, 5, True),
        (lambda: vit(num_classes=0), 16, False),
        (torchvision_vit, 5, True),
        (torchvision_vit, 16, False),  # its heads were replaced by nothing
        (transformers_vit, 5, True),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**tiny.HF)), 16, False),
        (lambda: nn.Linear(3, 5), 5, True),
    ],
    ids=["timm", "timm features", "tv", "tv features", "hf", "hf features", "somebody's"],
)
def test_logits_are_distinguished_from_features(build: Any, width: int, expected: bool) -> None:
    assert outputs_logits(build(), width) is expected


def test_a_bare_backbone_has_no_classifier() -> None:
    own = create_model("vit_mini_patch4_28", num_classes=0, depth=1)
    for bare in (vit(num_classes=0), own, transformers_vit().vit):
        assert not has_classifier(bare)
        with pytest.raises(ValueError, match=f"{type(bare).__name__} has no classifier"):
            check_classifier(bare)


def test_a_model_with_a_head_of_any_kind_has_a_classifier() -> None:
    class Mine(transformers.ViTForImageClassification):  # no "Classification" in its own name
        pass

    mine = Mine(transformers_vit().config)
    replaced = vit(num_classes=0)
    replaced.head = nn.Linear(replaced.num_features, 3)  # num_classes stays 0
    for model in (vit(), replaced, torchvision_vit(), transformers_vit(), mine, nn.Linear(2, 2)):
        assert has_classifier(model)
        check_classifier(model)
