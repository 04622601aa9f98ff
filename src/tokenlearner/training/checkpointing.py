"""What a run leaves to go on from: one file, written whole, read without running code from it."""

from __future__ import annotations

import errno
import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from ..data.config import OLD_NAMES
from ..utils.io import atomic_write
from .config import TrainConfig

CHECKPOINT = "checkpoint.pt"
_FREE = {  # options that may change from one part of a run to the next
    *("out", "root", "resume", "save_every", "trackers", "device", "workers", "max_broken", "nan"),
    "download",
}
_FORMAT = 1
METRICS = "metrics.jsonl"
_WRITTEN = ("checkpoint.pt", "model.safetensors", "metrics.jsonl", "train.json", "calibration.json")


class TrainingInterrupted(RuntimeError):
    """A run that was asked to stop, and left a checkpoint."""

    def __init__(self, number: int, out: str, step: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {out} holds a checkpoint of step {step}, "
            "go on with resume='auto'"
        )
        self.signal = number


class StopSignal:
    """Whether the process was asked to stop: the signal's number, or 0."""

    signal = 0


@contextmanager
def handle_signals() -> Iterator[StopSignal]:
    """Notes SIGTERM and SIGINT in place of dying of them; a second SIGINT interrupts as ever."""
    asked, before = StopSignal(), {}

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


def check_run_folder(config: TrainConfig) -> None:
    """Refuses to start where a run is already, or to go on where its checkpoint is missing.

    Raises:
        ValueError: One of both.
    """
    out = Path(config.out)
    checkpoint, metrics = ((out / name).exists() for name in (CHECKPOINT, METRICS))
    if config.resume is None and (checkpoint or metrics):
        raise ValueError(
            f"{out} holds a run already; pass resume='auto' to go on with it, another out, or move "
            "it away"
        )
    if metrics and not checkpoint:
        raise ValueError(
            f"{out} holds a run without {CHECKPOINT}, which it would go on from; pass another out, "
            "or move it away to start anew"
        )


def remove_temporary_files(config: TrainConfig) -> None:
    """Removes what runs that were killed while they wrote a file left of it."""
    names = "|".join(re.escape(Path(name).stem) for name in _WRITTEN)
    endings = "|".join(re.escape(Path(name).suffix) for name in _WRITTEN)
    temporary = re.compile(rf"\.({names})\.\d+({endings})")
    for path in Path(config.out).glob(".*"):
        if temporary.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_checkpoint(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Writes `checkpoint.pt` in the run's folder; the one before stays until this is complete.

    Raises:
        RuntimeError: It cannot be written, as on a full disk; what was there is as it was.
    """
    whole = {"format": _FORMAT, "config": json.dumps(asdict(config)), **state}
    path = Path(config.out) / CHECKPOINT
    with (
        explain_write_errors(config, "checkpoint", state["step"]),
        atomic_write(path) as temporary,
        temporary.open("wb") as file,  # Python's file says why it cannot be written
    ):
        torch.save(whole, file)


@contextmanager
def explain_write_errors(config: TrainConfig, what: str, step: int) -> Iterator[None]:
    """Says of a file that cannot be written what is left, and what to do.

    Raises:
        RuntimeError: In place of the error that came.
    """
    path = Path(config.out) / CHECKPOINT
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        left = f"the last checkpoint, {path}, is intact" if path.exists() else "there is none yet"
        raise RuntimeError(
            f"the {what} of step {step} cannot be written "
            f"({'no space is left' if full else error}); {left}. Make room, and go on with "
            "resume='auto'"
        ) from error


def _number(error: BaseException | None) -> int | None:
    """The system's number of an error, or of the one that it came from."""
    while error and getattr(error, "errno", None) is None:
        error = error.__cause__ or error.__context__
    return getattr(error, "errno", None)


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
        saved, found = asdict(TrainConfig()) | json.loads(state["config"]), state["format"]
        saved["data"] = OLD_NAMES.get(saved["data"], saved["data"])
    except Exception as error:  # torch raises what it likes on damaged files
        raise ValueError(
            f"{path} is no checkpoint of a run ({error}); move it away to start anew"
        ) from error
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found}, expected {_FORMAT}; train with the older one")
    now = json.loads(json.dumps(asdict(config)))
    changed = [name for name in now if name not in _FREE and saved[name] != now[name]]
    if changed:
        pairs = ", ".join(f"{name} was {saved[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{path} is of a run with other options: {pairs}; pass another out")
    return state


def write_metrics(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes a line of metrics for every epoch."""
    with atomic_write(Path(config.out) / METRICS) as temporary:
        lines = "".join(json.dumps(row) + "\n" for row in history)
        temporary.write_text(lines, encoding="utf-8")
