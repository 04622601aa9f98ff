"""Connectors fitted to their own language model, without labels: `fit_connector(model, ...)`.

The teacher is the model with all image tokens, on the same texts and images. What it makes of the
text behind an image is what the connected model is fitted to.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.connection import connector_of, disconnected, learners_of
from ..utils.modules import eager_gradients, training_mode, uncompiled
from ..utils.validation import check_above_zero, check_choice, check_count, check_rate, require
from .calibration import split_held_out
from .distillation import DISTILL_TYPES, DistillType, logit_loss, unexplained_variance
from .fitting import FitConfig, Group, fit
from .meter import Report

Example = Mapping[str, Any]
"""A text and its images, or videos, as a processor takes them: `{"text": ..., "images": [...]}`."""


@dataclass(frozen=True)
class ConnectorFit:
    """The result of fitting a connector.

    Args:
        examples: Texts that it was fitted on.
        steps: Updates that were made.
        best_step: The update after which the held-out divergence was lowest; its weights were kept.
        kl_before: Divergence from the next-token distribution with all image tokens, in nats a
            token of text behind an image, before; on held-out texts, if there are any.
        kl_after: The same afterwards.
        held_out: Texts that were held out.
        seconds: Time of it all.
    """

    examples: int
    steps: int
    best_step: int
    kl_before: float
    kl_after: float
    held_out: int
    seconds: float


@eager_gradients()
def fit_connector(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    *,
    kind: DistillType = "logit",
    steps: int = 300,
    batch_size: int = 16,
    lr: float = 3e-3,
    projector_lr: float = 0.0,
    held_out: float = 0.1,
    patience: int = 10,
    seed: int = 0,
    report: Report | None = None,
) -> ConnectorFit:
    """Fits the connector of `model` to the model with all image tokens; changes it in place.

    No labels are needed: captions do, and so does any text behind an image. A tenth of the texts
    is held out, and the weights of the update with the lowest divergence there are kept.

    Args:
        model: A connected model with its head; all but the connector stays bit for bit.
        processor: The one it was connected with.
        examples: What the processor takes for a text, `{"text": "...", "images": [image]}` or
            `{"text": "...", "videos": [clip]}`, with the image token in the text.
        kind: "logit" compares next-token distributions, "feature" the last hidden states.
        steps: Updates at most.
        batch_size: Texts an update.
        lr: Highest learning rate of the learned tokens.
        projector_lr: The same of the model's own projector; 0 leaves it as it is.
        held_out: Share of the texts to evaluate on; 0 makes all steps, and keeps the last.
        patience: Evaluations, of 20 within all steps, without a lower divergence that end it; 0 is
            all.
        seed: Of the texts' order, and of what is held out.
        report: Called with a `CalibrationRow` after every step.

    Raises:
        ValueError: The model is not connected or has nothing to fit, the examples are no texts
            with images, or a number does not fit.
        RuntimeError: The loss is no longer finite.
    """
    model = uncompiled(model)
    config = FitConfig(steps, batch_size, patience=patience, seed=seed)
    check_choice("kind", kind, DISTILL_TYPES)
    check_rate(held_out, "held_out")
    groups = _groups(model, lr, projector_lr)
    start = time.perf_counter()
    teacher = TextTeacher(model, processor, examples, kind, batch_size)
    training, evaluated = split_held_out(len(examples), held_out, seed)
    scored = evaluated if len(evaluated) else training
    before = teacher.error(model, scored)
    done = fit(model, teacher, groups, config, training, evaluated, report)
    return ConnectorFit(
        examples=len(training),
        steps=done.steps,
        best_step=done.best_step,
        kl_before=before,
        kl_after=teacher.error(model, scored),
        held_out=len(evaluated),
        seconds=time.perf_counter() - start,
    )


def _groups(model: nn.Module, lr: float, projector_lr: float) -> list[Group]:
    """Returns the parameters of learners, and of the projector if it has a rate."""
    learned = [p for learner in learners_of(model) for p in learner.parameters()]
    groups: list[Group] = [(learned, check_above_zero("lr", lr))] if learned else []
    if projector_lr:
        rate = check_above_zero("projector_lr", projector_lr)
        groups.append((list(connector_of(model).projector.parameters()), rate))
    require(
        bool(groups),
        "the connector averages neighbors, which has nothing to fit; pass projector_lr to fit the "
        'projector, or connect with learner="v11"',
    )
    return groups


class TextTeacher:
    """The last hidden states of a model with all its image tokens, at texts behind images.

    Args:
        model: A connected model with its head; it runs without its connector here.
        processor: The one it was connected with.
        examples: As in `fit_connector`.
        kind: As in `fit_connector`.
        batch_size: Texts at a time.

    Raises:
        ValueError: The examples are no texts with images.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        examples: Sequence[Example],
        kind: DistillType = "logit",
        batch_size: int = 16,
    ):
        self.processor, self.kind, self.batch_size = processor, kind, batch_size
        self.examples = _check_examples(examples)
        parts = torch.arange(len(examples), device="cpu").split(batch_size)
        with torch.no_grad(), training_mode(model, False), disconnected(model, processor):
            self.hidden = [h.cpu() for part in parts for h in self._run(model, part)]
        states = torch.cat(self.hidden).float()
        self._variance = states.var(0, correction=0, keepdim=True)

    def rows(self, examples: Tensor) -> Tensor:
        """Returns the rows of some examples: each has one."""
        return examples

    def losses(self, student: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses of a student's last hidden states and next-token distributions."""
        ours, theirs = self._pairs(student, rows)
        feature = logit = ours.new_zeros((), dtype=torch.float32)
        if "feature" in self.kind:
            feature = unexplained_variance(ours, theirs, self._variance.to(ours.device))
        if "logit" in self.kind:
            logit = logit_loss(_logits(student, ours), _logits(student, theirs))
        return feature, logit

    @torch.no_grad()
    def error(self, student: nn.Module, rows: Tensor) -> float:
        """Returns a student's divergence from the next-token distributions, in nats a token."""
        total, count = 0.0, 0
        with training_mode(student, training=False):
            for part in rows.split(self.batch_size):
                ours, theirs = self._pairs(student, part)
                loss = logit_loss(_logits(student, ours), _logits(student, theirs))
                total, count = total + loss.item() * len(ours), count + len(ours)
        return total / count

    def _pairs(self, student: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states of a student and of the teacher, at each token of the texts."""
        each = self._run(student, rows)
        targets = [self.hidden[row] for row in rows.tolist()]
        if [len(h) for h in each] != [len(h) for h in targets]:
            raise ValueError(
                "texts have other tokens with fewer image tokens, as where they are cut off; leave "
                "truncation out of the processor's settings"
            )
        ours = torch.cat(each)
        return ours, torch.cat(targets).to(ours.device)

    def _run(self, model: Any, rows: Tensor) -> list[Tensor]:
        """Returns the last hidden states of each text behind its first image: `tokens c`."""
        inputs = self._encode(model, rows)
        states = model.base_model(**inputs).last_hidden_state
        config, ids = model.config, inputs["input_ids"]
        names = ("image_token_id", "video_token_id")
        image = torch.zeros_like(ids, dtype=torch.bool)
        for token in (getattr(config, name, None) for name in names):
            if token is not None:
                image |= ids == token
        is_text = (image.cumsum(1) > 0) & ~image & inputs["attention_mask"].bool()
        return [state[mask] for state, mask in zip(states, is_text, strict=True)]

    def _encode(self, model: Any, rows: Tensor) -> Any:
        batch = [self.examples[row] for row in rows.tolist()]
        fields = {name: [example[name] for example in batch] for name in batch[0]}
        inputs = self.processor(**fields, padding=True, return_tensors="pt")
        inputs.pop("labels", None)
        return inputs.to(model.device, model.dtype)


def _logits(model: Any, states: Tensor) -> Tensor:
    """Returns the next-token logits of hidden states, as the model's head makes them."""
    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _check_examples(examples: Any) -> list[Example]:
    """Returns examples if each is a text with images or videos, of the same fields."""
    check_count("the number of examples", len(examples), least=2)
    names = {frozenset(e) if isinstance(e, Mapping) else type(e).__name__ for e in examples}
    if len(names) > 1 or not any({"text", x} <= {*next(iter(names))} for x in ("images", "videos")):
        raise ValueError(
            f"examples have {' and '.join(str(sorted(name)) for name in names)}, expected "
            '{"text": "...", "images": [image]} or {"text": "...", "videos": [clip]} of each'
        )
    return list(examples)
