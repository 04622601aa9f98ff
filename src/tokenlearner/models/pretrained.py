"""Saving with transformers: a folder with learned tokens that a plain class refuses to read.

A plain class would start the wrapped blocks at random, with only a line in the log. So the file
gets an empty tensor under the name that the plain class has for a weight of a wrapped block; the
sizes differ, which `from_pretrained` refuses. A class that inserts does not know the name.
"""

from __future__ import annotations

import gc
import inspect
import re
from typing import Any

import torch
from torch import nn

from ..layers.blocks import ReducedBlock
from ..layers.token_connector import TokenConnector

_METHOD = "save_pretrained"
_IGNORED = "_keys_to_ignore_on_load_unexpected"
_BASE = ("transformers.modeling_utils", "PreTrainedModel")


class SavePretrained:
    """Stands for `save_pretrained` of a model of transformers that has learned tokens.

    Args:
        model: The model; kept here so that a copy of the model has a copy of this.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own method with names that a plain class refuses."""
        method = getattr(type(self.model), _METHOD)
        call = inspect.signature(method).bind(self.model, *args, **kwargs)
        state = call.arguments.get("state_dict")
        state = dict(self.model.state_dict() if state is None else state)
        call.arguments["state_dict"] = state | {n: torch.empty(0) for n in _names(self.model)}
        return method(*call.args, **call.kwargs)


def is_pretrained(model: nn.Module) -> bool:
    """Returns whether a model is one of transformers', which need not be there."""
    return _BASE in ((cls.__module__, cls.__qualname__) for cls in type(model).__mro__)


def _names(model: nn.Module) -> list[str]:
    """Returns a name that a plain model has and this one has not for each part that is wrapped."""
    return [
        f"{name}.{next(iter(dict(part.named_parameters())))}"
        for name, wrapper in model.named_modules()
        if (part := _wrapped(wrapper)) is not None
    ]


def _wrapped(wrapper: nn.Module) -> nn.Module | None:
    """Returns the block or the projector in a wrapper that learns tokens."""
    if isinstance(wrapper, TokenConnector):
        return wrapper.projector
    return wrapper.block if isinstance(wrapper, ReducedBlock) else None


def _patterns(model: nn.Module) -> set[str]:
    """Returns what `from_pretrained` of a class that inserts leaves out of its report."""
    return {rf"(^|\.){re.escape(name)}$" for name in _names(model)}


def _outer(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that hold a model, and those that hold them: a module does not know."""
    known = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    found = [model]
    for part in found:
        found += [m for m in known if m not in found and part in m._modules.values()]
    return found[1:]


def guard_saving(model: nn.Module) -> None:
    """Lets the models of transformers in this one save what a plain class refuses to read.

    So do those that it is a part of, as a classifier of which `classifier.vit` was given.
    """
    outer = _outer(model) if is_pretrained(model) else []
    for part in (*model.modules(), *outer):
        if is_pretrained(part) and (patterns := _patterns(part)):
            setattr(part, _METHOD, SavePretrained(part))
            setattr(part, _IGNORED, {*(getattr(part, _IGNORED, None) or ()), *patterns})


def remove_saving_guard(model: nn.Module) -> None:
    """Takes the guards of `guard_saving` away; call it while the blocks are wrapped."""
    for part in model.modules():
        if isinstance(vars(part).get(_METHOD), SavePretrained):
            delattr(part, _METHOD)
            setattr(part, _IGNORED, {*getattr(part, _IGNORED)} - _patterns(part))
