"""Training mode, structural copies and devices of modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in training or evaluation mode, and restores the mode of each module after."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def clone_structure(model: nn.Module, device: str | None = None) -> nn.Module:
    """Returns a copy of a model that can be changed and run without changing the model.

    Args:
        model: Any that can be deep-copied.
        device: None shares the weights; on a device such as `"meta"` they are new and empty.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if device is not None:
        for key, tensor in memo.items():
            memo[key] = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
    return copy.deepcopy(model, memo)  # tensors of the memo are not copied


def pick_device(name: str = "auto") -> torch.device:
    """Returns the named device, or with `"auto"` a GPU where there is one.

    Raises:
        ValueError: torch does not know the device, or this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        message = f"device {name!r} is not to be had here ({error}); pass cpu or auto"
        raise ValueError(message) from error
    return torch.device(name)
