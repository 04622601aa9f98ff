"""Outputs of models and of their blocks as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")  # of transformers


def first_tensor(out: Any) -> Tensor:
    """A block's tokens; older transformers return them in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def output_tensor(result: Any, num_prefix_tokens: int = 1) -> Tensor:
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
            return summarize_tokens(value, num_prefix_tokens)[:, 0] if value.ndim == 3 else value
    raise ValueError(
        f"the model returns {type(result).__name__}, expected a tensor or an output of "
        "transformers with logits or features; wrap it in a module that returns one tensor"
    )


def summarize_tokens(
    tokens: Tensor, num_prefix_tokens: int, pools_positions: bool = False
) -> Tensor:
    """What can be compared across token counts: `b (p n) c -> b p c`.

    Without prefix tokens, or where a head reads it besides them, the mean of the positions too.
    """
    prefix, positions = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    if num_prefix_tokens and not pools_positions:
        return prefix
    return torch.cat([prefix, positions.mean(1, keepdim=True)], dim=1)


def outputs_logits(model: nn.Module, width: int) -> bool:
    """Whether the output, so wide, is logits: timm and torchvision have `num_classes` for it.

    A head that was replaced by nothing leaves that number behind, but not its width. Transformers
    tells by the class; of other models logits are expected.
    """
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        return classes == width
    return not hasattr(model, "config") or "Classification" in type(model).__name__
