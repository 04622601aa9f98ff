"""Progress of a training, on a terminal and in a log file."""

from __future__ import annotations

import io
from itertools import count, pairwise
from typing import Any

import pytest
from rich.console import Console

from tokenlearner.commands import _console
from tokenlearner.commands._console import (
    epoch_line,
    show_progress,
    summary_table,
    training_progress,
)
from tokenlearner.commands._tables import filled_table

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


def calibrating(number: int) -> dict[str, Any]:
    return {name: value for name, value in step(number).items() if name != "lr"}


def printed(*rows: dict[str, Any], terminal: bool = False) -> str:
    text = io.StringIO()
    to = Console(file=text, force_terminal=terminal, width=150, highlight=False)
    with training_progress("run", to) as report:
        for row in rows:
            report(row)
    return text.getvalue()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes by 10 seconds from one look at the clock to the next."""
    ticks = count(0.0, 10.0)
    monkeypatch.setattr(_console.time, "monotonic", lambda: next(ticks))


# --- lines --------------------------------------------------------------------------------------


def test_an_epoch_is_a_line_that_counts_what_was_left_out() -> None:
    line = "run: epoch 2, loss 1.235, held-out top-1 61.2 %, 512 images/s, 4.0 % waiting for data\n"
    assert printed(EPOCH) == line
    row = EPOCH | {"skipped_steps": 3, "broken": 2, "test_broken": 1, "images_per_second": 0.257}
    line = epoch_line(row)
    assert line.endswith(", 3 steps left out, 3 files cannot be read")
    assert "0.26 images/s" in line
    assert "0.26 clips/s" in epoch_line(row, "clips")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_warning_is_a_line_that_is_not_wrapped(terminal: bool) -> None:
    text = "[a/b] is left out, " * 20 + "too"
    assert f"run: {text}" in printed({"warning": text}, terminal=terminal)


@pytest.mark.parametrize("name", ["runs/[/b]", "[red]x", ":cat:"])
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = filled_table({"model": str}, [name])
    table.title = name
    _console.console().print(name, table)
    assert capsys.readouterr().out.count(name) == 3
    assert name in printed({"warning": name}, terminal=True)


@pytest.mark.parametrize("name", ["runs/[/b]", "a\x1b[2Jb"])
def test_progress_is_on_a_terminal_only_and_shows_names_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for width, total in (("", 2), ("1", 2), ("1", None)):
        monkeypatch.setenv("FORCE_COLOR", width)
        with show_progress(f"drawing {name}", total) as advance:
            advance()
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("drawing" in shown.err) == bool(width)
        assert ("1/2" in shown.err) == bool(width and total)
        assert name in shown.err or not width or "\x1b" in name
        assert "\x1b[2Jb" not in shown.err


# --- a log file ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_a_log_has_a_line_about_steps_every_30_seconds() -> None:
    lines = printed(*map(step, range(1, 40))).splitlines()
    steps = [int(line.split()[2]) for line in lines]
    assert len(steps) > 3
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert lines[0].startswith(f"run: step {steps[0]} of 100, loss 2.000, lr 0.0005, 80 images/s")
    assert lines[1].endswith(" left")


@pytest.mark.usefixtures("clock")
def test_training_after_calibrating_has_its_own_time_left() -> None:
    lines = printed(*map(calibrating, range(1, 20)), *map(step, range(1, 20))).splitlines()
    assert ", calibrating, 80 images/s" in lines[0]
    assert ", lr 0.0005, 80 images/s" in lines[-1]
    phases = [line for line in lines if "left" in line]
    assert phases[-1] != phases[0]


@pytest.mark.usefixtures("clock")
def test_the_time_left_in_a_resumed_run_counts_only_the_steps_of_this_session() -> None:
    whole, resumed = (printed(*map(step, range(first, 80))).splitlines() for first in (1, 31))
    assert len([line for line in resumed if line.endswith(" left")]) > 5
    assert {*resumed[1:]} <= {*whole[1:]}


def test_a_terminal_shows_a_bar_with_lines_above_it_but_a_log_no_steps_of_a_quick_run() -> None:
    assert printed(*map(step, range(1, 10))) == ""
    shown = printed(step(41), step(42), EPOCH, terminal=True)
    assert "42/100" in shown
    assert "lr 0.0005" in shown
    assert "run: epoch 2, loss 1.235" in shown


def test_the_loss_against_a_teacher_is_beside_that_of_training() -> None:
    row = EPOCH | {"test_distill_loss": 1.5}
    assert "loss 1.235, held-out 1.500, held-out top-1" in epoch_line(row)
    history = [EPOCH | {"test_distill_loss": 1.25}, row]
    cells = [[*column.cells] for column in summary_table(history, 1.0).columns]
    found = dict(zip(*cells, strict=True))
    label = "held-out loss against the teacher"
    assert (found[f"{label}, last epoch"], found[f"{label}, lowest"]) == ("1.5000", "1.2500")


# --- several processes --------------------------------------------------------------------------


# --- the end ------------------------------------------------------------------------------------


def test_the_summary_has_best_and_last_and_weighs_waiting_by_time() -> None:
    history = [
        EPOCH | {"epoch": 1, "test_top1_percent": 70.0, "waiting_percent": 40, "train_seconds": 10},
        EPOCH | {"images_per_second": 100.0, "train_seconds": 3690, "waiting_percent": 0},
        EPOCH | {"epoch": 3, "images_per_second": 90.0, "train_seconds": 0.0, "skipped_steps": 2},
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
        "steps left out": "2",
    }
