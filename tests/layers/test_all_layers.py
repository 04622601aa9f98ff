"""Properties that all learners and fusers share: shapes, dtypes, copies, devices, compilers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from learners import DTYPES, FUSERS, LEARNERS, Make, inputs_for, randomized, uneven
from torch import Tensor, nn

from tokenlearner import TokenFuser

MODULES = LEARNERS | FUSERS
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.float() - exact).abs().max() / exact.abs().max())


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [randomized, lambda module: module], ids=["random", "initial"])
@each_module
def test_gradients_are_the_derivatives_of_the_output(make: Make, start: Callable) -> None:
    module = start(make(3, 2, norm_eps=1e-2).double())
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(*values: Tensor) -> Tensor:
        state = dict(zip(names, values[-len(names) :], strict=True))
        return torch.func.functional_call(module, state, values[: -len(names)])

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in inputs_for(module, x)]
    assert torch.autograd.gradcheck(call, (*inputs, *parameters), fast_mode=True)


# --- shapes ------------------------------------------------------------------------------------


@each_module
@torch.no_grad()
def test_frames_of_a_clip_are_taken_one_by_one(make: Make) -> None:
    module = randomized(make(9, 4).double())
    inputs = inputs_for(module, uneven(2, 3, 5, 7, 9))
    frames = [module(*(value[:, t] for value in inputs)) for t in range(3)]
    torch.testing.assert_close(module(*inputs), torch.stack(frames, 1))


@pytest.mark.parametrize("num_tokens", [1, 81, 100])
@each_module
def test_any_number_of_tokens_goes_with_81_positions(make: Make, num_tokens: int) -> None:
    module = randomized(make(9, num_tokens))
    result = module(*inputs_for(module, torch.randn(2, 9, 9, 9)))
    assert result.shape == ((2, 9, 9, 9) if isinstance(module, TokenFuser) else (2, num_tokens, 9))
    assert result.isfinite().all()


@each_module
def test_an_empty_batch_gives_an_empty_batch_and_has_a_backward_pass(make: Make) -> None:
    module = make(9, 4)
    result = module(*inputs_for(module, torch.ones(0, 5, 7, 9)))
    assert result.shape == ((0, 5, 7, 9) if isinstance(module, TokenFuser) else (0, 4, 9))
    result.sum().backward()
    assert all((p.grad == 0).all() for p in module.parameters())


@each_module
def test_shapes_are_known_on_the_meta_device(make: Make) -> None:
    module, x = make(9, 4).to("meta"), torch.empty(10_000, 512, 512, 9, device="meta")
    inputs = (torch.empty(10_000, 4, 9, device="meta"), x) if make in FUSERS.values() else (x,)
    assert module(*inputs).shape == (x.shape if len(inputs) == 2 else (10_000, 4, 9))


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float16, 4e-3),
        (torch.bfloat16, 3e-2),
        (torch.float32, 1e-6),
        (torch.float64, 1e-6),
    ],
    ids=str,
)
@each_module
@torch.no_grad()
def test_other_dtypes_are_kept_and_close_to_float32(
    make: Make, dtype: torch.dtype, tolerance: float
) -> None:
    module = make(24, 4) if make in LEARNERS.values() else randomized(make(24, 4))
    inputs = inputs_for(module, torch.randn(2, 14, 14, 24))
    exact = module(*inputs)
    result = module.to(dtype)(*(value.to(dtype) for value in inputs))
    assert result.dtype == dtype
    assert relative_error(result, exact) < tolerance


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@each_module
@torch.no_grad()
def test_autocast_gives_the_dtype_of_the_input(
    make: Make, dtype: torch.dtype, device: torch.device
) -> None:
    module = make(24, 4) if make in LEARNERS.values() else randomized(make(24, 4))
    inputs = [value.to(device) for value in inputs_for(module, torch.randn(2, 14, 14, 24))]
    exact = module.to(device)(*inputs)
    with torch.autocast(device.type, torch.bfloat16):
        result = module(*inputs[:-1], inputs[-1].to(dtype))
    assert result.dtype == dtype
    assert 0 < relative_error(result, exact) < 4e-2


# --- copies, devices, compilers ----------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None],
    ids=["deepcopy", "pickle", "state_dict"],
)
@each_module
@torch.no_grad()
def test_a_used_module_can_be_copied(make: Make, duplicate: Callable | None) -> None:
    module, other = randomized(make(9, 4)), randomized(make(9, 4))
    inputs = inputs_for(module, torch.randn(2, 5, 7, 9))
    expected = module(*inputs)
    if duplicate is None:
        other.load_state_dict(module.state_dict(), strict=True)
    else:
        other = duplicate(module)
    module.apply(lambda m: [nn.init.zeros_(p) for p in m.parameters()])
    assert torch.equal(other(*inputs), expected)  # the same operations on the same machine


@each_module
def test_output_and_gradients_on_the_chosen_device_are_those_on_the_cpu(
    make: Make, device: torch.device
) -> None:
    module = randomized(make(9, 4).double())
    inputs = inputs_for(module, uneven(2, 5, 7, 9))
    results = []
    for place in ("cpu", device):
        values = [value.detach().to(place).requires_grad_() for value in inputs]
        result = module.to(place)(*values)
        weights = torch.linspace(-1, 1, result.numel()).to(result).reshape(result.shape)
        gradients = torch.autograd.grad((result * weights).sum(), [*values, *module.parameters()])
        results.append([value.cpu() for value in (result, *gradients)])
    torch.testing.assert_close(results[1], results[0])


COMPILED = [("v1_mean", "eager"), ("linear", "eager")]
SLOWLY = [(name, "aot_eager") for name in MODULES if name not in ("gain_at_0", "exact_gelu")]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *COMPILED,
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [*SLOWLY, ("v11", "inductor")]),
    ],
)
def test_compiled_as_one_graph_for_several_grids(name: str, backend: str) -> None:
    torch.compiler.reset()
    module = MODULES[name](9, 4)
    module = randomized(module) if name in FUSERS else module
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for h, w in ((4, 4), (6, 6), (5, 7)):
        inputs = inputs_for(module, torch.randn(2, h, w, 9))
        torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
