"""`use_onednn`: the same numbers from oneDNN's product, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, enable_grad, nn, set_grad_enabled
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tokenlearner import (
    TokenLearnerV11,
    create_model,
    insert,
    load_model,
    remove,
    save_model,
    use_onednn,
)
from tokenlearner.deploy.quantization import quantize
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.onednn import OneDNNLinear

MINI = "vit_mini_patch4_28"


def products(run: Callable[[], object]) -> int:
    """How often oneDNN's product is called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(event.name == "mkldnn::_linear_pointwise" for event in seen.events())


def pair(bias: bool = True, i: int = 48, o: int = 80) -> tuple[nn.Linear, nn.Linear]:
    """torch's layer and oneDNN's, of the same weights."""
    plain = nn.Linear(i, o, bias=bias)
    return plain, use_onednn(copy.deepcopy(plain))


def gradients(layer: nn.Module, x: Tensor, of: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of input and parameters where they are wanted."""
    x = x.detach().requires_grad_(x.requires_grad)
    out = layer(x)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return out, list(torch.autograd.grad(out, wanted, of))


def labeled(image_model: nn.Module) -> nn.Module:
    """With a head that is not 0."""
    nn.init.normal_(image_model.get_submodule("head").weight)
    return image_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the same numbers ---------------------------------------------------------------------------


def check_gradients(plain: nn.Module, layer: nn.Module, x: Tensor, of: Tensor) -> None:
    """Both give the same output and the same gradients."""
    (expected, wanted), (out, found) = gradients(plain, x, of), gradients(layer, x, of)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(1,), (8,), (1, 8), (3, 17), (2, 3, 5), (300,)])
def test_outputs_and_gradients_are_torch_s(lead: tuple[int, ...], bias: bool) -> None:
    plain, layer = pair(bias)
    x, of = torch.randn(*lead, 48, requires_grad=True), torch.randn(*lead, 80)
    check_gradients(plain, layer, x, of)
    assert products(lambda: gradients(layer, x, of)) == 3  # forward, and two of the gradients


def test_tensors_that_are_not_contiguous_give_the_same() -> None:
    x = torch.randn(48, 7, 2).permute(2, 1, 0).requires_grad_()
    of = torch.randn(80, 1, 1).permute(1, 2, 0).expand(2, 7, 80)
    check_gradients(*pair(), x, of)


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
    plain: Any = labeled(insert(create_model(MINI), 8, at=3))
    fast = use_onednn(copy.deepcopy(plain))
    fast.set_grad_checkpointing(checkpointing)
    x, of = torch.randn(2, 1, 28, 28, requires_grad=True), torch.randn(2, 10)
    (expected, wanted), (out, found) = gradients(plain, x, of), gradients(fast, x, of)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5 * float(right.abs().max() + 1))


# --- where it is left to torch ------------------------------------------------------------------


def in_bfloat16() -> Tensor:
    return pair()[1].bfloat16()(torch.ones(2, 48, dtype=torch.bfloat16))


def under_autocast() -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return pair()[1](torch.ones(2, 48))


def switched_off() -> Tensor:
    torch.backends.mkldnn.enabled = False
    try:
        return pair()[1](torch.ones(2, 48))
    finally:
        torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize(
    ("run", "dtype", "shape"),
    [
        (in_bfloat16, torch.bfloat16, (2, 80)),
        (under_autocast, torch.bfloat16, (2, 80)),
        (switched_off, torch.float32, (2, 80)),
        (lambda: pair()[1].double()(torch.ones(2, 48).double()), torch.float64, (2, 80)),
        (lambda: pair()[1](torch.ones(48)), torch.float32, (80,)),
        (lambda: pair()[1](torch.ones(0, 5, 48)), torch.float32, (0, 5, 80)),
        (lambda: pair()[1].to("meta")(torch.ones(2, 48, device="meta")), torch.float32, (2, 80)),
    ],
)
def test_all_else_is_left_to_torch(
    run: Callable[[], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert products(run) == 0
    assert (run().dtype, run().shape) == (dtype, shape)


def test_an_input_of_the_wrong_width_is_torch_s_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        pair()[1](torch.ones(2, 47))


def test_exported_programs_have_torch_s_own_layer() -> None:
    exported = torch.export.export(pair()[1], (torch.ones(2, 48),))
    called = {str(node.target) for node in exported.graph.nodes}
    assert "aten.linear.default" in called
    assert not any("mkldnn" in name for name in called)


def test_a_compiled_model_is_one_graph_with_torch_s_own_layer() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    plain, layer = pair()
    x = torch.randn(2, 48)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    [code] = graphs
    assert "linear" in code
    assert "mkldnn" not in code


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_model_of_fewer_bits_can_still_be_made(precision: str) -> None:
    model = labeled(create_model(MINI, depth=2)).eval()
    x = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        expected = quantize(copy.deepcopy(model), precision)(x)
        torch.testing.assert_close(quantize(use_onednn(model), precision)(x), expected)


# --- the default path is torch's own --------------------------------------------------------------


@torch.no_grad()
def test_a_learner_runs_torch_s_own_operations_unless_asked_for_onednn() -> None:
    learner, x = TokenLearnerV11(48, 4), torch.randn(2, 9, 48)
    assert products(lambda: learner(x)) == 0
    exported = torch.export.export(learner, (x,)).module()
    assert torch.equal(exported(x), learner(x))  # the same operations on the same machine
    expected = learner(x)
    use_onednn(learner)
    assert products(lambda: learner(x)) == 2
    torch.testing.assert_close(learner(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_replaces_a_learner_s_layers_is_used() -> None:
    learner, x = TokenLearnerV11(48, 4), torch.randn(2, 9, 48)
    expected = learner(x)
    learner.attention_maps[0] = nn.Sequential(learner.attention_maps[0])  # as LoRA does
    torch.testing.assert_close(learner(x), expected)
    learner.attention_maps[1] = nn.ReLU()
    assert not torch.allclose(learner(x), expected)


def test_what_counts_operations_sees_those_of_torch() -> None:
    learner, x = TokenLearnerV11(48, 4, bottleneck_dim=16), torch.randn(1, 9, 48)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        learner(x)
    assert counter.get_total_flops() == 2 * 9 * (48 * 16 + 16 * 4 + 4 * 48)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
@torch.no_grad()
def test_a_trace_has_torch_s_own_layers() -> None:
    traced = torch.jit.trace(pair()[1].requires_grad_(False), torch.randn(9, 48))
    assert "mkldnn" not in str(traced.graph)


def with_dual_numbers(
    function: Callable[[Tensor], Tensor], values: tuple[Tensor], along: tuple[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `torch.func.jvp`, by `torch.autograd.forward_ad` alone."""
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(
            function(forward_ad.make_dual(values[0], along[0]))
        )
        assert tangent is not None
        return primal, tangent


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("of", ["input", "0.weight", "0.bias"])
@pytest.mark.parametrize("forward_mode", [jvp, with_dual_numbers])
def test_forward_mode_differentiation_is_left_to_torch(
    forward_mode: Callable[..., tuple[Tensor, Tensor]], of: str, with_gradients: bool
) -> None:
    learner, x = TokenLearnerV11(48, 4), torch.randn(2, 9, 48)
    state = dict(learner.named_parameters())
    name = f"attention_maps.{of}"
    value = x if of == "input" else state[name].detach()
    along = torch.randn_like(value)

    def run(model: nn.Module, value: Tensor) -> Tensor:
        if of == "input":
            return model(value)
        return functional_call(model, {**state, name: value}, (x,))

    with enable_grad():
        _, expected = jvp(lambda v: run(learner, v), (value,), (along,))
    assert expected.abs().max() > 1e-3
    for model in (learner, use_onednn(copy.deepcopy(learner))):
        with set_grad_enabled(with_gradients):
            _, found = forward_mode(lambda v, model=model: run(model, v), (value,), (along,))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("change", [lambda model: model, use_onednn])
def test_gradients_of_each_sample_are_those_of_a_loop(
    change: Callable[[nn.Module], nn.Module], with_gradients: bool
) -> None:
    learner, x = change(TokenLearnerV11(48, 4)), torch.randn(3, 9, 48)
    parameters = dict(learner.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(learner, parameters, (sample[None],)).square().sum()

    with set_grad_enabled(with_gradients):
        detached = {name: p.detach() for name, p in parameters.items()}
        found = vmap(grad(loss), (None, 0))(detached, x)
    wanted = [torch.autograd.grad(loss(parameters, one), [*parameters.values()]) for one in x]
    for of_each, *of_one in zip(found.values(), *wanted, strict=True):
        torch.testing.assert_close(of_each, torch.stack(of_one), rtol=1e-4, atol=1e-5)
    assert found["norm.weight"].abs().max() > 1e-3


# --- nothing else changes -----------------------------------------------------------------------


def test_every_linear_layer_takes_part_and_subclasses_do_not() -> None:
    vit = insert(create_model(MINI), 8)
    model = nn.ModuleDict({"vit": vit, "attention": nn.MultiheadAttention(8, 2)})
    types, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
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
    twin, x = again(layer), torch.randn(8, 48)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
        assert products(lambda: twin(x)) == products(lambda: layer(x)) == 1
        assert torch.equal(twin(x), layer(x))


def test_a_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model = use_onednn(labeled(insert(create_model(MINI), 8)))
    again = load_model(save_model(model, tmp_path / "m"))
    assert not any(isinstance(module, OneDNNLinear) for module in again.modules())
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_tokens_can_be_inserted_and_removed_all_the_same() -> None:
    model = use_onednn(create_model(MINI))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = remove(insert(model, 8)).state_dict()
    assert [*before] == [*after]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_multiply_adds_are_counted_the_same() -> None:
    model, image = insert(create_model(MINI), 8), torch.zeros(1, 1, 28, 28)
    expected = count_macs(model, image)
    assert count_macs(use_onednn(model), image) == expected > 0


# --- errors -------------------------------------------------------------------------------------


def test_what_is_no_module_is_refused() -> None:
    not_a_model: Any = MINI
    with pytest.raises(ValueError, match="model is a str"):
        use_onednn(not_a_model)


def test_a_torch_without_onednn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="without oneDNN"):
        use_onednn(model)
    assert type(use_onednn(model, on=False)) is nn.Linear
    assert count_macs(model, torch.ones(1, 2)) == 4
