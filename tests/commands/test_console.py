"""What a person sees while a model trains."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tokenlearner.commands import _console as progress
from tokenlearner.commands._console import (
    Pace,
    epoch_line,
    is_seen,
    summary_table,
    training_progress,
)

EPOCH = {
    "epoch": 2,
    "step": 20,
    "train_loss": 1.23456,
    "train_seconds": 30.0,
    "waiting_percent": 4.0,
    "lr": 1e-3,
    "images_per_second": 512.3,
    "test_images": 100,
    "test_loss": 1.0,
    "test_top1_percent": 61.25,
    "test_broken": 0,
}


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "steps": 100, "loss": 2.0, "lr": 5e-4, "images_per_second": 80.0} | more


def seen(*rows: dict[str, Any], terminal: bool = False) -> str:
    text = io.StringIO()
    to = Console(file=text, force_terminal=terminal, width=150, highlight=False)
    with training_progress("run", to) as report:
        for row in rows:
            report(row)
    return text.getvalue()


class Clock:
    """Time that passes by 10 seconds whenever it is asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", Clock())


# lines


def test_an_epoch_is_a_line() -> None:
    line = "run: epoch 2, loss 1.235, held-out top-1 61.2 %, 512 images/s, 4.0 % waiting for data\n"
    assert seen(EPOCH) == line


def test_an_epoch_says_what_was_left_out() -> None:
    assert epoch_line(EPOCH | {"skipped_steps": 3, "broken": 2, "test_broken": 1}).endswith(
        ", 3 steps left out, 3 files cannot be read"
    )


def test_a_slow_run_has_decimals() -> None:
    assert "0.26 images/s" in epoch_line(EPOCH | {"images_per_second": 0.257})


@pytest.mark.parametrize("terminal", [False, True])
def test_a_warning_is_a_line_as_it_is(terminal: bool) -> None:
    text = "[a/b] is left out, " * 20 + "too"
    assert f"run: {text}" in seen({"warning": text}, terminal=terminal)


# a log file


@pytest.mark.usefixtures("clock")
def test_a_log_shows_life_every_30_seconds() -> None:
    lines = seen(*map(step, range(1, 10))).splitlines()
    assert [line.split()[2] for line in lines] == ["3", "6", "9"]
    assert lines[0] == ("run: step 3 of 100, loss 2.000, lr 0.0005, 80 images/s, 0:16:10 left")


def test_a_quick_run_leaves_no_steps_in_a_log() -> None:
    assert seen(*map(step, range(1, 10))) == ""


@pytest.mark.usefixtures("clock")
def test_calibrating_is_called_so() -> None:
    rows = [{k: v for k, v in step(i).items() if k != "lr"} for i in range(1, 4)]
    assert "step 3 of 100, calibrating, loss 2.000, 80 images/s" in seen(*rows)


# a terminal


def test_a_terminal_shows_a_bar_with_the_step_the_run_is_at() -> None:
    shown = seen(step(41), step(42), terminal=True)
    assert "42/100" in shown
    assert "lr 0.0005" in shown


def test_an_epoch_is_a_line_above_the_bar() -> None:
    assert "run: epoch 2, loss 1.235" in seen(step(20), EPOCH, terminal=True)


# time left


def test_time_left_is_of_the_steps_seen() -> None:
    pace = Pace()
    assert pace.seconds_left(step(1), 0.0) is None
    assert pace.seconds_left(step(5), 8.0) == 2.0 * 95


def test_a_resumed_run_has_its_own_pace() -> None:
    pace = Pace()
    assert pace.seconds_left(step(61), 100.0) is None
    assert pace.seconds_left(step(62), 103.0) == 3.0 * 38


def test_training_after_calibrating_starts_anew() -> None:
    pace = Pace()
    for number in (1, 2, 3):
        pace.seconds_left(step(number), 50.0 * number)
    assert pace.seconds_left(step(1), 200.0) is None
    assert pace.seconds_left(step(2), 201.0) == 98.0


# several processes


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("1", False)])
def test_the_first_process_is_seen(
    rank: str | None, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_seen() is is_first


def test_consoles_of_other_processes_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    with training_progress("run") as report:
        report(EPOCH)
    progress.console().print("text")
    assert capsys.readouterr().out == ""


# the end


def test_the_summary_has_best_and_last_and_weighs_waiting_by_time() -> None:
    history = [
        EPOCH | {"epoch": 1, "test_top1_percent": 70.0, "waiting_percent": 40, "train_seconds": 10},
        EPOCH | {"images_per_second": 100.0, "train_seconds": 3690, "waiting_percent": 0},
        EPOCH | {"epoch": 3, "images_per_second": 90.0, "train_seconds": 0.0},
    ]
    cells = [[*column.cells] for column in summary_table(history, 3723.4).columns]
    assert dict(zip(*cells, strict=True)) == {
        "epochs": "3",
        "held-out top-1, last epoch": "61.25 %",
        "held-out top-1, best epoch": "70.00 % (1)",
        "speed, median of epochs": "100 images/s",
        "waiting for data": "0.1 %",
        "time of training steps": "1:01:40",
        "time of this command": "1:02:03",
    }


def test_the_summary_tells_what_was_left_out() -> None:
    cells = summary_table([EPOCH | {"skipped_steps": 2, "test_broken": 4}], 1.0).columns
    ends = [[*column.cells][-2:] for column in cells]
    assert ends == [["steps left out", "files that cannot be read"], ["2", "4"]]
