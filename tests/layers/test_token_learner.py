"""The TokenLearners: equal numbers first, then what the maps promise, then how they are used."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from learners import LEARNERS, Golden, Make, check_golden, half_dtypes, randomized, uneven
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from tokenlearner.layers.functional import chunks

SOFTMAX = {name: make for name, make in LEARNERS.items() if name.startswith("v11")}

each_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
each_softmax_learner = pytest.mark.parametrize("make", SOFTMAX.values(), ids=SOFTMAX)


# --- equal to the small port (to scenic: tests/checkpoints/test_scenic.py) ---------------------

SEED = {
    "seed_token_learner_mean": partial(TokenLearner, 24, 8),
    "seed_token_learner_sum": partial(TokenLearner, 24, 5, use_sum_pooling=True),
    "seed_module_v11": partial(TokenLearnerModuleV11, 24, 8, 4),
}


@pytest.mark.parametrize("file", SEED)
def test_numbers_of_the_small_port_that_many_started_from_stay(file: str, golden: Golden) -> None:
    arrays, prefix, learner = golden(file), "state_dict/", SEED[file]()
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    learner.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    check_golden(learner, arrays, rtol=1e-6)
    for name, parameter in learner.named_parameters():
        np.testing.assert_allclose(parameter.grad, arrays[f"grad/{name}"], rtol=1e-5, atol=1e-5)


# --- equal to the equations --------------------------------------------------------------------

EQUATIONS = {
    "v1_sum": partial(reference.v1, use_sum_pooling=True, norm_eps=1e-6, approximate="tanh"),
    "v1_mean": partial(reference.v1, use_sum_pooling=False, norm_eps=1e-5, approximate="none"),
    "v11_grouped": partial(reference.v11_grouped, norm_eps=1e-5, approximate=None),
    "v11_grouped_gelu": partial(reference.v11_grouped, norm_eps=1e-5, approximate="tanh"),
    "v11": partial(reference.v11, norm_eps=1e-6, approximate="tanh"),
    "v11_exact": partial(reference.v11, norm_eps=1e-3, approximate="none"),
}
V11_EXACT = partial(TokenLearnerV11, bottleneck_dim=10, approximate="none", norm_eps=1e-3)


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 1, 1, 3), (3, 5, 2, 15)])
@pytest.mark.parametrize("name", EQUATIONS)
@torch.no_grad()
def test_tokens_and_maps_follow_the_equations(name: str, shape: tuple[int, ...]) -> None:
    learner = randomized((LEARNERS | {"v11_exact": V11_EXACT})[name](shape[-1], 5).double())
    x = uneven(*shape)
    params = {key: value.numpy() for key, value in learner.state_dict().items()}
    tokens, maps = EQUATIONS[name](x.numpy(), params)
    np.testing.assert_allclose(learner(x), tokens, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(learner.attention(x).flatten(2), maps, rtol=1e-10, atol=1e-12)


# --- what the maps promise ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)],
    ids=str,
)
@each_softmax_learner
@torch.no_grad()
def test_every_map_of_v11_sums_to_1(make: Make, dtype: torch.dtype, tolerance: float) -> None:
    maps = randomized(make(9, 4)).to(dtype).attention(torch.randn(2, 7, 5, 9).to(dtype))
    sums = maps.double().sum((-2, -1))
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=tolerance)


# --- shapes ------------------------------------------------------------------------------------


@each_learner
@torch.no_grad()
def test_maps_have_the_arrangement_of_the_input(make: Make) -> None:
    learner = randomized(make(9, 4).double())
    x = uneven(2, 3, 6, 6, 9)
    maps = torch.stack([learner.attention(x[:, t]) for t in range(3)], 1)
    assert maps.shape == (2, 3, 4, 6, 6)
    torch.testing.assert_close(learner.attention(x), maps)
    flat = learner.attention(x[:, 0].flatten(1, 2))
    torch.testing.assert_close(flat, maps[:, 0].flatten(2))


@each_learner
@torch.no_grad()
def test_flat_positions_with_their_grid_give_the_tokens_of_the_grid(make: Make) -> None:
    learner = randomized(make(9, 4).double())
    x, square = uneven(2, 5, 7, 9), uneven(2, 6, 6, 9)
    assert torch.equal(learner(x.flatten(1, 2), grid=(5, 7)), learner(x))
    assert torch.equal(learner(square.flatten(1, 2)), learner(square))


@each_learner
@torch.no_grad()
def test_the_first_tokens_are_those_of_all_tokens(make: Make) -> None:
    learner, x = randomized(make(9, 4)), torch.randn(2, 3, 5, 7, 9)
    tokens, maps = learner(x), learner.attention(x)
    learner.active_tokens = 3
    torch.testing.assert_close(copy.deepcopy(learner)(x), tokens[:, :, :3])
    torch.testing.assert_close(learner.attention(x), maps[:, :, :3])
    assert learner(x[:0]).shape == (0, 3, 3, 9)


@pytest.mark.parametrize(("channels", "with_gradients"), [(256, False), (1024, True)])
def test_v1_of_wide_inputs_gives_what_its_convolutions_give(
    channels: int, with_gradients: bool
) -> None:
    learner = TokenLearner(channels, 3)
    x = torch.randn(2, 4, 6, channels, requires_grad=with_gradients)
    with torch.set_grad_enabled(with_gradients):
        tokens = learner(x)
        logits = learner.attention_maps(learner.norm(x).movedim(-1, 1))
        expected = torch.einsum("bkhw,bhwc->bkc", logits.sigmoid(), x) / 24
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    if with_gradients:
        inputs = [x, *learner.parameters()]
        for found, right in zip(
            *(torch.autograd.grad(y.square().mean(), inputs) for y in (tokens, expected)),
            strict=True,
        ):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@each_learner
def test_many_frames_give_what_they_give_one_by_one(make: Make) -> None:
    learner = make(24, 4).double().eval()
    x = torch.randn(3, 128, 128, 24, dtype=torch.float64, requires_grad=True)  # 3 MiB a frame
    assert len(chunks(x.flatten(1, 2))) > 1
    tokens, expected = learner(x), torch.cat([learner(frame) for frame in x.split(1)])
    torch.testing.assert_close(tokens, expected)
    with torch.inference_mode():
        torch.testing.assert_close(learner(x), expected)
    inputs = [x, *learner.parameters()]
    for found, right in zip(
        *(torch.autograd.grad(y.square().sum(), inputs) for y in (tokens, expected)), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_v1_of_wide_inputs_takes_no_frames(with_gradients: bool) -> None:
    with torch.set_grad_enabled(with_gradients):
        assert TokenLearner(1024, 3)(torch.ones(0, 4, 4, 1024)).shape == (0, 3, 1024)


@each_learner
@torch.no_grad()
def test_a_view_with_other_strides_gives_the_same_tokens(make: Make) -> None:
    learner = randomized(make(9, 4).double())
    x = uneven(2, 5, 7, 9).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    torch.testing.assert_close(learner(x), learner(x.contiguous()))


# --- dtypes ------------------------------------------------------------------------------------


@half_dtypes
@pytest.mark.parametrize(
    ("learner", "value"),
    [
        # every gate is 1/2, and a sum in bfloat16 stops at 128, in float16 at 1024
        (partial(TokenLearner, use_sum_pooling=True), 4096),
        (TokenLearner, 0.5),
        (TokenLearnerV11, 1),
    ],
    ids=["sum", "mean", "softmax"],
)
@torch.no_grad()
def test_thousands_of_positions_are_pooled_exactly(
    learner: Make, value: float, dtype: torch.dtype
) -> None:
    module = learner(9, 4).to(dtype)
    for parameter in module.attention_maps.parameters():
        parameter.zero_()
    assert (module(torch.ones(2, 64, 128, 9, dtype=dtype)) == value).all()


# --- dropout -----------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout_of_v11_sets_logits_to_0_before_the_softmax() -> None:
    learner = TokenLearnerV11(9, 4, dropout_rate=0.5).train()
    _, _, _, logits, _ = learner.attention_maps
    logits.weight.zero_()
    logits.bias.fill_(1)  # logits of 0 or 2, whatever the hidden layer does
    maps = learner.attention(torch.randn(1, 100, 9))[0]
    low, high = maps.amin(1), maps.amax(1)
    torch.testing.assert_close(high / low, torch.full((4,), math.exp(2)))
    assert all(len(row.unique()) == 2 for row in maps)


@torch.no_grad()
def test_dropout_of_v11_acts_on_the_hidden_layer_too() -> None:
    learner = TokenLearnerV11(9, 1, dropout_rate=0.5).train()
    hidden, _, _, logits, _ = learner.attention_maps
    hidden.weight.zero_()
    hidden.bias.fill_(1)
    logits.weight.fill_(0.1)  # equal positions, so dropout alone can tell them apart
    assert len(learner.attention(torch.randn(1, 100, 9)).unique()) > 5


@torch.no_grad()
def test_dropout_of_the_grouped_learner_acts_on_the_tokens_and_leaves_the_maps_alone() -> None:
    learner = randomized(TokenLearnerModuleV11(24, 50, 3, dropout_rate=0.25))
    x = torch.randn(2, 5, 7, 24)
    kept, maps = learner.eval()(x), learner.attention(x)
    tokens = learner.train()(x)
    dropped = tokens == 0
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(tokens[~dropped], kept[~dropped] / 0.75)
    assert torch.equal(learner.attention(x), maps)


@pytest.mark.parametrize("name", SOFTMAX)
@torch.no_grad()
def test_there_is_no_dropout_in_eval_mode(name: str) -> None:
    dropping, plain = LEARNERS[name](9, 4, dropout_rate=0.5).eval(), LEARNERS[name](9, 4)
    plain.load_state_dict(dropping.state_dict())
    x = torch.randn(2, 5, 7, 9)
    assert torch.equal(dropping(x), plain(x))


# --- parameters --------------------------------------------------------------------------------


def conv(i: int, o: int, size: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, groups=groups, bias=False)


def test_v1_and_the_grouped_learner_start_from_torchs_own_convolutions() -> None:
    norm = {"norm.weight": torch.ones(9), "norm.bias": torch.zeros(9)}
    torch.manual_seed(0)
    learners = TokenLearner(9, 4), TokenLearnerModuleV11(9, 4, 3)
    torch.manual_seed(0)
    convs = {layer: conv(9 if layer == 0 else 4, 4, 3) for layer in (0, 2, 4, 6)}
    v1 = {f"attention_maps.{i}.weight": layer.weight for i, layer in convs.items()}
    grouped = {
        "attention_maps.0.weight": conv(9, 9, 1, groups=3).weight,
        "attention_maps.1.weight": conv(9, 4, 1).weight,
        "feat_conv.weight": conv(9, 9, 1, groups=3).weight,
    }
    for learner, expected in zip(learners, (v1, grouped), strict=True):
        state = dict(learner.state_dict())
        torch.testing.assert_close(state, norm | expected, rtol=0, atol=0)


def test_v11_starts_xavier_uniform_with_biases_that_are_tiny_but_not_0() -> None:
    learner = TokenLearnerV11(96, 64, 64)
    for layer in (0, 3):
        weight = learner.attention_maps[layer].weight.detach()
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        bias = learner.attention_maps[layer].bias.detach()
        assert bias.std().item() == pytest.approx(1e-6, rel=0.5)


PARAMETERS = {
    (768, 8): {"v1": 58_560, "v11": 51_272, "dec_2021": 155_136, "jan_2022": 204_288},
    (768, 16): {"v1": 119_040, "v11": 51_792, "dec_2021": 161_280, "jan_2022": 210_432},
    (1024, 16): {"v1": 156_416, "v11": 68_688, "dec_2021": 280_576, "jan_2022": 280_576},
    (512, 8): {"v1": 39_616, "v11": 34_376, "dec_2021": 70_656, "jan_2022": 136_192},
}


@pytest.mark.parametrize(("size", "counts"), PARAMETERS.items(), ids=str)
def test_parameters_are_as_many_as_in_the_official_modules(
    size: tuple[int, int], counts: dict[str, int]
) -> None:
    learners = {
        "v1": TokenLearner(*size),
        "v11": TokenLearnerV11(*size),
        "dec_2021": TokenLearnerModuleV11(*size, num_groups=8),
        "jan_2022": TokenLearnerModuleV11(*size, num_groups=size[0] // 128, approximate="tanh"),
    }
    found = {k: sum(p.numel() for p in m.parameters()) for k, m in learners.items()}
    assert found == counts


# --- machines ----------------------------------------------------------------------------------


PEAK_MEMORY = """
import gc, re, sys, torch
from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

