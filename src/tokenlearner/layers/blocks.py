"""Wrappers that put a learner in front of a transformer block, which itself is not changed.

With `blocks[i] = ReducedBlock(blocks[i], learner)` that block and all later ones run on `k` tokens;
with `blocks[i] = FusedBlock(blocks[i], learner, fuser)` only that block does. Both pass prefix
tokens (class, distillation, registers) around the learner and learn tokens frame by frame.

With an overlap a `ReducedBlock` keeps the positions behind the new tokens, which so attend to them
for some blocks; the last of these is an `OverlapEnd`, or with an overlap of 1 the block itself.

A learned token has no position. Blocks that take positions besides their input (`PositionArgs`) run
on tokens without them; blocks behind a `ReducedBlock` are wrapped as `PositionFreeBlock` for that.

Axes: `b` batch, `p` prefix tokens, `t` frames, `n` positions of a frame, `k` tokens, `c` channels.
Source: scenic `EncoderMod` and `EncoderModFuser`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy

from ..utils.validation import Grid, check_count, require
from .token_fuser import TokenFuser
from .token_learner import Learner, TokenLearner


@dataclass(frozen=True)
class PositionArgs:
    """Names what a block takes of positions besides its input.

    Args:
        arguments: Call arguments to leave out for tokens, such as `"rope"`.
        parameters: Paths from the block to parameters to set aside while it runs on tokens; its
            attention has to take None for "no bias".
        exported: Call arguments to leave out only while `torch.export` traces. Some of
            transformers' models then create a mask of ones that they do not create when they run.
            While tracing it cannot be told apart from a user's mask, which every run refuses.
    """

    arguments: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    exported: tuple[str, ...] = ()


_OWN = {"block", "learner", "fuser", "position_args", "num_prefix_tokens", "frames", "overlap"}


@dataclass(frozen=True)
class PatchGrid:
    """Computes the grid of a host from its image size and patch size; height first."""

    image_size: Grid
    patch_size: Grid

    @property
    def grid_size(self) -> Grid:
        """Returns height and width in positions of an image of the host's size."""
        return self.dynamic_feat_size(self.image_size)

    def dynamic_feat_size(self, image_size: Grid) -> Grid:
        """Returns height and width in positions of an image of any size; the name is timm's."""
        (h, w), (patch_h, patch_w) = image_size, self.patch_size
        return h // patch_h, w // patch_w


