"""Learned tokens between a vision tower and a language model.

A `TokenConnector` wraps the projector of a vision-language model: positions are projected as
before, and `k` weighted means of them go on to the language model, whose inputs they look like.
Each mean starts as that of neighbors, so a connected model can be used before it is fitted.

Axes: `b` images, `n` positions, `k` tokens, `c` channels, `t` frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..utils.validation import Grid, check_count, check_pair, check_rate
from .functional import softmax
from .token_learner import TokenLearnerV11

LEAK = 0.1  # of a token's weight, on all positions at the start: weights of 0 would learn nothing


def pooled_grid(grid: Grid, num_tokens: int) -> Grid:
    """Returns the grid of `num_tokens` cells whose sides fit `grid` best.

    Raises:
        ValueError: There is none: the number is too large, or does not divide into sides.

    >>> pooled_grid((12, 12), 16), pooled_grid((12, 12), 8), pooled_grid((8, 16), 32)
    ((4, 4), (2, 4), (4, 8))
    """
    (h, w), k = check_pair(grid), check_count("num_tokens", num_tokens)
    sides = [(i, k // i) for i in range(1, k + 1) if k % i == 0 and i <= h and k // i <= w]
    if not sides:
        likely = [i * j for i in range(1, h + 1) for j in range(1, w + 1)]
        nearest = min(likely, key=lambda count: (abs(count - k), count))
        raise ValueError(
            f"num_tokens is {k}, which has no two sides within a {h} x {w} grid; pass {nearest}"
        )

    def stretch(side: Grid) -> float:
        a, b = side[0] * w, side[1] * h
        return max(a / b, b / a)

    return min(sides, key=lambda side: (stretch(side), side))


class NeighborPooling(nn.Module):
    """Averages neighboring positions, without a parameter: the rival of learned tokens.

    Args:
        num_tokens: Tokens `k`, the cells of a grid.
        grid: Height and width of the positions.
        num_prefix_tokens: Tokens in front of them, which are left out.

    Raises:
        ValueError: The number fits no grid of cells.

    Source: Yao et al., DeCo, arXiv 2405.20985.

    >>> NeighborPooling(4, (6, 6))(torch.ones(2, 36, 8)).shape
    torch.Size([2, 4, 8])
    """

    def __init__(self, num_tokens: int, grid: Grid, num_prefix_tokens: int = 0):
        super().__init__()
        self.num_tokens, self.grid = num_tokens, check_pair(grid)
        self.cells = pooled_grid(grid, num_tokens)
        self.num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens, least=0)

    def forward(self, x: Tensor) -> Tensor:
        """Averages the positions of each cell: `b n c -> b k c`."""
        positions = rearrange(
            x[:, self.num_prefix_tokens :], "b (h w) c -> b c h w", h=self.grid[0]
        )
        return F.adaptive_avg_pool2d(positions, self.cells).flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        """Returns the sizes for `print`."""
        return f"{self.grid[0]} x {self.grid[1]} -> {self.cells[0]} x {self.cells[1]}"


class NeighborTokenLearner(TokenLearnerV11):
    """Learns tokens that start as means of neighboring positions: V1.1 with a sense of place.

    To the logits of V1.1's maps, which know no place, a learned table of places is added. At the
    start the MLP is 0 and the table that of average pooling, with a tenth of each token's weight
    spread over all positions.

    Args:
        in_channels: Channels `c`.
        num_tokens: Tokens `k`, the cells of a grid.
        grid: Height and width of the positions.
        num_prefix_tokens: Tokens in front of them, such as a class token.
        bottleneck_dim: As in `TokenLearnerV11`.
        leak: Share of each token's weight that is spread over all positions at the start.

    Raises:
        ValueError: An argument is out of range, or the number fits no grid of cells.

    >>> NeighborTokenLearner(64, 16, grid=(12, 12))(torch.ones(2, 144, 64)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        in_channels: int,
        num_tokens: int,
        grid: Grid,
        num_prefix_tokens: int = 0,
        bottleneck_dim: int = 64,
        leak: float = LEAK,
    ):
        super().__init__(in_channels, num_tokens, bottleneck_dim)
        check_rate(leak, "leak")
        weights = _pooling_weights(grid, num_tokens, num_prefix_tokens)
        weights = (1 - leak) * weights + leak / weights.shape[0]
        self.places = nn.Parameter(weights.clamp(min=1e-6).log().to(self.norm.weight))
        last: Any = self.attention_maps
        for parameter in last[3].parameters():
            nn.init.zeros_(parameter)

    def _maps(self, x: Tensor, grid: Grid | None) -> Tensor:
        if x.shape[1] != len(self.places):
            raise ValueError(
                f"there are {x.shape[1]} positions, expected {len(self.places)}; give the model "
                "images of the size that it was connected for"
            )
        return softmax(self.attention_maps(self.norm(x)) + self.places)


def _pooling_weights(grid: Grid, num_tokens: int, num_prefix_tokens: int) -> Tensor:
    """Returns the weights of average pooling, `n k`; prefix tokens have none."""
    n = math.prod(check_pair(grid))
    with torch.device("cpu"):
        each = NeighborPooling(num_tokens, grid)(torch.eye(n, dtype=torch.float32)[None])[0].T
        return torch.cat([torch.zeros(num_prefix_tokens, num_tokens), each])


class TokenConnector(nn.Module):
    """Projects the positions of a vision tower, and turns them into few tokens of a language model.

    Args:
        projector: The model's own, `b m d -> b n c`; it may shuffle positions together.
        learner: `b n c -> b k c`: a `NeighborTokenLearner`, or `NeighborPooling`.
        clip_learner: Of a model for videos, the same over the tokens of all frames, one frame
            after the other, `b (t k) c`; None leaves `k` tokens a frame.

    >>> learner = NeighborTokenLearner(64, 16, grid=(12, 12))
    >>> TokenConnector(nn.Linear(32, 64), learner)(torch.ones(2, 144, 32)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self, projector: nn.Module, learner: nn.Module, clip_learner: nn.Module | None = None
    ):
        super().__init__()
        self.projector, self.learner, self.clip_learner = projector, learner, clip_learner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Projects positions and pools them: `b m d -> b k c`."""
        return self.learner(self.projector(x, *args, **kwargs))
