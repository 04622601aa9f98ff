"""Several processes make the same steps as one, and leave the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from running import BEIT, DISTILLED, INSERTED, RUNS, STOPS, quarter_images, recipe, save_host, until

from tokenlearner import TrainConfig, evaluate, load_model, train
from tokenlearner.utils.io import lock_folder

# Its gradient is 0 in exact arithmetic (a softmax over positions ignores what all have in common),
# so AdamW, which divides by the gradient's size, makes steps of any size from rounding.
WITHOUT_GRADIENT = "learner.attention_maps.3.bias"

pytestmark = pytest.mark.slow  # processes take most of the time to start


@pytest.fixture(scope="module", autouse=True)
def small_data() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("tokenlearner.training.run"), "load_data", quarter_images)
        yield


def start(launcher: Sequence[str], job: str, folder: Path, message: str = "") -> None:
    """Runs a job in two processes, which fails with a message, if one is given."""
    command = [sys.executable, "-m", *launcher, running.__file__, job, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (not message), done.stderr[-3000:]
    assert message in done.stderr


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    save_host(folder / "host")
    save_host(folder / "beit_host", BEIT)
    start(TORCHRUN, "all", folder)
    return folder


def alone(out: Path, options: dict[str, Any]) -> torch.nn.Module:
    """The same recipe in one process."""
    return train(recipe(out, **options | {"fsdp": False})).model


def report_of(folder: Path, process: int) -> dict[str, Any]:
    return json.loads((folder.parent / f"process-{process}.json").read_text())


def assert_close(model: torch.nn.Module, other: torch.nn.Module, but: str = "none") -> None:
    for name, value in model.state_dict().items():
        if but not in name:
            expected = other.state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_to_the_weights_of_one(name: str, folder: Path, tmp_path: Path) -> None:
    expected, model = alone(tmp_path / "one", RUNS[name]), load_model(folder / name)
    assert_close(model, expected, WITHOUT_GRADIENT if "adamw" in name else "none")
    images, _ = next(quarter_images("x", "test").batches(33))
    torch.testing.assert_close(model(images), expected(images), rtol=0, atol=1e-5)


def test_features_are_distilled_in_two_processes_to_the_weights_of_one(
    folder: Path, tmp_path: Path
) -> None:
    expected = alone(tmp_path / "one", {**DISTILLED, "model": str(folder / "host")})
    assert_close(load_model(folder / "distilled"), expected, WITHOUT_GRADIENT)
    host, student = load_model(folder / "host"), load_model(folder / "distilled")
    first, second = (
        json.loads(line)["train_loss"]
        for line in (folder / "distilled" / "metrics.jsonl").read_text().splitlines()
    )
    assert second < first
    assert torch.equal(student.head.weight, host.head.weight)  # features do not reach it
    assert not torch.equal(student.pos_embed, host.pos_embed)


def test_beit_with_tokens_trains_in_two_processes_to_the_weights_of_one(
    folder: Path, tmp_path: Path
) -> None:
    expected = alone(tmp_path / "one", {**INSERTED, "model": str(folder / "beit_host")})
    assert_close(load_model(folder / "beit"), expected, WITHOUT_GRADIENT)


def test_metrics_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    alone(tmp_path / "one", RUNS["ddp-sgd"])
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder / "ddp-sgd", tmp_path / "one")
    ]
    for row, expected in zip(*rows, strict=True):
        for key in ("epoch", "step", "test_images", "test_top1_percent"):
            assert row[key] == expected[key]
        for key in ("train_loss", "test_loss"):
            assert row[key] == pytest.approx(expected[key], abs=1e-5)


def test_every_image_is_evaluated_once_though_they_are_odd(folder: Path) -> None:
    data = quarter_images("x", "test")
    result = vars(evaluate(running.fixed_model(), data))
    assert len(data) % 2
    assert not result.pop("broken_files")
    for process in range(2):
        evaluation = report_of(folder, process)["evaluation"]
        assert {name: evaluation[name] for name in result} == pytest.approx(result)
        assert report_of(folder, process)["processes"] == 2


def test_one_process_writes(folder: Path) -> None:
    assert report_of(folder, 0)["opened"]
    assert report_of(folder, 1)["opened"] == []


def test_two_processes_end_where_another_trains_in_the_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "stopped"):
        start(TORCHRUN, "go_on", tmp_path, f"stopped is in use by process {os.getpid()}")


def test_a_checkpoint_is_the_same_kind_of_file_however_weights_are_shared_out(
    folder: Path,
) -> None:
    def form(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: form(item) for key, item in value.items()}
        if isinstance(value, list):
            return [form(item) for item in value]
        return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else type(value)

    ddp, fsdp = (
        form(torch.load(folder / f"{kind}-adamw" / "checkpoint.pt", weights_only=True))
        for kind in ("ddp", "fsdp")
    )
    for part in ("model", "optimizer"):
        assert ddp[part] == fsdp[part]
    assert ddp.keys() == fsdp.keys()


def test_a_signal_to_one_process_stops_both(folder: Path) -> None:
    for process in range(2):
        assert "holds a checkpoint of step 6" in report_of(folder, process)["message"]


def test_what_two_processes_began_one_can_end(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "checkpoint.pt").write_bytes((folder / "stopped" / "checkpoint.pt").read_bytes())
    expected = alone(tmp_path / "one", {**STOPS, "resume": None})
    began: TrainConfig = recipe(copied, **STOPS)
    (copied / "metrics.jsonl").touch()
    assert_close(train(began).model, expected)


@pytest.mark.slow
def test_what_one_process_began_two_of_accelerate_can_end(tmp_path: Path) -> None:
    expected = alone(tmp_path / "one", {**STOPS, "resume": None})
    assert "step 7" in until(recipe(tmp_path / "stopped", **STOPS), 7)
    start(ACCELERATE, "go_on", tmp_path)
    assert_close(load_model(tmp_path / "stopped"), expected)
