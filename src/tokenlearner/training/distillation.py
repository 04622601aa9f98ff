"""What a student is taught by its teacher: logits, and features across different token counts.

A host and the same host on learned tokens have the same blocks, but not the same tokens. What can
be compared behind every block is its `summary`: the prefix tokens (class, distillation, registers),
through which a ViT with a class token passes all that its head sees. Without any, or where a head
pools positions besides, it has their mean too. Where both have as many tokens, as with fusers, they
are compared one by one.

The words are timm's: `temperature`, `distill_loss_weight`, `task_loss_weight`, and "logit" and
"feature" for what is taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.hosts import find_host
from ..models.insertion import wrapped_blocks
from ..models.outputs import first_tensor, output_tensor, outputs_logits, summarize_tokens
from ..utils.validation import check_above_zero, check_choice

DISTILL_TYPES = ("logit", "feature", "logit+feature")
_EPS = 1e-3  # of a layer's mean variance; keeps features that hardly vary from counting most


@dataclass(frozen=True)
class BlockOutputs:
    """What a model made of images on the way to its output.

    Args:
        output: Logits `b classes`, or features where the model has no classifier.
        features: Of each block that was watched its tokens, `b (p n) c`.
    """

    output: Tensor
    features: tuple[Tensor, ...]


def forward_with_features(model: nn.Module, images: Any, first: int = 0) -> BlockOutputs:
    """Runs a model and returns its output and that of every block from `first` on.

    Args:
        model: A host of `tokenlearner.models.hosts`, with or without learned tokens.
        images: What the model takes.
        first: Block from which on features are wanted.
    """
    seen: list[Tensor] = []
    place = find_host(model)
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(first_tensor(out)))
        for block in list(place.blocks)[first:]
    ]
    try:
        output = output_tensor(model(images), place.num_prefix_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return BlockOutputs(output, tuple(seen))


def feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    num_prefix_tokens: int = 0,
    pools_positions: bool = False,
) -> Tensor:
    """The share of the variance of the teacher's features that the student's do not reproduce.

    0 is perfect; the batch's mean in place of every feature would score 1. Channels count alike,
    whatever their size, and so do blocks.

    Args:
        student: Tokens behind blocks, each `b (p k) c`.
        teacher: Tokens behind the same blocks, each `b (p n) c`; no gradient goes there.
        num_prefix_tokens: Prefix tokens `p`.
        pools_positions: As in `summary`.

    Raises:
        ValueError: There are no features, not as many, or of another width, or of one image.
    """
    if len(student) != len(teacher) or not teacher:
        raise ValueError(
            f"the student has features of {len(student)} blocks, the teacher of {len(teacher)}; "
            "features are taught by the untouched host only, take kd_distill_type='logit'"
        )
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise ValueError(
            f"the student is {student[0].shape[-1]} wide, the teacher {teacher[0].shape[-1]}; "
            "take kd_distill_type='logit', which any two models with the same classes share"
        )
    if len(teacher[0]) < 2:
        raise ValueError(
            "features are measured by their variance over the batch, and it has 1 image; take "
            "batch_size=2 or more, or kd_distill_type='logit'"
        )
    kept = num_prefix_tokens, pools_positions
    pairs = [_pair(s, t, *kept) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([unexplained_variance(s, t.detach()) for s, t in pairs]).mean()


def unexplained_variance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error in units of the teacher's variance over the batch, by channel."""
    teacher = teacher.float()
    variance = teacher.var(0, correction=0, keepdim=True)
    scale = variance + _EPS * variance.mean() + 1e-12
    return ((student.float() - teacher).square() / scale).mean()


def logit_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, in nats.

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
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}; "
            "both need the same classes"
        )
    own, taught = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher.detach()))
    loss = F.kl_div(own, taught, log_target=True, reduction="batchmean")
    return loss * temperature**2


def output_loss(student: Tensor, teacher: Tensor, model: nn.Module) -> Tensor:
    """`logit_loss` for a classifier, `unexplained` for a model that gives features."""
    if outputs_logits(model, student.shape[-1]):
        return logit_loss(student, teacher)
    return unexplained_variance(student, teacher.detach())


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much of it counts: `Distillation(teacher)(student, images)` is the loss.

    Args:
        teacher: Gives logits of the student's classes; for features the untouched host. It should
            be in evaluation mode.
        kind: "logit", "feature" or "logit+feature".
        temperature: As in `logit_loss`.
        first: Block from which on features are taught; None is the first that learns tokens.

    Raises:
        ValueError: A choice or a number is out of range; in a call, the two do not fit.
    """

    teacher: nn.Module
    kind: str = "logit+feature"
    temperature: float = 1.0
    first: int | None = None

    def __post_init__(self) -> None:
        check_choice("kd_distill_type", self.kind, DISTILL_TYPES)
        check_above_zero("temperature", self.temperature)

    def __call__(self, student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Runs both and returns the student's output and the loss."""
        if "feature" not in self.kind:
            own = output_tensor(student(images))
            with torch.no_grad():
                taught = output_tensor(self.teacher(images))
            return own, logit_loss(own, taught, self.temperature)
        _check_has_blocks("student", student)
        _check_has_blocks("teacher", self.teacher)
        first = self.first
        if first is None:
            first = min(wrapped_blocks(student), default=0)
        seen = forward_with_features(student, images, first)
        with torch.no_grad():
            shown = forward_with_features(self.teacher, images, first)
        place = find_host(student)
        compared = place.num_prefix_tokens, place.pools_positions
        loss = feature_loss(seen.features, shown.features, *compared)
        if "logit" in self.kind:
            loss = loss + logit_loss(seen.output, shown.output, self.temperature)
        return seen.output, loss


def _check_has_blocks(role: str, model: nn.Module) -> None:
    """Refuses a model behind whose blocks nothing can be compared."""
    try:
        find_host(model)
    except ValueError as error:
        raise ValueError(
            f"the {role} is a {type(model).__name__}, which has no blocks to compare features "
            "behind; take kd_distill_type='logit'"
        ) from error


def _pair(student: Tensor, teacher: Tensor, *kept: Any) -> tuple[Tensor, Tensor]:
    """What of two blocks' tokens is compared."""
    if student.shape == teacher.shape:
        return student, teacher
    return summarize_tokens(student, *kept), summarize_tokens(teacher, *kept)
