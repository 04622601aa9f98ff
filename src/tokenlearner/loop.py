"""The loop over steps, and everything that changes while a model trains."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import mixing, training_change
from .checks import require
from .distill import Distillation, output_of
from .engine import Engine, random_states, set_random_states, set_whole_state, whole_state
from .labelled import LabelledData
from .loader import Batch, epoch_keys, load_batches
from .recipe import TrainConfig

Report = Callable[[dict[str, Any]], None]


class Loop:
    """The state that changes while a model trains.

    Args:
        config: The recipe.
        model: What trains: its parameters that need gradients.
        data: Training pictures, and labels where they count.
        report: Called after every step.
        teaching: The teacher, if there is one.
        engine: This process; None makes one.

    Raises:
        ValueError: Something does not fit the recipe.
        RuntimeError: While it runs: the loss is not finite, or too many files are broken.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        data: LabelledData,
        report: Report = lambda row: None,
        teaching: Distillation | None = None,
        engine: Engine | None = None,
    ):
        self.config, self.model, self.data, self.report = config, model, data, report
        self.teaching, self.engine = teaching, engine or Engine(config)
        self.per_epoch = len(data) // config.batch_size
        self.steps = config.epochs * self.per_epoch
        self.change = training_change(config, data, config.crop_pct)
        self.mix = mixing(config, len(data.classes), config.seed)
        self.step = self.skipped = 0
        self.broken: set[str] = set()
        self.after_step: Callable[[], None] = lambda: None
        self._so_far = _blank()
        self.engine.alike(model)
        self._whole = copy.deepcopy(model).cpu() if config.fsdp else None
        self.running = self.engine.share_out(model)
        if config.compile:
            self.running.compile()
        self.optimizer = _optimizer(config, model)
        self._stepper = self.engine.accelerator.prepare_optimizer(
            self.optimizer, device_placement=False
        )
        self.schedule = _schedule(config, self.optimizer, self.steps, self.per_epoch)
        self.schedule.step_update(0)
        self.average = _average(config, model)

    @property
    def epochs_done(self) -> int:
        """Epochs of which every step has been made."""
        return self.step // self.per_epoch

    def epoch(self) -> dict[str, Any]:
        """Makes the steps that are left of an epoch.

        Returns the mean loss, the time, the speed and the share of the time in which the model
        waited for data; over the whole epoch, wherever it was cut off.
        """
        self.running.train()
        now, size = self._so_far, self.config.batch_size
        before = time.perf_counter()
        for batch in self._batches():
            waited = time.perf_counter()
            self._note_broken(batch)
            loss = self._update(batch)
            after = time.perf_counter()
            now["steps"] += 1
            now["loss"] += loss
            now["seconds"] += after - before
            now["waited"] += waited - before
            before = after
            self._report_step(loss, now["steps"] * size / now["seconds"])
            if self.step % self.per_epoch:  # after the last one the epoch is still to be judged
                self.after_step()
        self._so_far = _blank()
        self.broken = set().union(*self.engine.gather(self.broken))
        steps, seconds = now["steps"], now["seconds"]
        row = {"step": self.step, "train_loss": now["loss"] / steps, "train_seconds": seconds}
        row |= {"waiting_percent": 100 * now["waited"] / seconds}
        row |= self._rates(steps * size / seconds)
        return row | {
            name: count
            for name, count in (("skipped_steps", self.skipped), ("broken", len(self.broken)))
            if count
        }

    def state(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on; every process has to ask for it."""
        weights, optimizer = whole_state(self.running, self.optimizer)
        return {
            "step": self.step,
            "skipped": self.skipped,
            "broken": sorted(self.broken),
            "so_far": dict(self._so_far),
            "model": weights,
            "optimizer": optimizer,
            "average": self.average and self.average.state_dict(),
            "scaler": self._scaler and self._scaler.state_dict(),
            "random": self.engine.gather(random_states()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the loop was that gave this state."""
        set_whole_state(self.running, self.optimizer, state["model"], state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.broken, self._so_far = set(state["broken"]), dict(state["so_far"])
        self.schedule.step_update(self.step)
        for part, name in ((self.average, "average"), (self._scaler, "scaler")):
            if part:
                part.load_state_dict(state[name])
        set_random_states(state["random"][self.engine.process % len(state["random"])])

    @property
    def judged(self) -> nn.Module:
        """What is evaluated: the model, or the moving average of its weights."""
        return self.average.module if self.average else self.running

    def trained(self, state: dict[str, Any]) -> nn.Module:
        """The model, or the moving average of its weights.

        Of a model that is shared out, a whole copy from the `state` of now, in the first process.
        """
        if self.average:
            return self.average.module
        if self._whole is None:
            return self.model
        if state["model"]:
            self._whole.load_state_dict(state["model"])
        return self._whole

    @property
    def _scaler(self) -> Any:
        return self.engine.accelerator.scaler

    def _batches(self) -> Iterator[Batch]:
        """This process's part of what is left of the epoch."""
        config, engine = self.config, self.engine
        part = {"process": engine.process, "num_processes": engine.num_processes}
        if stream := getattr(self.data, "stream", None):
            return self._of_stream(stream, part)
        keys = epoch_keys(
            len(self.data),
            config.batch_size,
            seed=config.seed,
            epoch=self.epochs_done,
            start=self.step % self.per_epoch,
            **part,
        )
        in_memory = hasattr(self.data, "take") and self.change is None
        return load_batches(
            self.data,
            keys,
            self.change,
            workers=0 if in_memory else config.reading_workers,
            refill=True,
            pin=engine.device.type == "cuda",
        )

    def _of_stream(self, stream: Callable[..., Iterator[Batch]], part: Any) -> Iterator[Batch]:
        """A stream cannot be entered in the middle: what was seen is read and dropped."""
        config = self.config
        batches = stream(
            self.change,
            config.batch_size // self.engine.num_processes,
            epoch=self.epochs_done,
            seed=config.seed,
            workers=config.reading_workers,
            **part,
        )
        first = self.step % self.per_epoch
        for number, batch in zip(range(self.per_epoch), batches, strict=False):
            if number >= first:
                yield batch

    def _note_broken(self, batch: Batch) -> None:
        new = set(batch.broken) - self.broken
        self.broken |= new
        if new and len(self.broken) > self.config.max_broken:
            shown = "; ".join(sorted(self.broken)[:5])
            raise RuntimeError(
                f"{len(self.broken)} files cannot be read, max_broken is {self.config.max_broken}: "
                f"{shown}. Mend them, or raise max_broken"
            )

    def _update(self, batch: Batch) -> float:
        """One step of the optimiser; returns the mean loss over all processes."""
        device, accelerator = self.engine.device, self.engine.accelerator
        images, labels = batch.images.to(device), batch.labels.to(device)
        if self.mix:
            images, labels = self.mix(images, labels, self.step)
        parts = self.config.grad_accum_steps
        total = torch.zeros((), device=device)
        self.optimizer.zero_grad()
        for number, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            last = number == parts - 1
            with nullcontext() if last else accelerator.no_sync(self.running):
                with accelerator.autocast():
                    loss = self._loss(x, y) / parts
                total += loss.detach()
                accelerator.backward(loss)
        value = (self.engine.sum(total) / self.engine.num_processes).item()
        if self._is_usable(value):
            accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self._stepper.step()
            if self.average:
                self.average.update(self.model)
        self.step += 1
        self.schedule.step_update(self.step)
        return value

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the teacher teaches and what the labels say, as far as they count."""
        config, loss = self.config, torch.zeros((), device=images.device)
        if self.teaching:
            logits, taught = self.teaching(self.running, images)
            loss = loss + config.distill_loss_weight * taught
        else:
            logits = output_of(self.running(images))
        if config.label_weight:
            loss = loss + config.label_weight * label_loss(config, logits, labels)
        return loss

    def _is_usable(self, loss: float) -> bool:
        """Whether a loss is finite; if not, the run ends, or the step is left out and counted."""
        if math.isfinite(loss):
            return True
        if self.config.nan == "skip":
            self.skipped += 1
            self.report({"warning": f"step {self.step + 1} is left out: its loss is {loss}"})
            return False
        raise RuntimeError(
            f"the loss is {loss} at step {self.step + 1} of {self.steps}; {self._left()}. Try a "
            "lower lr, or nan='skip'"
        )

    def _left(self) -> str:
        """What a run that stops here leaves."""
        every = self.config.save_every or self.per_epoch
        if last := self.step // every * every:
            return f"the last checkpoint in {self.config.out} is from step {last}"
        return f"there is no checkpoint in {self.config.out} yet"

    def _report_step(self, loss: float, speed: float) -> None:
        self.report({"step": self.step, "steps": self.steps, "loss": loss} | self._rates(speed))

    def _rates(self, speed: float) -> dict[str, float]:
        lr = max(group["lr"] for group in self.optimizer.param_groups)  # the head's, of layer decay
        return {"lr": lr, "images_per_second": speed}


def label_loss(config: TrainConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of labels `b`, or of mixed ones `b classes`.

    Source: for "sigmoid", scenic `sigmoid_cross_entropy`: summed over classes, mean over pictures.
    """
    logits = logits.float()
    mixed = labels.ndim == 2
    if config.loss == "softmax":
        smoothing = 0.0 if mixed else config.smoothing  # mixed labels are smooth already
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if not mixed:
        smooth = config.smoothing
        labels = F.one_hot(labels, logits.shape[1]) * (1 - smooth) + smooth / logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return loss.sum(1).mean()


def _blank() -> dict[str, float]:
    """What an epoch adds up."""
    return {"steps": 0, "loss": 0.0, "seconds": 0.0, "waited": 0.0}


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    known: Any = list_optimizers()
    require(config.opt in known, f"opt is {config.opt!r}, expected one of: {', '.join(known)}")
    betas: dict[str, Any] = {"betas": tuple(config.betas)} if config.betas else {}
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **betas,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm refuses opt={config.opt!r} with these options: {error}") from error


def _schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int, per_epoch: int
) -> Any:
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler

    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * per_epoch)
    require(
        warmup < steps, f"warmup_steps is {warmup}, expected fewer than the {steps} steps there are"
    )
    falling = {"cosine": CosineLRScheduler, "linear": PolyLRScheduler}[config.sched]
    return falling(
        optimizer,
        t_initial=steps - warmup,
        warmup_t=warmup,
        warmup_prefix=True,  # the fall starts where the warm-up ends, at the full rate
        t_in_epochs=False,
        lr_min=config.min_lr,
        **({"power": 1.0} if config.sched == "linear" else {}),
    )


def _average(config: TrainConfig, model: nn.Module) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
