"""Runs that were cut off: what they leave, how they go on, what is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from files import make_image_folder
from safetensors.torch import load_file
from tiny import same

from tokenlearner import TrainConfig, calibrate, train
from tokenlearner.training.checkpointing import (
    CHECKPOINT,
    TrainingInterrupted,
    handle_signals,
    read_checkpoint,
    remove_temporary_files,
    write_checkpoint,
)
from tokenlearner.utils.io import LOCK, lock_folder

AT_RANDOM: dict[str, Any] = {"drop_path": 0.3, "ema_decay": 0.9, "hflip": 0.5, "mixup": 0.4}
IN_STEPS: dict[str, Any] = {**AT_RANDOM, "epochs": None, "steps": 21, "warmup_epochs": None}
STEPS = 8


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("tokenlearner.training.run"), "load_data", running.quarter_images
    )


def recipe(out: Path, **changes: Any) -> TrainConfig:
    return running.recipe(out, **{"resume": "auto", "workers": 0, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def without_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "percent", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows]


def cut_off(config: TrainConfig, step: int) -> None:
    """Ends a run after a step as a crash would."""

    def crash(row: dict[str, Any]) -> None:
        if row.get("step") == step and "lr" in row and "epoch" not in row:
            raise KeyError("crash")

    with pytest.raises(KeyError, match="crash"):
        train(config, crash)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not cut off."""
    return run_to_the_end(tmp_path_factory.mktemp("whole") / "run", AT_RANDOM)


def run_to_the_end(out: Path, options: dict[str, Any]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("tokenlearner.training.run"), "load_data", running.quarter_images
        )
        train(recipe(out, **options))
    return out


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 6, 8])
def test_a_run_that_crashed_ends_as_one_that_did_not(
    step: int, whole: Path, tmp_path: Path
) -> None:
    config, rows = recipe(tmp_path / "run", save_every=2, **AT_RANDOM), list[dict[str, Any]]()
    cut_off(config, step)
    train(config, rows.append)
    assert same(weights(tmp_path / "run"), weights(whole))
    assert without_times(tmp_path / "run") == without_times(whole)
    left = range((step - 1) // 2 * 2 + 1, STEPS + 1)  # since the last checkpoint
    assert [row["step"] for row in rows if "epoch" not in row] == [*left]


@pytest.fixture(scope="module")
def in_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a number of steps that is no multiple of an epoch's."""
    return run_to_the_end(tmp_path_factory.mktemp("steps") / "run", IN_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("step", [10, 11])
def test_a_run_of_steps_that_crashed_ends_as_one_that_did_not(
    step: int, in_steps: Path, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", save_every=3, **IN_STEPS)
    cut_off(config, step)
    train(config)
    assert same(weights(tmp_path / "run"), weights(in_steps))
    assert without_times(tmp_path / "run") == (rows := without_times(in_steps))
    steps = [*range(2, 21, 2), 21]
    assert [(row["step"], row["epoch"]) for row in rows] == [(step, step / 4) for step in steps]
    assert "21 of 21, the last one" in (in_steps / "README.md").read_text()


def test_a_run_that_was_over_is_returned_as_it_was(whole: Path) -> None:
    rows: list[dict[str, Any]] = []
    before = weights(whole)
    result = train(recipe(whole, **AT_RANDOM), rows.append)
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert rows == []
    assert same(weights(whole), before)


def test_what_was_killed_between_checkpoint_and_metrics_is_written_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyError("crash")

    config = recipe(tmp_path / "run", **AT_RANDOM)
    with monkeypatch.context() as patch:
        patch.setattr(import_module("tokenlearner.training.run"), "save_model", killed)
        with pytest.raises(KeyError, match="crash"):
            train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(config)
    assert without_times(tmp_path / "run") == without_times(whole)


def test_an_inserted_model_is_not_calibrated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = import_module("tokenlearner.training.setup")
    monkeypatch.setattr(setup, "calibrate", partial(calibrate, steps=2))
    host = running.save_host(tmp_path / "host")
    insertion = {"model": host, "model_kwargs": None, "num_tokens": 0, "insert": 2, "at": 1}
    config = recipe(tmp_path / "run", **insertion, teacher="host", calibrate=8)
    cut_off(config, 5)
    monkeypatch.delattr(setup, "calibrate")
    result = train(config)
    calibrated = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert result.calibration is not None
    assert vars(result.calibration) == calibrated
    assert result.host is not None
    assert len(result.history) == 2


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 4)])
def test_a_signal_leaves_a_checkpoint_of_that_step(
    number: signal.Signals, step: int, whole: Path, tmp_path: Path
) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == step and "epoch" not in row:
            os.kill(os.getpid(), number)

    config = recipe(tmp_path / "run", **AT_RANDOM)
    expected = f"{number.name}.* step {step}, .*resume='auto'"
    with pytest.raises(TrainingInterrupted, match=expected) as stopped:
        train(config, interrupt)
    assert stopped.value.signal == number
    train(config)
    assert same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_second_signal_ends_the_process_and_afterwards_signals_mean_what_they_meant(
    number: signal.Signals, end: type[BaseException]
) -> None:
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with handle_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)  # the launcher's, to the group
            stop.time -= 2
        with pytest.raises(end):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in numbers] == before


