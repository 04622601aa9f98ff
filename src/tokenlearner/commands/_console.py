"""What a person sees while a command runs: on a terminal a bar, in a log file a line now and then.

Of several processes that train together only the first one is seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..training.trainer import Report

LOG_SECONDS = 30.0  # from one line to the next where there is no terminal


def is_seen() -> bool:
    """Whether this is the process that prints, among those that train together.

    torchrun and `accelerate launch` number them in the environment, before they know each other.
    """
    return os.environ.get("RANK", "0") == "0"


def console(**options: Any) -> Console:
    """Returns rich's console, which is silent in all processes but the first.

    Raises:
        ValueError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        message = "the command needs rich; run pip install 'tokenlearner[train]'"
        raise ValueError(message) from error
    return Console(highlight=False, quiet=not is_seen(), **options)


@contextmanager
def training_progress(title: str, to: Console | None = None) -> Iterator[Report]:
    """Shows steps as they are made, a line for every epoch, and every warning.

    Gives what `train` takes as `report`.

    Args:
        title: What the lines start with.
        to: The console; None is the usual one.
    """
    out = to or console()
    showing = _bar if out.is_terminal and is_seen() else _log
    with showing(title, out) as show_step:

        def report(row: dict[str, Any]) -> None:
            if "warning" in row:
                _print_line(out, f"{title}: {row['warning']}")
            elif "epoch" in row:
                _print_line(out, f"{title}: {epoch_line(row)}")
            else:
                show_step(row)

        yield report


def epoch_line(row: dict[str, Any]) -> str:
    """What an epoch came to, from its row of metrics."""
    broken = row.get("broken", 0) + row.get("test_broken", 0)
    parts = [
        f"epoch {row['epoch']}",
        f"loss {row['train_loss']:.3f}",
        f"held-out top-1 {row['test_top1_percent']:.1f} %",
        speed(row["images_per_second"]),
        f"{row['waiting_percent']:.1f} % waiting for data",
    ]
    if row.get("skipped_steps"):
        parts.append(f"{row['skipped_steps']} steps left out")
    if broken:
        parts.append(f"{broken} files cannot be read")
    return ", ".join(parts)


def summary_table(history: Sequence[dict[str, Any]], seconds: float) -> Table:
    """A run in a few numbers.

    Args:
        history: A row of metrics for every epoch, one at least.
        seconds: How long it took just now, with judging and saving.
    """
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _summary(history, seconds):
        table.add_row(name, value)
    return table


def speed(images_per_second: float) -> str:
    """Images a second, with as many digits as matter."""
    digits = 0 if images_per_second >= 10 else 2
    return f"{images_per_second:.{digits}f} images/s"


def _summary(history: Sequence[dict[str, Any]], seconds: float) -> Iterator[tuple[str, str]]:
    last = history[-1]
    best = max(history, key=lambda row: row["test_top1_percent"])
    trained = sum(row["train_seconds"] for row in history)
    waited = sum(row["waiting_percent"] * row["train_seconds"] for row in history)
    yield "epochs", str(last["epoch"])
    yield "held-out top-1, last epoch", f"{last['test_top1_percent']:.2f} %"
    yield "held-out top-1, best epoch", f"{best['test_top1_percent']:.2f} % ({best['epoch']})"
    yield "speed, median of epochs", speed(median(row["images_per_second"] for row in history))
    yield "waiting for data", f"{waited / trained:.1f} %"
    yield "time of training steps", duration(trained)
    yield "time of this command", duration(seconds)
    if last.get("skipped_steps"):
        yield "steps left out", str(last["skipped_steps"])
    if broken := last.get("broken", 0) + last.get("test_broken", 0):
        yield "files that cannot be read", str(broken)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


class Pace:
    """How many steps a second, since the first that was seen: a resumed run has made some before.

    A step number that does not rise starts another phase, as training does after calibrating.
    """

    def __init__(self) -> None:
        self.first, self.last, self.since = 0, 0, 0.0

    def seconds_left(self, row: dict[str, Any], now: float) -> float | None:
        """Seconds to the last step; None where nothing is known yet.

        Args:
            row: What was reported after a step.
            now: The time, of a clock that only goes forward.
        """
        step = row["step"]
        if step <= self.last or self.last == 0:
            self.first, self.since = step, now
        self.last = step
        if step == self.first:
            return None
        return (now - self.since) / (step - self.first) * (row["steps"] - step)


def _status(row: dict[str, Any], left: float | None) -> str:
    parts = [f"loss {row['loss']:.3f}", speed(row["images_per_second"])]
    if "lr" in row:
        parts.insert(1, f"lr {row['lr']:.2g}")
    else:
        parts.insert(0, "calibrating")
    return ", ".join(parts + ([] if left is None else [f"{duration(left)} left"]))


@contextmanager
def _bar(title: str, out: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    status = TextColumn("{task.fields[status]}")
    with Progress(*columns, status, console=out, transient=True) as bar:
        task, pace = bar.add_task(title, total=None, status=""), Pace()

        def show(row: dict[str, Any]) -> None:
            text = _status(row, pace.seconds_left(row, time.monotonic()))
            bar.update(task, completed=row["step"], total=row["steps"], status=text)

        yield show


@contextmanager
def _log(title: str, out: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    pace, shown = Pace(), time.monotonic()

    def show(row: dict[str, Any]) -> None:
        nonlocal shown
        now = time.monotonic()
        left = pace.seconds_left(row, now)
        if now - shown >= LOG_SECONDS:
            shown = now
            _print_line(out, f"{title}: step {row['step']} of {row['steps']}, {_status(row, left)}")

    yield show


def _print_line(out: Console, text: str) -> None:
    """Prints text as it is, not wrapped, since a log is searched by lines."""
    out.print(text, markup=False, soft_wrap=True)
