"""Losses between a student and its teacher: logits, and features across token counts.

A host and the same host on learned tokens have the same blocks, but not the same tokens. What can
be compared behind every block is `summarize_tokens`: the prefix tokens (class, distillation,
registers), through which a ViT with a class token passes all that its head reads. Without any, or
where a head pools positions besides, it has their mean too. Where both have as many tokens, as with
fusers, they are compared one by one.

The words are timm's: `temperature`, `distill_loss_weight`, `task_loss_weight`, and "logit" and
"feature" for what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.blocks import ReducedBlock
from ..models.hosts import Place, find_host
from ..models.outputs import first_tensor, output_tensor, outputs_logits, summarize_tokens
from ..utils.validation import check_above_zero, check_choice, require

DistillType = Literal["logit", "feature", "logit+feature"]
DISTILL_TYPES = get_args(DistillType)
_EPS = 1e-3  # of a layer's mean variance; keeps features that hardly vary from counting most


@dataclass(frozen=True)
class BlockOutputs:
    """The output of a model and of its blocks.

    Args:
        output: Logits `b classes`, or features where the model has no classifier.
        features: Tokens behind each block, `b (p n) c`.
    """

    output: Tensor
    features: tuple[Tensor, ...]


class HostFinder:
    """`find_host` that remembers its last answer: a training step needs no walk over modules."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._place: Place | None = None

    def __call__(self, model: nn.Module) -> Place:
        """Returns the place of the host in a model."""
        if self._place is None or model is not self._model:
            self._model, self._place = model, find_host(model)
        return self._place


def forward_with_features(
    model: nn.Module,
    images: Any,
    first: int = 0,
    place: Place | None = None,
    skipped: Collection[int] = (),
) -> BlockOutputs:
    """Runs a model and returns its output and that of every block from `first` on.

    Args:
        model: A host of `tokenlearner.models.hosts`, with or without learned tokens.
        images: Input of the model.
        first: The first block whose tokens are returned.
        place: What `find_host` returns for the model; None looks for it.
        skipped: Blocks whose tokens are not returned, such as `mixed_blocks`.
    """
    features: list[Tensor] = []
    place = place or find_host(model)
    hooks = [
        block.register_forward_hook(lambda _, __, out: features.append(first_tensor(out)))
        for i, block in enumerate(place.blocks)
        if i >= first and i not in skipped
    ]
    try:
        output = output_tensor(model(images), place.num_prefix_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return BlockOutputs(output, tuple(features))


def mixed_blocks(place: Place) -> set[int]:
    """Returns the blocks of a student behind which a summary would mix tokens and positions.

    That is within an overlap (`insert`), where the mean of positions is compared.
    """
    if place.num_prefix_tokens and not place.pools_positions:
        return set()
    wrapped = ((i, b) for i, b in enumerate(place.blocks) if isinstance(b, ReducedBlock))
    return {j for i, block in wrapped for j in range(i, i + block.overlap - 1)}


def feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    num_prefix_tokens: int = 0,
    pools_positions: bool = False,
    variances: Sequence[Tensor] | None = None,
) -> Tensor:
    """Returns the share of the variance of the teacher's features that the student leaves open.

    0 is perfect; the images' mean in place of every feature would score 1. Channels count alike,
    whatever their size, and so do blocks.

    Args:
        student: Tokens behind blocks, each `b (p k) c`.
        teacher: Tokens behind the same blocks, each `b (p n) c`; no gradient goes there.
        num_prefix_tokens: Prefix tokens `p`.
        pools_positions: As in `summarize_tokens`.
        variances: Of the teacher's features over many images, as `Distillation.measure` finds
            them: the loss is then a mean over images, however a batch is cut into parts. None
            takes those of this batch.

    Raises:
        ValueError: There are no features, not as many, or of another width, or of one image.
    """
    if len(student) != len(teacher) or not teacher:
        raise ValueError(
            f"the student has features of {len(student)} blocks, the teacher of {len(teacher)}; "
            "features need the untouched host as teacher, else take kd_distill_type='logit'"
        )
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise ValueError(
            f"the student is {student[0].shape[-1]} wide, the teacher {teacher[0].shape[-1]}; "
            "take kd_distill_type='logit', which any two models with the same classes share"
        )
    if variances is None and len(teacher[0]) < 2:
        raise ValueError(
            "features are compared by their variance over the batch, and it has 1 image; take "
            "batch_size=2 or more, or kd_distill_type='logit'"
        )
    pairs = _comparable(student, teacher, num_prefix_tokens, pools_positions)
    known = variances or [None] * len(pairs)
    losses = [
        unexplained_variance(s, t.detach(), v) for (s, t), v in zip(pairs, known, strict=True)
    ]
    return torch.stack(losses).mean()


