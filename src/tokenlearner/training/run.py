"""The training loop: a config, a data set and a named model become a checkpoint and its metrics."""

from __future__ import annotations

import logging
import signal
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.dataset import IterableDataset, require_order
from ..data.factory import load_data
from ..evaluation.accuracy import Evaluation, eval_batch_size, mean_metrics, sum_metrics
from ..models.factory import load_model, save_model
from ..models.hub import model_card
from ..utils.io import atomic_write, write_json
from ..utils.validation import require
from .calibration import Calibration
from .checkpointing import (
    RunFolder,
    StopSignal,
    TrainingInterrupted,
    check_run_folder,
    check_space,
    explain_write_errors,
    handle_signals,
    read_checkpoint,
    remove_temporary_files,
    write_checkpoint,
    write_metrics,
)
from .config import TrainConfig
from .distributed import Distributed
from .meter import Report
from .paths import absolute_options
from .setup import TrainingSetup, calibrate_inserted, prepare, read_calibration, with_sizes
from .trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The trained model and the metrics of its run.

    Args:
        model: In evaluation mode.
        checkpoint: File of its weights.
        history: An `EpochRow` for every evaluation.
        images: Number of training images.
        host: With insert, the model before inserting.
        calibration: With insert, the result of calibrating, if there was any.
    """

    model: nn.Module
    checkpoint: Path
    history: list[dict[str, Any]]
    images: int
    host: nn.Module | None = None
    calibration: Calibration | None = None


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Trains a model and writes it, with a line of metrics after every evaluation.

    Nothing is written before the config, the data and the model have been checked. The same
    config gives the same weights on the same machine, also when the run was cut off and goes on
    with `resume="auto"`. Several processes that torchrun or `accelerate launch` started train
    together; the first one writes and reports.

    Args:
        config: What to train, on what, and how.
        report: Called with a row (`tokenlearner.training.meter`): `CalibrationRow` after every
            step of calibrating, `StepRow` every `log_interval` steps, `EpochRow` after every
            evaluation, `WarningRow` for a step that is left out.

    Returns:
        The model in evaluation mode, its checkpoint and the metrics.

    Raises:
        ValueError: The folder holds a run already, another process trains in it, it cannot be
            written to or is too small, or a name or a number does not fit.
        RuntimeError: The loss is no longer finite, too many files are unreadable, or a checkpoint
            cannot be written; the last checkpoint is named, if there is one.
        TrainingInterrupted: After SIGTERM or SIGINT; the run can be resumed. A RuntimeError too.
    """
    check_run_folder(config)
    config = with_sizes(config)
    distributed = Distributed(config)
    with RunFolder(config, distributed.accelerator.is_main_process) as folder:
        return _train(config, report, distributed, folder)


def _train(
    config: TrainConfig, report: Report | None, distributed: Distributed, folder: RunFolder
) -> TrainResult:
    checkpoint = read_checkpoint(config)
    data, held_out = (load_data(config, split) for split in ("train", "val"))
    if config.images:
        ordered = require_order(data, f"draw {config.images} images")
        require(
            config.images <= len(data),
            f"images is {config.images}, but {data.name} has {len(data)} to train on",
        )
        data = ordered.sample(config.images, config.seed)
    require(
        data.classes == held_out.classes,
        f"{data.name} has {len(data.classes)} classes to train on and {len(held_out.classes)} held "
        "out, or they have other names; make them the same",
    )
    if config.batch_size > len(data):
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has {len(data)}")
    torch.manual_seed(config.seed)
    setup = prepare(config, data, held_out, distributed.device)
    if report is None or not distributed.accelerator.is_main_process:
        report = lambda row: None  # noqa: E731
    if folder.writes:
        check_space(config, setup.model)
    folder.begin(resumed=checkpoint is not None)
    with handle_signals() as stop:
        return _Run(config, distributed, setup, report, stop).run(checkpoint)


