"""Compiling a model: what repeats in it once, or all of it as one graph."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

from torch import nn

from ..utils.validation import check_choice
from .hosts import find_host

CompileMode = Literal["no", "default", "reduce-overhead", "max-autotune"]
MODES = get_args(CompileMode)[1:]

Model = TypeVar("Model", bound=nn.Module)


def compile_model(model: Model, mode: str = "default", **options: Any) -> Model:
    """Compiles a model in place by `torch.compile`, and returns it; it is saved as before.

    By default each block is a graph for any number of images, made once for all that are alike, so
    that a deep model takes no longer than a shallow one, and another batch size does not compile
    again; but for a single image, which torch treats apart. Models without blocks, such as
    convolutional ones, are compiled as a whole.

    The other modes compile the whole model anew for each batch size, and on a GPU record it as a
    CUDA graph, which is what speeds up small batches there.

    Args:
        model: Any model; hosts that `insert` takes are those with blocks.
        mode: `"default"`, `"reduce-overhead"` or `"max-autotune"`, as in `torch.compile`.
        options: Further arguments of `torch.compile`, such as `backend`.

    Raises:
        ValueError: There is no such mode.

    >>> import torch
    >>> from tokenlearner import create_model
    >>> vit = compile_model(create_model("vit_mini_patch4_28", num_tokens=8), backend="eager")
    >>> vit(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_choice("mode", mode, MODES)
    blocks = _blocks(model) if mode == "default" else []
    for block in blocks:
        block.compile(**{"fullgraph": True, "dynamic": True} | options)
    if not blocks:
        model.compile(**{"mode": mode} | options)
    return model


def known_mode(value: bool | str) -> str:
    """Returns a mode, or what True and False meant in options of version 0.4."""
    return {True: "default", False: "no"}[value] if isinstance(value, bool) else value


def _blocks(model: nn.Module) -> list[nn.Module]:
    try:
        return list(find_host(model).blocks)
    except ValueError:
        return []
