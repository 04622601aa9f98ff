"""The engine by itself: devices, precision, what does not divide, random states, trackers."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tokenlearner import TrainConfig
from tokenlearner.training.distributed import Distributed, full_state, set_full_state
from tokenlearner.utils.random import random_states, set_random_states


def engine(**options: Any) -> Distributed:
    return Distributed(TrainConfig(**{"device": "cpu"} | options))


def test_alone_it_is_the_first_and_only_process() -> None:
    one = engine()
    assert (one.main, one.process, one.num_processes) == (True, 0, 1)
    assert one.device == torch.device("cpu")


def test_alone_sums_agreements_and_gatherings_are_ones_own() -> None:
    one, value = engine(), torch.tensor([1.0, 2.0])
    assert one.sum(value) is value
    assert [one.agree(True), one.agree(False)] == [True, False]
    assert one.gather({"a"}) == [{"a"}]


def test_half_precision_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(
        ValueError, match=r"is 'fp16', which needs a GPU, and .* is a CPU; pass bf16"
    ):
        engine(mixed_precision="fp16")


def test_onednn_is_refused_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenlearner.training.distributed.pick_device", torch.device)
    with pytest.raises(ValueError, match="onednn is for a CPU, and the device is meta; leave it"):
        engine(device="meta", onednn=True)


def test_a_run_after_one_of_another_precision_has_its_own() -> None:
    assert engine(mixed_precision="bf16").accelerator.mixed_precision == "bf16"
    assert engine().accelerator.mixed_precision == "no"


def test_a_run_after_one_on_a_cpu_looks_for_a_device_again() -> None:
    from accelerate.state import PartialState

    engine(device="cpu")
    assert PartialState()._cpu
    engine(device="auto")
    assert not PartialState()._cpu


def test_a_tracker_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Accelerate refuses the options: .*abacus"):
        engine(trackers=["abacus"])


def test_without_accelerate_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenlearner\[train\]'"):
        engine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "grad_accum_steps": 4}, "batch_size is 6, which 1 processes and 4 grad"),
        ({"batch_size": 5, "mixup": 0.2}, "and 5 images of a step .* a multiple of 2"),
        ({"batch_size": 9, "cutmix": 1.0, "grad_accum_steps": 3}, "and 9 im.* a multiple of 6"),
        ({"fsdp": True}, "fsdp shares a model out among processes, and there is one; start sev"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_or_paired_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine(**options)


def test_only_mixing_needs_pairs() -> None:
    assert engine(batch_size=5).num_processes == 1
    assert engine(batch_size=6, mixup=0.2, grad_accum_steps=2).num_processes == 1


def test_other_processes_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for process in (0, 1, 2):
        monkeypatch.setattr(Distributed, "process", process)
        torch.manual_seed(0)
        engine().part_ways()
        draws.append(torch.rand(()).item())
    torch.manual_seed(0)
    assert draws[0] == torch.rand(()).item()
    assert len(set(draws)) == 3


def test_random_states_are_plain_and_bring_back_the_same_draws(tmp_path: Path) -> None:
    def drawn() -> tuple[Any, ...]:
        return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()

    drawn()  # half of a pair of normal numbers is kept
    torch.save(random_states(), tmp_path / "states.pt")
    expected = drawn(), drawn()
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (drawn(), drawn()) == expected


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9)], ids=["AdamW", "SGD"]
)
def test_a_whole_state_is_a_copy_that_brings_back_weights_and_optimizer(kind: Any) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, others = kind(model.parameters()), kind(other.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    state = full_state(model, optimizer)
    step(model, optimizer)
    set_full_state(other, others, *state)
    assert not torch.equal(other.weight, model.weight)
    step(other, others)
    assert torch.equal(other.weight, model.weight)


def test_numbers_are_reported_to_a_tracker_in_the_runs_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = engine(trackers=["tensorboard"], out=str(tmp_path))
    with one.trackers():
        one.track({"step": 3, "loss": 0.5, "name": "not a number"})
    events = EventAccumulator(str(tmp_path / "tokenlearner")).Reload()
    (seen,) = events.Scalars("loss")
    assert (seen.step, seen.value) == (3, 0.5)
    assert events.Tags()["scalars"] == ["loss"]
