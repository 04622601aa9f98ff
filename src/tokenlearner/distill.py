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

from .checks import check_above_zero, check_choice
from .hosts import look
from .insert import wrapped_blocks

KINDS = ("logit", "feature", "logit+feature")
_OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")  # of transformers
_EPS = 1e-3  # of a layer's mean variance; keeps features that hardly vary from counting most


@dataclass(frozen=True)
class Seen:
    """What a model made of pictures on the way to its output.

    Args:
        output: Logits `b classes`, or features where the model has no classifier.
        features: Of each block that was watched its tokens, `b (p n) c`.
    """

    output: Tensor
    features: tuple[Tensor, ...]


def watch(model: nn.Module, images: Any, first: int = 0) -> Seen:
    """Runs a model and returns its output and that of every block from `first` on.

    Args:
        model: A host of `tokenlearner.hosts`, with or without learned tokens.
        images: What the model takes.
        first: Block from which on features are wanted.
    """
    seen: list[Tensor] = []
    place = look(model)
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(first_tensor(out)))
        for block in list(place.blocks)[first:]
    ]
    try:
        output = output_of(model(images), place.num_prefix_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(output, tuple(seen))


def first_tensor(out: Any) -> Tensor:
    """A block's tokens; older transformers return them in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def output_of(result: Any, num_prefix_tokens: int = 1) -> Tensor:
    """What a model gives in the end: a tensor, or in transformers the logits or the features.

    Args:
        result: What a call of the model returned.
        num_prefix_tokens: Where that is tokens, `b (p n) c`, the first one is taken, which is the
            class token; without prefix their mean, since positions and learned tokens differ.

    Raises:
        ValueError: There is none of them.
    """
    for value in (result, *(getattr(result, name, None) for name in _OUTPUTS)):
        if isinstance(value, Tensor):
            return summary(value, num_prefix_tokens)[:, 0] if value.ndim == 3 else value
    raise ValueError(
        f"the model returns {type(result).__name__}, expected a tensor or an output of "
        "transformers with logits or features; wrap it in a module that returns one tensor"
    )


def summary(tokens: Tensor, num_prefix_tokens: int, pools_positions: bool = False) -> Tensor:
    """What can be compared across token counts: `b (p n) c -> b p c`.

    Without prefix tokens, or where a head reads it besides them, the mean of the positions too.
    """
    prefix, positions = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    if num_prefix_tokens and not pools_positions:
        return prefix
    return torch.cat([prefix, positions.mean(1, keepdim=True)], dim=1)


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
        ValueError: There are no features, not as many, or of another width, or of one picture.
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
            "features are measured by their variance over the batch, and it has 1 picture; take "
            "batch_size=2 or more, or kd_distill_type='logit'"
        )
    kept = num_prefix_tokens, pools_positions
    pairs = [_pair(s, t, *kept) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([unexplained(s, t.detach()) for s, t in pairs]).mean()


def unexplained(student: Tensor, teacher: Tensor) -> Tensor:
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
    if has_classes(model, student.shape[-1]):
        return logit_loss(student, teacher)
    return unexplained(student, teacher.detach())


def has_classes(model: nn.Module, width: int) -> bool:
    """Whether the output, so wide, is logits: timm and torchvision have `num_classes` for it.

    A head that was replaced by nothing leaves that number behind, but not its width. Transformers
    tells by the class; of other models logits are expected.
    """
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        return classes == width
    return not hasattr(model, "config") or "Classification" in type(model).__name__


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
        check_choice("kd_distill_type", self.kind, KINDS)
        check_above_zero("temperature", self.temperature)

    def __call__(self, student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Runs both and returns the student's output and the loss."""
        if "feature" not in self.kind:
            own = output_of(student(images))
            with torch.no_grad():
                taught = output_of(self.teacher(images))
            return own, logit_loss(own, taught, self.temperature)
        _check_has_blocks("student", student)
        _check_has_blocks("teacher", self.teacher)
        first = self.first
        if first is None:
            first = min(wrapped_blocks(student), default=0)
        seen = watch(student, images, first)
        with torch.no_grad():
            shown = watch(self.teacher, images, first)
        place = look(student)
        compared = place.num_prefix_tokens, place.pools_positions
        loss = feature_loss(seen.features, shown.features, *compared)
        if "logit" in self.kind:
            loss = loss + logit_loss(seen.output, shown.output, self.temperature)
        return seen.output, loss


def _check_has_blocks(role: str, model: nn.Module) -> None:
    """Refuses a model behind whose blocks nothing can be compared."""
    try:
        look(model)
    except ValueError as error:
        raise ValueError(
            f"the {role} is a {type(model).__name__}, which has no blocks to compare features "
            "behind; take kd_distill_type='logit'"
        ) from error


def _pair(student: Tensor, teacher: Tensor, *kept: Any) -> tuple[Tensor, Tensor]:
    """What of two blocks' tokens is compared."""
    if student.shape == teacher.shape:
        return student, teacher
    return summary(student, *kept), summary(teacher, *kept)
