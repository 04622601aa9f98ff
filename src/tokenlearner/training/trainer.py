"""The loop over steps, and everything that changes while a model trains."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..data.dataset import Batch, IterableDataset, LabeledDataset
from ..data.loader import epoch_keys, load_batches
from ..data.transforms import mixup_transform, train_transform
from ..layers.onednn import use_onednn
from ..utils.random import random_states, set_random_states
from ..utils.validation import require
from .config import TrainConfig
from .distillation import Distillation
from .distributed import Distributed, full_state, set_full_state
from .objective import Objective, make_average, make_optimizer, make_schedule

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """The state that changes while a model trains.

    Args:
        config: The recipe.
        model: What trains: its parameters that need gradients.
        data: Training images, and labels where they count.
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
        data: LabeledDataset,
        report: Report = lambda row: None,
        teaching: Distillation | None = None,
        engine: Distributed | None = None,
    ):
        self.config, self.model, self.data, self.report = config, model, data, report
        self.engine = engine or Distributed(config)
        self.per_epoch = len(data) // config.batch_size
        self.steps = config.epochs * self.per_epoch
        self.transform = train_transform(config, data, config.crop_pct)
        self.mix = mixup_transform(config, len(data.classes), config.seed)
        self.step = self.skipped = 0
        self.broken: set[str] = set()
        self.after_step: Callable[[], None] = lambda: None
        self._so_far = _blank()
        self.engine.alike(model)
        self._whole = copy.deepcopy(model).cpu() if config.fsdp else None
        if config.onednn:
            for one in (model, *([teaching.teacher] if teaching else [])):
                use_onednn(one)
        if config.compile:
            model.compile()
        self.running = self.engine.share_out(Objective(config, model, teaching))
        self.optimizer = make_optimizer(config, model)
        self._stepper = self.engine.accelerator.prepare_optimizer(
            self.optimizer, device_placement=False
        )
        self.schedule = make_schedule(config, self.optimizer, self.steps, self.per_epoch)
        self.schedule.step_update(0)
        self.average = make_average(config, model)
        self.engine.part_ways()

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
            now["usable"] += math.isfinite(loss)
            now["loss"] += loss if math.isfinite(loss) else 0.0
            now["seconds"] += after - before
            now["waited"] += waited - before
            before = after
            self._report_step(loss, now["steps"] * size / now["seconds"])
            if self.step % self.per_epoch:  # after the last one the epoch is still to be judged
                self.after_step()
        self._so_far = _blank()
        self.broken = set().union(*self.engine.gather(self.broken))
        steps, seconds = now["steps"], now["seconds"]
        if not now["usable"]:
            raise RuntimeError(
                f"every step of the epoch that ends with step {self.step} was left out, since its "
                f"loss was not finite; {self._left()}. Try a lower lr"
            )
        mean = now["loss"] / now["usable"]
        row = {"step": self.step, "train_loss": mean, "train_seconds": seconds}
        row |= {"waiting_percent": 100 * now["waited"] / seconds}
        row |= self._rates(steps * size / seconds)
        return row | {
            name: count
            for name, count in (("skipped_steps", self.skipped), ("broken", len(self.broken)))
            if count
        }

    def state(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on; every process has to ask for it."""
        weights, optimizer = full_state(self.model, self.optimizer)
        return {
            "step": self.step,
            "images": len(self.data),
            "skipped": self.skipped,
            "broken": sorted(set().union(*self.engine.gather(self.broken))),
            "so_far": dict(self._so_far),
            "model": weights,
            "optimizer": optimizer,
            "average": self.average and copy.deepcopy(self.average.state_dict()),
            "scaler": self._scaler and self._scaler.state_dict(),
            "random": self.engine.gather(random_states()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the loop was that gave this state.

        Raises:
            ValueError: It trained on more or fewer images.
        """
        require(
            state["images"] == len(self.data),
            f"the checkpoint is of a run on {state['images']} images, {self.data.name} has "
            f"{len(self.data)} now; bring back what there was, or pass another out",
        )
        set_full_state(self.model, self.optimizer, state["model"], state["optimizer"])
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
        return self.average.module if self.average else self.model

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
        if isinstance(self.data, IterableDataset):
            return self._of_stream(self.data, part)
        keys = epoch_keys(
            len(self.data),
            config.batch_size,
            seed=config.seed,
            epoch=self.epochs_done,
            start=self.step % self.per_epoch,
            **part,
        )
        in_memory = self.data.in_memory and self.transform is None
        return load_batches(
            self.data,
            keys,
            self.transform,
            workers=0 if in_memory else config.reading_workers,
            replace_unreadable=True,
            pin=engine.device.type == "cuda",
        )

    def _of_stream(self, data: IterableDataset, part: Any) -> Iterator[Batch]:
        """A stream cannot be entered in the middle: what was seen is read and dropped."""
        config = self.config
        batches = data.train_batches(
            self.transform,
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
        new = set(batch.unreadable) - self.broken
        self.broken |= new
        if new and len(self.broken) > self.config.max_broken:
            shown = "; ".join(sorted(self.broken)[:5])
            raise RuntimeError(
                f"{len(self.broken)} files cannot be read, max_broken is {self.config.max_broken}: "
                f"{shown}. Mend them, or raise max_broken"
            )

    def _update(self, batch: Batch) -> float:
        """One step of the optimizer; returns the mean loss over all processes."""
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
                    loss = self.running(x, y) / parts
                total += loss.detach()
                accelerator.backward(loss)
        value = (self.engine.sum(total) / self.engine.num_processes).item()
        if self._is_usable("loss", value) and self._can_clip():
            self._stepper.step()
            if self.average:
                self.average.update(self.model)
        self.step += 1
        self.schedule.step_update(self.step)
        return value

    def _can_clip(self) -> bool:
        """Clips the gradient; whether its norm is one to go by."""
        clip, parameters = self.engine.accelerator.clip_grad_norm_, self.model.parameters()
        norm: Any = clip(parameters, self.config.clip_grad or math.inf)
        if self._scaler:  # which looks for itself, and halves its scale
            return True
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self._is_usable("gradient's norm", float(whole))

    def _is_usable(self, name: str, value: float) -> bool:
        """Whether a number is finite; if not, the run ends, or the step is left out and counted."""
        if math.isfinite(value):
            return True
        if self.config.nan == "skip":
            self.skipped += 1
            self.report({"warning": f"step {self.step + 1} is left out: its {name} is {value}"})
            return False
        raise RuntimeError(
            f"the {name} is {value} at step {self.step + 1} of {self.steps}; {self._left()}. Try a "
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


def _blank() -> dict[str, float]:
    """What an epoch adds up."""
    return {"steps": 0, "usable": 0, "loss": 0.0, "seconds": 0.0, "waited": 0.0}
