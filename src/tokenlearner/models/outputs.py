"""Outputs of models and of their blocks as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.modules import stream_device, stream_dtype
from ..utils.validation import require

_OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")  # of transformers


def first_tensor(out: Any) -> Tensor:
    """Returns a block's tokens; older transformers have them in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def output_tensor(result: Any, num_prefix_tokens: int = 1) -> Tensor:
    """Returns the final tensor of a model: its output, or transformers' logits or features.

    Args:
        result: Return value of a call of the model.
        num_prefix_tokens: If the output is tokens `b (p n) c`, the first one is taken, which is the
            class token; without prefix their mean, since positions and learned tokens differ.

    Raises:
        ValueError: There is no such tensor.
    """
    for value in (result, *(getattr(result, name, None) for name in _OUTPUTS)):
        if isinstance(value, Tensor):
            return summarize_tokens(value, num_prefix_tokens)[:, 0] if value.ndim == 3 else value
    raise ValueError(
        f"the model returns {type(result).__name__}, expected a tensor or an output of "
        "transformers with logits or features; wrap it in a module that returns one tensor"
    )


def has_classifier(model: nn.Module) -> bool:
    """Returns False for a bare backbone, whose output is features.

    timm's have `num_classes` 0 and nothing as their head. Of transformers' own classes the name
    decides; one that a user derived from them may return anything, and is taken for a classifier.
    """
    if type(model).__module__.startswith("transformers."):
        return "Classification" in type(model).__name__
    head: Any = getattr(model, "get_classifier", None)
    is_bare = getattr(model, "num_classes", None) == 0 and callable(head)
    return not (is_bare and isinstance(head(), nn.Identity))


def check_classifier(model: nn.Module) -> None:
    """Checks that outputs of a model are logits of classes.

    Raises:
        ValueError: It is a bare backbone.
    """
    require(
        has_classifier(model),
        f"{type(model).__name__} has no classifier, so its output is features, not classes; "
        "build it with num_classes, and train it such as by `tokenlearner train`",
    )


def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Runs a classifier on images, in the dtype of its weights, and returns float32 logits.

    Args:
        model: Images to logits, or to an output of transformers that has them.
        images: `b c h w`, or clips with 5 axes, on any device.

    Raises:
        ValueError: The model returns no logits, but features or tokens.
    """
    result = model(images.to(stream_device(model), stream_dtype(model)))
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"the model returns {got}, expected logits, [b, classes]; add a head")
    return logits.float()


def summarize_tokens(
    tokens: Tensor, num_prefix_tokens: int, pools_positions: bool = False
) -> Tensor:
    """Reduces tokens to what can be compared across token counts: `b (p n) c -> b p c`.

    The mean of the positions is appended without prefix tokens, or with `pools_positions`.
    """
    prefix, positions = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    if num_prefix_tokens and not pools_positions:
        return prefix
    return torch.cat([prefix, positions.mean(1, keepdim=True)], dim=1)


def outputs_logits(model: nn.Module, width: int) -> bool:
    """Returns whether an output of this width is logits.

    timm and torchvision have `num_classes`, which also stays when the head is removed, so it has to
    be the width. In transformers the name of the class decides; other models return logits.
    """
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        return classes == width
    return not hasattr(model, "config") or "Classification" in type(model).__name__
