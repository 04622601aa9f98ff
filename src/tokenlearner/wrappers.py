"""The two ways a learner enters a network: around a transformer block, which is left as it is.

`blocks[i] = ReducedBlock(blocks[i], learner)` lets that block and all behind it see `k` tokens;
`blocks[i] = FusedBlock(blocks[i], learner, fuser)` lets that block alone see them. Both pass prefix
tokens (class, distillation, registers) around the learner and learn each frame's tokens by itself.

Axes: `b` batch, `p` prefix tokens, `t` frames, `n` positions of a frame, `k` tokens, `c` channels.
Source: scenic `EncoderMod` and `EncoderModFuser`, whose encoders these wrappers make of any.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import Grid, check_count
from .fuser import TokenFuser
from .modules import TokenLearner


class ReducedBlock(nn.Module):
    """Learns tokens in front of a block; the block and all that follow it run on them.

    Args:
        block: Any module `b n c -> b n c` whose weights do not depend on `n`.
        learner: Pools each frame, as `TokenLearnerV11`.
        num_prefix_tokens: Tokens at the front that are no positions; they pass by the learner.
        frames: Frames `t` that follow one another in the sequence.
        grid: Height and width of a frame, or the module that knows it as `grid_size`, which is
            asked at every call. Only V1 needs it.

    Raises:
        ValueError: A count is out of range.
    """

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | None = None,
    ):
        super().__init__()
        self.learner = learner
        self.block = block
        self.num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens, least=0)
        self.frames = check_count("frames", frames)
        self._grid = (grid,)  # in a tuple, so that the host's module is not registered twice

    @property
    def grid(self) -> Grid | None:
        """Height and width of a frame as far as known."""
        (known,) = self._grid
        return getattr(known, "grid_size", None) if isinstance(known, nn.Module) else known

    @property
    def fixed_grid(self) -> Grid | None:
        """The grid that was passed as such, None where a module is asked."""
        (known,) = self._grid
        return None if isinstance(known, nn.Module) else known

    def grid_of(self, image_size: tuple[int, int]) -> Grid | None:
        """Height and width in positions of a picture of this size, as far as known."""
        (known,) = self._grid
        ask = getattr(known, "dynamic_feat_size", None)  # timm's, for hosts that take any size
        return self.grid if ask is None else ask(image_size)

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Tensor:
        """Learns tokens and runs the block on them: `b (p + t n) c -> b (p + t k) c`.

        Args:
            x: Prefix tokens, then the positions of one frame after the other.
            args: For the block.
            grid: Height and width of these frames, where it changes from call to call.
            kwargs: For the block.

        Raises:
            ValueError: The frames do not divide the sequence, or an attention mask is given.
        """
        _refuse_mask(kwargs)
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
    """

    def __init__(
        self,
        block: nn.Module,
        learner: nn.Module,
        fuser: TokenFuser,
        num_prefix_tokens: int = 0,
        frames: int = 1,
        grid: Grid | nn.Module | None = None,
    ):
        super().__init__(block, learner, num_prefix_tokens, frames, grid)
        self.fuser = fuser

    def forward(self, x: Tensor, *args: Any, grid: Grid | None = None, **kwargs: Any) -> Tensor:
        """Runs the block on learned tokens: `b (p + t n) c -> b (p + t n) c`.

        Positions change only by what the fuser adds; prefix tokens are the block's.
        """
        _refuse_mask(kwargs)
        prefix, positions = self.split(x)
        seen = self.block(self.join(prefix, self.learn(positions, grid)), *args, **kwargs)
        prefix, tokens = self.split(seen)
        return self.join(prefix, positions + self.fuser(tokens, positions))


def _refuse_mask(arguments: dict[str, Any]) -> None:
    if arguments.get("attn_mask") is not None or arguments.get("is_causal"):
        raise ValueError(
            "an attention mask over positions does not fit learned tokens; call the model without "
            "attn_mask and is_causal, or remove() the learners"
        )
