"""What the modules refuse: every misuse has a ValueError that says what came and what fits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
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

GROUPED = partial(TokenLearnerModuleV11, num_groups=1)
LEARNERS: dict[str, Make] = {"v1": TokenLearner, "v11_grouped": GROUPED, "v11": TokenLearnerV11}
MODULES: dict[str, Make] = LEARNERS | {"fuser": TokenFuser}
with_mlp = pytest.mark.parametrize("make", [TokenLearnerV11, TokenFuser])
with_dropout = pytest.mark.parametrize("make", [GROUPED, TokenLearnerV11, TokenFuser])
each_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def refused(message: str) -> Any:
    """Expects a ValueError with exactly this text in it."""
    return pytest.raises(ValueError, match=re.escape(message))


# --- arguments ---------------------------------------------------------------------------------

NO_COUNTS = [0, -1, 8.0, "8", True, None]


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@each_module
def test_channels_are_a_positive_integer(make: Make, value: Any) -> None:
    with refused(f"in_channels is {value!r}, expected an integer of 1 or more"):
        make(value, 4)


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@each_module
def test_tokens_are_a_positive_integer(make: Make, value: Any) -> None:
    with refused(f"num_tokens is {value!r}, expected an integer of 1 or more"):
        make(8, value)


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_groups_are_a_positive_integer(value: Any) -> None:
    with refused(f"num_groups is {value!r}, expected an integer of 1 or more"):
        TokenLearnerModuleV11(8, 4, value)


@pytest.mark.parametrize("groups", [3, 16])
def test_groups_divide_the_channels(groups: int) -> None:
    with refused(f"{groups} groups do not divide 8 channels evenly"):
        TokenLearnerModuleV11(8, 4, groups)


@pytest.mark.parametrize("value", NO_COUNTS[:-1], ids=repr)
@with_mlp
def test_the_bottleneck_is_a_positive_integer(make: Make, value: Any) -> None:
    with refused(f"bottleneck_dim is {value!r}, expected an integer of 1 or more"):
        make(8, 4, bottleneck_dim=value)


def test_a_learner_has_no_form_without_a_bottleneck() -> None:
    with refused("bottleneck_dim is None, expected an integer of 1 or more"):
        TokenLearnerV11(8, 4, bottleneck_dim=None)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, "0.1", True, None], ids=repr)
@with_dropout
def test_the_dropout_rate_is_a_share_below_1(make: Make, value: Any) -> None:
    with refused(f"dropout_rate is {value!r}, expected a share from 0 to below 1"):
        make(8, 4, dropout_rate=value)


@pytest.mark.parametrize("value", [0, -1e-6, math.inf, math.nan, "1e-6", True, None], ids=repr)
@each_module
def test_epsilon_is_a_number_above_0(make: Make, value: Any) -> None:
    with refused(f"norm_eps is {value!r}, expected a number above 0"):
        make(8, 4, norm_eps=value)


@pytest.mark.parametrize("value", ["exact", True, 1, ["tanh"]], ids=repr)
@each_module
def test_only_torchs_gelus_are_known(make: Make, value: Any) -> None:
    with refused(f"approximate is {value!r}, expected one of 'none', 'tanh'"):
        make(8, 4, approximate=value)


@pytest.mark.parametrize("value", ["gain", None, 0], ids=repr)
def test_a_fuser_starts_from_norm_or_mix(value: Any) -> None:
    with refused(f"zero_init is {value!r}, expected one of 'mix', 'norm'"):
        TokenFuser(8, 4, zero_init=value)


# --- inputs of the learners --------------------------------------------------------------------


def calls(make: Make) -> list[Callable[..., Tensor]]:
    """Both ways to give a learner of 8 channels an input; they refuse the same."""
    learner = make(8, 4)
    return [learner, learner.attention]


@each_learner
def test_other_channels_are_refused(make: Make) -> None:
    for call in calls(make):
        with refused("the input is [2, 5, 5, 6] with 6 channels, expected 8 in the last axis"):
            call(torch.ones(2, 5, 5, 6))


@each_learner
def test_channels_first_are_recognized(make: Make) -> None:
    for call in calls(make):
        with refused("channels come last, permute them there"):
            call(torch.ones(2, 8, 5, 7))


@pytest.mark.parametrize("shape", [(), (8,), (5, 8), (1, 1, 1, 1, 1, 8)], ids=str)
@each_learner
def test_other_ranks_are_refused(make: Make, shape: tuple[int, ...]) -> None:
    message = (
        f"the input has {len(shape)} axes, {list(shape)}; "
        "expected [b, n, c] or [b, h, w, c] or [b, t, h, w, c]"
    )
    for call in calls(make):
        with refused(message):
            call(torch.ones(shape))


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 0, 5, 8), (2, 5, 0, 8), (2, 0, 5, 5, 8)], ids=str)
@each_learner
def test_frames_without_positions_are_refused(make: Make, shape: tuple[int, ...]) -> None:
    for call in calls(make):
        with refused(f"the input is {list(shape)}: only the batch may be empty"):
            call(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
@each_learner
def test_inputs_that_are_not_floating_point_are_refused(make: Make, dtype: torch.dtype) -> None:
    for call in calls(make):
        with refused(f"the input is {dtype}, expected a floating point dtype"):
            call(torch.ones(2, 5, 5, 8, dtype=dtype))


@pytest.mark.parametrize(
    "x", [np.ones((2, 5, 5, 8)), [[[1.0] * 8]], None], ids=["array", "list", "None"]
)
@each_learner
def test_inputs_that_are_no_tensors_are_refused(make: Make, x: Any) -> None:
    for call in calls(make):
        with refused(f"the input is a {type(x).__name__}, expected a torch.Tensor"):
            call(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@each_learner
def test_other_dtypes_are_refused_without_autocast(make: Make, device: str) -> None:
    message = "the input is torch.float64, the module's parameters are torch.float32; call .to()"
    with refused(message):
        make(8, 4).to(device)(torch.ones(2, 5, 5, 8, dtype=torch.float64, device=device))


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
@each_learner
def test_dtypes_that_autocast_does_not_bring_together_are_refused(
    make: Make, parameters: torch.dtype, dtype: torch.dtype
) -> None:
    learner = make(8, 4).to(parameters)
    with (
        torch.autocast("cpu", torch.bfloat16),
        refused(f"the input is {dtype}, the module's parameters are {parameters}"),
    ):
        learner(torch.ones(2, 5, 5, 8, dtype=dtype))


# --- grids -------------------------------------------------------------------------------------

NO_GRIDS = [(5,), (5, 5, 1), 5, {5, 7}, {"h": 5, "w": 7}]


def test_v1_wants_the_grid_of_positions_that_are_no_square() -> None:
    for call in calls(TokenLearner):
        with refused("35 positions are no square; pass grid=(height, width)"):
            call(torch.ones(2, 35, 8))


@each_learner
def test_a_grid_of_other_size_is_refused(make: Make) -> None:
    for call in calls(make):
        with refused("35 positions do not fit a 5 x 5 grid of 25; pass the grid they come from"):
            call(torch.ones(2, 35, 8), grid=(5, 5))


@pytest.mark.parametrize("grid", NO_GRIDS, ids=repr)
@each_learner
def test_a_malformed_grid_is_refused(make: Make, grid: Any) -> None:
    for call in calls(make):
        with refused(f"grid is {grid!r}, expected (height, width)"):
            call(torch.ones(2, 35, 8), grid=grid)


@pytest.mark.parametrize(
    ("grid", "axis"), [((-5, -7), "h"), ((0, 35), "h"), ((5, 7.0), "w"), ((35, True), "w")], ids=str
)
@each_learner
def test_a_grid_is_made_of_positive_integers(make: Make, grid: Any, axis: str) -> None:
    value = grid["hw".index(axis)]
    for call in calls(make):
        with refused(f"the grid's {axis} is {value!r}, expected an integer of 1 or more"):
            call(torch.ones(2, 35, 8), grid=grid)


@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (2, 3, 5, 7, 8)], ids=str)
@each_learner
def test_a_grid_that_contradicts_the_input_is_refused(make: Make, shape: tuple[int, ...]) -> None:
    for call in calls(make):
        with refused("grid is (7, 5), but the input has a 5 x 7 grid; leave grid out"):
            call(torch.ones(shape), grid=(7, 5))


@pytest.mark.parametrize("grid", NO_GRIDS, ids=repr)
@each_learner
def test_a_malformed_grid_is_refused_beside_an_input_with_its_own(make: Make, grid: Any) -> None:
    for call in calls(make):
        with refused(f"grid is {grid!r}"):
            call(torch.ones(2, 5, 7, 8), grid=grid)


@pytest.mark.parametrize("grid", [(5, 7), [5, 7], torch.Size([5, 7])], ids=repr)
def test_a_grid_may_be_any_pair(grid: Any) -> None:
    assert check_grid(grid, 35) == (5, 7)


# --- inputs of the fuser -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "original"),
    [
        ((3, 4, 8), (2, 35, 8)),
        ((2, 5, 8), (2, 35, 8)),
        ((2, 4, 4, 8), (2, 3, 5, 7, 8)),
        ((4, 2, 8), (2, 35, 8)),
    ],
    ids=["batch", "count", "frames", "swapped"],
)
def test_tokens_that_do_not_fit_the_original_are_refused(
    tokens: tuple[int, ...], original: tuple[int, ...]
) -> None:
    frames = original[:2] if len(original) == 5 else original[:1]
    message = (
        f"the tokens are {list(tokens)}, expected {[*frames, 4, 8]} "
        f"for an original of {list(original)} and 4 tokens a frame"
    )
    with refused(message):
        TokenFuser(8, 4)(torch.ones(tokens), torch.ones(original))


@pytest.mark.parametrize(
    ("tokens", "original", "expected"),
    [
        ((2, 3, 4, 8), (2, 35, 8), "[b, k, c]"),
        ((2, 1, 4, 8), (2, 5, 7, 8), "[b, k, c]"),
        ((6, 4, 8), (2, 3, 5, 7, 8), "[b, t, k, c]"),
    ],
    ids=["clip_of_tokens_for_flat", "grid_of_tokens_for_grid", "folded_tokens_for_clip"],
)
def test_tokens_of_other_rank_are_refused(
    tokens: tuple[int, ...], original: tuple[int, ...], expected: str
) -> None:
    with refused(f" {len(tokens)} axes, {list(tokens)}; expected {expected}"):
        TokenFuser(8, 4)(torch.ones(tokens), torch.ones(original))


def test_a_fuser_refuses_other_channels_of_either_input() -> None:
    fuser = TokenFuser(8, 4)
    with refused("the original is [2, 35, 6] with 6 channels, expected 8"):
        fuser(torch.ones(2, 4, 8), torch.ones(2, 35, 6))
    with refused("[2, 4, 6] with 6 channels, expected 8"):
        fuser(torch.ones(2, 4, 6), torch.ones(2, 35, 8))


def test_a_fuser_refuses_other_dtypes_of_either_input() -> None:
    fuser, narrow, wide = TokenFuser(8, 4), torch.ones(2, 4, 8), torch.ones(2, 4, 8).double()
    with refused("the original is torch.float64, the module's parameters are torch.float32"):
        fuser(narrow, wide)
    with refused("torch.float64, the module's parameters are torch.float32"):
        fuser(wide, narrow)


def test_a_fuser_refuses_float64_beside_float32_under_autocast() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        refused("the original is torch.float64, the module's parameters are torch.float32"),
    ):
        TokenFuser(8, 4)(torch.ones(2, 4, 8), torch.ones(2, 35, 8).double())


# --- anything ----------------------------------------------------------------------------------

JUNK: list[Any] = [0, -1, 2.0, True, "4", None, (4,)]
some = settings(max_examples=120)


def mostly(good: st.SearchStrategy, junk: Any = JUNK) -> st.SearchStrategy:
    """The good strategy 19 times out of 20, else one of the junk values or that other strategy."""
    other = st.sampled_from(junk) if isinstance(junk, list) else junk
    return st.integers(0, 19).flatmap(lambda i: other if i == 0 else good)


usually = mostly(st.just(True), [False])
counts = mostly(st.integers(1, 6))
floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
dtypes = mostly(floats, [torch.int64, torch.bool, torch.complex64])
shapes = mostly(
    st.lists(st.integers(1, 6), min_size=3, max_size=5).map(tuple),
    st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple),
)
JUNK_GRIDS = [5, (5,), "55", (2.0, 2), (1, 2, 3), [2, 2], {2, 3}, (None, 2)]


options = st.fixed_dictionaries(
    {},
    optional={
        "norm_eps": mostly(st.sampled_from([1e-6, 1e-5]), [0, -1, math.nan, "1e-6", None]),
        "approximate": mostly(st.sampled_from(["none", "tanh"]), ["exact", 1, ["tanh"]]),
    },
)


def shaped(shape: tuple[int, ...], c: Any, fits: bool) -> tuple[int, ...]:
    """The shape, with the module's own channels in its last axis if it is to fit."""
    return (*shape[:-1], c) if fits and type(c) is int and c > 0 else shape


