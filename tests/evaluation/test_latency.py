"""`benchmark`: multiply-adds, memory, the ratios of speeds, and the timing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenlearner import benchmark, create_model
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Timing, time_interleaved, time_models


class Repeated(nn.Module):
    """The same product over and over: its cost is known."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times
        self.linear = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.linear(x)
        return x


def test_macs_of_a_product_are_its_three_sizes() -> None:
    assert count_macs(Repeated(3), torch.ones(2, 256)) == 3 * 2 * 256 * 256


@pytest.mark.parametrize("fused", [True, False])
def test_macs_count_attention_whether_it_is_fused_or_not(fused: bool, device: torch.device) -> None:
    model = create_model("vit_mini_patch4_28", depth=1).to(device)
    model.blocks[0].attn.fused_attn = fused
    n, c = 49, 64
    block = 12 * n * c * c + 2 * n * n * c
    images = torch.ones(1, 1, 28, 28, device=device)
    assert count_macs(model, images) == 16 * n * c + block + 10 * c


def test_a_model_that_does_more_is_slower_and_the_first_is_1() -> None:
    costs = benchmark({"one": Repeated(4), "ten": Repeated(40)}, torch.ones(64, 256), rounds=5)
    assert costs["one"].speedup == costs["one"].training_speedup == Timing(1, 1, 1)
    assert costs["ten"].speedup.high < 1
    assert costs["ten"].gmacs == pytest.approx(10 * costs["one"].gmacs)


def test_peak_memory_counts_what_is_alive_at_once(device: torch.device) -> None:
    size, x = 512 * 256 * 4 / 2**20, torch.ones(512, 256, device=device)
    cost = benchmark({"four": Repeated(4).to(device)}, x, rounds=2)["four"]
    assert cost.peak_memory_mib == pytest.approx(2 * size)  # a product's input and output
    assert cost.training_peak_memory_mib > 4 * size  # all of them wait for the backward pass


def test_a_timing_is_the_median_between_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3, 2, 4)


def test_too_few_rounds_and_nothing_to_measure_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 1"):
        benchmark({"one": Repeated(1)}, torch.ones(4, 256), rounds=1)
    with pytest.raises(ValueError, match="0 models and 4 images"):
        benchmark({}, torch.ones(4, 256))


# --- timing --------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Notes how it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.calls.append((len(x), self.training, out.requires_grad))
        return out


@pytest.mark.parametrize("training", [False, True])
def test_models_run_in_the_mode_that_is_measured_and_get_their_own_back(training: bool) -> None:
    model = Recorder().train(not training)
    seconds = time_models({"one": model}, torch.ones(3, 4), 2, training=training)
    assert model.calls == [(3, training, training)] * 4  # two warm up
    assert len(seconds["one"]) == 2
    assert model.training is not training


def test_a_training_step_goes_backward_and_leaves_no_gradients() -> None:
    model, calls = Recorder(), []
    model.linear.weight.register_hook(calls.append)
    time_models({"one": model}, torch.ones(3, 4), 2, training=True)
    assert len(calls) == 4
    assert model.linear.weight.grad is None


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of `torch.compile`; the graphs run as they are, which takes no time."""
    calls: list[dict[str, Any]] = []
    compile_it = torch.compile

    def compiles(run: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return compile_it(run, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", compiles)
    return calls


@pytest.mark.slow
def test_more_models_are_compiled_than_torch_compiles_of_one_function(
    compilations: list[dict[str, Any]],
) -> None:
    models = {str(n): nn.Sequential(*(nn.Linear(4, 4) for _ in range(n))) for n in range(1, 12)}
    seconds = time_models(models, torch.ones(2, 4), 2, compiled=True)
    assert [*seconds] == [*models]
    assert compilations == [{"fullgraph": True, "dynamic": False, "mode": "default"}] * 11


def test_a_model_is_compiled_once_before_anything_is_counted() -> None:
    made: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        made.append(len(example))
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        compile_it = torch.compile
        patch.setattr(torch, "compile", lambda run, **kwargs: compile_it(run, backend=backend))
        time_models({"one": nn.Linear(4, 4)}, torch.ones(2, 4), 3, compiled=True)
    assert len(made) == 1


def test_models_are_compiled_only_on_demand(compilations: list[dict[str, Any]]) -> None:
    time_models({"one": Recorder()}, torch.ones(3, 4), 2)
    assert not compilations


class Accelerator:
    """One that notes when it is waited for."""

    def __init__(self, there: bool, done: list[str]):
        self.there, self.done = there, done

    def is_available(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.done.append("wait")


@pytest.mark.parametrize("there", [True, False])
def test_an_accelerator_is_waited_for_before_and_after_each_run(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch, "accelerator", Accelerator(there, done))
    time_interleaved({"a": lambda: done.append("run")}, rounds=1)
    assert done == (["wait", "run", "wait"] if there else ["run"]) * 3


def test_multiply_adds_are_the_same_in_every_thread() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model, x = Attention(), torch.ones(2, 4, 9, 8)
    with ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: count_macs(model, x), range(40))}
    assert found == {2 * 2 * 4 * 9 * 9 * 8}


def test_little_time_leaves_three_rounds_and_one_to_warm_up() -> None:
    calls: list[str] = []
    runs = {name: partial(calls.append, name) for name in "ab"}
    assert {len(s) for s in time_interleaved(runs, rounds=9, seconds=1e-9).values()} == {3}
    assert "".join(calls) == "baabbaab"
    assert {len(s) for s in time_interleaved(runs, rounds=9, seconds=60).values()} == {9}
    assert {len(s) for s in time_interleaved(runs, rounds=2, seconds=1e-9).values()} == {2}
