"""Who takes part in compare.py: ways to spend a share of a host's multiply-adds.

A contender is a row in `CONTENDERS`. Those from scratch are trained on all images with labels, as
the host is. The others start from the trained host and are trained on a tenth of the images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines import MergedBlocks, average_pool, merge, schedule_for, top_k
from torch import Tensor, nn

from tokenlearner import calibrate, create_model, insert
from tokenlearner.models.insertion import wrapped_blocks
from tokenlearner.training.distillation import Distillation, feature_loss, logit_loss

HOST = "vit_mini_patch4_28"
SHAPE: dict[str, Any] = {"depth": 8, "class_token": True, "global_pool": "token"}


@dataclass(frozen=True)
class Budget:
    """A share of the host's multiply-adds and what each family makes of it."""

    share: float
    at: int
    num_tokens: int
    depth: int  # of a smaller host
    fused: tuple[int, int]  # place and tokens with fusers, which cost something in every block


BUDGETS = {
    "half": Budget(0.5, at=3, num_tokens=8, depth=4, fused=(2, 8)),
    "third": Budget(0.35, at=2, num_tokens=6, depth=3, fused=(1, 4)),
}

Build = Callable[[Any, Budget, Tensor], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        label: What the table calls it.
        build: Makes the model of the host (or its shape), a budget and unlabeled images.
        from_scratch: Trained on all images with labels.
        distilled: From the host, without labels; otherwise trained on labels.
    """

    label: str
    build: Build
    from_scratch: bool = False
    distilled: bool = True


def teaching(host: nn.Module, budget: Budget, model: nn.Module) -> Any:
    """The same distillation for all: logits, and the class token behind every reduced block."""
    if isinstance(model.blocks, MergedBlocks):
        return _MergedTeaching(host, budget.at)
    return Distillation(host, first=min(wrapped_blocks(model), default=budget.at))


@dataclass(frozen=True)
class _MergedTeaching:
    """As `Distillation`, for blocks that are in no list."""

    teacher: Any
    first: int

    def __call__(self, student: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        shown: list[Tensor] = []
        hooks = [student.blocks.handed_on.register_forward_hook(lambda *a: seen.append(a[2]))]
        for block in self.teacher.blocks:
            hooks.append(block.register_forward_hook(lambda *a: shown.append(a[2])))
        try:
            own = student(images)
            with torch.no_grad():
                distilled = self.teacher(images)
        finally:
            for hook in hooks:
                hook.remove()
        features = feature_loss(
            [x[:, :1] for x in seen[self.first :]], [x[:, :1] for x in shown[self.first :]], 1
        )
        return own, features + logit_loss(own, distilled)


def _smaller(host: Any, budget: Budget, images: Tensor) -> nn.Module:
    return create_model(HOST, **SHAPE | {"depth": budget.depth} | _ends(images))


def _scratch(learner: str) -> Build:
    def build(host: Any, budget: Budget, images: Tensor) -> nn.Module:
        tokens = {"num_tokens": budget.num_tokens, "at": budget.at, "learner": learner}
        return create_model(HOST, **SHAPE, **tokens, **_ends(images))

    return build


def _ends(images: Tensor) -> dict[str, Any]:
    return {"in_chans": images.shape[1], "num_classes": 10}


def _pooled(host: Any, budget: Budget, images: Tensor) -> nn.Module:
    return average_pool(copy.deepcopy(host), budget.num_tokens, budget.at)


def _top_k(host: Any, budget: Budget, images: Tensor) -> nn.Module:
    return top_k(copy.deepcopy(host), budget.num_tokens, budget.at)


def _merged(host: Any, budget: Budget, images: Tensor) -> nn.Module:
    return merge(copy.deepcopy(host), schedule_for(host, images, budget.share).r)


def _inserted(calibrated: bool, **options: Any) -> Build:
    def build(host: Any, budget: Budget, images: Tensor) -> nn.Module:
        at, num_tokens = budget.fused if options.get("fuse") else (budget.at, budget.num_tokens)
        model = insert(copy.deepcopy(host), num_tokens, at, **options)
        if calibrated:
            calibrate(model, images, steps=CALIBRATION_STEPS)
        return model

    return build


CALIBRATION_IMAGES, CALIBRATION_STEPS = 2048, 600

CONTENDERS = {
    "smaller": Contender("smaller host", _smaller, from_scratch=True),
    "v1": Contender("TokenLearner V1, from scratch", _scratch("v1"), from_scratch=True),
    "v11": Contender("TokenLearner V1.1, from scratch", _scratch("v11"), from_scratch=True),
    "pool": Contender("average pooling, distilled", _pooled),
    "topk": Contender("top-k by class attention, distilled", _top_k),
    "merge": Contender("token merging, distilled", _merged),
    "plain": Contender("inserted, fine-tuned", _inserted(False), distilled=False),
    "random": Contender("inserted, distilled", _inserted(False)),
    "calibrated": Contender("inserted, calibrated, distilled", _inserted(True)),
    "fuser": Contender("with fuser, calibrated, distilled", _inserted(True, fuse=True)),
}
