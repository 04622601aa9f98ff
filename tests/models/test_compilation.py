"""`compile_model`: how many graphs, when they are made again, and that results stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tokenlearner import create_model, insert, load_model, save_model
from tokenlearner.models.compilation import compile_model


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def host() -> Any:
    torch.manual_seed(0)
    options = {"class_token": True, "global_pool": "token"}  # behind it tokens are contiguous
    return create_model("vit_mini_patch4_28", depth=8, **options).eval()


def test_equal_blocks_are_one_graph_and_other_batch_sizes_do_not_compile_again() -> None:
    images, counter = torch.randn(32, 1, 28, 28), CompileCounter()
    model = insert(host(), 8, 4, overlap=0)
    with torch.no_grad():
        expected = model(images)
        compiled = compile_model(model, backend=counter)
        for count in (3, 8, 32, 5):
            torch.testing.assert_close(compiled(images[:count]), expected[:count])
            assert counter.frame_count == 2  # a block, and the one that learns tokens
        torch.testing.assert_close(compiled(images[:1]), expected[:1])
    assert counter.frame_count <= 4  # torch takes an axis of 1 for another case


def test_gradients_are_those_of_the_plain_model_with_checkpointing_too() -> None:
    images, plain = torch.randn(4, 1, 28, 28), insert(host(), 8, 4)
    compiled = compile_model(copy.deepcopy(plain), backend="aot_eager")
    for checkpointing in (False, True):
        for model in (plain, compiled):
            model.train().set_grad_checkpointing(checkpointing)
            model.zero_grad()
            model(images).square().mean().backward()
        for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_is_copied_and_saved_as_any(tmp_path: Path) -> None:
    images = torch.randn(2, 1, 28, 28)
    model = compile_model(insert(host(), 8, 4), backend="eager")
    for other in (copy.deepcopy(model), load_model(save_model(model, tmp_path / "m.safetensors"))):
        torch.testing.assert_close(other(images), model(images))


def test_models_without_blocks_and_other_modes_are_compiled_whole() -> None:
    net, asked = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), list[dict[str, Any]]()
    counter = CompileCounter()
    assert compile_model(net, backend=counter)(torch.ones(2, 4)).shape == (2, 4)
    assert counter.frame_count == 1
    vit: Any = host()
    vit.compile = lambda **options: asked.append(options)
    assert compile_model(vit, "reduce-overhead") is vit
    assert asked == [{"mode": "reduce-overhead"}]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'fast', expected"):
        compile_model(host(), "fast")
