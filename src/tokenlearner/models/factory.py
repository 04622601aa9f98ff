"""Builds models by name, ours and timm's; `hub.py` saves and loads them."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from .features import wrapped_blocks
from .hub import load_adapter as load_adapter
from .hub import load_model as load_model
from .hub import push_to_hub as push_to_hub
from .hub import save_model as save_model
from .insertion import insert
from .serialization import build_named, named_models


def create_model(
    name: str,
    *,
    num_tokens: int = 0,
    at: int | float | None = None,
    learner: str | None = None,
    fuse: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name, ours or any of timm's, with learned tokens if they are specified.

    Args:
        name: One of `list_models()` or of `timm.list_models()`.
        num_tokens: Tokens to learn; with 0 it depends on the name.
        at: As in `insert`; like the others, it takes precedence over the name.
        learner: As in `insert`.
        fuse: As in `insert`.
        kwargs: Of the model: `num_classes`, `img_size`, `in_chans`, `pretrained`, ...; and
            `fuser_bottleneck_dim`, as in `insert`.

    Raises:
        ValueError: The name is unknown, or learned tokens do not fit the model.

    >>> import torch
    >>> create_model("vit_mini_patch4_28", num_tokens=4)(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    options = {"at": at, "learner": learner, "fuse": fuse, "num_tokens": num_tokens or None}
    tokens = {key: value for key, value in options.items() if value is not None}
    if name in named_models():
        model = build_named(name, kwargs | tokens)
    else:
        if "fuser_bottleneck_dim" in kwargs:
            tokens["fuser_bottleneck_dim"] = kwargs.pop("fuser_bottleneck_dim")
        model = build_named(name, kwargs)
        if num_tokens:
            insert(model, **tokens)
    if tokens and not wrapped_blocks(model):
        names = ", ".join(tokens)
        raise ValueError(f"{name} learns no tokens, but {names} is given; pass num_tokens too")
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of our models that match a pattern such as `"*tl8*"`."""
    return sorted(fnmatch.filter(named_models(), pattern))
