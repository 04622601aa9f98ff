"""Learned tokens in a model that was built without them: `insert(model)`, and `remove(model)`.

The model's code is never changed: its blocks are wrapped (`layers/blocks.py`) and can be unwrapped
again. `hosts.py` knows where a model keeps its blocks. The host keeps the arguments of `insert` as
`tokenlearner_insertion`, an `InsertionConfig`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..layers.blocks import FusedBlock, OverlapEnd, PositionFreeBlock, ReducedBlock
from ..layers.token_fuser import TokenFuser
from ..layers.token_learner import LEARNERS
from ..utils.modules import stream_device, stream_dtype, uncompiled
from ..utils.validation import (
    Grid,
    check_choice,
    check_count,
    check_flag,
    check_grid,
    check_pair,
    is_integer,
)
from .features import guard_feature_maps, record_hidden_states, remove_guard, wrapped_blocks
from .hosts import Place, check_positions_are_not_needed, find_host
from .pretrained import guard_saving, remove_saving_guard

Model = TypeVar("Model", bound=nn.Module)
Wrapped = TypeVar("Wrapped", bound=PositionFreeBlock)
Counts = int | Sequence[int]
Places = int | float | Sequence[int | float]


_LEFT_OUT = ("grid", "overlap", "elastic", "active_tokens")  # of the kwargs, where not given


@dataclass(frozen=True)
class InsertionConfig:
    """Holds the arguments of `insert` that a host's learners were made with.

    Args:
        num_tokens: One number, or a list of them.
        at: One block, counted from 0, or as many as there are numbers.
        learner: As in `insert`.
        fuse: As in `insert`.
        fuser_bottleneck_dim: As in `insert`; 0 is the linear layer.
        grid: As in `insert`.
        overlap: As in `insert`.
        elastic: As in `insert`.
        active_tokens: As in `insert`; `set_num_tokens` changes it.
    """

    num_tokens: int | list[int]
    at: int | list[int]
    learner: str = "v11"
    fuse: bool = False
    fuser_bottleneck_dim: int = 64
    grid: list[int] | None = None
    overlap: int = 0
    elastic: bool = False
    active_tokens: int | None = None

    def to_kwargs(self) -> dict[str, Any]:
        """Returns plain values for `insert` and JSON; options without effect are left out."""
        kwargs = asdict(self)
        if not self.fuse or self.fuser_bottleneck_dim == 64:
            del kwargs["fuser_bottleneck_dim"]
        unset = [name for name in _LEFT_OUT if not kwargs[name]]
        return {name: value for name, value in kwargs.items() if name not in unset}


def insert(
    model: Model,
    num_tokens: Counts = 8,
    at: Places = 0.5,
    *,
    learner: str = "v11",
    fuse: bool = False,
    fuser_bottleneck_dim: int | None = 64,
    grid: Grid | None = None,
    overlap: int = 0,
    elastic: bool = False,
    active_tokens: int | None = None,
) -> Model:
    """Makes `model` run on `num_tokens` learned tokens from block `at` on; changes it in place.

    The new parameters take the device and dtype of their block and start untrained: train or
    distill before use. Prefix tokens (class, distillation, registers) are kept beside the learned
    ones. Learned tokens have no position, so blocks that add positions (by rotation, or by a bias
    such as BEiT's) run on them without; a table of biases gets no gradient then. `remove` takes
    everything out again.

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
        fuser_bottleneck_dim: Hidden width of the fusers' gates; None or 0 is the paper's linear
            layer.
        grid: Height and width of the positions, where the model does not know them.
        overlap: Learn tokens so many blocks before `at`, and run them beside all positions until
            these leave in front of `at`. Not with `fuse`, nor in blocks that take positions.
        elastic: Lets the model run on the first `m` of its tokens, see `set_num_tokens`; train it
            with several `m`. Not with `fuse`.
        active_tokens: With `elastic`, the `m` to start with; None is all.

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
    if not check_flag("fuse", fuse):
        check_positions_are_not_needed(model)
    place = find_host(model)
    if wrapped_blocks(place.host):
        raise ValueError("this model has learned tokens already; call remove(model) first")
    points = _points(num_tokens, at, len(place.blocks))
    overlap = check_count("overlap", overlap, least=0)
    starts = _starts(place, points, overlap, fuse)
    active = _check_elastic(elastic, active_tokens, max(points.values()), fuse)
    check_choice("learner", learner, list(LEARNERS))
    if learner in ("v1", "v1-mean"):
        _check_v1(place, points, fuse, grid)
    options: dict[str, Any] = {
        "num_prefix_tokens": place.num_prefix_tokens,
        "frames": place.frames,
        "grid": _check_positions(place, points, grid),
        "position_args": place.position_args,
    }
    if overlap:
        options["overlap"] = overlap
    k, start = 0, None
    for i in range(min(starts), len(place.blocks)):
        k = starts.get(i, k if fuse else 0)
        if k:
            is_meta = stream_device(place.blocks[i]).type == "meta"
            with torch.device("meta" if is_meta else "cpu"), torch.inference_mode(False):
                new = LEARNERS[learner](place.width, k)
                block = wrap(place.blocks[i], new, fuse, fuser_bottleneck_dim, **options)
            place.blocks[i] = start = _recorded(block, place)
        elif start and overlap > 1 and i + 1 in points:
            end = OverlapEnd(place.blocks[i], start, place.position_args)
            place.blocks[i] = _recorded(_like_block(end), place)
        elif place.position_args:
            place.blocks[i] = _like_block(PositionFreeBlock(place.blocks[i], place.position_args))
    indices, counts = list(points), list(points.values())
    host: Any = place.host
    guard_feature_maps(host)
    guard_saving(model)
    host.tokenlearner_insertion = InsertionConfig(
        num_tokens=counts if len(counts) > 1 else counts[0],
        at=indices if len(indices) > 1 else indices[0],
        learner=learner,
        fuse=bool(fuse),
        fuser_bottleneck_dim=fuser_bottleneck_dim or 0,
        grid=None if grid is None else list(check_pair(grid)),
        overlap=overlap,
        elastic=bool(elastic),
    )
    return model if active is None else set_num_tokens(model, active)


def set_num_tokens(model: Model, num_tokens: int) -> Model:
    """Makes a model run on the first `num_tokens` of its learned tokens; changes it in place.

    It has to be inserted with `elastic=True`. Where tokens are learned at several places, each has
    at most as many as it was inserted with. Its parameters stay as they are. A backward pass that
    computes blocks again (gradient checkpointing) has to come before the next change.

    Returns:
        The model itself.

    Raises:
        ValueError: The model has no learned tokens, is not elastic, or has fewer.

    >>> import timm, torch
    >>> vit = insert(timm.create_model("vit_tiny_patch16_224"), 16, elastic=True)
    >>> set_num_tokens(vit, 4).forward_features(torch.ones(1, 3, 224, 224)).shape  # and a class
    torch.Size([1, 5, 192])
    """
    host: Any = find_host(uncompiled(model)).host
    if not (blocks := wrapped_blocks(host)):
        raise ValueError("this model has no learned tokens; insert(model, elastic=True) adds them")
    config = vars(host).get("tokenlearner_insertion")
    if config is None or not config.elastic:
        raise ValueError(
            "the learned tokens of this model work together only, as it was inserted without "
            "elastic=True; insert it anew with elastic=True, or with as many tokens as you want"
        )
    most = max(learner.num_tokens for block in blocks.values() for learner in block.learners)
    if check_count("num_tokens", num_tokens) > most:
        raise ValueError(f"num_tokens is {num_tokens}, but {most} were inserted; ask for fewer")
    for block in blocks.values():
        for learner in block.learners:
            fewer = num_tokens < learner.num_tokens
            learner.active_tokens = int(num_tokens) if fewer else None
    active = int(num_tokens) if num_tokens < most else None
    host.tokenlearner_insertion = replace(config, active_tokens=active)
    return model


def wrap(
    block: nn.Module, learner: Any, fuse: bool, fuser_bottleneck_dim: int | None, **options: Any
) -> ReducedBlock:
    """Puts a learner in front of a block, in the block's device, dtype and mode.

    Args:
        block: As in `ReducedBlock`.
        learner: A module that `LEARNERS` makes.
        fuse: Put a fuser behind the block.
        fuser_bottleneck_dim: As in `insert`.
        options: Further arguments of `ReducedBlock`.
    """
    if not fuse:
        return _like_block(ReducedBlock(block, learner, **options))
    fuser = TokenFuser(learner.in_channels, learner.num_tokens, fuser_bottleneck_dim or None)
    return _like_block(FusedBlock(block, learner, fuser, **options))


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
    remove_saving_guard(model)
    for i, block in enumerate(place.blocks):
        if isinstance(block, PositionFreeBlock):
            place.blocks[i] = block.unwrap()
    vars(place.host).pop("tokenlearner_insertion", None)
    remove_guard(place.host)
    return model


def get_insertion(model: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of `insert` that a model's learners were made with.

    None without learners, and for blocks that were wrapped by hand or pickled by version 0.3; for
    those, set `tokenlearner_insertion` of the host to an `InsertionConfig`.
    """
    configs = (vars(part).get("tokenlearner_insertion") for part in model.modules())
    return next((config.to_kwargs() for config in configs if config is not None), None)


def block_index(at: int | float, depth: int) -> int:
    """Turns a share of the depth, such as 0.5, into the index of a block.

    Raises:
        ValueError: There is no such block.
    """
    is_index = is_integer(at) and 0 <= at < depth
    is_share = not is_integer(at) and isinstance(at, numbers.Real) and 0 <= at < 1
    if not is_share and not is_index:
        raise ValueError(
            f"at is {at!r}, expected a block from 0 to {depth - 1}, or a share from 0.0 to below 1"
        )
    return int(at * depth) if is_share else int(at)


def _points(num_tokens: Any, at: Any, depth: int) -> dict[int, int]:
    """Returns the number of tokens to learn by the index of the block, in order."""
    num_tokens, at = (getattr(x, "tolist", lambda x=x: x)() for x in (num_tokens, at))
    are_lists = [isinstance(x, Sequence) and not isinstance(x, str) for x in (num_tokens, at)]
    counts: list[Any] = [*num_tokens] if isinstance(num_tokens, Sequence) else [num_tokens]
    places: list[Any] = [*at] if isinstance(at, Sequence) and are_lists[1] else [at]
    if are_lists[0] != are_lists[1] or len(counts) != len(places) or not counts:
        raise ValueError(
            f"num_tokens is {num_tokens!r} and at is {at!r}, expected as many numbers as places: "
            "num_tokens=8, at=0.5, or num_tokens=(16, 8), at=(0.25, 0.5)"
        )
    indices = [block_index(place, depth) for place in places]
    counts = [check_count("num_tokens", count) for count in counts]
    if indices != sorted(set(indices)):
        raise ValueError(
            f"at is {at!r}, which is blocks {indices} of {depth}; pass each block once, in order"
        )
    if counts != sorted(counts, reverse=True):
        raise ValueError(
            f"num_tokens is {num_tokens!r}, expected no more tokens than at the place before; "
            f"pass {tuple(sorted(counts, reverse=True))}"
        )
    return dict(zip(indices, counts, strict=True))


def _starts(place: Place, points: dict[int, int], overlap: int, fuse: bool) -> dict[int, int]:
    """Returns the number of tokens to learn by the index of the block that learns them."""
    if not overlap:
        return points
    if fuse:
        raise ValueError(
            f"overlap is {overlap}, but with fuse=True positions never leave; pass either"
        )
    args = place.position_args
    if args and (args.arguments or args.parameters):
        raise ValueError(
            f"overlap is {overlap}, but blocks of {type(place.host).__name__} take the positions' "
            "rotary embeddings or relative biases, which learned tokens among them do not have; "
            "pass overlap=0"
        )
    previous = 0
    for at in points:
        if at - overlap < previous:
            raise ValueError(
                f"overlap is {overlap}, but there are {at - previous} blocks in front of block "
                f"{at} that run on what its tokens are learned from; pass overlap={at - previous} "
                "or less"
            )
        previous = at
    return {at - overlap: k for at, k in points.items()}


def _check_elastic(elastic: bool, active: int | None, k: int, fuse: bool) -> int | None:
    """Returns the number of tokens to run on, None for all."""
    if check_flag("elastic", elastic) and fuse:
        raise ValueError(
            "elastic is True, but with fuse=True fusers are made for one number of tokens; pass "
            "either"
        )
    if active is None:
        return None
    if not elastic:
        raise ValueError(f"active_tokens is {active}, which goes with elastic=True; pass it too")
    if check_count("active_tokens", active) > k:
        raise ValueError(f"active_tokens is {active}, but num_tokens is {k}; ask for fewer")
    return active


def _recorded(block: Wrapped, place: Place) -> Wrapped:
    """Lets transformers record the hidden states of a wrapper, if the host is one of theirs."""
    if type(place.host).__module__.startswith("transformers."):
        record_hidden_states(block)
    return block


def _check_positions(place: Place, points: dict[int, int], grid: Grid | None) -> Any:
    """Returns the source of the grid, after checking that there are enough positions."""
    n, k = math.prod(place.grid.grid_size), max(points.values())
    source = place.grid if grid is None else check_grid(grid, n)
    if k > n:
        raise ValueError(f"num_tokens is {k}, but an image has {n}; ask for fewer")
    return source


def _check_v1(place: Place, points: dict[int, int], fuse: bool, grid: Grid | None) -> None:
    """Raises ValueError where V1's convolutions would not have all positions on a known grid."""
    drop = getattr(place.host, "patch_drop", getattr(place.host, "patch_dropout", None))
    if drop is not None and not isinstance(drop, nn.Identity):
        raise ValueError(
            "V1's convolutions need all positions, but patch_drop_rate drops some in training; "
            "insert learner='v11', or build the host without patch_drop_rate"
        )
    if len(points) > 1 and not fuse:
        raise ValueError(
            "V1's convolutions need a grid, which learned tokens at a second place do not have; "
            "insert learner='v11', or pass fuse=True"
        )
    if grid is None and place.dynamic_img_size and not getattr(place.host, "passes_grid", False):
        raise ValueError(
            "V1's convolutions need a grid, which is unknown in a host for images of any size "
            "(dynamic_img_size, interpolate_pos_encoding); insert learner='v11', which needs none, "
            "or pass grid=(height, width) if all images have one size"
        )


def _like_block(wrapped: Wrapped) -> Wrapped:
    """Gives new parameters the block's device and dtype, and new modules its mode."""
    training = wrapped.block.training
    wrapped.training = training
    device, dtype = stream_device(wrapped.block), stream_dtype(wrapped.block)
    for name, module in wrapped.named_children():
        if name != "block":
            module.to(device, dtype).train(training)
    return wrapped
