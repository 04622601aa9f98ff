"""`use_onednn`: the same numbers from oneDNN's product, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tokenlearner import create_model, insert, load_model, remove, save_model, use_onednn
from tokenlearner.deploy.quantization import quantize
from tokenlearner.layers.onednn import OneDNNLinear

MINI = "vit_mini_patch4_28"


def products(run: Callable[[], object]) -> int:
    """How often oneDNN's product is called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(event.name == "mkldnn::_linear_pointwise" for event in seen.events())


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """torch's layer and oneDNN's, of the same weights."""
    plain = nn.Linear(48, 80, bias=bias)
    return plain, use_onednn(copy.deepcopy(plain))


def gradients(layer: nn.Module, x: Tensor, of: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of input and parameters where they are wanted."""
    x = x.detach().requires_grad_(x.requires_grad)
    out = layer(x)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return out, list(torch.autograd.grad(out, wanted, of))


def with_a_head(model: nn.Module) -> nn.Module:
    nn.init.normal_(model.get_submodule("head").weight)  # which starts as 0
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(1,), (1, 8), (2, 3, 5), (300,), None], ids=str)
def test_outputs_and_gradients_are_torch_s(lead: tuple[int, ...] | None, bias: bool) -> None:
    plain, layer = pair(bias)
    if lead is None:  # not contiguous
        x = torch.randn(48, 7, 2).permute(2, 1, 0).requires_grad_()
        of = torch.randn(80, 1, 1).permute(1, 2, 0).expand(2, 7, 80)
    else:
        x, of = torch.randn(*lead, 48, requires_grad=True), torch.randn(*lead, 80)
    expected, found = gradients(plain, x, of), gradients(layer, x, of)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert products(lambda: gradients(layer, x, of)) == 3  # forward, and two of the gradients


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_needs_no_gradient_gets_none_and_costs_nothing(frozen: str) -> None:
    plain, layer = pair()
    x, of = torch.randn(4, 48, requires_grad=frozen != "input"), torch.randn(4, 80)
    for one in (plain, layer):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name != frozen)
    expected, found = gradients(plain, x, of)[1], gradients(layer, x, of)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert products(lambda: gradients(layer, x, of)) == (3 if frozen == "bias" else 2)


def test_gradients_of_gradients_are_torch_s() -> None:
    found = []
    for layer in pair():
        torch.manual_seed(1)
        x = torch.randn(4, 48, requires_grad=True)
        [slope] = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_inserted_tokens_gives_the_same(checkpointing: bool) -> None:
    plain: Any = with_a_head(insert(create_model(MINI), 8, at=3))
    fast = use_onednn(copy.deepcopy(plain))
    fast.set_grad_checkpointing(checkpointing)
    x, of = torch.randn(2, 1, 28, 28, requires_grad=True), torch.randn(2, 10)
    (expected, wanted), (out, found) = gradients(plain, x, of), gradients(fast, x, of)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5 * float(right.abs().max() + 1))


# --- where it is left to torch ------------------------------------------------------------------

X = torch.linspace(-1, 1, 9 * 48).reshape(9, 48)


def under_autocast(layer: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(X)


def switched_off(layer: nn.Module) -> Tensor:
    torch.backends.mkldnn.enabled = False
    try:
        return layer(X)
    finally:
        torch.backends.mkldnn.enabled = True


def counted(layer: nn.Module) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        layer(X)
    return torch.tensor(counter.get_total_flops())


def run_with(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    """The layer's output with another input or parameter."""
    if name == "input":
        return layer(value)
    return functional_call(layer, {**dict(layer.named_parameters()), name: value}, (X,))


def tangent(layer: nn.Module, name: str, transform: bool) -> Tensor:
    """How the output moves with the input or a parameter, by jvp or by dual numbers."""
    value = X if name == "input" else layer.get_parameter(name).detach()
    along = torch.ones_like(value)
    if transform:
        return jvp(partial(run_with, layer, name), (value,), (along,))[1]
    with forward_ad.dual_level():
        out = run_with(layer, name, forward_ad.make_dual(value, along))
        moved = forward_ad.unpack_dual(out).tangent
        assert moved is not None
        return moved


def gradients_of_each(layer: nn.Module) -> Tensor:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    detached = {name: p.detach() for name, p in layer.named_parameters()}
    return vmap(grad(loss), (None, 0))(detached, X)["weight"]


LEFT: dict[str, Callable[[nn.Module], Tensor]] = {
    "bfloat16": lambda layer: layer.bfloat16()(X.bfloat16()),
    "float64": lambda layer: layer.double()(X.double()),
    "autocast": under_autocast,
    "switched off": switched_off,
    "one row": lambda layer: layer(X[0]),
    "no rows": lambda layer: layer(X[:0]),
    "counted": counted,
    "traced": lambda layer: torch.jit.trace(layer.requires_grad_(False), X, check_trace=False)(X),
    "exported": lambda layer: torch.export.export(layer, (X,)).module()(X),
    "compiled": lambda layer: torch.compile(layer, fullgraph=True, backend="eager")(X),
    "each sample": gradients_of_each,
    **{
        f"{'jvp' if transform else 'dual numbers'} of {name}": partial(
            tangent, name=name, transform=transform
        )
        for name in ("input", "weight", "bias")
        for transform in (True, False)
    },
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("run", LEFT.values(), ids=LEFT)
def test_all_else_is_left_to_torch(
    run: Callable[[nn.Module], Tensor], with_gradients: bool
) -> None:
    found: list[Tensor] = []
    plain, layer = pair()
    with torch.set_grad_enabled(with_gradients):
        assert products(lambda: found.append(run(layer))) == 0
        torch.testing.assert_close(found[0], run(plain))


def test_on_the_meta_device_it_is_left_to_torch_and_a_wrong_width_is_torch_s_error() -> None:
    assert pair()[1].to("meta")(X.to("meta")).shape == (9, 80)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        pair()[1](X[:, 1:])


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_model_of_fewer_bits_can_still_be_made(precision: str) -> None:
    model = with_a_head(create_model(MINI, depth=2)).eval()
    x = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        expected = quantize(copy.deepcopy(model), precision)(x)
        torch.testing.assert_close(quantize(use_onednn(model), precision)(x), expected)


# --- nothing else changes -----------------------------------------------------------------------


def test_every_linear_layer_takes_part_and_subclasses_do_not() -> None:
    vit = insert(create_model(MINI), 8)
    model = nn.ModuleDict({"vit": vit, "attention": nn.MultiheadAttention(8, 2)})
    types, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
    assert OneDNNLinear not in types
    assert use_onednn(model) is model
    linear = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear.pop("attention.out_proj") is NonDynamicallyQuantizableLinear
    assert set(linear.values()) == {OneDNNLinear}
    assert any("learner" in name for name in linear)
    once, after = [type(m) for m in model.modules()], dict(model.named_parameters())
    assert [*parameters] == [*after]
    assert all(parameters[name] is after[name] for name in parameters)
    assert [type(m) for m in use_onednn(model).modules()] == once != types
    assert [type(m) for m in use_onednn(model, on=False).modules()] == types


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_and_its_copies_take_part_without_gradients_too(
    again: Callable[[nn.Module], nn.Module],
) -> None:
    plain, layer = pair()
    twin = again(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(X), plain(X), rtol=1e-5, atol=1e-5)
        assert products(lambda: twin(X)) == products(lambda: layer(X)) == 1
        assert torch.equal(twin(X), layer(X))


def test_adapters_of_peft_around_its_layers_give_the_same_and_learn() -> None:
    plain = with_a_head(insert(create_model(MINI), 8, at=3))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    expected = get_peft_model(copy.deepcopy(plain), config)
    torch.manual_seed(1)
    adapted = get_peft_model(use_onednn(plain), config)
    x, of = torch.randn(2, 1, 28, 28), torch.randn(2, 10)
    (out, wanted), (fast, found) = gradients(expected, x, of), gradients(adapted, x, of)
    torch.testing.assert_close(fast, out, rtol=1e-5, atol=1e-5)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5 * float(right.abs().max() + 1))
    assert products(lambda: adapted(x)) > 0


def test_a_saved_model_is_the_plain_one_and_tokens_can_be_removed(tmp_path: Path) -> None:
    model = use_onednn(create_model(MINI))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = load_model(save_model(insert(model, 8), tmp_path / "m"))
    assert not any(isinstance(module, OneDNNLinear) for module in again.modules())
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    after = remove(model).state_dict()
    assert [*before] == [*after]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_no_module_or_a_torch_without_onednn_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    not_a_model: Any = MINI
    with pytest.raises(ValueError, match="model is a str"):
        use_onednn(not_a_model)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="without oneDNN"):
        use_onednn(model)
    assert type(use_onednn(model, on=False)) is nn.Linear
