"""The two ways a learner enters a network: around a transformer block, which is left as it is.

`blocks[i] = ReducedBlock(blocks[i], learner)` lets that block and all behind it see `k` tokens;
`blocks[i] = FusedBlock(blocks[i], learner, fuser)` lets that block alone see them. Both pass prefix
tokens (class, distillation, registers) around the learner and learn each frame's tokens by itself.

A learned token has no position. Blocks that are told positions besides (`OfPositions`) run on
tokens without them, and those behind a `ReducedBlock` are wrapped as `UnplacedBlock` for that.

Axes: `b` batch, `p` prefix tokens, `t` frames, `n` positions of a frame, `k` tokens, `c` channels.
Source: scenic `EncoderMod` and `EncoderModFuser`, whose encoders these wrappers make of any.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..utils.validation import Grid, check_count
from .token_fuser import TokenFuser
from .token_learner import TokenLearner


@dataclass(frozen=True)
class PositionArgs:
    """What a block is told of positions besides its input.

    Args:
        arguments: Names of call arguments that are left out for tokens, such as `"rope"`: without
            a rotation all tokens are at one place.
        parameters: Paths from the block to parameters that are set aside while it runs on tokens;
            its attention has to take None for "no bias".
        exported: Names of call arguments that are left out while `torch.export` traces. Some of
            transformers' models then make a mask of ones, where they make none when they run; that
            one cannot be told from a mask that was passed, which is refused in every run.
    """

    arguments: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    exported: tuple[str, ...] = ()


@dataclass(frozen=True)
class PatchGrid:
    """The grid of a host that knows its image and its patches, but no grid; height first."""

    image_size: Grid
    patch_size: Grid

    @property
    def grid_size(self) -> Grid:
        """Height and width in positions of an image of the host's size."""
        return self.dynamic_feat_size(self.image_size)

    def dynamic_feat_size(self, image_size: Grid) -> Grid:
        """Height and width in positions of an image of any size; the name is timm's."""
        (h, w), (patch_h, patch_w) = image_size, self.patch_size
        return h // patch_h, w // patch_w


class PositionFreeBlock(nn.Module):
    """Runs a block on tokens that have no position.

    A parameter that is set aside is this module's while it lasts, under the last part of its name:
    so it is in the state dict, moves along with `to`, and gets no gradient. `unwrap` puts the same
    object back in its place.

    Args:
        block: Any module `b n c -> b n c` whose other weights do not depend on `n`.
        of_positions: What of it belongs to positions.
    """

    def __init__(self, block: nn.Module, of_positions: PositionArgs | None = None):
        super().__init__()
        self._wrap(block, of_positions)

    def _wrap(self, block: nn.Module, of_positions: PositionArgs | None) -> None:
        self.block = block
        self.of_positions = of_positions or PositionArgs()
        self._arguments = _positional_arguments(block)
        for path in self.of_positions.parameters:
            owner, name = _owner(block, path)
            self.register_parameter(name, getattr(owner, name))
            setattr(owner, name, None)

    def unwrap(self) -> nn.Module:
        """Returns the block as it was; this module is of no more use."""
        for path in self.of_positions.parameters:
            owner, name = _owner(self.block, path)
            setattr(owner, name, getattr(self, name))
            setattr(self, name, None)
        return self.block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block: `b k c -> b k c`."""
        args, kwargs = self.without_positions(args, kwargs)
        return self.block(x, *args, **kwargs)

    def without_positions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call as tokens take them.

        Raises:
            ValueError: There is an attention mask.
        """
        left_out = self.of_positions.arguments
        if torch.compiler.is_exporting():
            left_out += self.of_positions.exported
        names = (*self._arguments, *[""] * len(args))
        args = tuple(None if n in left_out else value for n, value in zip(names, args))  # noqa: B905
        kwargs = {n: value for n, value in kwargs.items() if n not in left_out}
        for name, value in (*zip(names, args), *kwargs.items()):  # noqa: B905
            _refuse_mask(name, value)
        return args, kwargs


