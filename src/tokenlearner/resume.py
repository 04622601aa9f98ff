"""What a run leaves to go on from: one file, written whole, read without running code from it."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .files import written_whole
from .recipe import TrainConfig

CHECKPOINT = "checkpoint.pt"
_FREE = {  # options that may change from one part of a run to the next
    *("out", "root", "resume", "save_every", "trackers", "device", "workers", "max_broken", "nan"),
}
_FORMAT = 1


class Stopped(RuntimeError):
    """A run that was asked to stop, and left a checkpoint."""

    def __init__(self, number: int, out: str, step: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {out} holds a checkpoint of step {step}, "
            "go on with resume='auto'"
        )
        self.signal = number


class Asked:
    """Whether the process was asked to stop: the signal's number, or 0."""

    signal = 0


@contextmanager
def listening() -> Iterator[Asked]:
    """Notes SIGTERM and SIGINT in place of dying of them; a second SIGINT interrupts as ever."""
    asked, before = Asked(), {}

    def note(number: int, frame: FrameType | None) -> None:
        if asked.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # Python lets the main thread alone listen
            break
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_checkpoint(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Writes `checkpoint.pt` in the run's folder; the one before stays until this is complete.

    Raises:
        RuntimeError: It cannot be written, as on a full disk; what was there is as it was.
    """
    path = Path(config.out) / CHECKPOINT
    whole = {"format": _FORMAT, "config": json.dumps(asdict(config)), **state}
    try:
        with written_whole(path) as temporary:
            torch.save(whole, temporary)
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        left = f"the one before, in {path}, is intact" if path.exists() else "there is none yet"
        raise RuntimeError(
            f"the checkpoint of step {state['step']} cannot be written "
            f"({'no space is left' if full else error}); {left}. Make room, and go on with "
            "resume='auto'"
        ) from error


def read_checkpoint(config: TrainConfig) -> dict[str, Any] | None:
    """Reads the checkpoint that a run with `resume` goes on from, if there is one.

    Raises:
        ValueError: It is damaged, or of a run with other options; they are named.
    """
    path = Path(config.out) / CHECKPOINT
    if config.resume is None or not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, found = json.loads(state["config"]), state["format"]
    except Exception as error:  # torch raises what it likes on damaged files
        raise ValueError(
            f"{path} is no checkpoint of a run ({error}); move it away to start anew"
        ) from error
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found}, expected {_FORMAT}; train with the older one")
    now = json.loads(json.dumps(asdict(config)))
    changed = [name for name in now if name not in _FREE and saved.get(name) != now[name]]
    if changed:
        pairs = ", ".join(f"{name} was {saved.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{path} is of a run with other options: {pairs}; pass another out")
    return state


def write_metrics(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes a line of metrics for every epoch."""
    with written_whole(Path(config.out) / "metrics.jsonl") as temporary:
        lines = "".join(json.dumps(row) + "\n" for row in history)
        temporary.write_text(lines, encoding="utf-8")