def grids_for(shape: tuple[int, ...]) -> st.SearchStrategy:
    """No grid, one that fits, another one, or what is no grid."""
    own = shape[-3:-1] if len(shape) > 3 else (1, *shape[-2:-1])
    pair = st.tuples(st.integers(0, 6), st.integers(0, 6))
    return st.one_of(st.none(), st.just(own), mostly(pair, JUNK_GRIDS), st.sampled_from(JUNK_GRIDS))


@some
@given(st.data())
def test_a_learner_works_as_documented_or_raises_value_error(data: st.DataObject) -> None:
    draw = data.draw
    c, k = draw(counts), draw(counts)
    x = torch.ones(shaped(draw(shapes), c, draw(usually)), dtype=draw(dtypes))
    arguments = draw(options)
    make = draw(st.sampled_from([TokenLearner, TokenLearnerModuleV11, TokenLearnerV11]))
    if make is TokenLearnerModuleV11:
        arguments["num_groups"] = draw(counts)
    if make is TokenLearnerV11:
        arguments["bottleneck_dim"] = draw(counts)
    if make is not TokenLearner:
        arguments["dropout_rate"] = draw(mostly(st.just(0.1), [1, -1, math.nan, "0.1", None]))
    dtype = x.dtype if x.is_floating_point() and draw(usually) else draw(floats)
    grid = draw(grids_for(x.shape))
    try:
        learner = make(c, k, **arguments).to(dtype)
        tokens, maps = learner(x, grid), learner.attention(x, grid)
    except ValueError:
        return
    frames = x.shape[: 2 if x.ndim == 5 else 1]
    assert (tokens.shape, tokens.dtype) == ((*frames, k, c), x.dtype)
    assert (maps.shape, maps.dtype) == ((*frames, k, *x.shape[len(frames) : -1]), x.dtype)