@dataclass
class _Run:
    """A training run, its evaluations and what it writes."""

    config: TrainConfig
    distributed: Distributed
    setup: TrainingSetup
    report: Report
    stop: StopSignal

    def run(self, checkpoint: dict[str, Any] | None) -> TrainResult:
        config, setup = self.config, self.setup
        self.data, self.held_out = setup.data, setup.held_out
        self.accelerator, self.out = self.distributed.accelerator, Path(config.out)
        self.history: list[dict[str, Any]] = []
        if self.accelerator.is_main_process:
            remove_temporary_files(config)
        calibration = read_calibration(config) if checkpoint else self._calibrate()
        self.trainer = Trainer(
            config, setup.model, self.data, self._report, setup.distillation, self.distributed
        )
        if checkpoint:
            self.trainer.load_state(checkpoint)
            logger.info("%s goes on from step %s", self.out, self.trainer.step)
            self.history = checkpoint["history"]
            self._write_model(checkpoint)
        self.trainer.after_step = self._after_step
        with self.distributed.trackers(), closing(self.trainer):
            while self.trainer.step < self.trainer.total_steps:
                self._run_epoch()
        path = self.out / "model.safetensors"
        model = self._best_model().eval() if config.keep == "best" else self.model.eval()
        return TrainResult(model, path, self.history, len(self.data), setup.host, calibration)

    def _calibrate(self) -> Calibration | None:
        """Calibrates inserted learners, and writes how the run began."""
        calibration = calibrate_inserted(self.config, self.setup.model, self.data, self.report)
        if self.accelerator.is_main_process:
            with explain_write_errors(self.config, "recipe", 0):
                write_json(self.out / "train.json", absolute_options(self.config))
                if calibration:
                    write_json(self.out / "calibration.json", asdict(calibration))
        return calibration

    def _run_epoch(self) -> None:
        row = self.trainer.train_epoch()
        metrics = asdict(self._evaluate())
        if not metrics["broken"]:
            del metrics["broken_files"]
        row |= {f"test_{name}": value for name, value in metrics.items()}
        self.history.append(row)
        self._write_model(self._save())
        self.distributed.track(row)
        self.report(row)
        if self.trainer.step < self.trainer.total_steps:
            self._stop_if_signaled(saved=True)

    def _after_step(self) -> None:
        """Saves and stops, as is due, between two steps of an epoch."""
        every, step = self.config.save_every, self.trainer.step
        saved = every > 0 and step % every == 0
        if saved:
            self._save()
        if self.accelerator.num_processes == 1 or self.trainer.is_log_step:
            self._stop_if_signaled(saved)  # several processes wait for each other to find out

    def _stop_if_signaled(self, saved: bool) -> None:
        if self.distributed.any_rank(bool(self.stop.signal)):
            if not saved:
                self._save()
            self.accelerator.wait_for_everyone()  # until the first has written
            number, step = self.stop.signal or signal.SIGTERM, self.trainer.step
            raise TrainingInterrupted(number, self.config.out, step)

    def _save(self) -> dict[str, Any]:
        state = {**self.trainer.state(), "history": self.history}
        if self.accelerator.is_main_process:
            write_checkpoint(self.config, state)
        return state

    def _write_model(self, state: dict[str, Any]) -> None:
        """Writes the model and the metrics, if this is a state that was evaluated."""
        trainer = self.trainer
        if not trainer.is_eval_step or trainer.evaluations != len(self.history):
            return
        self.model = trainer.whole_model(state)
        if self.accelerator.is_main_process:
            with explain_write_errors(self.config, "model", trainer.step):
                if self._kept_epoch(self.history) == len(self.history):
                    save_model(self.model, self.out)
                    self._write_card()
                write_metrics(self.config, self.history)

    def _kept_epoch(self, history: list[dict[str, Any]]) -> int:
        """Returns the number of the epoch, from 1, whose model is kept; 0 before the first."""
        if self.config.keep == "last" or not history:
            return len(history)
        accuracies = [row["test_top1_percent"] for row in history]
        return accuracies.index(max(accuracies)) + 1

    def _write_card(self) -> None:
        """Writes what was measured to the model card, unless someone else has written to it."""
        path, earlier = self.out / "README.md", self.history[: self._kept_epoch(self.history[:-1])]
        written = [self._card([]), self._card(earlier)]
        if path.read_text(encoding="utf-8") in written:
            with atomic_write(path) as temporary:
                temporary.write_text(self._card(self.history), encoding="utf-8")

    def _card(self, history: list[dict[str, Any]]) -> str:
        if not history:
            return model_card(self.model)
        config, row = self.config, history[-1]
        unit = "step" if config.steps else "epoch"
        rows = {
            "data": f"{config.data}, {row['test_images']:,} held-out images",
            "top-1": f"{row['test_top1_percent']:.2f} %",
            "top-5": f"{row['test_top5_percent']:.2f} %",
            unit: f"{row[unit]} of {getattr(config, f'{unit}s')}, the {config.keep} one",
        }
        return model_card(self.model, {"this model": rows})

    def _best_model(self) -> nn.Module:
        """Returns the model that was kept; every process reads what the first one wrote."""
        self.accelerator.wait_for_everyone()
        model = load_model(self.out)
        return model.to(next(self.model.parameters()).device)

    def _evaluate(self) -> Evaluation:
        """Evaluates the model on the held-out images, each process on its part."""
        data, model = self.held_out, self.trainer.eval_model
        batch_size = eval_batch_size(data.shape, self.config.views * self.config.crops)
        part = self.accelerator.process_index, self.accelerator.num_processes
        unreadable: list[str] = []
        sums = sum_metrics(model, data, batch_size, *part, unreadable)
        if not isinstance(data, IterableDataset):  # of which every process evaluates all
            sums: Any = self.accelerator.reduce(sums.to(self.distributed.device), "sum")
            unreadable = [name for names in self.distributed.gather(unreadable) for name in names]
        self.trainer.note_unreadable(unreadable)
        return mean_metrics(sums.cpu(), data, unreadable)

    def _report(self, row: dict[str, Any]) -> None:
        if "step" in row:
            self.distributed.track(row)
        self.report(row)