class PositionFreeBlock(nn.Module):
    """Runs a block on tokens that have no position.

    A parameter that is set aside belongs to this module meanwhile, under the last part of its name:
    it stays in the state dict, moves along with `to`, and is not trained, as it plays no part.
    `unwrap` puts the same object back.

    The block's public attributes can be read and set through this module: `blocks[6].norm1` is the
    block's, as it was before the block was wrapped.

    Args:
        block: Any module `b n c -> b n c` whose other weights do not depend on `n`.
        position_args: What the block takes of positions.
    """

    def __init__(self, block: nn.Module, position_args: PositionArgs | None = None):
        super().__init__()
        self._wrap(block, position_args)

    def _wrap(self, block: nn.Module, position_args: PositionArgs | None) -> None:
        self.block = block
        self.position_args = position_args or PositionArgs()
        self._arguments = _positional_arguments(block)
        self._were_trained: dict[str, bool] = {}
        for path in self.position_args.parameters:
            owner, name = _owner(block, path)
            parameter = getattr(owner, name)
            self._were_trained[name] = parameter is not None and parameter.requires_grad
            self.register_parameter(name, parameter)
            setattr(owner, name, None)
            if parameter is not None:  # processes that train together would wait for its gradient
                parameter.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        """Reads what this module does not have from the block, such as `norm1` or `attn`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            block = self.__dict__.get("_modules", {}).get("block")
            if block is None or name.startswith("_"):
                raise
            return getattr(block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets on the block what the block has and this module does not."""
        if self._is_of_block(name):
            setattr(self.block, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_block(self, name: str) -> bool:
        block = self.__dict__.get("_modules", {}).get("block")
        if block is None or name.startswith("_") or name in _OWN or hasattr(type(self), name):
            return False
        places = (self.__dict__, self._parameters, self._buffers, self._modules)
        return hasattr(block, name) and not any(name in place for place in places)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickles a block; version 0.3 had another name for `position_args`."""
        if "of_positions" in state:
            state["position_args"] = state.pop("of_positions")
        state.setdefault("_were_trained", {})
        super().__setstate__(state)

    def unwrap(self) -> nn.Module:
        """Returns the block as it was; this module cannot be used any more."""
        for path in self.position_args.parameters:
            owner, name = _owner(self.block, path)
            parameter = getattr(self, name)
            setattr(owner, name, parameter)
            setattr(self, name, None)
            if self._were_trained.get(name):
                parameter.requires_grad_(True)
        return self.block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block: `b k c -> b k c`."""
        _check_is_not_traced(x)
        args, kwargs = self.without_positions(args, kwargs)
        return self.block(x, *args, **kwargs)

    def without_positions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call without those that belong to positions.

        Raises:
            ValueError: An attention mask is given.
        """
        left_out = self.position_args.arguments
        if torch.compiler.is_exporting():
            left_out += self.position_args.exported
        names = (*self._arguments, *[""] * len(args))
        args = tuple(None if n in left_out else value for n, value in zip(names, args))  # noqa: B905
        kwargs = {n: value for n, value in kwargs.items() if n not in left_out}
        for name, value in (*zip(names, args), *kwargs.items()):  # noqa: B905
            _check_is_no_mask(name, value)
        return args, kwargs


class ReducedBlock(PositionFreeBlock):
    """Learns tokens in front of a block; the block and all that follow it run on them.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        learner: Pools each frame, as `TokenLearnerV11`.
        num_prefix_tokens: Tokens at the front that are no positions; they pass by the learner.
        frames: Frames `t` that follow one another in the sequence.
        grid: Height and width of a frame, or a module or `PatchGrid` whose `grid_size` is read at
            every call. Only V1 needs it.
        position_args: What the block takes of positions.
        overlap: Blocks, this one first, that run on tokens and positions. Behind an overlap of 1
            the positions leave here; else the last of these blocks has to be an `OverlapEnd`.

    Raises:
        ValueError: A count is out of range.
    """

    overlap = 0  # of blocks pickled by version 0.3

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | PatchGrid | None = None,
        position_args: PositionArgs | None = None,
        overlap: int = 0,
    ):
        nn.Module.__init__(self)
        self.learner = learner  # in front of the block when parameters are counted
        self._wrap(block, position_args)
        self.num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens, least=0)
        self.frames = check_count("frames", frames)
        self.overlap = check_count("overlap", overlap, least=0)
        self._grid = (grid,)  # in a tuple, so that the host's module is not registered twice

    @property
    def grid(self) -> Grid | None:
        """Returns height and width of a frame, None if unknown."""
        (source,) = self._grid
        is_owner = isinstance(source, nn.Module | PatchGrid)
        return getattr(source, "grid_size", None) if is_owner else source

    def grid_of(self, image_size: tuple[int, int]) -> Grid | None:
        """Returns height and width in positions of an image of this size, None if unknown."""
        (source,) = self._grid
        compute = getattr(source, "dynamic_feat_size", None)  # timm's, for images of any size
        return self.grid if compute is None else compute(image_size)

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Any:
        """Learns tokens and runs the block on them: `b (p + t n) c -> b (p + t k) c`.

        With an overlap above 1 positions remain behind the tokens: `b (p + t k + t n) c`.

        Args:
            x: Prefix tokens, then the positions of one frame after the other.
            args: For the block.
            grid: Height and width of these frames, where it changes from call to call.
            kwargs: For the block.

        Raises:
            ValueError: The frames do not divide the sequence, or an attention mask is given.
        """
        _check_is_not_traced(x)
        args, kwargs = self.without_positions(args, kwargs)
        prefix, positions = self.split(x)
        tokens = self.join(prefix, self.learn(positions, grid))
        if not self.overlap:
            return self.block(tokens, *args, **kwargs)
        both = torch.cat([tokens, x[:, self.num_prefix_tokens :]], dim=1)
        out = self.block(both, *args, **kwargs)
        return _first_tokens(out, tokens.shape[1]) if self.overlap == 1 else out

    def learn(self, positions: Tensor, grid: Grid | None = None) -> Tensor:
        """Pools each frame: `(b t) n c -> (b t) k c`."""
        return self.learner(positions, grid if grid and self.needs_grid else self.learner_grid)

    @property
    def learners(self) -> list[Learner]:
        """Returns the learner; inside a wrapper of PEFT's there are two, of which one runs."""
        if isinstance(self.learner, Learner):
            return [self.learner]
        return [module for module in self.learner.modules() if isinstance(module, Learner)]

    @property
    def needs_grid(self) -> bool:
        """Returns whether the learner depends on the grid: V1's convolutions do, V1.1 does not."""
        return isinstance(self.learner, TokenLearner) or any(  # inside a wrapper of PEFT's
            isinstance(module, TokenLearner) for module in self.learner.modules()
        )

    @property
    def learner_grid(self) -> Grid | None:
        """Returns the grid for the learner, unless a call passes another."""
        return self.grid if self.needs_grid else None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits a sequence into prefix and frames: `b (p + t n) c` to `b p c`, `(b t) n c`."""
        prefix, rest = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if self.frames == 1:
            return prefix, rest
        if rest.shape[1] % self.frames:
            raise ValueError(
                f"{rest.shape[1]} tokens (behind {self.num_prefix_tokens} prefix tokens) do not "
                f"divide into {self.frames} frames; build the model for the clip's length"
            )
        return prefix, rearrange(rest, "b (t n) c -> (b t) n c", t=self.frames)

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        """Reverses `split`: `b p c`, `(b t) n c` to `b (p + t n) c`."""
        rest = rearrange(frames, "(b t) n c -> b (t n) c", t=self.frames)
        return torch.cat([prefix, rest], dim=1) if self.num_prefix_tokens else rest


class OverlapEnd(PositionFreeBlock):
    """Runs the last block on tokens and positions; the positions leave behind it.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        start: The block that learned the tokens, with a learner of `LEARNERS`.
        position_args: What the block takes of positions.

    Raises:
        ValueError: `start` is no such block.
    """

    def __init__(
        self, block: nn.Module, start: ReducedBlock, position_args: PositionArgs | None = None
    ):
        super().__init__(block, position_args)
        require(
            start.overlap > 1 and bool(start.learners),
            f"start has overlap={start.overlap} and a {type(start.learner).__name__}, expected an "
            "overlap of 2 or more and a learner of tokenlearner.layers",
        )
        self._start = (start,)  # in a tuple, so that it is not registered twice

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block and drops the positions: `b (p + t k + t n) c -> b (p + t k) c`."""
        (start,) = self._start
        learner = start.learners[0]
        k = learner.active_tokens or learner.num_tokens
        count = start.num_prefix_tokens + start.frames * k
        return _first_tokens(super().forward(x, *args, **kwargs), count)


class FusedBlock(ReducedBlock):
    """Runs a block on learned tokens and gives all positions back: learn, block, fuse, add.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        learner: Pools each frame, as `TokenLearnerV11`.
        fuser: Spreads the block's tokens over the positions again.
        num_prefix_tokens: Tokens at the front that are no positions; the block sees them.
        frames: Frames `t` that follow one another in the sequence.
        grid: As in `ReducedBlock`.
        position_args: As in `ReducedBlock`.
    """

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        fuser: TokenFuser,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | PatchGrid | None = None,
        position_args: PositionArgs | None = None,
    ):
        super().__init__(block, learner, num_prefix_tokens, frames, grid, position_args)
        self.fuser = fuser

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Any:
        """Runs the block on learned tokens: `b (p + t n) c -> b (p + t n) c`.

        Positions change only by what the fuser adds; prefix tokens are the block's. If the block
        returns a tuple, its first element is used and the others are passed on.
        """
        _check_is_not_traced(x)
        args, kwargs = self.without_positions(args, kwargs)
        prefix, positions = self.split(x)
        out = self.block(self.join(prefix, self.learn(positions, grid)), *args, **kwargs)
        prefix, tokens = self.split(out[0] if isinstance(out, tuple) else out)
        x = self.join(prefix, positions + self.fuser(tokens, positions))
        return (x, *out[1:]) if isinstance(out, tuple) else x


