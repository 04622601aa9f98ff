"""Learned tokens in timm's ViTs: the host as it was, every kind of host, every way to use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import TIMM, drawn, inputs_of
from torch import Tensor, nn

from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11, insert, remove
from tokenlearner.layers.blocks import FusedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.insertion import get_insertion, wrapped_blocks

TINY = TIMM | {"depth": 4}
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduce", "fuse"])


def vit(**kwargs: Any) -> VisionTransformer:
    """A small host with every parameter drawn at random, so that nothing is hidden by a 0."""
    return drawn(VisionTransformer(**TINY | kwargs).eval(), 0.2)


def randomized(model: VisionTransformer) -> VisionTransformer:
    """The model with learners and fusers drawn at random: a fuser then adds something."""
    for block in wrapped_blocks(model).values():
        for name, parameter in block.named_parameters():
            if not name.startswith("block."):
                nn.init.normal_(parameter, std=0.3)
    return model


def images(h: int = 16, w: int = 16, b: int = 2) -> Tensor:
    return torch.randn(b, 3, h, w)


# --- the host ----------------------------------------------------------------------------------


@torch.no_grad()
def test_layer_scale_and_qk_norm_take_part_in_the_wrapped_block() -> None:
    host = vit(init_values=1e-5, qk_norm=True)
    block = host.blocks[2]
    wrapped, x = insert(host, 3, at=2).blocks[2], torch.randn(2, 17, 16)
    tokens = torch.cat([x[:, :1], wrapped.learner(x[:, 1:])], dim=1)
    normed = block.ls1(block.attn(block.norm1(tokens))) + tokens
    expected = normed + block.ls2(block.mlp(block.norm2(normed)))
    torch.testing.assert_close(wrapped(x), expected)
    assert isinstance(block.attn.q_norm, nn.LayerNorm)


# --- where -------------------------------------------------------------------------------------

PLACES = [
    (0, 4, 0),
    (3, 4, 3),
    (0.0, 4, 0),
    (0.25, 4, 1),
    (0.5, 4, 2),
    (0.99, 4, 3),
    (0.5, 3, 1),
    (0.75, 3, 2),
]


@pytest.mark.parametrize(("at", "depth", "index"), PLACES)
def test_the_learner_stands_at_a_block_or_at_a_share_of_the_depth(
    at: int | float, depth: int, index: int
) -> None:
    host = vit(depth=depth)
    assert insert(host, 3, at) is host
    assert list(wrapped_blocks(host)) == [index]
    assert (get_insertion(host) or {})["at"] == index
    assert remove(host) is host


# --- several places ----------------------------------------------------------------------------


@torch.no_grad()
def test_at_a_second_place_tokens_are_learned_from_the_first_ones() -> None:
    host, x = randomized(insert(vit(reg_tokens=4), (6, 2), at=(0.25, 0.75))), images()
    first, second = wrapped_blocks(host).values()
    into = inputs_of(second, lambda: host(x))
    assert into.shape == (2, 5 + 6, 16)
    expected = torch.cat([into[:, :5], second.learner(into[:, 5:])], dim=1)
    assert torch.equal(inputs_of(second.block, lambda: host(x)), expected)
    assert first.learner.num_tokens == 6


@pytest.mark.parametrize("learner", ["v1", "v11"])
@torch.no_grad()
def test_fused_blocks_learn_from_all_positions_and_have_the_tokens_of_the_place_in_front(
    learner: str,
) -> None:
    host, plain = insert(vit(), (6, 2), at=(1, 3), fuse=True, learner=learner), vit()
    assert {i: b.learner.num_tokens for i, b in wrapped_blocks(host).items()} == {1: 6, 2: 6, 3: 2}
    assert {type(block) for block in wrapped_blocks(host).values()} == {FusedBlock}
    seen = [inputs_of(host.blocks[i], lambda: host(images())).shape[1] for i in range(4)]
    assert seen == [17] * 4
    assert list(remove(host).state_dict()) == list(plain.state_dict())


# --- the new parameters ------------------------------------------------------------------------

KINDS = {
    "v11": TokenLearnerV11,
    "v1": TokenLearner,
    "v1-mean": TokenLearner,
    "grouped": TokenLearnerModuleV11,
    "grouped-linear": TokenLearnerModuleV11,
}


@each_learner
def test_learners_have_the_official_numbers(learner: str) -> None:
    (block,) = wrapped_blocks(insert(vit(), 3, learner=learner)).values()
    gelus = [m.approximate for m in block.learner.modules() if isinstance(m, nn.GELU)]
    assert type(block.learner) is KINDS[learner]
    assert block.learner.norm.eps == 1e-6
    official = None if learner == "grouped-linear" else "tanh"  # no GELU in December 2021
    assert set(gelus or [block.learner.approximate]) == {official}


@each_learner
@pytest.mark.parametrize("resized", [False, True])
@torch.no_grad()
def test_learners_run_on_the_grid_of_an_image_that_is_not_square(
    resized: bool, learner: str
) -> None:
    host = insert(vit(img_size=(16, 16) if resized else (8, 32)), 3, learner=learner)
    if resized:
        host.set_input_size((8, 32))  # 16 positions as before, but on another grid
    (block,) = wrapped_blocks(host).values()
    x = torch.randn(2, 1 + 16, 16)
    tokens = inputs_of(block.block, lambda: block(x))[:, 1:]
    torch.testing.assert_close(tokens, block.learner(x[:, 1:].unflatten(1, (2, 8))))
    assert host(images(8, 32)).shape == (2, 5)


@both_ways
@each_learner
@torch.no_grad()
def test_new_parameters_take_dtype_device_and_mode_of_the_block(learner: str, fuse: bool) -> None:
    for device, dtype in (("cpu", torch.bfloat16), ("meta", torch.float32)):
        for training in (False, True):
            host = vit().to(device, dtype).train(training)
            insert(host, 3, learner=learner, fuse=fuse)
            assert {(p.device.type, p.dtype) for p in host.parameters()} == {(device, dtype)}
            assert {module.training for module in host.modules()} == {training}
            out = host(images().to(device, dtype))
            assert (out.shape, out.dtype) == ((2, 5), dtype)


# --- what a model goes through -----------------------------------------------------------------


@pytest.mark.parametrize("learner", ["v1", "v1-mean"])
@pytest.mark.parametrize("size", [(8, 16), (8, 32)])  # the second has as many positions
@torch.no_grad()
def test_v1_never_runs_on_the_grid_of_another_image(size: tuple[int, int], learner: str) -> None:
    with pytest.raises(ValueError, match=r"8 positions do not fit a 4 x 4 grid|dynamic_img_size"):
        insert(vit(dynamic_img_size=True), 3, learner=learner)(images(*size))


# --- insertion ---------------------------------------------------------------------------------

INSERTIONS: list[dict[str, Any]] = [
    {"num_tokens": 3, "at": 1, "learner": "v11", "fuse": False},
    {"num_tokens": 5, "at": 0, "learner": "v1", "fuse": False},
    {"num_tokens": 2, "at": 2, "learner": "v1-mean", "fuse": True},
    {"num_tokens": 4, "at": 3, "learner": "grouped", "fuse": True},
    {"num_tokens": [6, 2], "at": [1, 3], "learner": "v11", "fuse": False},
    {"num_tokens": [6, 6, 1], "at": [0, 1, 3], "learner": "grouped-linear", "fuse": False},
    {"num_tokens": [6, 2], "at": [0, 2], "learner": "v1", "fuse": True},
    {"num_tokens": 3, "at": 2, "learner": "v1", "fuse": False, "grid": [2, 8]},
]


@pytest.mark.parametrize("arguments", INSERTIONS, ids=str)
@torch.no_grad()
def test_get_insertion_returns_the_arguments_that_build_the_same_model(
    arguments: dict[str, Any],
) -> None:
    host, x = randomized(insert(vit(), **arguments)), images()
    assert get_insertion(host) == arguments
    other = insert(vit(), **get_insertion(host))
    other.load_state_dict(host.state_dict())
    assert torch.equal(other(x), host(x))


def test_insertion_is_none_without_learned_tokens_and_plain_for_one_place() -> None:
    assert get_insertion(vit()) is None
    with pytest.raises(ValueError, match="no learned tokens"):
        remove(vit())
    ((index, block),) = wrapped_blocks(insert(vit())).items()
    assert (index, block.learner.num_tokens) == (2, 8)  # the default: 8 tokens half-way
    assert get_insertion(remove(insert(vit(), 3))) is None
    assert get_insertion(insert(vit(), [3], at=[2])) == get_insertion(insert(vit(), 3, at=2))


# --- what is refused ---------------------------------------------------------------------------


_AT = "expected a block from 0 to 3"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_tokens": 17}, "num_tokens is 17"),
    ({"num_tokens": 0}, "num_tokens is 0"),
    ({"num_tokens": 2.0}, r"num_tokens is 2\.0"),
    ({"num_tokens": True}, "num_tokens is True"),
    ({"at": True}, f"at is True, {_AT}"),
    ({"at": 4}, f"at is 4, {_AT}"),
    ({"at": 1.0}, rf"at is 1\.0, {_AT}"),
    ({"at": -0.5}, rf"at is -0\.5, {_AT}"),
    ({"at": float("nan")}, f"at is nan, {_AT}"),
    ({"at": "x"}, f"at is 'x', {_AT}"),
    (
        {"at": (0.25, 0.5)},
        r"num_tokens is 3 and at is \(0\.25, 0\.5\)",
    ),
    ({"num_tokens": (3, 2)}, r"num_tokens is \(3, 2\) and at is 0\.5"),
    ({"num_tokens": (3, 2, 1), "at": (1, 2)}, "num_tokens is .* and at is"),
    ({"num_tokens": (), "at": ()}, "num_tokens is .* and at is"),
    ({"num_tokens": (3, 2), "at": (2, 1)}, r"at is \(2, 1\)"),
    ({"num_tokens": (3, 2), "at": (2, 0.6)}, r"at is \(2, 0\.6\)"),
    ({"num_tokens": (2, 3), "at": (1, 2)}, r"num_tokens is \(2, 3\)"),
    ({"num_tokens": (17, 3), "at": (1, 2)}, "num_tokens is 17"),
    ({"num_tokens": (3, 2), "at": (1, 4)}, f"at is 4, {_AT}"),
    (
        {"num_tokens": (3, 2), "at": (1, 2), "learner": "v1-mean"},
        "V1's convolutions need a grid",
    ),
    ({"learner": "v2"}, "learner is 'v2'"),
    ({"fuse": "no"}, "fuse is 'no'"),
    ({"grid": (3, 5)}, "16 positions do not fit a 3 x 5 grid of 15"),
    ({"grid": 4}, r"grid is 4, expected \(height, width\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_a_bad_argument_is_refused_and_leaves_the_model_as_it_was(
    arguments: dict[str, Any], message: str
) -> None:
    host = vit()
    with pytest.raises(ValueError, match=message):
        insert(host, **({"num_tokens": 3} | arguments))
    assert get_insertion(host) is None


@both_ways
@torch.no_grad()
def test_tokens_inserted_on_the_chosen_device_give_what_they_give_on_the_cpu(
    fuse: bool, device: torch.device
) -> None:
    host, images = vit().double().to(device), torch.randn(2, 3, 16, 16).double()
    insert(host, 4, fuse=fuse)
    assert {p.device.type for p in host.parameters()} == {device.type}
    on_device = host(images.to(device)).cpu()
    torch.testing.assert_close(on_device, host.cpu()(images))
