"""The machine that a measurement was made on."""

from __future__ import annotations

import pytest
import torch

from tokenlearner.evaluation import hardware
from tokenlearner.evaluation.latency import Seconds

CPU = torch.device("cpu")


def test_the_machine_is_described() -> None:
    machine = hardware.describe_machine(CPU)
    assert (machine["device"], machine["torch"]) == ("cpu", torch.__version__)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"]
    assert machine["accelerator"] is None


def test_reading_speed_is_bytes_in_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"sum": Seconds([9.0, 0.5, 0.25])}
    monkeypatch.setattr(hardware, "time_interleaved", lambda runs, rounds: seconds)
    monkeypatch.setattr(hardware, "_READ_BYTES", 4000)
    assert hardware.read_gigabytes_per_second(CPU) == 4000 / 1e9 / 0.5
