"""New learners fitted to an old host, without labels: `calibrate(insert(model), images)`.

A learner starts as noise, so a host on its tokens is much worse than it need be. Here the learners,
and only they, are fitted so that later blocks compute from their tokens what they computed from all
positions. A few hundred images and seconds to minutes are enough; the host's weights stay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.blocks import FusedBlock
from ..models.features import wrapped_blocks
from ..models.hosts import Place, find_host
from ..models.insertion import remove
from ..models.outputs import first_tensor, summarize_tokens
from ..utils.modules import check_plain, clone_structure, eager_gradients, training_mode, uncompiled
from ..utils.validation import check_above_zero, check_count, check_flag, require
from .distillation import (
    BlockOutputs,
    HostFinder,
    feature_loss,
    forward_with_features,
    mixed_blocks,
    output_loss,
)
from .meter import CalibrationRow, Report
from .optim import MasterWeights


@dataclass(frozen=True)
class Calibration:
    """The result of calibrating.

    Args:
        images: Images that the learners were fitted on.
        steps: Updates of the learners.
        error_before: Share of the variance of later blocks' features that the model did not
            reproduce, as `feature_loss` counts it; noise may score above 1.
        error_after: The same afterwards, on the same images.
        seconds: Time of the whole calibration.
    """

    images: int
    steps: int
    error_before: float
    error_after: float
    seconds: float


@eager_gradients()
def calibrate(
    model: nn.Module,
    images: Tensor,
    *,
    tail: bool = False,
    steps: int = 300,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    report: Report | None = None,
) -> Calibration:
    """Fits the learners of `model` to its host on images without labels; changes it in place.

    The teacher is the model without its learners, so this comes before any other training. Blocks
    in front of the first learner run once; only their output is kept, `n c` floats an image.

    Args:
        model: A host with learned tokens. What runs before them stays bit for bit; without `tail`
            so do all of the host's parameters.
        images: A few hundred normalized images as the model takes them, `b c h w`, or clips.
        tail: Fit all that runs behind the first learner too, which takes more images, a lower
            `lr` and a call without it before: the cheapest way to distil on a CPU.
        steps: Updates.
        batch_size: Images an update.
        lr: Highest learning rate of Adam, which falls to 0 as a cosine. Learners of half
            precision are fitted by float32 copies.
        seed: Of the images' order.
        report: Called with a `CalibrationRow` after every step.

    Raises:
        ValueError: The model has no learned tokens, a number does not fit, or weights are quantized
            so that they cannot be fitted or no gradient passes.
        RuntimeError: The loss is no longer finite.

    >>> import timm
    >>> from tokenlearner import insert
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    >>> done = calibrate(insert(model, 2), torch.randn(8, 3, 32, 32), steps=5)
    >>> done.error_after < done.error_before
    True
    """
    model = uncompiled(model)
    wrapped = wrapped_blocks(model)
    if not wrapped:
        raise ValueError("this model has no learned tokens to calibrate; insert(model) adds them")
    _check_numbers(steps, lr)
    start, first = time.perf_counter(), min(wrapped)
    host = remove(clone_structure(model))
    whole = all(isinstance(block, FusedBlock) for block in wrapped.values())
    mixed = mixed_blocks(find_host(model))
    cache = TeacherCache(host, images, first, whole=whole, batch_size=batch_size, skipped=mixed)
    before = cache.error(model)
    parameters = (
        tail_parameters(model, first) if check_flag("tail", tail) else new_parameters(model)
    )
    cache.fit(model, parameters, steps=steps, lr=lr, seed=seed, report=report)
    after = cache.error(model)
    return Calibration(len(images), steps, before, after, time.perf_counter() - start)


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that `insert` added: those of learners and fusers."""
    parts = [[b.learner, getattr(b, "fuser", None)] for b in wrapped_blocks(model).values()]
    return [p for pair in parts for part in pair if part is not None for p in part.parameters()]


def tail_parameters(model: nn.Module, first: int) -> list[nn.Parameter]:
    """Returns the parameters of blocks from `first` on and of all that is registered behind them.

    That is the order in which hosts, and classifiers on top of them, run.
    """
    entered = next(find_host(model).blocks[first].parameters())
    parameters = list(model.parameters())
    start = next(i for i, parameter in enumerate(parameters) if parameter is entered)
    return [p for p in parameters[start:] if p.requires_grad]


