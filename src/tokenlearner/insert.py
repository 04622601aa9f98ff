"""Learned tokens in a model that was built without them: `insert(model)`, and `remove(model)`.

A host is a row in `HOSTS` that names where it keeps its blocks, width, prefix count and grid. Its
own code is never touched: blocks are wrapped (`wrappers.py`) and can be unwrapped again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from .checks import Grid, check_choice, check_count, check_grid
from .fuser import TokenFuser
from .modules import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from .wrappers import FusedBlock, ReducedBlock

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Host:
    """The attributes in which a family of models keeps what insertion needs."""

    blocks: str
    width: str
    num_prefix_tokens: str
    grid: str  # the module that has `grid_size`


HOSTS = {
    "timm.models.vision_transformer.VisionTransformer": Host(
        blocks="blocks",
        width="embed_dim",
        num_prefix_tokens="num_prefix_tokens",
        grid="patch_embed",
    ),
}

_OFFICIAL: dict[str, Any] = {"norm_eps": 1e-6, "approximate": "tanh"}
LEARNERS: dict[str, Callable[[int, int], nn.Module]] = {
    "v11": TokenLearnerV11,
    "v1": lambda c, k: TokenLearner(c, k, use_sum_pooling=True, **_OFFICIAL),
    "v1-mean": lambda c, k: TokenLearner(c, k, use_sum_pooling=False, **_OFFICIAL),
    "grouped": lambda c, k: TokenLearnerModuleV11(c, k, max(1, c // 128), **_OFFICIAL),
    "grouped-linear": lambda c, k: TokenLearnerModuleV11(c, k, 8, norm_eps=1e-6),
}


def insert(
    model: Model,
    num_tokens: int = 8,
    at: int | float = 0.5,
    *,
    learner: str = "v11",
    fuse: bool = False,
    fuser_bottleneck_dim: int | None = 64,
    grid: Grid | None = None,
) -> Model:
    """Makes `model` run on `num_tokens` learned tokens from block `at` on; changes it in place.

    The new parameters take the device and dtype of the block they stand at, and start untrained:
    train or distil before use. Prefix tokens (class, distillation, registers) are kept besides the
    learned ones. `remove` takes everything out again.

    Args:
        model: A timm VisionTransformer.
        num_tokens: Tokens `k` to learn from a picture.
        at: The learner runs in front of this block, counted from 0, or at this share of the depth.
        learner: `"v11"` (MLP, softmax), `"v1"` (convolutions, sigmoid, sum), `"v1-mean"` (the same
            with the mean, which keeps tokens at the size that pretrained blocks expect),
            `"grouped"` (V1.1 of January 2022) or `"grouped-linear"` (V1.1 of December 2021).
        fuse: Put the tokens back on all positions behind each block from `at` on, for dense tasks.
        fuser_bottleneck_dim: Hidden width of the fusers' gates; None or 0, which timm can carry, is
            the paper's linear layer.
        grid: Height and width of the positions, where the model cannot tell them.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is unknown or has learners already, or an argument is out of range.

    Source: scenic `EncoderMod` (at `tokenlearner_loc`) and `EncoderModFuser`.

    >>> import timm, torch
    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> vit(torch.ones(1, 3, 224, 224)).shape, insert(vit, 8)(torch.ones(1, 3, 224, 224)).shape
    (torch.Size([1, 10]), torch.Size([1, 10]))
    """
    host = find_host(model)
    if wrapped_blocks(model):
        raise ValueError("this model has learned tokens already; call remove(model) first")
    blocks, patches = getattr(model, host.blocks), getattr(model, host.grid)
    index = block_index(at, len(blocks))
    check_choice("learner", learner, list(LEARNERS))
    check_count("num_tokens", num_tokens)
    n = math.prod(patches.grid_size)
    known = patches if grid is None else check_grid(grid, n)
    if learner in ("v1", "v1-mean"):
        _check_grid_is_told(model, patches, grid)
    if num_tokens > n:
        raise ValueError(f"num_tokens is {num_tokens}, but a picture has {n}; ask for fewer")
    width, prefix = getattr(model, host.width), getattr(model, host.num_prefix_tokens)
    frames = getattr(patches, "frames", 1)  # of a clip, as our video models' embedding tells
    place: dict[str, Any] = {"num_prefix_tokens": prefix, "frames": frames, "grid": known}
    for i in range(index, len(blocks) if fuse else index + 1):
        new = LEARNERS[learner](width, num_tokens)
        blocks[i] = wrap(blocks[i], new, fuse, fuser_bottleneck_dim, **place)
    return model


def wrap(
    block: nn.Module, learner: Any, fuse: bool, fuser_bottleneck_dim: int | None, **place: Any
) -> ReducedBlock:
    """Puts a learner in front of a block, in the block's device, dtype and mode.

    Args:
        block: As in `ReducedBlock`.
        learner: One that `LEARNERS` makes.
        fuse: Whether a fuser stands behind the block.
        fuser_bottleneck_dim: As in `insert`.
        place: What `ReducedBlock` takes besides.
    """
    if not fuse:
        return _like_its_block(ReducedBlock(block, learner, **place))
    fuser = TokenFuser(learner.in_channels, learner.num_tokens, fuser_bottleneck_dim or None)
    return _like_its_block(FusedBlock(block, learner, fuser, **place))


def remove(model: Model) -> Model:
    """Takes all learners and fusers out again; the host's parameters are as they are.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is unknown or has no learners.
    """
    blocks = getattr(model, find_host(model).blocks)
    found = wrapped_blocks(model)
    if not found:
        raise ValueError("this model has no learned tokens to remove; insert(model) adds them")
    for i, wrapped in found.items():
        blocks[i] = wrapped.block
    return model


def find_host(model: nn.Module) -> Host:
    """Returns the row of `HOSTS` for a model's class or one it derives from.

    Raises:
        ValueError: There is none.
    """
    for cls in type(model).__mro__:
        if host := HOSTS.get(f"{cls.__module__}.{cls.__qualname__}"):
            return host
    known = ", ".join(name.rpartition(".")[2] + " of " + name.partition(".")[0] for name in HOSTS)
    raise ValueError(
        f"{type(model).__module__}.{type(model).__qualname__} is no model that tokens can be "
        f"inserted in; known: {known}. For others, wrap a block yourself with "
        "tokenlearner.wrappers.ReducedBlock"
    )


def wrapped_blocks(model: nn.Module) -> dict[int, ReducedBlock]:
    """Finds the blocks of any model that learners stand at, by their index in their list.

    Blocks that are in no list are counted in their order.
    """
    found: dict[int, ReducedBlock] = {}
    for name, module in model.named_modules():
        if isinstance(module, ReducedBlock):
            last = name.rpartition(".")[2]
            found[int(last) if last.isdecimal() else len(found)] = module
    return found


def insertion(model: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of `insert` that lead to this model's learners, None without any."""
    found = wrapped_blocks(model)
    if not found:
        return None
    at, first = min(found.items())
    learner = first.learner
    if isinstance(learner, TokenLearner):
        name = "v1" if learner.use_sum_pooling else "v1-mean"
    else:
        name = "v11"
    if isinstance(learner, TokenLearnerModuleV11):
        name = "grouped-linear" if learner.approximate is None else "grouped"
    told = {"num_tokens": learner.num_tokens, "at": at, "learner": name, "fuse": False}
    if isinstance(first, FusedBlock):
        told["fuse"] = True
        if first.fuser.bottleneck_dim != 64:
            told["fuser_bottleneck_dim"] = first.fuser.bottleneck_dim or 0
    return told | ({"grid": list(first.fixed_grid)} if first.fixed_grid else {})


