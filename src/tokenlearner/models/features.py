"""The inside of a model with learned tokens: wrapped blocks, feature maps and hidden states.

timm's and open_clip's hosts reshape the tokens of blocks to maps, transformers' record what their
blocks return. Where there are learned tokens only, the first has to be refused; the second is what
leaves the wrapper: behind a fuser all positions, not the tokens that the block inside runs on.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

from torch import nn

from ..layers.blocks import FusedBlock, PositionFreeBlock, ReducedBlock
from .hosts import find_host


def wrapped_blocks(model: nn.Module) -> dict[int, ReducedBlock]:
    """Returns the blocks of any model that have a learner, by their index in their list.

    Blocks that are in no list are counted in their order.
    """
    blocks: dict[int, ReducedBlock] = {}
    for parent in nn.ModuleList([model]).modules():
        is_list = isinstance(parent, nn.Sequential | nn.ModuleList)
        for i, child in enumerate(parent.children()):
            if isinstance(child, ReducedBlock):
                blocks[i if is_list else len(blocks)] = child
    return blocks


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that `insert` added: those of learners and fusers."""
    parts = [[b.learner, getattr(b, "fuser", None)] for b in wrapped_blocks(model).values()]
    return [p for pair in parts for part in pair if part is not None for p in part.parameters()]


def check_has_grid(model: nn.Module, indices: list[int]) -> None:
    """Checks that the blocks of these indices leave a grid, not learned tokens only.

    Raises:
        ValueError: One of them does not.
    """
    reduced = [i for i, b in wrapped_blocks(model).items() if not isinstance(b, FusedBlock)]
    at = min(reduced, default=math.inf)
    if without := [str(i) for i in indices if i >= at]:
        raise ValueError(
            f"from block {at} on there are learned tokens and no grid, but a feature map of block "
            f"{', '.join(without)} is asked for; take indices below {at}, output_fmt='NLC', or a "
            "model with fuse=True"
        )


class FeatureMaps:
    """Stands for `forward_intermediates` of a host; refuses maps of blocks without a grid.

    Args:
        host: The host; kept here so that a copy of the host has a copy of this.
    """

    def __init__(self, host: nn.Module):
        self.host = host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the host's own method.

        Raises:
            ValueError: Behind one of the blocks there are learned tokens only.
        """
        from timm.models._features import feature_take_indices

        host: Any = self.host
        method = getattr(type(host), _METHOD)
        call = inspect.signature(method).bind(host, *args, **kwargs)
        call.apply_defaults()
        if call.arguments.get("output_fmt", "NCHW") == "NCHW":
            depth = len(find_host(host).blocks)
            indices, _ = feature_take_indices(depth, call.arguments.get("indices"))
            check_has_grid(host, indices)
        return method(host, *args, **kwargs)


_METHOD = "forward_intermediates"


def guard_feature_maps(host: nn.Module) -> None:
    """Lets a host refuse feature maps of blocks that have no grid, until `remove_guard`."""
    is_known = type(host).__module__.startswith(("timm.", "open_clip."))
    if is_known and hasattr(type(host), _METHOD):
        setattr(host, _METHOD, FeatureMaps(host))


def remove_guard(host: nn.Module) -> None:
    """Takes the guard of `guard_feature_maps` away."""
    vars(host).pop(_METHOD, None)


def record_hidden_states(block: PositionFreeBlock) -> None:
    """Lets transformers record what goes into and comes out of a wrapper, not of its block."""
    block.register_forward_hook(_record)


def _record(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Replaces what transformers has just recorded of the block inside.

    It keeps the states in a list that all hooks of one call share; the first is the input of the
    first block. None stands for states that were not asked for.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    states = (collector.get() or {}).get("hidden_states") if collector else None
    if not states:
        return
    if states[-1] is not None:
        states[-1] = output[0] if isinstance(output, tuple) else output
    if len(states) == 2 and states[0] is not None:
        states[0] = args[0]
