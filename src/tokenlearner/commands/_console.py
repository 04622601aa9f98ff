"""Progress and results of a command: a bar on a terminal, a line now and then in a log file.

Of several processes that train together only the first one prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from ..utils.imports import require_package
from ..utils.processors import is_main_process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..training.trainer import Report

LOG_SECONDS = 30.0  # from one line about steps to the next where there is no terminal
logger = logging.getLogger("tokenlearner")
logger.setLevel(logging.INFO)


def console(**options: Any) -> Console:
    """Returns rich's console, which is silent in all processes but the first.

    Raises:
        ValueError: rich is missing.
    """
    rich = require_package("rich.console", "train", "the command")
    return rich.Console(highlight=False, quiet=not is_main_process(), **options)


@contextmanager
def training_progress(title: str, to: Console | None = None) -> Iterator[Report]:
    """Shows the current step, and a line for every epoch and every warning.

    Gives what `train` takes as `report`.

    Args:
        title: What the lines start with.
        to: The console; None is the usual one.
    """
    out = to or console()
    handler, logged = _ConsoleHandler(out), time.monotonic()
    logger.addHandler(handler)
    with closing(handler), _progress(out) as bar:
        task = bar.add_task(title, total=None, status="")

        def report(row: dict[str, Any]) -> None:
            nonlocal logged
            if "warning" in row:
                logger.warning("%s: %s", title, row["warning"])
            elif "epoch" in row:
                logger.info("%s: %s", title, epoch_line(row))
            else:
                line = _update(bar, task, row)
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
        self.out.print(self.format(record), markup=False, soft_wrap=True)

    def close(self) -> None:
        logger.removeHandler(self)
        super().close()


def _progress(out: Console) -> Any:
    """Returns rich's bar, which counts without being drawn where there is no terminal."""
    from rich import progress

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal or out.quiet,
        speed_estimate_period=600,  # steps of large models take long
        get_time=time.monotonic,
    )


def _update(bar: Any, task: Any, row: dict[str, Any]) -> str:
    """Moves a bar to a step, and returns the same as a line with the time left, if it is known."""
    if row["step"] < bar.tasks[0].completed:  # training after calibrating
        bar.reset(task)
    rate = f"lr {row['lr']:.2g}" if "lr" in row else "calibrating"
    status = f"loss {row['loss']:.3f}, {rate}, {_speed(row['images_per_second'])}"
    bar.update(task, completed=row["step"], total=row["steps"], status=status)
    left = bar.tasks[0].time_remaining
    ending = "" if left is None else f", {_duration(left)} left"
    return f"step {row['step']} of {row['steps']}, {status}{ending}"


def epoch_line(row: dict[str, Any]) -> str:
    """Returns an epoch's metrics in one line."""
    parts = [
        f"epoch {row['epoch']}",
        f"loss {row['train_loss']:.3f}",
        f"held-out top-1 {row['test_top1_percent']:.1f} %",
        _speed(row["images_per_second"]),
        f"{row['waiting_percent']:.1f} % waiting for data",
    ]
    return ", ".join(parts + [f"{count} {name}" for name, count in _left_out(row)])


def summary_table(history: Sequence[dict[str, Any]], seconds: float) -> Table:
    """Returns a table with the main numbers of a run.

    Args:
        history: A row of metrics for every epoch, one at least.
        seconds: Duration of the command, with evaluating and saving.
    """
    from rich.table import Table

    last, best = history[-1], max(history, key=lambda row: row["test_top1_percent"])
    trained = sum(row["train_seconds"] for row in history)
    waited = sum(row["waiting_percent"] * row["train_seconds"] for row in history)
    rows = {
        "epochs": last["epoch"],
        "held-out top-1, last epoch": f"{last['test_top1_percent']:.2f} %",
        "held-out top-1, best epoch": f"{best['test_top1_percent']:.2f} % ({best['epoch']})",
        "speed, median of epochs": _speed(median(row["images_per_second"] for row in history)),
        "waiting for data": f"{waited / trained:.1f} %",
        "time of training steps": _duration(trained),
        "time of this command": _duration(seconds),
        **dict(_left_out(last)),
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _left_out(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    if skipped := row.get("skipped_steps"):
        yield "steps left out", skipped
    if broken := row.get("broken", 0) + row.get("test_broken", 0):
        yield "files cannot be read", broken


def _speed(images_per_second: float) -> str:
    digits = 0 if images_per_second >= 10 else 2
    return f"{images_per_second:.{digits}f} images/s"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