def block_index(at: int | float, depth: int) -> int:
    """Turns a share of the depth, such as 0.5, into the index of a block.

    Raises:
        ValueError: There is no such block.
    """
    is_share = isinstance(at, float) and 0 <= at < 1
    is_index = isinstance(at, int) and not isinstance(at, bool) and 0 <= at < depth
    if not is_share and not is_index:
        raise ValueError(
            f"at is {at!r}, expected a block from 0 to {depth - 1}, or a share from 0.0 to below 1"
        )
    return int(at * depth) if is_share else int(at)


def check_grid_remains(model: nn.Module, indices: list[int]) -> None:
    """Refuses feature maps of blocks that leave learned tokens only.

    Raises:
        ValueError: One of the blocks has none.
    """
    reduced = [i for i, b in wrapped_blocks(model).items() if not isinstance(b, FusedBlock)]
    at = min(reduced, default=math.inf)
    if without := [str(i) for i in indices if i >= at]:
        raise ValueError(
            f"from block {at} on there are learned tokens and no grid, but a feature map of block "
            f"{', '.join(without)} is asked for; take indices below {at}, output_fmt='NLC', or a "
            "model with fuse=True"
        )


def _check_grid_is_told(model: nn.Module, patches: nn.Module, grid: Grid | None) -> None:
    """Refuses V1 in a host that takes pictures of any size: a block sees no picture's grid."""
    if not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
        raise ValueError(
            "V1's convolutions need all positions, but patch_drop_rate leaves some out in "
            "training; insert learner='v11', or build the host without patch_drop_rate"
        )
    if getattr(model, "tells_grid", False):
        return
    if grid is None and not getattr(patches, "strict_img_size", True):
        raise ValueError(
            "V1's convolutions need the grid, which a host with dynamic_img_size does not tell; "
            "insert learner='v11', which needs none, or build the host without dynamic_img_size"
        )


def _like_its_block(wrapped: ReducedBlock) -> ReducedBlock:
    """Gives new parameters the block's device, dtype and mode."""
    parameter = next(wrapped.block.parameters())
    new = [wrapped.learner] + ([wrapped.fuser] if isinstance(wrapped, FusedBlock) else [])
    for module in new:
        module.to(parameter.device, parameter.dtype)
    return wrapped.train(wrapped.block.training)