HANGS = """
import os, sys, time
from torch.utils.data import get_worker_info
from tokenlearner.commands.main import main
from tokenlearner.data.image_folder import ImagePaths

real = ImagePaths.open
def opened(self, number):
    if get_worker_info() and os.path.exists(sys.argv[1]):
        print("reading", flush=True)
        time.sleep(1000)
    return real(self, number)
ImagePaths.open = opened
main(sys.argv[2:])
"""

OPTIONS = "--model vit_mini_patch4_28 --img_size 28 --batch_size 2 --epochs 9 --device cpu"


@pytest.mark.slow
def test_two_signals_end_a_run_whose_reader_hangs(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "data", "ab")
    where = f"--data folder --root {tmp_path}/data --out {tmp_path}/run --workers 1"
    command = ["train", *where.split(), *OPTIONS.split()]
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, f"{tmp_path}/run/metrics.jsonl", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert any("reading" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None  # it would save behind the step
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM


# --- what is refused ----------------------------------------------------------------------------


def test_other_options_are_refused_by_name_but_where_and_how_often_may_change(whole: Path) -> None:
    config = recipe(whole, **{**AT_RANDOM, "hflip": 0.25}, lr=2e-3)
    for named in ("lr was 0.001, is 0.002", "hflip was 0.5, is 0.25"):
        with pytest.raises(ValueError, match=named):
            read_checkpoint(config)
    free = recipe(whole, **AT_RANDOM, save_every=3, log_interval=7, nan="skip")
    state = read_checkpoint(free)
    assert state is not None
    assert state["step"] == STEPS


def test_a_checkpoint_from_before_an_option_was_added_goes_on(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    write_checkpoint(config, {"step": 1})
    state = torch.load(tmp_path / CHECKPOINT)
    older = json.loads(state["config"])
    assert older.pop("onednn") is False
    torch.save(state | {"config": json.dumps(older)}, tmp_path / CHECKPOINT)
    assert read_checkpoint(config) is not None
    with pytest.raises(ValueError, match=r"onednn was False, is True"):
        read_checkpoint(recipe(tmp_path, onednn=True))


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        ({"img_size": None, "frames": 8}, {"img_size": 224, "frames": None}, True),  # version 0.4
        ({"img_size": None, "frames": 8}, {"img_size": 96}, False),
        ({"frames": 8}, {"frames": 6}, False),
    ],
)
def test_sizes_that_were_not_given_are_those_that_were_used(
    before: dict[str, Any], now: dict[str, Any], goes_on: bool, tmp_path: Path
) -> None:
    write_checkpoint(recipe(tmp_path, data="folder", **before), {"step": 1})
    later = recipe(tmp_path, data="folder", resume="auto", **now)
    with nullcontext() if goes_on else pytest.raises(ValueError, match="other options"):
        assert read_checkpoint(later) is not None


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def malicious(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path.parent / 'harm'}",)

    path.write_bytes(pickle.dumps({"format": 1, "config": "{}", "step": Evil()}))


