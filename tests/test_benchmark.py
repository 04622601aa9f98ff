"""`benchmark`: multiply-adds, memory and the ratios of speeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tokenlearner import benchmark, create_model
from tokenlearner.benchmark import Spread, count_macs


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
def test_macs_count_attention_whether_it_is_fused_or_not(fused: bool) -> None:
    model = create_model("vit_mini_patch4_28", depth=1)
    model.blocks[0].attn.fused_attn = fused
    n, c = 49, 64
    block = 12 * n * c * c + 2 * n * n * c
    assert count_macs(model, torch.ones(1, 1, 28, 28)) == 16 * n * c + block + 10 * c


def test_a_model_that_does_more_is_found_slower_and_the_first_is_1() -> None:
    costs = benchmark({"one": Repeated(4), "ten": Repeated(40)}, torch.ones(512, 256), rounds=5)
    assert costs["one"].speedup == costs["one"].training_speedup == Spread(1, 1, 1)
    assert costs["ten"].speedup.high < 1
    assert costs["ten"].gmacs == pytest.approx(10 * costs["one"].gmacs)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    size = 512 * 256 * 4 / 2**20
    cost = benchmark({"four": Repeated(4)}, torch.ones(512, 256), rounds=2)["four"]
    assert cost.peak_memory_mib == pytest.approx(2 * size)  # a product's input and output
    assert cost.training_peak_memory_mib > 4 * size  # all of them wait for the backward pass


def test_mode_and_gradients_are_left_as_they_were() -> None:
    model = Repeated(1).eval()
    benchmark({"one": model}, torch.ones(4, 256), rounds=2)
    assert not model.training
    assert model.linear.weight.grad is None


def test_a_spread_is_the_median_between_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3, 2, 4)


def test_learned_tokens_cut_macs_and_training_memory() -> None:
    models = {str(k): create_model("vit_mini_patch4_28", num_tokens=k) for k in (0, 8)}
    plain, learned = benchmark(models, torch.ones(8, 1, 28, 28), rounds=2).values()
    assert learned.gmacs < 0.6 * plain.gmacs
    assert learned.training_peak_memory_mib < 0.7 * plain.training_peak_memory_mib


def test_too_few_rounds_and_nothing_to_measure_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 1, expected an integer of 2 or more"):
        benchmark({"one": Repeated(1)}, torch.ones(4, 256), rounds=1)
    with pytest.raises(ValueError, match="0 models and 4 pictures"):
        benchmark({}, torch.ones(4, 256))
