"""The loop over steps, and everything that changes while a model trains."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import Batch, IterableDataset, LabeledDataset
from ..data.loader import epoch_keys, load_batches
from ..data.transforms import mixup_transform, train_transform
from ..evaluation.accuracy import MAX_NAMED
from ..layers.onednn import use_onednn
from ..models.compilation import compile_model
from ..utils.random import random_states, set_random_states
from ..utils.validation import plain_text, require, shortened
from .config import TrainConfig
from .distillation import Distillation
from .distributed import Distributed, full_state, set_full_state
from .losses import Objective
from .meter import EpochMeter, Report, StepRow, WarningRow
from .optim import make_average, make_optimizer, make_schedule

logger = logging.getLogger(__name__)


class Trainer:
    """The state that changes while a model trains.

    Losses stay on the device and are read every `log_interval` steps, before a state is saved and
    at the end of an epoch; with `nan="skip"` in every step.

    Args:
        config: The recipe.
        model: Its parameters that need gradients are trained.
        data: Training images, and labels where they count.
        report: Called with a `StepRow` whenever losses are read, and with a `WarningRow` for a
            step that is left out.
        distillation: The teacher, if there is one.
        distributed: This process; None makes one.

    Raises:
        ValueError: Something does not fit the recipe.
        RuntimeError: While it runs: the loss is not finite, or too many files are unreadable.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        data: LabeledDataset,
        report: Report = lambda row: None,
        distillation: Distillation | None = None,
        distributed: Distributed | None = None,
    ):
        self.config, self.model, self.data, self.report = config, model, data, report
        self.distributed = distributed or Distributed(config)
        self.accelerator: Any = self.distributed.accelerator
        self.steps_per_epoch = len(data) // config.batch_size
        self.total_steps = config.total_steps(self.steps_per_epoch)
        self.eval_interval = config.eval_interval(self.steps_per_epoch)
        self.transform = train_transform(config, data)
        self.mixup = mixup_transform(config, len(data.classes), config.seed)
        self.step = self.skipped_steps = 0
        self.unreadable: set[str] = set()
        self._named: set[str] = set()  # files that a warning has named, held-out ones too
        self.after_step: Callable[[], None] = lambda: None
        self.meter = EpochMeter()
        self._epoch_batches: Iterator[Batch] | None = None  # what is left of an epoch
        self._unread: list[tuple[int, Tensor]] = []  # steps, with loss and norm on the device
        self._loss = math.nan  # that was read last
        self.distributed.broadcast_parameters(model)
        self._whole_model = copy.deepcopy(model).cpu() if config.fsdp else None
        if config.onednn:
            for module in (model, *([distillation.teacher] if distillation else [])):
                use_onednn(module)
        if config.compile != "no":
            compile_model(model, config.compile)
        self.objective = self.distributed.prepare(Objective(config, model, distillation))
        self.optimizer = make_optimizer(config, model)
        self._prepared_optimizer = self.accelerator.prepare_optimizer(
            self.optimizer, device_placement=False
        )
        self.schedule = make_schedule(
            config, self.optimizer, self.total_steps, self.steps_per_epoch
        )
        self.schedule.step_update(0)
        self.average = make_average(config, model)
        self.distributed.set_rank_seed()

    @property
    def epochs_done(self) -> int:
        """Epochs of which every step has been made."""
        return self.step // self.steps_per_epoch

    @property
    def evaluations(self) -> int:
        """Evaluations that are due up to now."""
        return math.ceil(self.step / self.eval_interval)

    @property
    def is_eval_step(self) -> bool:
        """Whether an evaluation is due after the step that was made last."""
        return self.step % self.eval_interval == 0 or self.step == self.total_steps

    @property
    def is_log_step(self) -> bool:
        """Returns whether losses are reported after the step that was made last."""
        return self.step % self.config.log_interval == 0 or self.is_eval_step

    def train_epoch(self) -> dict[str, Any]:
        """Makes the steps that are left until an evaluation: of an epoch, or of a part of `steps`.

        Returns the training's part of an `EpochRow`, of all these steps, wherever they were cut
        off.
        """
        self.objective.train()
        start = time.perf_counter()
        for batch in self._batches():
            loaded = time.perf_counter()
            self._count_unreadable(batch)
            self._train_step(batch)
            if self.is_log_step:
                self._read_losses()
            end = time.perf_counter()
            self.meter.add_step(end - start, loaded - start)
            start = end
            if self.is_log_step:
                step, steps = self.step, self.total_steps
                self.report(StepRow(step=step, steps=steps, loss=self._loss, **self._rates()))
            if not self.is_eval_step:
                self.after_step()
        self.unreadable = self._all_unreadable()
        row, self.meter = self._epoch_row(), EpochMeter()
        return row

    def state(self) -> dict[str, Any]:
        """Returns all that the rest of a run depends on; every process has to call this."""
        self._read_losses()
        weights, optimizer = full_state(self.model, self.optimizer)
        return {
            "step": self.step,
            "images": len(self.data),
            "skipped": self.skipped_steps,
            "broken": sorted(self._all_unreadable()),
            "so_far": dict(vars(self.meter)),
            "model": weights,
            "optimizer": optimizer,
            "average": self.average and copy.deepcopy(self.average.state_dict()),
            "scaler": self._scaler and self._scaler.state_dict(),
            "random": self.distributed.gather(random_states()),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where the trainer was that gave this state.

        Raises:
            ValueError: It trained on more or fewer images.
        """
        require(
            state["images"] == len(self.data),
            f"the checkpoint is of a run on {state['images']} images, {self.data.name} has "
            f"{len(self.data)}; restore the data, or pass another out",
        )
        set_full_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.step, self.skipped_steps = state["step"], state["skipped"]
        self.unreadable = set(state["broken"])
        self.meter = EpochMeter(*state["so_far"].values())  # version 0.3 had other names
        self.schedule.step_update(self.step)
        for part, name in ((self.average, "average"), (self._scaler, "scaler")):
            if part:
                part.load_state_dict(state[name])
        set_random_states(state["random"][self.accelerator.process_index % len(state["random"])])

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the trained one, or the moving average of its weights."""
        return self.average.module if self.average else self.model

    def whole_model(self, state: dict[str, Any]) -> nn.Module:
        """Returns the model to save: `eval_model`, or a copy of one that is sharded.

        The copy is made from the `state` of now, in the first process.
        """
        if self._whole_model is None:
            return self.eval_model
        if state["model"]:
            self._whole_model.load_state_dict(state["model"])
        return self._whole_model

    @property
    def _scaler(self) -> Any:
        return self.accelerator.scaler

    def close(self) -> None:
        """Ends the processes that read what is left of an epoch."""
        self._epoch_batches = None

    def _batches(self) -> Iterator[Batch]:
        """Yields this process's part of what is left until an evaluation.

        Readers of an epoch that goes on after it are kept.
        """
        end = min(self.total_steps, (self.step // self.eval_interval + 1) * self.eval_interval)
        while self.step < end:
            begun, left = self.step, self.steps_per_epoch - self.step % self.steps_per_epoch
            if self._epoch_batches is None:
                self._epoch_batches = self._read_epoch()
            yield from itertools.islice(self._epoch_batches, min(left, end - begun))
            if self.step in (begun, begun + left):
                self.close()
            if self.step == begun:  # nothing could be read
                return

    def _read_epoch(self) -> Iterator[Batch]:
        """Yields this process's part of what is left of the epoch."""
        config, data, start = self.config, self.data, self.step % self.steps_per_epoch
        num_processes = self.accelerator.num_processes
        part = {"process": self.accelerator.process_index, "num_processes": num_processes}
        draw = {"seed": config.seed, "epoch": self.epochs_done}
        if isinstance(data, IterableDataset):
            share, workers = config.batch_size // num_processes, config.reading_workers
            batches = data.train_batches(self.transform, share, workers=workers, **draw, **part)
            # It cannot be entered in the middle: batches of steps that were made are dropped.
            return itertools.islice(batches, start, self.steps_per_epoch)
        return load_batches(
            data,
            epoch_keys(len(data), config.batch_size, start=start, **draw, **part),
            self.transform,
            workers=0 if data.in_memory and self.transform is None else config.reading_workers,
            replace_unreadable=True,
            pin=self.distributed.device.type == "cuda",
        )

    def _train_step(self, batch: Batch) -> None:
        """Makes a step of the optimizer, unless it is left out."""
        numbers = [self._backward(batch)]
        if not self._scaler:  # which looks for infinite gradients itself, and halves its scale
            numbers.append(self._clip(numbers[0]))
        self._unread.append((self.step + 1, torch.stack(numbers)))
        if self.config.nan == "stop" or self._read_losses():
            if self._scaler:
                self._clip(numbers[0])
            self._prepared_optimizer.step()
            if self.average:
                self.average.update(self.model)
        self.step += 1
        self.schedule.step_update(self.step)

    def _backward(self, batch: Batch) -> Tensor:
        """Computes gradients; returns the mean loss of this process's images, on the device."""
        device, parts = self.distributed.device, self.config.grad_accum_steps
        images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
        if self.mixup:
            images, labels = self.mixup(images, labels, self.step)
        total = torch.zeros((), device=device)
        self.optimizer.zero_grad()
        for number, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            last = number == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                with self.accelerator.autocast():
                    loss = self.objective(x, y) / parts
                total += loss.detach()
                self.accelerator.backward(loss)
        return total

    def _clip(self, like: Tensor) -> Tensor:
        """Clips the gradient; returns its norm before, on the device."""
        largest = self.config.clip_grad or math.inf
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), largest)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(like)

    def _read_losses(self) -> bool:
        """Reads losses and norms that are still on the device; every process has to call this.

        Returns whether all of them are finite.

        Raises:
            RuntimeError: One is not, and nan is "stop".
        """
        if not self._unread:
            return True
        numbers = torch.stack([numbers for _, numbers in self._unread])
        steps = [step for step, _ in self._unread]
        self._unread.clear()
        summed = self.accelerator.reduce(numbers, "sum")
        rows: list[list[float]] = (summed / self.accelerator.num_processes).tolist()
        for loss, *_ in rows:
            self.meter.add_loss(loss)
        self._loss = rows[-1][0]
        return all(self._is_finite(step, row) for step, row in zip(steps, rows, strict=True))

    def _is_finite(self, step: int, numbers: list[float]) -> bool:
        """Checks the loss and the norm of a step; one that is not finite ends the run, or warns."""
        for name, value in zip(("loss", "gradient's norm"), numbers, strict=False):
            if math.isfinite(value):
                continue
            if self.config.nan == "stop":
                raise RuntimeError(
                    f"the {name} is {value} at step {step} of {self.total_steps}; "
                    f"{self._last_checkpoint(step)}. Try a lower lr, or nan='skip'"
                )
            self.skipped_steps += 1
            self.report(WarningRow(warning=f"step {step} is left out: its {name} is {value}"))
            return False
        return True

    def _last_checkpoint(self, step: int) -> str:
        """Says which checkpoint a run leaves that stops in a step."""
        every = self.config.save_every or self.eval_interval
        if last := (step - 1) // every * every:
            return f"the last checkpoint in {self.config.out} is from step {last}"
        return f"there is no checkpoint in {self.config.out} yet"

    def _rates(self) -> dict[str, float]:
        lr = max(group["lr"] for group in self.optimizer.param_groups)  # the head's, of layer decay
        speed = self.meter.images_per_second(self.config.batch_size)
        return {"lr": lr, "images_per_second": speed}

    def _epoch_row(self) -> dict[str, Any]:
        meter = self.meter
        if not meter.finite_steps:
            raise RuntimeError(
                f"no step since the last evaluation, up to step {self.step}, had a finite loss; "
                f"{self._last_checkpoint(self.step)}. Try a lower lr"
            )
        counts = {"skipped_steps": self.skipped_steps, "broken": len(self.unreadable)}
        names = {"broken_files": sorted(self.unreadable)[:MAX_NAMED]} if self.unreadable else {}
        epochs = self.step / self.steps_per_epoch
        return {
            "epoch": int(epochs) if epochs.is_integer() else float(f"{epochs:.4g}"),
            "step": self.step,
            "train_loss": meter.loss_sum / meter.finite_steps,
            "train_seconds": meter.seconds,
            "waiting_percent": 100 * meter.data_seconds / meter.seconds,
            **self._rates(),
            **{name: count for name, count in counts.items() if count},
            **names,
        }

    def note_unreadable(self, names: Iterable[str]) -> None:
        """Warns of the files among these that no warning has named."""
        new = set(names) - self._named
        self._named |= new
        if new:
            logger.warning("left out: %s", plain_text(shortened(sorted(new))))

    def _count_unreadable(self, batch: Batch) -> None:
        self.note_unreadable(batch.unreadable)
        new = set(batch.unreadable) - self.unreadable
        self.unreadable |= new
        if new and len(self.unreadable) > self.config.max_broken:
            first = "; ".join(sorted(self.unreadable)[:5])
            raise RuntimeError(
                f"{len(self.unreadable)} files cannot be read, max_broken is "
                f"{self.config.max_broken}: {first}. Fix them, or raise max_broken"
            )

    def _all_unreadable(self) -> set[str]:
        return set().union(*self.distributed.gather(self.unreadable))
