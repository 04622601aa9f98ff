"""The training loop: a config, a data set and a named model become a checkpoint and its metrics."""

from __future__ import annotations

import logging
import math
import signal
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import IterableDataset, require_order
from ..data.factory import load_data
from ..evaluation.accuracy import eval_batch_size, mean_metrics, sum_metrics
from ..models.factory import load_model, save_model
from ..models.hub import model_card
from ..utils.io import atomic_write, write_json
from ..utils.validation import require
from .calibration import Calibration, split_held_out
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
from .distillation import Distillation
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
        held_out: The images of the evaluations, as the model takes them.
        kept: Index of the row in `history` that is the model's.
    """

    model: nn.Module
    checkpoint: Path
    history: list[dict[str, Any]]
    images: int
    host: nn.Module | None = None
    calibration: Calibration | None = None
    held_out: Any = None
    kept: int = -1


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
    data, held_out = _load_data(config)
    require(
        data.classes == held_out.classes,
        f"{data.name} has {len(data.classes)} classes to train on and {len(held_out.classes)} held "
        "out, or they have other names; make them the same",
    )
    if config.batch_size > len(data):
        raise ValueError(
            f"batch_size is {config.batch_size}, but {data.name} has {len(data)} to train on; pass "
            f"batch_size={len(data)} or less"
        )
    torch.manual_seed(config.seed)
    setup = prepare(config, data, held_out, distributed.device)
    if report is None or not distributed.accelerator.is_main_process:
        report = lambda row: None  # noqa: E731
    if folder.writes:
        check_space(config, setup.model)
    folder.begin(resumed=checkpoint is not None)
    with handle_signals() as stop:
        return _Run(config, distributed, setup, report, stop).run(checkpoint)


def _load_data(config: TrainConfig) -> tuple[Any, Any]:
    """Returns the images to train on, and those to evaluate on."""
    data = load_data(config, "train")
    if config.images:
        ordered = require_order(data, f"draw {config.images} images")
        require(
            config.images <= len(data),
            f"images is {config.images}, but {data.name} has {len(data)} to train on",
        )
        data = ordered.sample(config.images, config.seed)
    if not config.held_out:
        return data, load_data(config, "val")
    ordered = require_order(data, f"hold out {config.held_out:.0%} of its images")
    training, rest = split_held_out(len(data), config.held_out, config.seed)
    require(
        len(rest) > 0,
        f"held_out is {config.held_out}, but of {len(data)} images that is none; pass more",
    )
    return ordered.select(training), ordered.select(rest).with_split("val")


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
            while self.trainer.step < self.trainer.total_steps and not self._is_stalled():
                self._run_epoch()
        if (step := self.trainer.step) < self.trainer.total_steps:
            logger.info(
                "%s evaluations without a better one end the run at step %s", config.patience, step
            )
        if config.keep == "best":
            self._load_best()
        return TrainResult(
            self.model.eval(),
            self.out / "model.safetensors",
            self.history,
            len(self.data),
            setup.host,
            calibration,
            self.held_out,
            self._kept(self.history) - 1,
        )

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
        row |= {f"test_{name}": value for name, value in self._evaluate().items()}
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
                if self._kept(self.history) == len(self.history):
                    save_model(self.model, self.out)
                    self._write_card()
                write_metrics(self.config, self.history)

    def _is_stalled(self) -> bool:
        """Returns whether the last evaluations, as many as `patience`, were not the best."""
        since = len(self.history) - self._best(self.history)
        return self.distributed.any_rank(0 < self.config.patience <= since)

    def _kept(self, history: list[dict[str, Any]]) -> int:
        """Returns the number of the evaluation, from 1, whose model is kept; 0 before the first."""
        return len(history) if self.config.keep == "last" else self._best(history)

    def _best(self, history: list[dict[str, Any]]) -> int:
        """Returns the number of the best evaluation, from 1; 0 before the first."""
        errors = [row.get("test_distill_loss", math.inf) for row in history]
        if self.config.label_weight or not any(map(math.isfinite, errors)):  # of an older version
            errors = [-row["test_top1_percent"] for row in history]
        return errors.index(min(errors)) + 1 if errors else 0

    def _write_card(self) -> None:
        """Writes what was measured to the model card, unless someone else has written to it."""
        path, earlier = self.out / "README.md", self.history[: self._kept(self.history[:-1])]
        written = [self._card([]), self._card(earlier)]
        if path.read_text(encoding="utf-8") in written:
            with atomic_write(path) as temporary:
                temporary.write_text(self._card(self.history), encoding="utf-8")

    def _card(self, history: list[dict[str, Any]]) -> str:
        if not history:
            return model_card(self.model)
        config, row = self.config, history[-1]
        unit, loss = "step" if config.steps else "epoch", row.get("test_distill_loss")
        rows = {
            "data": f"{config.data}, {row['test_images']:,} held-out images",
            "top-1": f"{row['test_top1_percent']:.2f} %",
            "top-5": f"{row['test_top5_percent']:.2f} %",
            **({"loss against the teacher": f"{loss:.4f}"} if loss is not None else {}),
            unit: f"{row[unit]} of {getattr(config, f'{unit}s')}, the {config.keep} one",
        }
        return model_card(self.model, {"this model": rows})

    def _load_best(self) -> None:
        """Loads the weights that were kept; every process reads what the first one wrote."""
        self.accelerator.wait_for_everyone()
        self.model.load_state_dict(load_model(self.out).state_dict())

    def _evaluate(self) -> dict[str, Any]:
        """Evaluates the model on the held-out images, each process on its part."""
        data, model, distillation = self.held_out, self.trainer.eval_model, self.setup.distillation
        batch_size = eval_batch_size(data.shape, self.config.views * self.config.crops)
        if distillation:  # which keeps the tokens of all blocks, of two models
            batch_size = min(batch_size, self.config.batch_size)
        part = self.accelerator.process_index, self.accelerator.num_processes
        unreadable: list[str] = []
        forward = partial(self._distill, distillation) if distillation else None
        sums = sum_metrics(model, data, batch_size, *part, unreadable, forward)
        if not isinstance(data, IterableDataset):  # of which every process evaluates all
            sums: Any = self.accelerator.reduce(sums.to(self.distributed.device), "sum")
            unreadable = [name for names in self.distributed.gather(unreadable) for name in names]
        self.trainer.note_unreadable(unreadable)
        metrics = asdict(mean_metrics(sums := sums.cpu(), data, unreadable))
        if not metrics["broken"]:
            del metrics["broken_files"]
        if distillation:
            metrics["distill_loss"] = (sums[5] / sums[0]).item()
        return metrics

    def _distill(self, distillation: Distillation, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits, the mean over views if there are several, and the teacher's loss."""
        views = images.reshape(-1, *self.held_out.shape)
        logits, loss = distillation(self.trainer.eval_model, views)
        return logits.float().unflatten(0, (len(images), -1)).mean(1), loss

    def _report(self, row: dict[str, Any]) -> None:
        if "step" in row:
            self.distributed.track(row)
        self.report(row)