class ReducedBlock(PositionFreeBlock):
    """Learns tokens in front of a block; the block and all that follow it run on them.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        learner: Pools each frame, as `TokenLearnerV11`.
        num_prefix_tokens: Tokens at the front that are no positions; they pass by the learner.
        frames: Frames `t` that follow one another in the sequence.
        grid: Height and width of a frame, or what knows it as `grid_size`, such as a module or a
            `PatchGrid`, and is asked at every call. Only V1 needs it.
        of_positions: What of the block belongs to positions.

    Raises:
        ValueError: A count is out of range.
    """

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | PatchGrid | None = None,
        of_positions: PositionArgs | None = None,
    ):
        nn.Module.__init__(self)
        self.learner = learner  # in front of the block when parameters are counted
        self._wrap(block, of_positions)
        self.num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens, least=0)
        self.frames = check_count("frames", frames)
        self._grid = (grid,)  # in a tuple, so that the host's module is not registered twice

    @property
    def grid(self) -> Grid | None:
        """Height and width of a frame as far as known."""
        (known,) = self._grid
        asked = isinstance(known, nn.Module | PatchGrid)
        return getattr(known, "grid_size", None) if asked else known

    @property
    def fixed_grid(self) -> Grid | None:
        """The grid that was passed as such, None where the host is asked."""
        (known,) = self._grid
        return None if isinstance(known, nn.Module | PatchGrid) else known

    def grid_of(self, image_size: tuple[int, int]) -> Grid | None:
        """Height and width in positions of an image of this size, as far as known."""
        (known,) = self._grid
        ask = getattr(known, "dynamic_feat_size", None)  # timm's, for hosts that take any size
        return self.grid if ask is None else ask(image_size)

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Any:
        """Learns tokens and runs the block on them: `b (p + t n) c -> b (p + t k) c`.

        Args:
            x: Prefix tokens, then the positions of one frame after the other.
            args: For the block.
            grid: Height and width of these frames, where it changes from call to call.
            kwargs: For the block.

        Raises:
            ValueError: The frames do not divide the sequence, or an attention mask is given.
        """
        args, kwargs = self.without_positions(args, kwargs)
        prefix, positions = self.split(x)
        return self.block(self.join(prefix, self.learn(positions, grid)), *args, **kwargs)

    def learn(self, positions: Tensor, grid: Grid | None = None) -> Tensor:
        """Pools each frame: `(b t) n c -> (b t) k c`."""
        return self.learner(positions, grid if grid and self.needs_grid else self.learner_grid)

    @property
    def needs_grid(self) -> bool:
        """Whether the learner depends on the grid: V1's convolutions do, V1.1 does not."""
        return isinstance(self.learner, TokenLearner)

    @property
    def learner_grid(self) -> Grid | None:
        """What the learner is told about the grid unless a call tells it another."""
        return self.grid if self.needs_grid else None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parts a sequence into prefix and frames: `b (p + t n) c` to `b p c`, `(b t) n c`."""
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
        """The way back from `split`: `b p c`, `(b t) n c` to `b (p + t n) c`."""
        rest = rearrange(frames, "(b t) n c -> b (t n) c", t=self.frames)
        return torch.cat([prefix, rest], dim=1) if self.num_prefix_tokens else rest


class FusedBlock(ReducedBlock):
    """Runs a block on learned tokens and gives all positions back: learn, block, fuse, add.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        learner: Pools each frame, as `TokenLearnerV11`.
        fuser: Spreads the block's tokens over the positions again.
        num_prefix_tokens: Tokens at the front that are no positions; the block sees them.
        frames: Frames `t` that follow one another in the sequence.
        grid: As in `ReducedBlock`.
        of_positions: As in `ReducedBlock`: the block runs on tokens, so it is left out here too.
    """

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        fuser: TokenFuser,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | PatchGrid | None = None,
        of_positions: PositionArgs | None = None,
    ):
        super().__init__(block, learner, num_prefix_tokens, frames, grid, of_positions)
        self.fuser = fuser

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Any:
        """Runs the block on learned tokens: `b (p + t n) c -> b (p + t n) c`.

        Positions change only by what the fuser adds; prefix tokens are the block's. Of a block that
        returns a tuple the first is meant, and the rest is passed on.
        """
        args, kwargs = self.without_positions(args, kwargs)
        prefix, positions = self.split(x)
        seen = self.block(self.join(prefix, self.learn(positions, grid)), *args, **kwargs)
        prefix, tokens = self.split(seen[0] if isinstance(seen, tuple) else seen)
        x = self.join(prefix, positions + self.fuser(tokens, positions))
        return (x, *seen[1:]) if isinstance(seen, tuple) else x


def _positional_arguments(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a call may give by their place, behind the tokens."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def _owner(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and the parameter's name there."""
    module, _, name = path.rpartition(".")
    return block.get_submodule(module), name


def _refuse_mask(name: str, value: Any) -> None:
    """Refuses a mask over positions; one over heads is none."""
    is_mask = "mask" in name and name != "head_mask" and value is not None
    if is_mask or (name == "is_causal" and value):
        raise ValueError(
            "an attention mask over positions does not fit learned tokens; call the model without "
            f"{name}, or remove() the learners"
        )