@pytest.mark.parametrize("what", [damaged, malicious])
def test_a_file_that_is_no_checkpoint_is_refused(
    what: Callable[[Path], None], tmp_path: Path
) -> None:
    config = recipe(tmp_path)
    write_checkpoint(config, {"step": 1})
    assert read_checkpoint(config) is not None
    what(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint"):
        read_checkpoint(config)
    assert not (tmp_path / "harm").exists()


def test_a_run_whose_checkpoint_is_gone_is_not_started_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"run without checkpoint.pt"):
        train(recipe(tmp_path))


# --- what is left -------------------------------------------------------------------------------


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, left: int):
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


@pytest.mark.parametrize("left", ["is intact", "there is none yet"])
def test_on_a_full_disk_the_checkpoint_before_stays_if_there_is_one(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plain = recipe(tmp_path), Path.open
    if left == "is intact":
        write_checkpoint(config, {"step": 4, "model": torch.zeros(9)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *mode: FullDisk(plain(self, *mode), 2000))
        with pytest.raises(RuntimeError, match=rf"step 8 .*no space is left.* {left}"):
            write_checkpoint(config, {"step": 8, "model": torch.zeros(9999)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_temporary_files_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    remains = [".checkpoint.123.pt", ".model.45.safetensors", ".metrics.6.jsonl"]
    others = [".checkpoint.pt", ".notes.7.txt", "checkpoint.pt", ".checkpoint.12x.pt"]
    for name in (*remains, *others):
        (tmp_path / name).touch()
    remove_temporary_files(recipe(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# --- two at once --------------------------------------------------------------------------------


def test_a_run_in_a_folder_that_is_in_use_is_refused_and_leaves_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with lock_folder(out):
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} "):
            train(recipe(out))
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("over", [False, True])
def test_of_two_runs_that_begin_at_once_one_is_refused(
    over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one takes the folder, and may end, while this one is still reading data."""
    out, run = tmp_path / "run", import_module("tokenlearner.training.run")
    prepare, other = run.prepare, ExitStack()

    def slow(*arguments: Any) -> Any:
        other.enter_context(lock_folder(out))
        write_checkpoint(recipe(out), {"step": 1})
        if over:
            other.close()
        return prepare(*arguments)

    monkeypatch.setattr(run, "prepare", slow)
    with other, pytest.raises(ValueError, match="meanwhile" if over else "in use"):
        train(recipe(out))
    assert {path.name for path in out.iterdir()} == {LOCK, CHECKPOINT}


def test_a_run_that_is_over_leaves_its_folder_to_others(tmp_path: Path) -> None:
    train(recipe(tmp_path / "run"))
    hidden = [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert [(path.name, path.read_bytes()) for path in hidden] == [(LOCK, b"")]
    train(recipe(tmp_path / "run", resume="auto"))


@pytest.mark.parametrize("changes", [{}, {"opt": "sgd", "ema_decay": 0.9}, {"epochs": 1}])
def test_what_a_run_needs_on_its_disk_is_asked_for_before_anything_is_written(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = recipe(tmp_path / "run", **changes), list[int]()
    place = import_module("tokenlearner.utils.io")
    usage = place.shutil.disk_usage
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(path)._replace(free=1))
    with pytest.raises(ValueError, match=r"MiB are to be written there"):
        train(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.setattr(
        import_module("tokenlearner.training.run"), "load_data", running.quarter_images
    )
    checkpointing = import_module("tokenlearner.training.checkpointing")
    monkeypatch.setattr(
        checkpointing, "check_output_folder", lambda out, size=0: asked.append(size) or Path(out)
    )
    train(config)
    checkpoint, model = (
        (tmp_path / "run" / name).stat().st_size for name in (CHECKPOINT, "model.safetensors")
    )
    most = checkpoint * (1 if "epochs" in changes else 2) + model
    assert 0.5 * most < max(asked) < most  # besides the weights, files have names and random states