def _comparable(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    num_prefix_tokens: int,
    pools_positions: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Returns features of as many tokens as they are, and others as their summaries."""

    def summary(tokens: Tensor) -> Tensor:
        return summarize_tokens(tokens, num_prefix_tokens, pools_positions)

    return [
        (s, t) if s.shape == t.shape else (summary(s), summary(t))
        for s, t in zip(student, teacher, strict=True)
    ]


def unexplained_variance(
    student: Tensor, teacher: Tensor, variance: Tensor | None = None
) -> Tensor:
    """Returns the mean squared error in units of the teacher's variance, by default the batch's."""
    teacher = teacher.float()
    if variance is None:
        variance = teacher.var(0, correction=0, keepdim=True)
    scale = variance + _EPS * variance.mean() + 1e-12
    return ((student.float() - teacher).square() / scale).mean()


def logit_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the Kullback-Leibler divergence of the student's classes from the teacher's, in nats.

    Args:
        student: Logits `b classes`.
        teacher: Logits `b classes`; no gradient goes there.
        temperature: Divides both; the loss is multiplied by its square, so that gradients keep
            their size.

    Raises:
        ValueError: The classes are not as many.

    Source: Hinton, Vinyals and Dean, arXiv:1503.02531.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {list(student.shape)}, expected the teacher's classes, "
            f"{list(teacher.shape)}"
        )
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher.detach()))
    loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return loss * temperature**2


def output_loss(student: Tensor, teacher: Tensor, model: nn.Module) -> Tensor:
    """Returns `logit_loss` for a classifier, `unexplained_variance` for a model of features."""
    if outputs_logits(model, student.shape[-1]):
        return logit_loss(student, teacher)
    return unexplained_variance(student, teacher.detach())


class Distillation(nn.Module):
    """A teacher and what it is compared by: `Distillation(teacher)(student, images)`.

    A part of a larger module takes its teacher along to devices and dtypes. The teacher is not one
    of its submodules, though: it is not trained, keeps its mode, and is in no checkpoint.

    Args:
        teacher: Gives logits of the student's classes; for features the untouched host. It should
            be in evaluation mode.
        kind: "logit", "feature" or "logit+feature".
        temperature: As in `logit_loss`.
        first: Block from which on features are compared; None is the first that learns tokens.

    Raises:
        ValueError: A choice or a number is out of range; in a call, the two do not fit.
    """

    def __init__(
        self,
        teacher: nn.Module,
        kind: DistillType = "logit+feature",
        temperature: float = 1.0,
        first: int | None = None,
    ):
        super().__init__()
        self.teacher = teacher
        self.kind = check_choice("kind", kind, DISTILL_TYPES)
        self.temperature = check_above_zero("temperature", temperature)
        self.first = first
        self.variances: list[Tensor] | None = None
        self._find_teacher, self._find_student = HostFinder(), HostFinder()

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the teacher out of the submodules."""
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the teacher; the variances of its features stay in float32."""
        self.teacher._apply(fn, recurse)
        if self.variances is not None:
            self.variances = [fn(variance).float() for variance in self.variances]
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Returns what the teacher is and what it is compared by."""
        return f"{type(self.teacher).__name__}, kind={self.kind!r}, temperature={self.temperature}"

    def forward(self, student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Runs both and returns the student's output and the loss."""
        if "feature" not in self.kind:
            output = output_tensor(student(images))
            with torch.no_grad():
                expected = output_tensor(self.teacher(images))
            return output, logit_loss(output, expected, self.temperature)
        ours, theirs, compared = self._features(student, images)
        loss = feature_loss(ours.features, theirs.features, *compared, self.variances)
        if "logit" in self.kind:
            loss = loss + logit_loss(ours.output, theirs.output, self.temperature)
        return ours.output, loss

    @torch.no_grad()
    def measure(self, student: nn.Module, batches: Iterable[Tensor]) -> None:
        """Measures the variance of the teacher's features over images, and keeps it for the loss.

        Without it features are compared by the variance over each batch, which depends on how
        images are shared out among parts of a step and processes.

        Args:
            student: As in a call.
            batches: Images `b c h w`, or clips with 5 axes, on the device of both.
        """
        if "feature" not in self.kind:
            return
        count, sums = 0, list[Tensor]()
        for images in batches:
            ours, theirs, compared = self._features(student, images)
            pairs = _comparable(ours.features, theirs.features, *compared)
            moments = [torch.stack([t.double(), t.double() ** 2]).sum(1) for _, t in pairs]
            sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
            count += len(images)
        pairs = [(total / count).unbind() for total in sums]
        variances = [(square - mean**2).clamp(min=0) for mean, square in pairs]
        require(
            all(
                v.mean() > 1e-12 * square.mean()
                for v, (_, square) in zip(variances, pairs, strict=True)
            ),
            "the teacher's features are those of one image all the time; measure different images",
        )
        self.variances = [variance[None].float() for variance in variances]

    def _features(
        self, student: nn.Module, images: Tensor
    ) -> tuple[BlockOutputs, BlockOutputs, tuple[int, bool]]:
        """Runs both; returns also how their tokens are summarized."""
        place = _find_blocks("student", student, self._find_student)
        teacher_place = _find_blocks("teacher", self.teacher, self._find_teacher)
        first = self.first
        if first is None:
            first = next((i for i, b in enumerate(place.blocks) if isinstance(b, ReducedBlock)), 0)
        skipped = mixed_blocks(place) | mixed_blocks(teacher_place)
        ours = forward_with_features(student, images, first, place, skipped)
        with torch.no_grad():
            theirs = forward_with_features(self.teacher, images, first, teacher_place, skipped)
        return ours, theirs, (place.num_prefix_tokens, place.pools_positions)


def _find_blocks(role: str, model: nn.Module, find: HostFinder) -> Place:
    """Finds the host of a model, whose blocks features are compared behind."""
    try:
        return find(model)
    except ValueError as error:
        kind = type(getattr(model, "teacher", model)).__name__
        raise ValueError(
            f"the {role} is a {kind}, which has no blocks to compare features behind; take "
            "kd_distill_type='logit'"
        ) from error
