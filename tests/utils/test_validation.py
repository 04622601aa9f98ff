"""Arguments and inputs are refused by ValueError with their name, and whatever fits is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenlearner import TokenFuser, TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from tokenlearner.utils.validation import check_grid

Make = Callable[..., nn.Module]

LEARNERS: dict[str, Make] = {
    "v1": TokenLearner,
    "v11_grouped": partial(TokenLearnerModuleV11, num_groups=1),
    "v11": TokenLearnerV11,
}
MODULES: dict[str, Make] = {**LEARNERS, "fuser": TokenFuser}
each_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
NO_COUNTS = [0, -3, 2.0, True, "8", None]

# --- constructors ------------------------------------------------------------------------------

HAS: dict[str, list[str]] = {  # the modules with an argument
    "in_channels": [*MODULES],
    "num_tokens": [*MODULES],
    "num_groups": ["v11_grouped"],
    "bottleneck_dim": ["v11", "fuser"],
    "dropout_rate": ["v11_grouped", "v11", "fuser"],
    "norm_eps": [*MODULES],
    "approximate": [*MODULES],
    "zero_init": ["fuser"],
}
BAD: dict[str, list[Any]] = {
    "in_channels": NO_COUNTS,
    "num_tokens": NO_COUNTS,
    "num_groups": NO_COUNTS,
    "bottleneck_dim": NO_COUNTS[1:-1],  # None and 0 have a meaning of their own
    "dropout_rate": [-0.1, 1, 1.5, math.nan, "0.1", True, None],
    "norm_eps": [0, -1e-6, math.inf, math.nan, "1e-6", True, None],
    "approximate": ["exact", True, 1, ["tanh"]],
    "zero_init": ["gain", None, 0],
}


@pytest.mark.parametrize(("name", "module"), [(n, m) for n, ms in HAS.items() for m in ms])
def test_a_bad_argument_is_refused_by_its_name_and_value(name: str, module: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name) as error:
            MODULES[module](**({"in_channels": 8, "num_tokens": 4} | {name: value}))
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("groups", [3, 16])
def test_groups_divide_the_channels(groups: int) -> None:
    with pytest.raises(ValueError, match=f"{groups} groups"):
        TokenLearnerModuleV11(8, 4, groups)


def test_a_learner_has_no_form_without_a_bottleneck() -> None:
    with pytest.raises(ValueError, match="bottleneck_dim is None"):
        TokenLearnerV11(8, 4, bottleneck_dim=None)


# --- inputs of the learners --------------------------------------------------------------------

INPUTS: dict[str, tuple[Any, str]] = {  # what is given, and a part of the message
    "channels": (torch.ones(2, 5, 5, 6), "6 channels, expected 8"),
    "channels_first": (torch.ones(2, 8, 5, 7), "permute"),
    **{
        f"rank_{len(shape)}": (torch.ones(shape), rf"{len(shape)} axes.*expected \[b, n, c\]")
        for shape in [(), (8,), (5, 8), (1, 1, 1, 1, 1, 8)]
    },
    **{
        f"empty_{shape}": (torch.ones(shape), "only the batch may be empty")
        for shape in [(2, 0, 8), (2, 0, 5, 8), (2, 5, 0, 8), (2, 0, 5, 5, 8)]
    },
    **{
        str(dtype): (torch.ones(2, 5, 5, 8, dtype=dtype), f"{dtype}, expected a floating point")
        for dtype in [torch.uint8, torch.int64, torch.bool, torch.complex64]
    },
    "array": (np.ones((2, 5, 5, 8)), "ndarray, expected a torch.Tensor"),
    "list": ([[[1.0] * 8]], "list, expected a torch.Tensor"),
    "None": (None, "NoneType, expected a torch.Tensor"),
    "float64": (torch.ones(2, 5, 5, 8).double(), "torch.float64, .* are torch.float32"),
}


@pytest.mark.parametrize("kind", INPUTS)
@each_learner
def test_an_input_that_does_not_fit_is_refused(make: Make, kind: str) -> None:
    learner, (x, message) = make(8, 4), INPUTS[kind]
    for call in (learner, learner.attention):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_dtypes_that_autocast_does_not_mix_are_refused(
    make: Make, parameters: torch.dtype, dtype: torch.dtype
) -> None:
    module, x = make(8, 4).to(parameters), torch.ones(2, 5, 5, 8, dtype=dtype)
    inputs = (torch.ones(2, 4, 8, dtype=dtype), x) if make is TokenFuser else (x,)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=f"{dtype}.*{parameters}"),
    ):
        module(*inputs)


# --- grids -------------------------------------------------------------------------------------

FLAT = (2, 35, 8)
GRIDS: list[tuple[tuple[int, ...], Any, str]] = [
    (FLAT, (5, 5), "35 positions do not fit a 5 x 5 grid"),
    *((FLAT, grid, "grid is") for grid in [(5,), (5, 5, 1), 5, {5, 7}, {"h": 5, "w": 7}]),
    *((FLAT, grid, "the grid's h") for grid in [(-5, -7), (0, 35)]),
    *((FLAT, grid, "the grid's w") for grid in [(5, 7.0), (35, True)]),
    ((2, 5, 7, 8), (7, 5), "grid is .* 5 x 7 grid"),
    ((2, 3, 5, 7, 8), (7, 5), "grid is .* 5 x 7 grid"),
    ((2, 5, 7, 8), (5,), "grid is"),
]


@pytest.mark.parametrize(("shape", "grid", "message"), GRIDS, ids=str)
@each_learner
def test_a_grid_that_does_not_fit_is_refused(
    make: Make, shape: tuple[int, ...], grid: Any, message: str
) -> None:
    learner = make(8, 4)
    for call in (learner, learner.attention):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(shape), grid=grid)


def test_v1_needs_the_grid_of_positions_that_are_not_a_square() -> None:
    with pytest.raises(ValueError, match=r"35 positions.*pass grid="):
        TokenLearner(8, 4)(torch.ones(FLAT))


@pytest.mark.parametrize("grid", [(5, 7), [5, 7], torch.Size([5, 7])], ids=repr)
def test_a_grid_may_be_any_pair(grid: Any) -> None:
    assert check_grid(grid, 35) == (5, 7)


# --- inputs of the fuser -----------------------------------------------------------------------

FUSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {  # tokens, original, message
    "batch": ((3, 4, 8), FLAT, r"\[3, 4, 8\], expected \[2, 4, 8\]"),
    "count": ((2, 5, 8), FLAT, r"\[2, 5, 8\], expected \[2, 4, 8\]"),
    "frames": ((2, 4, 4, 8), (2, 3, 5, 7, 8), r"expected \[2, 3, 4, 8\]"),
    "clip_of_tokens_for_flat": ((2, 3, 4, 8), FLAT, r"4 axes.*expected \[b, k, c\]"),
    "grid_of_tokens_for_grid": ((2, 1, 4, 8), (2, 5, 7, 8), r"4 axes.*expected \[b, k, c\]"),
    "folded_for_clip": ((6, 4, 8), (2, 3, 5, 7, 8), r"3 axes.*expected \[b, t, k, c\]"),
    "channels_of_original": ((2, 4, 8), (2, 35, 6), "the original .* 6 channels"),
    "channels_of_tokens": ((2, 4, 6), FLAT, "6 channels"),
}


@pytest.mark.parametrize(("tokens", "original", "message"), FUSED.values(), ids=FUSED)
def test_tokens_that_do_not_fit_the_original_are_refused(
    tokens: tuple[int, ...], original: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFuser(8, 4)(torch.ones(tokens), torch.ones(original))


@pytest.mark.parametrize("which", [0, 1], ids=["tokens", "original"])
def test_a_fuser_refuses_other_dtypes_of_either_input(which: int) -> None:
    inputs: list[Tensor] = [torch.ones(2, 4, 8), torch.ones(2, 4, 8)]
    inputs[which] = inputs[which].double()
    with pytest.raises(ValueError, match=r"torch.float64, .* are torch.float32"):
        TokenFuser(8, 4)(*inputs)


# --- anything ----------------------------------------------------------------------------------

sizes = st.integers(1, 6)
ranks = st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple)
floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
dtypes = st.sampled_from([torch.float32] * 6 + [torch.float64, torch.int64, torch.bool])
pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))
grids = st.one_of(st.none(), pairs, st.sampled_from([5, (5,), "55", (2.0, 2), {2, 3}, (None, 2)]))


@settings(max_examples=50)
@given(st.data())
def test_inputs_give_what_is_documented_or_raise_value_error(data: st.DataObject) -> None:
    c, k, dtype = data.draw(sizes), data.draw(sizes), data.draw(floats)
    shape = data.draw(st.one_of(ranks, ranks.map(lambda shape: (*shape[:-1], c))))
    x = torch.ones(shape, dtype=data.draw(dtypes))
    own = shape[-3:-1] if len(shape) > 3 else (1, *shape[-2:-1])
    grid = data.draw(st.one_of(st.just(own), grids))
    frames = shape[: 2 if len(shape) == 5 else 1]
    tokens = torch.ones(*frames, k, shape[-1], dtype=x.dtype)
    for make in LEARNERS.values():
        learner = make(c, k).to(dtype)
        with suppress(ValueError):
            found, maps = learner(x, grid), learner.attention(x, grid)
            assert (found.shape, found.dtype) == ((*frames, k, c), x.dtype)
            assert (maps.shape, maps.dtype) == ((*frames, k, *shape[len(frames) : -1]), x.dtype)
    with suppress(ValueError):
        restored = TokenFuser(c, k).to(dtype)(tokens, x)
        assert (restored.shape, restored.dtype) == (x.shape, x.dtype)


@settings(max_examples=20)
@given(c=sizes, k=sizes, lead=st.lists(st.integers(0, 3), min_size=1, max_size=2), h=sizes, w=sizes)
def test_whatever_fits_is_taken(c: int, k: int, lead: list[int], h: int, w: int) -> None:
    lead = [lead[0], *(size + 1 for size in lead[1:])]
    x = torch.ones(*lead, h, w, c)
    for make in LEARNERS.values():
        tokens = make(c, k)(x)
        assert tokens.shape == (*lead, k, c)
        assert TokenFuser(c, k)(tokens, x).shape == x.shape
        if len(lead) == 1:
            assert make(c, k)(x.flatten(1, 2), (h, w)).shape == (*lead, k, c)
