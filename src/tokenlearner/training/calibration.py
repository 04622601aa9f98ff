"""New learners fitted to an old host, without labels: `calibrate(insert(model), images)`.

A learner starts as noise, so a host on its tokens is much worse than it need be. Here the learners
are fitted so that later blocks compute from their tokens what they computed from all positions; on
demand the blocks behind them are fitted too, and those in front. The teacher is the host.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from ..layers.blocks import FusedBlock
from ..models.features import new_parameters, wrapped_blocks
from ..models.hosts import find_host
from ..models.insertion import remove
from ..utils.modules import clone_structure, eager_gradients, uncompiled
from ..utils.validation import check_above_zero, check_flag, check_from_zero, check_rate, require
from .distillation import mixed_blocks
from .fitting import Fit, FitConfig, Group, fit
from .meter import Report
from .teacher import TeacherCache

_FEW, _FOLDS = 40, 4  # images, of which a tenth would be too few to evaluate on
_MOST_EVALUATED = 512  # training images


@dataclass(frozen=True)
class Calibration:
    """The result of calibrating.

    Args:
        images: Images that the learners were fitted on.
        steps: Updates that were made.
        error_before: Share of the variance of the host's output, on held-out images, that the model
            left open before; noise may score above 1. See `TeacherCache.error`.
        error_after: The same afterwards.
        seconds: Time of the whole calibration.
        training_error: The same on images that the learners were fitted on, at most 512.
        held_out: Images that were held out; where all images were, in turn, all of them.
        best_step: The update after which the held-out error was lowest; its weights were kept.
    """

    images: int
    steps: int
    error_before: float
    error_after: float
    seconds: float
    training_error: float = float("nan")
    held_out: int = 0
    best_step: int = 0


@eager_gradients()
def calibrate(
    model: nn.Module,
    images: Tensor,
    *,
    tail: bool = False,
    steps: int = 300,
    batch_size: int = 64,
    lr: float = 3e-3,
    host_lr: float = 3e-4,
    front_lr: float = 0.0,
    views: int = 1,
    held_out: float = 0.1,
    patience: int = 10,
    ema_decay: float = 0.0,
    seed: int = 0,
    report: Report | None = None,
) -> Calibration:
    """Fits the learners of `model` to its host on images without labels; changes it in place.

    The teacher is the model without its learners, so this comes before any other training. A tenth
    of the images is held out: the weights of the update with the lowest error there are kept. Of
    fewer than 40 images each quarter is held out in turn, and then all are fitted. With elastic
    tokens each update is of all of them, of one, and of some number between.

    Args:
        model: A host with learned tokens. Without `tail` all of the host's parameters stay bit for
            bit, and without `front_lr` those in front of the first learner.
        images: Normalized images as the model takes them, `b c h w`, or clips: hundreds for the
            learners, thousands for the tail.
        tail: Fit all that runs behind the first learner too, once the learners were fitted alone
            (call it twice).
        steps: Updates at most.
        batch_size: Images an update.
        lr: Highest learning rate of learners and fusers; half precision is fitted by float32
            copies. It rises for a tenth of the steps, and then falls as a cosine.
        host_lr: The same of the host's parameters behind the first learner, for `tail`.
        front_lr: The same of those in front, which are run anew in every update then; 0 leaves
            them as they are, and their output is computed once.
        views: 1 is each image as it is; of more the others are crops of it, of at least 0.35 of its
            area, half of them mirrored.
        held_out: Share of the images to evaluate on; 0 makes all steps, and keeps the last.
        patience: Evaluations, of 20 within all steps, without a lower error that end it; 0 is all.
        ema_decay: Of a moving average of what is fitted, which is kept then; 0 is none.
        seed: Of the images' order, the views and what is held out.
        report: Called with a `CalibrationRow` after every step.

    Raises:
        ValueError: The model has no learned tokens, a number does not fit, or weights are quantized
            so that they cannot be fitted or no gradient passes.
        RuntimeError: The loss is no longer finite.

    >>> import timm
    >>> from tokenlearner import insert
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    >>> done = calibrate(insert(model, 2), torch.randn(64, 3, 32, 32), steps=20)
    >>> done.error_after < done.error_before
    True
    """
    model = uncompiled(model)
    wrapped = wrapped_blocks(model)
    if not wrapped:
        raise ValueError("this model has no learned tokens to calibrate; insert(model) adds them")
    require(not front_lr or tail, f"front_lr is {front_lr}; pass tail=True too, or leave it out")
    rates = Rates(lr, host_lr if check_flag("tail", tail) else 0, front_lr)
    config = FitConfig(steps, batch_size, ema_decay=ema_decay, patience=patience, seed=seed)
    check_rate(held_out, "held_out")
    start, first = time.perf_counter(), min(wrapped)
    cache = TeacherCache(
        remove(clone_structure(model)),
        images,
        first,
        whole=all(isinstance(block, FusedBlock) for block in wrapped.values()),
        batch_size=batch_size,
        views=views,
        seed=seed,
        shares_front=not front_lr,
        skipped=mixed_blocks(find_host(model)),
    )
    run = _Run(model, cache, rates, config)
    few = len(images) < _FEW and held_out > 0
    folds = [run.fold(i) for i in range(min(_FOLDS, len(images)))] if few else []
    training, evaluated = split_held_out(len(images), 0 if few else held_out, seed)
    sample = training[:_MOST_EVALUATED]
    before = cache.error(model, sample)
    done = run.fit(model, training, evaluated, report)
    after = cache.error(model, sample)
    fits = folds or ([done] if len(evaluated) else [])
    return Calibration(
        images=len(training),
        steps=done.steps,
        error_before=fmean(f.error_before for f in fits) if fits else before,
        error_after=fmean(f.error for f in fits) if fits else after,
        seconds=time.perf_counter() - start,
        training_error=after,
        held_out=len(images) if few else len(evaluated),
        best_step=done.best_step,
    )


@dataclass(frozen=True)
class _Run:
    """Fits a model, or copies of it, as one call of `calibrate` says."""

    model: nn.Module
    cache: TeacherCache
    rates: Rates
    config: FitConfig

    def fit(
        self, model: nn.Module, training: Tensor, held_out: Tensor, report: Report | None = None
    ) -> Fit:
        groups = self.rates.groups(model, self.cache.first)
        return fit(model, self.cache, groups, self.config, training, held_out, report)

    def fold(self, number: int) -> Fit:
        """Fits a copy without every fourth image, which it is evaluated on."""
        images = torch.arange(len(self.cache.images), device="cpu")
        is_held_out = images % _FOLDS == number
        return self.fit(copy.deepcopy(self.model), images[~is_held_out], images[is_held_out])


@dataclass(frozen=True)
class Rates:
    """Learning rates of the parts of a model with learned tokens; 0 leaves a part as it is.

    Args:
        new: Of learners and fusers.
        tail: Of the host behind the first learner.
        front: Of the host in front of it.

    Raises:
        ValueError: One is negative or not finite.
    """

    new: float
    tail: float = 0.0
    front: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero("lr", self.new)
        check_from_zero(self, "tail", "front")

    def groups(self, model: nn.Module, first: int) -> list[Group]:
        """Returns the parameters to fit with their rates."""
        new, tail = new_parameters(model), tail_parameters(model, first) if self.tail else []
        known = {id(p) for p in new}
        tail = [p for p in tail if id(p) not in known]
        known |= {id(p) for p in tail}
        front = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        parts = ((new, self.new), (tail, self.tail), (front if self.front else [], self.front))
        return [(parameters, rate) for parameters, rate in parts if parameters]


def split_held_out(images: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws which of so many images are fitted on, and which are held out; both in order."""
    order = torch.randperm(images, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    count = min(round(share * images), max(0, images - 2))
    return order[count:].sort().values, order[:count].sort().values


def tail_parameters(model: nn.Module, first: int) -> list[nn.Parameter]:
    """Returns the parameters of blocks from `first` on and of all that is registered behind them.

    That is the order in which hosts, and classifiers on top of them, run.
    """
    entered = next(find_host(model).blocks[first].parameters())
    parameters = list(model.parameters())
    start = next(i for i, parameter in enumerate(parameters) if parameter is entered)
    return [p for p in parameters[start:] if p.requires_grad]
