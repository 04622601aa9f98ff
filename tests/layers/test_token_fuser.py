"""The TokenFuser: equal numbers first, then the exact 0 it starts from, then how it is used."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference
import torch
from learners import FUSERS, Make, half_dtypes, randomized, tokens_for, uneven
from torch import nn

from tokenlearner import TokenFuser

each_fuser = pytest.mark.parametrize("make", FUSERS.values(), ids=FUSERS)
SHAPES = {"flat": (2, 35, 9), "grid": (2, 5, 7, 9), "clip": (2, 3, 5, 7, 9)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# --- equal to the equations (to scenic: tests/checkpoints/test_scenic.py) ----------------------

_MLP = {"bottleneck": True, "use_normalization": True, "norm_eps": 1e-6, "approximate": "tanh"}
EQUATIONS = {
    "gain_at_0": _MLP,
    "default": _MLP,
    "linear": _MLP | {"bottleneck": False, "norm_eps": 1e-5},
    "without_norm": _MLP | {"use_normalization": False},
    "exact_gelu": _MLP | {"approximate": "none"},
}


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 11, 15), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("name", FUSERS)
@torch.no_grad()
def test_the_result_follows_the_equations(name: str, shape: tuple[int, ...]) -> None:
    fuser = randomized(FUSERS[name](shape[-1], 4).double())
    tokens, original = uneven(shape[0], 4, shape[-1]), uneven(*shape)
    params = {key: value.numpy() for key, value in fuser.state_dict().items()}
    expected = reference.fuser(tokens.numpy(), original.numpy(), params, **EQUATIONS[name])
    np.testing.assert_allclose(fuser(tokens, original), expected, rtol=1e-10, atol=1e-10)


# --- the start ---------------------------------------------------------------------------------


@each_shape
@each_fuser
def test_a_new_fuser_returns_exactly_0_in_the_shape_of_the_original(
    make: Make, shape: tuple[int, ...]
) -> None:
    original = 100 * torch.randn(shape)
    out = make(9, 4)(100 * tokens_for(original), original)
    assert out.shape == shape
    assert (out == 0).all()


def first_gradients(**arguments: object) -> dict[str, float]:
    """Norms of the first gradients of a new B/16 fuser behind 196 positions."""
    fuser = TokenFuser(768, 8, **arguments)
    original = torch.randn(2, 196, 768)
    (fuser(tokens_for(original, 8), original) * torch.randn(2, 196, 768)).sum().backward()
    return {name: p.grad.norm().item() for name, p in fuser.named_parameters()}


def test_first_gradients_are_ordinary_if_the_norms_gain_starts_at_0_and_huge_otherwise() -> None:
    gradients = first_gradients(zero_init="norm")
    assert max(gradients.values()) < 10 * first_gradients(use_normalization=False)["mix.weight"]
    assert first_gradients()["mix.weight"] > 100 * max(gradients.values())
    assert gradients["mix_norm2.weight"] > 1  # it learns from the first step
    assert gradients["mix_norm2.bias"] > 1


@pytest.mark.parametrize("arguments", [{}, {"zero_init": "norm"}, {"use_normalization": False}])
def test_two_steps_of_training_reach_every_parameter(arguments: dict[str, object]) -> None:
    fuser = TokenFuser(9, 4, **arguments)
    before = copy.deepcopy(fuser.state_dict())
    optimizer = torch.optim.SGD(fuser.parameters(), lr=0.1)
    original = torch.randn(2, 5, 7, 9)
    tokens, target = tokens_for(original), torch.randn(2, 5, 7, 9)
    for _ in range(2):
        optimizer.zero_grad()
        (fuser(tokens, original) - target).square().mean().backward()
        optimizer.step()
    change = {k: (v - before[k]).abs().max() for k, v in fuser.state_dict().items()}
    if isinstance(fuser.mix_norm2, nn.LayerNorm):
        change.pop("mix.bias")  # one number for all channels, which the norm behind it takes out
    assert min(change.values()) > 1e-6, change


def test_the_mix_starts_at_0_or_xavier_uniform_where_the_gain_starts_at_0() -> None:
    fuser, mix = TokenFuser(9, 64, zero_init="norm"), TokenFuser(9, 64)
    bound = math.sqrt(6 / 128)
    assert 0.95 * bound < fuser.mix.weight.abs().max() <= bound
    assert (fuser.mix_norm2.weight == 0).all()
    for other in (mix, TokenFuser(9, 4, zero_init="norm", use_normalization=False)):
        assert (other.mix.weight == 0).all()
        assert (other.mix.bias == 0).all()
    fuser.load_state_dict(mix.state_dict(), strict=True)


def test_kernels_of_the_gates_start_xavier_uniform() -> None:
    for gates in (TokenFuser(96, 64, 48).gates[0], TokenFuser(96, 64, None).gates):
        weight = gates.weight.detach()
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


PARAMETERS = {(768, 8): (10_824, 54_416), (768, 16): (17_168, 55_136), (1024, 16): (22_800, 73_056)}


@pytest.mark.parametrize(("size", "counts"), PARAMETERS.items(), ids=str)
def test_parameters_are_as_many_as_in_the_official_modules(
    size: tuple[int, int], counts: tuple[int, int]
) -> None:
    fusers = TokenFuser(*size, bottleneck_dim=None), TokenFuser(*size)
    assert tuple(sum(p.numel() for p in fuser.parameters()) for fuser in fusers) == counts


# --- shapes ------------------------------------------------------------------------------------


@each_fuser
@torch.no_grad()
def test_a_position_gets_what_its_own_original_asks_for(make: Make) -> None:
    fuser, original = randomized(make(9, 4).double()), uneven(2, 5, 7, 9)
    tokens, order, flat = tokens_for(original), torch.randperm(35), original.flatten(1, 2)
    out = fuser(tokens, original).flatten(1, 2)
    assert torch.equal(fuser(tokens, flat), out)
    torch.testing.assert_close(fuser(tokens, flat[:, order]), out[:, order])


# --- dtypes ------------------------------------------------------------------------------------


@half_dtypes
@torch.no_grad()
def test_thousands_of_tokens_are_added_up_exactly(dtype: torch.dtype) -> None:
    fuser = TokenFuser(3, 4096, None, use_normalization=False).to(dtype)
    fuser.gates.weight.zero_()  # every gate is 1/2
    fuser.mix.bias.fill_(1)  # every mixed token is 1
    result = fuser(torch.randn(1, 4096, 3).to(dtype), torch.randn(1, 2, 3).to(dtype))
    assert (result == 2048).all()  # a sum in bfloat16 stops at 128, in float16 at 1024


# --- dropout -----------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout_acts_on_the_result_and_in_the_gates_but_not_in_eval_mode() -> None:
    linear, plain = randomized(TokenFuser(9, 4, None, dropout_rate=0.25)), TokenFuser(9, 4, None)
    plain.load_state_dict(linear.state_dict())
    original = torch.randn(2, 20, 20, 9)
    tokens = tokens_for(original)
    result, kept = linear.train()(tokens, original), linear.eval()(tokens, original)
    dropped = result == 0
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(result[~dropped], kept[~dropped] / 0.75)
    assert torch.equal(plain(tokens, original), kept)
    mlp = randomized(TokenFuser(9, 4, 10, dropout_rate=0.5)).eval()
    kept = mlp(tokens, original)
    mlp.gates.train()
    assert not torch.allclose(mlp(tokens, original), kept)