torch.set_num_threads(2)
learner = {learner}
x = torch.randn(256, 32, 32, 128)
learner(x[:1]).sum().backward()
gc.collect()
before = kib("VmRSS")
with torch.set_grad_enabled({backward}):
    out = learner(x)
    if {backward}:
        out.sum().backward()
assert out.shape == (256, 8, 128)
print((kib("VmHWM") - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("backward", "limit_gib"), [(False, 0.25), (True, 0.5)])
@pytest.mark.parametrize(
    "learner",
    [
        "TokenLearner(in_channels=128, num_tokens=8, use_sum_pooling=False)",
        "TokenLearnerModuleV11(in_channels=128, num_tokens=8, num_groups=4)",
        "TokenLearnerV11(in_channels=128, num_tokens=8)",
    ],
)
def test_256_frames_of_32_x_32_need_little_memory(
    learner: str, backward: bool, limit_gib: float
) -> None:
    code = PEAK_MEMORY.format(learner=learner, backward=backward)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak_gib = float(result.stdout)
    print(f"{learner} backward={backward}: {peak_gib:.2f} GiB beyond the input")
    assert peak_gib < limit_gib


# --- what an eager call starts, which bounds its time on a GPU ---------------------------------


class Dispatched(TorchDispatchMode):
    """Collects the operators that compute or copy something."""

    VIEWS = frozenset(("view", "_unsafe_view", "t", "transpose", "alias", "split"))

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names += [name] * (name not in self.VIEWS)
        return func(*args, **(kwargs or {}))


def test_the_mlp_learner_starts_as_few_operators_as_its_definition_has() -> None:
    learner, x = TokenLearnerV11(32, 4).eval(), torch.randn(2, 16, 32)
    with torch.no_grad(), Dispatched() as dispatched:
        learner(x)
    mlp = ["addmm", "gelu", "addmm"]
    assert dispatched.names == ["native_layer_norm", *mlp, "_softmax", "bmm"]
    learner, x = learner.bfloat16(), x.bfloat16()
    with torch.no_grad(), Dispatched() as dispatched:
        learner(x)
    there_and_back = ["_to_copy", "_softmax", "_to_copy"]  # on a GPU the first is in the softmax
    assert dispatched.names == ["native_layer_norm", *mlp, *there_and_back, "bmm"]
