"""The training loop: a config, a data set and a named model become a checkpoint and its metrics."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.dataset import IterableDataset, LabeledDataset, require_order
from ..data.factory import SPLITS, load_data
from ..evaluation.accuracy import Evaluation, eval_batch_size, mean_metrics, sum_metrics
from ..models.factory import save_model
from ..utils.io import write_json
from ..utils.validation import require
from .calibration import Calibration
from .checkpointing import (
    StopSignal,
    TrainingInterrupted,
    check_run_folder,
    explain_write_errors,
    handle_signals,
    read_checkpoint,
    remove_temporary_files,
    write_checkpoint,
    write_metrics,
)
from .config import TrainConfig
from .distributed import Distributed
from .setup import TrainingSetup, calibrate_inserted, prepare, read_calibration
from .trainer import Report, Trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the trained model and one row of metrics an epoch.

    Args:
        model: In evaluation mode.
        checkpoint: Its weights.
        history: A row of metrics for every epoch.
        images: Training images there were.
        host: With insert, the model as it was before.
        calibration: With insert, what calibrating did, if it was asked for.
    """

    model: nn.Module
    checkpoint: Path
    history: list[dict[str, Any]]
    images: int
    host: nn.Module | None = None
    calibration: Calibration | None = None


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Trains a model and writes it, with a line of metrics after every epoch.

    Nothing is written before the config, the data and the model have been found good. The same
    config gives the same weights on the same machine, also when the run was cut off and goes on
    with `resume="auto"`. Several processes that torchrun or `accelerate launch` started train
    together; the first one writes and reports.

    Args:
        config: What to train, on what, and how.
        report: Called after every step with `step`, `steps`, `loss`, `lr` and `images_per_second`,
            and after every epoch with its row of metrics; before that after every step of
            calibrating, without `lr`; with a `warning` where a step is left out.

    Returns:
        The model in evaluation mode, its checkpoint and the metrics.

    Raises:
        ValueError: The folder holds a run already, or a name or a number does not fit.
        RuntimeError: The loss is no longer finite, too many files are broken, or a checkpoint
            cannot be written; the last checkpoint is named, if there is one.
        Stopped: SIGTERM or SIGINT came; the run can be resumed. A RuntimeError too.
    """
    check_run_folder(config)
    engine = Distributed(config)
    saved = read_checkpoint(config)
    data, held_out = (load_data(config, part) for part in SPLITS)
    if config.images:
        data = require_order(data, f"draw {config.images} images").sample(
            config.images, config.seed
        )
    require(
        data.classes == held_out.classes,
        f"{data.name} trains on {len(data.classes)} classes and is judged by "
        f"{len(held_out.classes)}, or they have other names; make them the same",
    )
    if config.batch_size > len(data):
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has {len(data)}")
    torch.manual_seed(config.seed)
    start, report = prepare(config, data, engine.device), report or (lambda row: None)
    run = _Run(config, engine, held_out, report if engine.main else lambda row: None)
    with handle_signals() as asked:
        return run.all(start, data, saved, asked)


class _Run:
    """A run from its start, or from where it was cut off, to its end."""

    def __init__(
        self, config: TrainConfig, engine: Distributed, held_out: LabeledDataset, report: Report
    ):
        self.config, self.engine, self.held_out = config, engine, held_out
        self.report, self.out = report, Path(config.out)
        self.history: list[dict[str, Any]] = []

    def all(
        self,
        start: TrainingSetup,
        data: LabeledDataset,
        saved: dict[str, Any] | None,
        asked: StopSignal,
    ) -> TrainResult:
        config, calibrated = self.config, read_calibration(self.config)
        if self.engine.main:
            remove_temporary_files(config)
        if saved is None:
            calibrated = calibrate_inserted(config, start.model, data, self.report)
            if self.engine.main:
                with explain_write_errors(config, "recipe", 0):
                    write_json(self.out / "train.json", asdict(config))
                    if calibrated:
                        write_json(self.out / "calibration.json", asdict(calibrated))
        loop = Trainer(config, start.model, data, self._report_step, start.teaching, self.engine)
        if saved:
            loop.restore(saved)
            self.history = saved["history"]
            self._leave(loop, saved)
        loop.after_step = lambda: self._between(loop, asked)
        with self.engine.trackers():
            while loop.epochs_done < config.epochs:
                self._epoch(loop, asked)
        model, checkpoint = self.trained.eval(), self.out / "model.safetensors"
        seen = len(data), start.host, calibrated
        return TrainResult(model, checkpoint, self.history, *seen)

    def _epoch(self, loop: Trainer, asked: StopSignal) -> None:
        row = {"epoch": loop.epochs_done + 1, **loop.epoch()}
        row |= {f"test_{k}": v for k, v in asdict(self._judge(loop)).items()}
        self.history.append(row)
        self._leave(loop, self._save(loop))
        self.engine.track(row)
        self.report(row)
        if loop.epochs_done < self.config.epochs:
            self._stop_if_asked(loop, asked)

    def _between(self, loop: Trainer, asked: StopSignal) -> None:
        """What is done between two steps of an epoch."""
        every = self.config.save_every
        saved = every > 0 and loop.step % every == 0
        if saved:
            self._save(loop)
        self._stop_if_asked(loop, asked, saved)

    def _stop_if_asked(self, loop: Trainer, asked: StopSignal, saved: bool = True) -> None:
        if self.engine.agree(bool(asked.signal)):
            if not saved:
                self._save(loop)
            self.engine.accelerator.wait_for_everyone()  # the first is done with writing
            raise TrainingInterrupted(asked.signal or signal.SIGTERM, self.config.out, loop.step)

    def _save(self, loop: Trainer) -> dict[str, Any]:
        state = {**loop.state(), "history": self.history}
        if self.engine.main:
            write_checkpoint(self.config, state)
        return state

    def _leave(self, loop: Trainer, state: dict[str, Any]) -> None:
        """Writes what others read: the model and the metrics of the last whole epoch."""
        at_end_of_epoch = loop.epochs_done == len(self.history) and not loop.step % loop.per_epoch
        if not (self.history and at_end_of_epoch):
            return
        self.trained = loop.trained(state)
        if self.engine.main:
            with explain_write_errors(self.config, "model", loop.step):
                save_model(self.trained, self.out)
                write_metrics(self.config, self.history)

    def _judge(self, loop: Trainer) -> Evaluation:
        """What the model makes of the held-out images, each process of its part."""
        data, engine = self.held_out, self.engine
        part = engine.process, engine.num_processes
        squares = self.config.views * self.config.crops
        sums = sum_metrics(loop.judged, data, eval_batch_size(data.shape, squares), *part)
        if not isinstance(data, IterableDataset):  # each process evaluated all of a stream
            sums = engine.sum(sums.to(engine.device)).cpu()
        return mean_metrics(sums, data)

    def _report_step(self, row: dict[str, Any]) -> None:
        if "step" in row:
            self.engine.track(row)
        self.report(row)