class TeacherCache:
    """The features and outputs of a host on images, for students that share its first blocks.

    The student's blocks in front of `first` have to be the host's: they are not run again.

    Args:
        host: The teacher.
        images: As in `calibrate`.
        first: The first block in which student and teacher differ.
        whole: Compare all tokens behind the last block too; for students that keep all positions.
        batch_size: Images at a time.
        skipped: Blocks behind which features are not compared, see `mixed_blocks`.

    Raises:
        ValueError: There are fewer than 2 images.
    """

    def __init__(
        self,
        host: nn.Module,
        images: Tensor,
        first: int,
        *,
        whole: bool = False,
        batch_size: int = 64,
        skipped: Collection[int] = (),
    ):
        check_count("batch_size", batch_size, least=2)  # one image has no variance
        if not isinstance(images, Tensor) or len(images) < 2:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images is {got}, expected a tensor of 2 images or more, b c h w")
        require(bool((images != images[:1]).any()), "images are all the same; pass different ones")
        self.images = images.clone() if images.is_inference() else images
        self.first, self.whole, self.skipped = first, whole, skipped
        self.batch_size, self.parts = (
            batch_size,
            torch.arange(len(images), device="cpu").split(batch_size),
        )
        self._find_student, self._place = HostFinder(), find_host(host)
        self._front: _CachedBlocks | None = None
        self.features, self.output = self._run_teacher(host)

    def run(self, student: nn.Module, index: Tensor) -> BlockOutputs:
        """Runs a student on some of the images, from block `first` on."""
        images, place = self.images[index], self._find_student(student)
        if self._front is None:
            return forward_with_features(student, images, 0, place, self.skipped)
        with _replaced_front(place, self.first, self._front.select(index)):
            return forward_with_features(student, images, self.first, place, self.skipped)

    def losses(self, student: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses of a student's features and of its output on some of the images."""
        features, output = self._compared(self.run(student, index))
        return (
            feature_loss(features, [layer[index] for layer in self.features]),
            output_loss(output, self.output[index], student),
        )

    @torch.no_grad()
    def error(self, student: nn.Module) -> float:
        """Returns the loss of a student's features on all images together."""
        with training_mode(student, training=False):
            features, _ = _concatenate([self._compared(self.run(student, p)) for p in self.parts])
        return feature_loss(features, self.features).item()

    def fit(
        self,
        student: nn.Module,
        parameters: list[nn.Parameter],
        *,
        steps: int,
        lr: float,
        seed: int = 0,
        report: Report | None = None,
    ) -> None:
        """Fits parameters of a student, in evaluation mode; arguments as in `calibrate`.

        Raises:
            ValueError: A number does not fit.
        """
        _check_numbers(steps, lr)
        for parameter in parameters:
            check_plain("a weight to fit", parameter, "calibrate")
        master = MasterWeights(parameters)
        optimizer = torch.optim.Adam(master.weights, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order, start = torch.Generator("cpu").manual_seed(seed), time.perf_counter()
        with training_mode(student, training=False), _trainable(student, parameters):
            for step in range(1, steps + 1):
                drawn = torch.randperm(len(self.images), generator=order, device="cpu")
                index = drawn[: self.batch_size]
                loss = torch.stack(self.losses(student, index)).sum()
                _check_finite(value := loss.item(), step, steps)
                loss.backward()
                if step == 1 and value:
                    _check_gradients(parameters)
                master.step(optimizer)
                schedule.step()
                speed = step * len(index) / (time.perf_counter() - start)
                if report:
                    report(
                        CalibrationRow(step=step, steps=steps, loss=value, images_per_second=speed)
                    )

    @torch.no_grad()
    def _run_teacher(self, host: nn.Module) -> tuple[list[Tensor], Tensor]:
        """Runs the host on all images; keeps what enters block `first`."""
        raw: list[Any] = []
        last = list(self._place.blocks)[: self.first][-1:]  # in front of `first`, if any is
        hooks = [b.register_forward_hook(lambda _, __, out: raw.append(out)) for b in last]
        try:
            with training_mode(host, training=False):
                runs = [
                    self._compared(
                        forward_with_features(
                            host, self.images[part], self.first, self._place, self.skipped
                        )
                    )
                    for part in self.parts
                ]
        finally:
            for hook in hooks:
                hook.remove()
        if raw:
            tokens = torch.cat([first_tensor(out) for out in raw])
            self._front = _CachedBlocks(tokens, isinstance(raw[0], tuple))
        return _concatenate(runs)

    def _compared(self, run: BlockOutputs) -> tuple[list[Tensor], Tensor]:
        """Returns each block's summary, with `whole` all tokens of the last one, and the output."""
        place = self._place
        features = [
            summarize_tokens(tokens, place.num_prefix_tokens, place.pools_positions)
            for tokens in run.features
        ]
        return [*features, run.features[-1]] if self.whole else features, run.output


def _concatenate(runs: list[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Concatenates features and outputs of several batches."""
    features, outputs = zip(*runs, strict=True)
    return [torch.cat(layer) for layer in zip(*features, strict=True)], torch.cat(outputs)


def _check_finite(loss: float, step: int, steps: int) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss} at step {step} of {steps} of calibrating; insert anew, and try a "
            "lower lr"
        )


def _check_gradients(parameters: list[nn.Parameter]) -> None:
    if not any(p.grad is not None and p.grad.any() for p in parameters):
        raise ValueError(
            "no gradient comes back to the learners through the blocks behind them, as where these "
            "round their inputs to int8; calibrate the model before it is quantized"
        )


def _check_numbers(steps: int, lr: float) -> None:
    check_count("steps", steps)
    check_above_zero("lr", lr)


@contextmanager
def _trainable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Lets gradients go to some of the parameters only; restores all gradients afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


class _CachedBlocks(nn.Module):
    """Stands for blocks that have run already: returns what the last of them returned.

    A module, not a hook, so that a host that runs blocks again in the backward pass (gradient
    checkpointing) finds it too. Older transformers return tokens in a tuple.
    """

    def __init__(self, tokens: Tensor, in_tuple: bool):
        super().__init__()
        self.tokens, self.in_tuple = tokens, in_tuple

    def select(self, index: Tensor) -> _CachedBlocks:
        """Returns the same for some of the images."""
        return _CachedBlocks(self.tokens[index], self.in_tuple)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.tokens,) if self.in_tuple else self.tokens


@contextmanager
def _replaced_front(place: Place, first: int, cached: _CachedBlocks) -> Iterator[None]:
    """Lets a model's forward begin at a block, on the tokens that are known to enter it."""
    blocks, front = place.blocks, list(place.blocks)[:first]
    try:
        for i in range(first):
            blocks[i] = cached
        yield
    finally:
        for i, block in enumerate(front):
            blocks[i] = block