def _first_tokens(out: Any, count: int) -> Any:
    """Returns a block's output without its last tokens; older transformers have it in a tuple."""
    return (out[0][:, :count], *out[1:]) if isinstance(out, tuple) else out[:, :count]


def _positional_arguments(block: nn.Module) -> tuple[str, ...]:
    """Returns the names of positional arguments of a block's `forward`, without the tokens."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def _owner(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module that has a parameter, and the parameter's name in it."""
    module, _, name = path.rpartition(".")
    return block.get_submodule(module), name


def _check_is_not_traced(x: Any) -> None:
    """Raises ValueError where torch.fx traces the operations of a wrapper."""
    if isinstance(x, Proxy):
        raise ValueError(
            "torch.fx cannot trace a block with learned tokens; keep it whole: pass "
            'tracer_kwargs={"leaf_modules": [...]} with ReducedBlock, FusedBlock and '
            "PositionFreeBlock of tokenlearner.layers"
        )


def _check_is_no_mask(name: str, value: Any) -> None:
    """Raises ValueError for a mask over positions; a mask over heads is allowed."""
    is_mask = "mask" in name and name != "head_mask" and value is not None
    if is_mask or (name == "is_causal" and value):
        raise ValueError(
            "an attention mask over positions does not fit learned tokens; call the model without "
            f"{name}, or remove() the learners"
        )