@some
@given(st.data())
def test_a_fuser_works_as_documented_or_raises_value_error(data: st.DataObject) -> None:
    draw = data.draw
    c, k = draw(counts), draw(counts)
    shape = shaped(draw(shapes), c, draw(usually))
    other = draw(shapes)
    if draw(usually) and type(k) is int and k > 0 and len(shape) > 2:
        other = (*shape[: 2 if len(shape) == 5 else 1], k, shape[-1])
    dtype = draw(dtypes)
    original = torch.ones(shape, dtype=dtype)
    tokens = torch.ones(other, dtype=dtype if draw(usually) else draw(dtypes))
    arguments = draw(options) | {
        "bottleneck_dim": draw(counts),
        "dropout_rate": draw(mostly(st.just(0.1), [1, -1, math.nan, "0.1", None])),
        "use_normalization": draw(st.booleans()),
        "zero_init": draw(mostly(st.sampled_from(["norm", "mix"]), ["gain", None, 1])),
    }
    module_dtype = dtype if dtype.is_floating_point and draw(usually) else draw(floats)
    try:
        result = TokenFuser(c, k, **arguments).to(module_dtype)(tokens, original)
    except ValueError:
        return
    assert (result.shape, result.dtype) == (original.shape, original.dtype)


sizes = st.integers(1, 6)


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
