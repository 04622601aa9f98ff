"""Learned tokens in a model that was built without them: `insert(model)`, and `remove(model)`.

Where a model keeps its blocks and what they need is told by `hosts.py`. Its own code is never
touched: blocks are wrapped (`wrappers.py`) and can be unwrapped again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ..layers.blocks import FusedBlock, PositionFreeBlock, ReducedBlock
from ..layers.token_fuser import TokenFuser
from ..layers.token_learner import LEARNERS, TokenLearner, TokenLearnerModuleV11
from ..utils.validation import Grid, check_choice, check_count, check_grid
from .hosts import Place, check_positions_are_not_needed, find_host

Model = TypeVar("Model", bound=nn.Module)
Wrapped = TypeVar("Wrapped", bound=PositionFreeBlock)
Counts = int | Sequence[int]
Places = int | float | Sequence[int | float]


def insert(
    model: Model,
    num_tokens: Counts = 8,
    at: Places = 0.5,
    *,
    learner: str = "v11",
    fuse: bool = False,
    fuser_bottleneck_dim: int | None = 64,
    grid: Grid | None = None,
) -> Model:
    """Makes `model` run on `num_tokens` learned tokens from block `at` on; changes it in place.

    The new parameters take the device and dtype of the block they stand at, and start untrained:
    train or distil before use. Prefix tokens (class, distillation, registers) are kept besides the
    learned ones. Learned tokens have no position, so blocks that are told positions (by rotation,
    or by a bias such as BEiT's) run on them without; a table of biases gets no gradient then.
    `remove` takes everything out again.

    Args:
        model: A ViT of timm (EVA, DINOv3 and BEiT too), torchvision or transformers, or a model
            that has one as a part; `tokenlearner.models.hosts.HOSTS` lists them.
        num_tokens: Tokens `k` to learn from an image, or from a frame of a clip. Several numbers
            go with several places, and do not grow: `num_tokens=(16, 8), at=(0.25, 0.5)`.
        at: The learner runs in front of this block, counted from 0, or at this share of the depth.
            At a second place it learns from the tokens of the first; with `fuse`, from all
            positions as everywhere.
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
        ValueError: The model is unknown, cannot run on tokens, or has learners already, or an
            argument is out of range.

    Source: scenic `EncoderMod` (at `tokenlearner_loc`) and `EncoderModFuser`.

    >>> import timm, torch
    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> vit(torch.ones(1, 3, 224, 224)).shape, insert(vit, 8)(torch.ones(1, 3, 224, 224)).shape
    (torch.Size([1, 10]), torch.Size([1, 10]))
    """
    place = find_host(model)
    if wrapped_blocks(place.host):
        raise ValueError("this model has learned tokens already; call remove(model) first")
    points = _points(num_tokens, at, len(place.blocks))
    check_choice("learner", learner, list(LEARNERS))
    if not fuse:
        check_positions_are_not_needed(model)
    if learner in ("v1", "v1-mean"):
        _check_v1(place, points, fuse, grid)
    seen: dict[str, Any] = {
        "num_prefix_tokens": place.num_prefix_tokens,
        "frames": place.frames,
        "grid": _known_grid(place, points, grid),
        "of_positions": place.of_positions,
    }
    k = 0
    for i in range(min(points), len(place.blocks)):
        k = points.get(i, k if fuse else 0)
        if k:
            new = LEARNERS[learner](place.width, k)
            place.blocks[i] = wrap(place.blocks[i], new, fuse, fuser_bottleneck_dim, **seen)
        elif place.of_positions:
            place.blocks[i] = _in_its_mode(PositionFreeBlock(place.blocks[i], place.of_positions))
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
        return _in_its_mode(ReducedBlock(block, learner, **place))
    fuser = TokenFuser(learner.in_channels, learner.num_tokens, fuser_bottleneck_dim or None)
    return _in_its_mode(FusedBlock(block, learner, fuser, **place))


def remove(model: Model) -> Model:
    """Takes all learners and fusers out again; the host's parameters are as they are.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is unknown or has no learners.
    """
    place = find_host(model)
    if not wrapped_blocks(place.host):
        raise ValueError("this model has no learned tokens to remove; insert(model) adds them")
    for i, block in enumerate(place.blocks):
        if isinstance(block, PositionFreeBlock):
            place.blocks[i] = block.unwrap()
    return model


def wrapped_blocks(model: nn.Module) -> dict[int, ReducedBlock]:
    """Finds the blocks of any model that learners stand at, by their index in their list.

    Blocks that are in no list are counted in their order.
    """
    found: dict[int, ReducedBlock] = {}
    for parent in nn.ModuleList([model]).modules():
        is_list = isinstance(parent, nn.Sequential | nn.ModuleList)
        for i, child in enumerate(parent.children()):
            if isinstance(child, ReducedBlock):
                found[i if is_list else len(found)] = child
    return found


def get_insertion(model: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of `insert` that lead to this model's learners, None without any."""
    found = wrapped_blocks(model)
    if not found:
        return None
    _, first = min(found.items())
    learner = first.learner
    if isinstance(learner, TokenLearner):
        name = "v1" if learner.use_sum_pooling else "v1-mean"
    else:
        name = "v11"
    if isinstance(learner, TokenLearnerModuleV11):
        name = "grouped-linear" if learner.approximate is None else "grouped"
    at, counts = _points_of(found)
    told = {"num_tokens": counts, "at": at, "learner": name, "fuse": False}
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


def check_has_grid(model: nn.Module, indices: list[int]) -> None:
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


def _points(num_tokens: Counts, at: Places, depth: int) -> dict[int, int]:
    """The blocks in front of which tokens are learned, in order, and how many."""
    several = [isinstance(x, Sequence) and not isinstance(x, str) for x in (num_tokens, at)]
    counts: list[Any] = [*num_tokens] if isinstance(num_tokens, Sequence) else [num_tokens]
    places: list[Any] = [*at] if isinstance(at, Sequence) and several[1] else [at]
    if several[0] != several[1] or len(counts) != len(places) or not counts:
        raise ValueError(
            f"num_tokens is {num_tokens!r} and at is {at!r}, expected a number of tokens for every "
            "place: num_tokens=8, at=0.5, or num_tokens=(16, 8), at=(0.25, 0.5)"
        )
    indices = [block_index(place, depth) for place in places]
    counts = [check_count("num_tokens", count) for count in counts]
    if indices != sorted(set(indices)):
        raise ValueError(
            f"at is {at!r}, which are blocks {indices} of {depth}; name each place once, in order"
        )
    if counts != sorted(counts, reverse=True):
        raise ValueError(
            f"num_tokens is {num_tokens!r}, but from place to place tokens can only become fewer; "
            f"pass {tuple(sorted(counts, reverse=True))}"
        )
    return dict(zip(indices, counts, strict=True))


def _points_of(found: dict[int, ReducedBlock]) -> tuple[Any, Any]:
    """Where a model learns tokens and how many, as `insert` takes them."""
    points: list[tuple[int, Any]] = []
    for i, block in sorted(found.items()):
        k = block.learner.num_tokens
        if not points or not isinstance(block, FusedBlock) or points[-1][1] != k:
            points.append((i, k))
    at, counts = map(list, zip(*points, strict=True))
    return (at, counts) if len(points) > 1 else points[0]


def _known_grid(place: Place, points: dict[int, int], grid: Grid | None) -> Any:
    """What knows the grid, once it is certain that there are positions enough."""
    n, k = math.prod(place.grid.grid_size), max(points.values())
    known = place.grid if grid is None else check_grid(grid, n)
    if k > n:
        raise ValueError(f"num_tokens is {k}, but an image has {n}; ask for fewer")
    return known


def _check_v1(place: Place, points: dict[int, int], fuse: bool, grid: Grid | None) -> None:
    """Refuses V1 where its convolutions would not have all positions on a grid that is known."""
    drop = getattr(place.host, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise ValueError(
            "V1's convolutions need all positions, but patch_drop_rate leaves some out in "
            "training; insert learner='v11', or build the host without patch_drop_rate"
        )
    if len(points) > 1 and not fuse:
        raise ValueError(
            "V1's convolutions need a grid, but from the second place on there are tokens without "
            "one; insert learner='v11', or with fuse=True"
        )
    if grid is None and place.any_size and not getattr(place.host, "passes_grid", False):
        raise ValueError(
            "V1's convolutions need the grid, which a host that takes images of any size "
            "(dynamic_img_size, interpolate_pos_encoding) does not tell; insert learner='v11', "
            "which needs none, or pass grid=(height, width) if all images have one size"
        )


def _in_its_mode(wrapped: Wrapped) -> Wrapped:
    """Gives new parameters the block's device and dtype, and new modules its mode."""
    training = wrapped.block.training
    wrapped.training = training
    for name, module in wrapped.named_children():
        if name != "block":
            like = next(wrapped.block.parameters())
            module.to(like.device, like.dtype).train(training)
    return wrapped
