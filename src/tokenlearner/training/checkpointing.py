"""The checkpoint that a run goes on from: one file, written whole, from which no code is run."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing import active_children
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..data.config import FRAMES, IMG_SIZE, OLD_NAMES, is_in_files
from ..models.compilation import known_mode
from ..models.serialization import WEIGHTS
from ..utils.files import read_torch
from ..utils.io import FULL, atomic_write, check_output_folder, lock_folder, system_error
from ..utils.processors import is_main_process
from .config import TrainConfig
from .optim import moments_per_weight
from .paths import PATHS, absolute_options, is_same_path

CHECKPOINT = "checkpoint.pt"
_FREE = {  # options that may change from one part of a run to the next
    *("out", "root", "resume", "save_every", "trackers", "device", "workers", "max_broken", "nan"),
    *("download", "follow_links", "log_interval", "license"),
}
_FORMAT = 1
METRICS = "metrics.jsonl"
_WRITTEN = ("checkpoint.pt", "model.safetensors", "metrics.jsonl", "train.json", "calibration.json")


class TrainingInterrupted(RuntimeError):
    """A run that was stopped by a signal, and wrote a checkpoint."""

    def __init__(self, number: int, out: str, step: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {out} holds a checkpoint of step {step}, "
            "go on with resume='auto'"
        )
        self.signal = number


class StopSignal:
    """The number of the signal that the process got, or 0, and when it got it, in seconds."""

    signal = 0
    time = -math.inf


@contextmanager
def handle_signals() -> Iterator[StopSignal]:
    """Records SIGTERM and SIGINT in place of dying of them; at a second one the process ends.

    Launchers send SIGTERM to a process and to its group: two within a second count as one.
    """
    stop, before = StopSignal(), {}

    def record(number: int, frame: FrameType | None) -> None:
        at = monotonic()
        if not stop.signal:
            stop.signal, stop.time = number, at
        elif number == signal.SIGINT or at - stop.time > 1:
            for reader in active_children():  # they ignore both signals
                reader.kill()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, record)
        except ValueError:  # only the main thread can
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunFolder(ExitStack):
    """The folder of a run, in which no other process trains meanwhile.

    A folder that is there is locked at once, a new one when the run begins: what does not fit is
    refused before that, and leaves nothing.

    Args:
        config: Of the run.
        writes: Whether this process, among several that train together, writes.

    Raises:
        ValueError: Another process trains in it.
    """

    def __init__(self, config: TrainConfig, writes: bool):
        super().__init__()
        self.config, self.path, self.writes = config, Path(config.out), writes
        self.locked = False

    def __enter__(self) -> RunFolder:
        if self.path.is_dir():
            self._lock()
        return super().__enter__()

    def begin(self, resumed: bool) -> None:
        """Locks the folder, if it is not, before the first file is written."""
        self._lock()
        if self.writes and not resumed and (self.path / CHECKPOINT).exists():
            raise ValueError(f"{self.path} got a run of another process meanwhile; start again")

    def _lock(self) -> None:
        if self.writes and not self.locked:
            self.enter_context(lock_folder(self.path))
            self.locked = True


def check_run_folder(config: TrainConfig) -> None:
    """Checks that the folder can be written to and has no run, or with `resume` a checkpoint.

    Raises:
        ValueError: It cannot, there is a run already, or its checkpoint is missing.
    """
    out = Path(config.out)
    if is_main_process():
        check_output_folder(out)
    checkpoint, metrics = ((out / name).exists() for name in (CHECKPOINT, METRICS))
    if config.resume is None and (checkpoint or metrics):
        raise ValueError(
            f"{out} holds a run already; pass resume='auto' to go on with it, another out, or move "
            "it away"
        )
    if metrics and not checkpoint:
        raise ValueError(
            f"{out} holds a run without {CHECKPOINT} to go on from; pass another out, or move it "
            "away to start anew"
        )


def check_space(config: TrainConfig, model: nn.Module) -> None:
    """Checks that the files of a run fit on their disk: two checkpoints at once, and the model.

    Raises:
        ValueError: Too little is free.
    """
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    copies = 2 if config.ema_decay else 1
    checkpoint = copies * weights + moments_per_weight(config) * trained
    at_once = 2 if config.epochs != 1 or config.save_every else 1
    files = (Path(config.out) / name for name in (CHECKPOINT, WEIGHTS))
    present = sum(file.stat().st_size for file in files if file.is_file())
    check_output_folder(config.out, size=max(0, at_once * checkpoint + weights - present))


def remove_temporary_files(config: TrainConfig) -> None:
    """Removes partly written files of runs that were killed."""
    names = "|".join(re.escape(Path(name).stem) for name in _WRITTEN)
    endings = "|".join(re.escape(Path(name).suffix) for name in _WRITTEN)
    temporary = re.compile(rf"\.({names})\.\d+({endings})")
    for path in Path(config.out).glob(".*"):
        if temporary.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_checkpoint(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Writes `checkpoint.pt` in the run's folder; the one before stays until this is complete.

    Raises:
        RuntimeError: It cannot be written, as on a full disk; the one before stays.
    """
    whole = {"format": _FORMAT, "config": json.dumps(absolute_options(config)), **state}
    path = Path(config.out) / CHECKPOINT
    with (
        explain_write_errors(config, "checkpoint", state["step"]),
        atomic_write(path) as temporary,
        temporary.open("wb") as file,  # Python's file says why it cannot be written
    ):
        torch.save(whole, file)


@contextmanager
def explain_write_errors(config: TrainConfig, what: str, step: int) -> Iterator[None]:
    """Explains errors of writing a file: which checkpoint there is, and how to go on.

    Raises:
        RuntimeError: In place of the original error.
    """
    path = Path(config.out) / CHECKPOINT
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = system_error(error) in FULL
        left = f"the last checkpoint, {path}, is intact" if path.exists() else "there is none yet"
        raise RuntimeError(
            f"the {what} of step {step} cannot be written "
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
        state = read_torch(path)
        saved = asdict(TrainConfig()) | json.loads(state["config"])
        version = state["format"]
        saved["data"] = OLD_NAMES.get(saved["data"], saved["data"])
        saved["compile"] = known_mode(saved["compile"])
    except Exception as error:  # torch raises many kinds on damaged files
        raise ValueError(
            f"{path} is no checkpoint of a run ({error}); move it away to start anew"
        ) from error
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version}, expected {_FORMAT}; it is of a newer version"
        )
    now = _with_sizes(json.loads(json.dumps(asdict(config))))
    saved = _with_sizes(saved)
    changed = [
        name
        for name in now
        if name not in _FREE
        and saved[name] != now[name]
        and not (name in PATHS and is_same_path(saved, name, config.out, now[name]))
    ]
    if changed:
        pairs = ", ".join(f"{name} was {saved[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{path} is of a run with other options: {pairs}; pass another out")
    return state


def _with_sizes(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a run with the sizes that were used where they are None."""
    size = IMG_SIZE if is_in_files(options["data"]) else None
    sizes = {"frames": options["frames"] or FRAMES, "img_size": options["img_size"] or size}
    return options | sizes


def write_metrics(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes a line of metrics for every epoch."""
    with atomic_write(Path(config.out) / METRICS) as temporary:
        lines = "".join(json.dumps(row) + "\n" for row in history)
        temporary.write_text(lines, encoding="utf-8")
