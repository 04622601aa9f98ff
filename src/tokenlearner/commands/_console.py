"""Progress and results of a command: a bar on a terminal, a line now and then in a log file.

Of several processes that train together only the first one prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from ..utils.imports import require_package
from ..utils.processors import is_main_process
from ..utils.validation import counted, plain_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..training.trainer import Report

LOG_SECONDS = 30.0  # from one line about steps to the next where there is no terminal
logger = logging.getLogger("tokenlearner")
logger.setLevel(logging.INFO)


def console(**options: Any) -> Console:
    """Returns rich's console, which is silent in all processes but the first.

    Names are printed as they are: rich's markup, such as `[/b]`, emoji codes and what steers a
    terminal mean nothing.

    Raises:
        ValueError: rich is missing.
    """
    rich = require_package("rich.console", "train", "the command")

    class PlainConsole(rich.Console):
        def render_str(self, text: str, **style: Any) -> Any:
            return super().render_str(plain_text(text), **style)

    quiet = not is_main_process()
    return PlainConsole(highlight=False, markup=False, emoji=False, quiet=quiet, **options)


def say(line: object, **options: Any) -> None:
    """Prints a line at once, names as `plain_text` shows them; options are those of `print`."""
    print(plain_text(line, ""), **options, flush=True)


@contextmanager
def show_progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows on stderr what a command does, and how far it is, where that is a terminal.

    Yields a function that takes what is done next, and how many of `total` are done now, or one.
    """
    with _progress(console(stderr=True), is_counted=total is not None) as bar:
        task = bar.add_task(plain_text(title), total=total, status="")

        def advance(next_title: str = title, count: float = 1) -> None:
            bar.update(task, advance=count, description=plain_text(next_title))

        yield advance


@contextmanager
def training_progress(
    title: str, to: Console | None = None, unit: str = "images"
) -> Iterator[Report]:
    """Shows the current step, and a line for every epoch and every warning.

    Gives what `train` takes as `report`.

    Args:
        title: What the lines start with.
        to: The console; None is the usual one.
        unit: What is trained on, images or clips.
    """
    out = to or console()
    handler, logged = _ConsoleHandler(out), time.monotonic()
    logger.addHandler(handler)
    with closing(handler), _progress(out) as bar:
        task = bar.add_task(plain_text(title), total=None, status="")

        def report(row: dict[str, Any]) -> None:
            nonlocal logged
            if "warning" in row:
                logger.warning("%s: %s", title, row["warning"])
            elif "epoch" in row:
                logger.info("%s: %s", title, epoch_line(row, unit))
            else:
                line = _update(bar, task, row, unit)
                if not out.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
                    logged = time.monotonic()
                    logger.info("%s: %s", title, line)

        yield report


class _ConsoleHandler(logging.Handler):
    """Prints records above the bar, or to a file: as they are, and not wrapped."""

    def __init__(self, out: Console) -> None:
        super().__init__()
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        line = plain_text(self.format(record))
        self.out.print(line, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        logger.removeHandler(self)
        super().close()


def _progress(out: Console, *, is_counted: bool = True) -> Any:
    """Returns rich's bar, which counts without being drawn where there is no terminal."""
    from rich import progress

    bar = (
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}", markup=False),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        *(bar if is_counted else [progress.TimeElapsedColumn()]),
        console=out,
        transient=True,
        disable=not out.is_terminal or out.quiet,
        speed_estimate_period=600,  # steps of large models take long
        get_time=time.monotonic,
    )


def _update(bar: Any, task: Any, row: dict[str, Any], unit: str) -> str:
    """Moves a bar to a step, and returns the same as a line with the time left, if it is known."""
    if row["step"] < bar.tasks[0].completed:  # training after calibrating
        bar.reset(task)
    rate = f"lr {row['lr']:.2g}" if "lr" in row else "calibrating"
    status = f"loss {row['loss']:.3f}, {rate}, {_speed(row['images_per_second'], unit)}"
    bar.update(task, completed=row["step"], total=row["steps"], status=status)
    left = bar.tasks[0].time_remaining
    ending = "" if left is None else f", {_duration(left)} left"
    return f"step {row['step']} of {row['steps']}, {status}{ending}"


def epoch_line(row: dict[str, Any], unit: str = "images") -> str:
    """Returns an epoch's metrics in one line."""
    parts = [
        f"epoch {row['epoch']}",
        f"loss {row['train_loss']:.3f}",
        *([f"held-out {loss:.3f}"] if (loss := row.get("test_distill_loss")) is not None else []),
        f"held-out top-1 {row['test_top1_percent']:.1f} %",
        _speed(row["images_per_second"], unit),
        f"{row['waiting_percent']:.1f} % waiting for data",
    ]
    left_out = (f"{counted(count, noun)} {how}" for noun, how, count in _left_out(row))
    return ", ".join([*parts, *left_out])


def summary_table(history: Sequence[dict[str, Any]], seconds: float, unit: str = "images") -> Table:
    """Returns a table with the main numbers of a run.

    Args:
        history: A row of metrics for every epoch, one at least.
        seconds: Duration of the command, with evaluating and saving.
        unit: What was trained on, images or clips.
    """
    from rich.table import Table

    last, best = history[-1], max(history, key=lambda row: row["test_top1_percent"])
    trained = sum(row["train_seconds"] for row in history)
    waited = sum(row["waiting_percent"] * row["train_seconds"] for row in history)
    losses = [row["test_distill_loss"] for row in history if "test_distill_loss" in row]
    ends = {"last epoch": losses[-1], "lowest": min(losses)} if losses else {}
    against_teacher = {
        f"held-out loss against the teacher, {end}": f"{loss:.4f}" for end, loss in ends.items()
    }
    rows = {
        "epochs": last["epoch"],
        **against_teacher,
        "held-out top-1, last epoch": f"{last['test_top1_percent']:.2f} %",
        "held-out top-1, best epoch": f"{best['test_top1_percent']:.2f} % ({best['epoch']})",
        "speed, median of epochs": _speed(
            median(row["images_per_second"] for row in history), unit
        ),
        "waiting for data": f"{waited / trained:.1f} %",
        "time of training steps": _duration(trained),
        "time of this command": _duration(seconds),
        **{f"{noun}s {how}": count for noun, how, count in _left_out(last)},
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _left_out(row: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    if skipped := row.get("skipped_steps"):
        yield "step", "left out", skipped
    if broken := row.get("broken", 0) + row.get("test_broken", 0):
        yield "file", "cannot be read", broken


def _speed(per_second: float, unit: str) -> str:
    return f"{per_second:.{0 if per_second >= 10 else 2}f} {unit}/s"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
