"""One process by itself: device, precision, what does not divide, seeds, states, trackers."""

from __future__ import annotations

import errno
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tokenlearner import TrainConfig
from tokenlearner.training.distributed import Distributed, full_state, set_full_state
from tokenlearner.utils.random import random_states, set_random_states


def alone(**options: Any) -> Distributed:
    return Distributed(TrainConfig(**{"device": "cpu"} | options))


def test_alone_it_is_the_only_process_and_decides_for_itself() -> None:
    process = alone()
    assert process.accelerator.is_main_process
    assert process.accelerator.num_processes == 1
    assert process.device == torch.device("cpu")
    assert [process.any_rank(True), process.any_rank(False)] == [True, False]


def test_a_run_has_its_own_precision_and_device_whatever_ran_before() -> None:
    from accelerate.state import PartialState

    assert alone(mixed_precision="bf16").accelerator.mixed_precision == "bf16"
    assert PartialState()._cpu
    assert alone(device="auto").accelerator.mixed_precision == "no"
    assert not PartialState()._cpu


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'"),
        ({"device": "meta", "onednn": True}, "onednn .* meta"),
        ({"trackers": ["abacus"]}, "abacus"),
        ({"batch_size": 6, "grad_accum_steps": 4}, "batch_size is 6, .*grad_accum_steps 4"),
        ({"batch_size": 5, "mixup": 0.2}, "mixup .* batch_size .* multiple of 2"),
        ({"batch_size": 9, "cutmix": 1.0, "grad_accum_steps": 3}, "cutmix .* multiple of 6"),
        ({"fsdp": True}, "fsdp .*torchrun"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_machine_are_refused(
    options: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlearner.training.distributed.pick_device", torch.device)
    with pytest.raises(ValueError, match=named):
        alone(**options)
    assert alone(batch_size=5)  # only mixing needs pairs
    assert alone(batch_size=6, mixup=0.2, grad_accum_steps=2)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"'\.\[train\]'"):
        alone()


def test_other_processes_draw_numbers_of_their_own() -> None:
    draws = []
    for rank in (0, 1, 2):
        process, accelerator = alone(), SimpleNamespace(process_index=rank)
        vars(process)["accelerator"] = accelerator
        torch.manual_seed(0)
        process.set_rank_seed()
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


def test_a_tracker_that_cannot_write_is_left_out_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    process = alone(trackers=["tensorboard"], out=str(tmp_path))
    with process.trackers():
        monkeypatch.setattr(process.accelerator.trackers[0], "log", full)
        for step in range(3):
            process.track({"step": step, "loss": 0.5})
    [record] = [record for record in caplog.records if record.name.startswith("tokenlearner")]
    assert "tensorboard cannot write ([Errno 28] No space left" in record.getMessage()


def test_numbers_are_reported_to_a_tracker_in_the_runs_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = alone(trackers=["tensorboard"], out=str(tmp_path))
    with process.trackers():
        process.track({"step": 3, "loss": 0.5, "name": "not a number"})
    events = EventAccumulator(str(tmp_path / "tokenlearner")).Reload()
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (3, 0.5)
    assert events.Tags()["scalars"] == ["loss"]
