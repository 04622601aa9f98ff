"""Quantized models: which layers change, that the model does not, and the comparison."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from tokenlearner import create_model, evaluate, insert, load_data
from tokenlearner.deploy.quantization import (
    PRECISIONS,
    compare_precisions,
    largest_difference,
    quantize,
)

IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 7}
    model = create_model("vit_mini_patch4_28", **shape, num_tokens=2, fuse=True, num_classes=32)
    nn.init.normal_(model.head.weight)
    return model.train()


def rounded(model: nn.Module) -> set[str]:
    """Returns the linear layers whose weights are not torch's own."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name for name, m in linear.items() if type(m.weight) is not nn.Parameter}


def test_int8_rounds_wide_linear_layers_but_no_narrow_one_no_learner_and_no_fuser(vit: Any) -> None:
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{'block.' if i else ''}{name}" for i in range(2) for name in layers}
    assert rounded(quantize(vit, "int8").model) == {*expected, "head"}
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(784, 31), nn.Linear(31, 32), nn.Linear(32, 32))
    assert rounded(quantize(narrow, "int8").model) == {"3"}


def test_int8_leaves_the_attention_of_torchvision_and_runs() -> None:
    model = insert(VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=5), 2)
    copy = quantize(model, "int8")
    assert {name.rpartition("mlp.")[1] for name in rounded(copy.model)} == {"mlp."}
    assert copy(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_a_copy_takes_and_gives_float32_near_the_model_which_stays(
    vit: Any, precision: str
) -> None:
    def weights() -> dict[str, Any]:
        return {name: (id(p), type(p), p.dtype, p.tolist()) for name, p in vit.named_parameters()}

    before, copy = weights(), quantize(vit, precision)
    assert weights() == before
    assert vit.training
    assert not any(module.training for module in copy.modules())
    assert not {id(p) for p in vit.parameters()} & {id(p) for p in copy.parameters()}
    if precision == "bfloat16":
        assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    output, expected = copy(IMAGES), vit.eval()(IMAGES)
    vit.train()
    assert output.dtype == torch.float32
    difference = largest_difference(expected, output) / expected.abs().max().item()
    assert (difference > 1e-6) == (precision != "float32")
    assert difference < 0.05


@torch.no_grad()
def test_int8_rounds_weights_alone_where_products_overflow(
    vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.full((len(a), b.shape[1]), 2**15 - 1))
    copy = quantize(vit, "int8")  # no product of it is of int8, or it would be of no use
    output, expected = copy(IMAGES), vit.eval()(IMAGES)
    vit.train()
    assert 1e-6 < largest_difference(expected, output) / expected.abs().max().item() < 0.05


def test_a_difference_is_the_largest_and_absolute_or_nan_and_of_outputs_of_one_shape() -> None:
    assert largest_difference(torch.tensor([1.0, 5.0]), torch.tensor([1.5, 2.0])) == 3
    assert math.isnan(largest_difference(torch.ones(2), torch.tensor([1.0, float("nan")])))
    with pytest.raises(ValueError, match=r"\[2, 1\] and \[2, 2\]"):
        largest_difference(torch.ones(2, 1), torch.ones(2, 2))


# --- the comparison -----------------------------------------------------------------------------


def test_precisions_are_compared_with_the_first_in_size_output_and_accuracy(vit: Any) -> None:
    data = load_data("fashion-mnist-small", "test").sample(64)
    data = replace(data, classes=tuple(map(str, range(32))))
    first, half, int8 = compare_precisions(vit, data, IMAGES, rounds=2)
    assert [row.precision for row in (first, half, int8)] == ["float32", "bfloat16", "int8"]
    assert (first.largest_difference, first.speedup.median) == (0, 1)  # the same run
    assert min(half.largest_difference, int8.largest_difference) > 0
    assert first.size_mib > 1.5 * max(half.size_mib, int8.size_mib)
    assert first.top1_percent == evaluate(vit, data).top1_percent
    assert half.top1_percent == evaluate(quantize(vit, "bfloat16"), data).top1_percent


class Named(nn.Module):
    """Returns logits by name, as transformers' models do."""

    def forward(self, images: Tensor) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=images.mean((1, 2, 3))[:, None])


def test_the_logits_of_transformers_are_taken_and_without_data_there_is_no_accuracy() -> None:
    assert quantize(Named(), "float32")(IMAGES).shape == (4, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
    [row] = compare_precisions(model, None, IMAGES, ["bfloat16"], rounds=2)
    assert row.top1_percent is None


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precisions": ["float16"]}, "precision is 'float16'"),
        ({"precisions": []}, "precisions is empty"),
        ({"rounds": 1}, "rounds is 1"),
        ({"images": IMAGES[:0]}, "images is 0"),
        ({"model": nn.Conv2d(1, 1, 1)}, "Conv2d has no linear layer"),
    ],
)
def test_arguments_out_of_range_are_refused(vit: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_precisions(**{"model": vit, "data": None, "images": IMAGES} | kwargs)


def test_int8_without_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch, vit: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="torchao"):
        quantize(vit, "int8")
