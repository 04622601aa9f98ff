"""What a person sees while a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .loop import Report


def console(**options: Any) -> Console:
    """Returns rich's console.

    Raises:
        ValueError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        message = "the command needs rich; run pip install 'tokenlearner[train]'"
        raise ValueError(message) from error
    return Console(highlight=False, **options)


@contextmanager
def training_progress(title: str) -> Iterator[Report]:
    """Shows a bar with loss, speed and time left, and a line for every epoch.

    Gives what `train` takes as `report`.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out = console()
    status = TextColumn("{task.fields[status]}")
    with Progress(
        TextColumn(title), BarColumn(), status, TimeRemainingColumn(), console=out, transient=True
    ) as bar:
        task = bar.add_task(title, total=None, status="")

        def report(row: dict[str, Any]) -> None:
            speed = f"{row['images_per_second']:.0f} images/s"
            if "epoch" not in row:
                status = f"loss {row['loss']:.3f}, {speed}"
                bar.update(task, completed=row["step"], total=row["steps"], status=status)
                return
            out.print(
                f"{title}: epoch {row['epoch']}, loss {row['train_loss']:.3f}, "
                f"held-out top-1 {row['test_top1_percent']:.1f} %, {speed}"
            )

        yield report
