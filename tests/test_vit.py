"""The named ViTs: known to timm, built as the paper's code is, at the cost they should have."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenlearner
from tokenlearner import vit
from tokenlearner.benchmark import count_macs
from tokenlearner.insert import insertion
from tokenlearner.vit import VARIANTS

PLAIN, LEARNED = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
each_name = pytest.mark.parametrize("name", VARIANTS)


def test_the_names_are_those_listed() -> None:
    assert tokenlearner.list_models() == [PLAIN, LEARNED] == sorted(VARIANTS)


@each_name
def test_importing_the_file_registers_the_names_with_timm(name: str) -> None:
    assert timm.is_model(name)
    assert timm.model_entrypoint(name) is getattr(vit, name)


@each_name
@torch.no_grad()
def test_timm_and_tokenlearner_build_the_same_model(name: str) -> None:
    torch.manual_seed(7)
    ours = tokenlearner.create_model(name).eval()
    torch.manual_seed(7)
    timms = timm.create_model(name).eval()
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(ours(images), timms(images))
    assert list(ours.state_dict()) == list(timms.state_dict())


@each_name
def test_timms_config_names_the_input_and_the_layers_of_the_model(name: str) -> None:
    model = timm.create_model(name)
    config = model.default_cfg
    assert config["input_size"] == (1, 28, 28)
    assert config["num_classes"] == 10
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert isinstance(model.get_submodule(config["classifier"]), nn.Linear)


def test_the_learner_stands_where_the_name_says() -> None:
    assert insertion(timm.create_model(PLAIN)) is None
    expected = {"num_tokens": 8, "at": 3, "learner": "v11", "fuse": False}
    assert insertion(timm.create_model(LEARNED)) == expected


@each_name
@torch.no_grad()
def test_classes_come_from_the_mean_of_the_normed_tokens(name: str) -> None:
    model, images = timm.create_model(name).eval(), torch.randn(2, 1, 28, 28)
    tokens = model.norm(model.blocks(model.pos_drop(model._pos_embed(model.patch_embed(images)))))
    assert tokens.shape == (2, 8 if name == LEARNED else 49, 64)
    torch.testing.assert_close(model(images), model.head(tokens.mean(dim=1)))


@each_name
def test_there_is_no_class_token(name: str) -> None:
    model = timm.create_model(name)
    assert model.num_prefix_tokens == 0
    assert model.pos_embed.shape == (1, 49, 64)


@each_name
def test_layer_norms_and_gelus_have_the_official_numbers(name: str) -> None:
    modules = list(timm.create_model(name).modules())
    assert {m.eps for m in modules if isinstance(m, nn.LayerNorm)} == {1e-6}
    gelus = [m for m in modules if "gelu" in type(m).__name__.lower()]
    x = torch.linspace(-3, 3, 50)
    assert len(gelus) == (7 if name == LEARNED else 6)
    assert all(torch.equal(m(x), nn.functional.gelu(x, approximate="tanh")) for m in gelus)


def block_macs(n: int, c: int) -> int:
    return 12 * n * c * c + 2 * n * n * c


N, C, S, DEPTH, CLASSES = 49, 64, 8, 6, 10
PATCHES_AND_HEAD = N * 16 * C * 1 + C * CLASSES
LEARNER = 64 * N * C + 64 * N * S + N * S * C
MACS = {
    PLAIN: PATCHES_AND_HEAD + DEPTH * block_macs(N, C),
    LEARNED: PATCHES_AND_HEAD + 3 * block_macs(N, C) + LEARNER + 3 * block_macs(S, C),
}


@each_name
def test_counted_multiply_adds_are_those_of_the_closed_form(name: str) -> None:
    assert count_macs(timm.create_model(name), torch.randn(1, 1, 28, 28)) == MACS[name]


@each_name
def test_pretrained_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no pretrained weights for {name}; pass pretrained=Fal"):
        timm.create_model(name, pretrained=True)


@each_name
@torch.no_grad()
def test_the_head_can_be_exchanged(name: str) -> None:
    model = timm.create_model(name).eval()
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)


OVERRIDES: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({"num_classes": 3}, (1, 28, 28), (2, 3)),
    ({"in_chans": 3}, (3, 28, 28), (2, 10)),
    ({"img_size": 32}, (1, 32, 32), (2, 10)),
    ({"img_size": (24, 36), "patch_size": 6}, (1, 24, 36), (2, 10)),
    ({"num_classes": 0, "embed_dim": 48, "depth": 4}, (1, 28, 28), (2, 48)),
]


@each_name
@pytest.mark.parametrize(("kwargs", "image", "out"), OVERRIDES, ids=[str(o[0]) for o in OVERRIDES])
@torch.no_grad()
def test_arguments_go_before_the_variants_own(
    kwargs: dict[str, Any], image: tuple[int, ...], out: tuple[int, ...], name: str
) -> None:
    assert timm.create_model(name, **kwargs)(torch.randn(2, *image)).shape == out
