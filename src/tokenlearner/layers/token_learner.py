"""The paper's TokenLearners: `k` tokens learned from the `n` positions of a frame.

A TokenLearner draws `k` maps over the positions and pools the positions into `k` tokens, one a map.

| class | maps from | as published |
| --- | --- | --- |
| `TokenLearner` | 4 convolutions 3 x 3, sigmoid | V1, the paper's experiments |
| `TokenLearnerModuleV11` | grouped convolutions 1 x 1, softmax | V1.1 of December 2021 |
| `TokenLearnerV11` | MLP, softmax | V1.1 since March 2022, and the one to use |

Axes: `b` batch, `t` frames, `h w` grid, `n` positions, `k` tokens, `c` channels, `g` groups.
Source: Ryoo et al., arXiv 2106.11297, and google-research/scenic `projects/token_learner/model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ..utils.validation import (
    POSITIONS,
    Grid,
    check_count,
    check_eps,
    check_grid,
    check_input,
    check_pair,
    check_rate,
)
from .functional import (
    check_gelu,
    chunks,
    conv3x3,
    flatten,
    is_plain_conv,
    leading_dims,
    mlp,
    pool,
    softmax,
    square_grid,
    upcast,
    wide_conv3x3,
)

_OFFICIAL: dict[str, Any] = {"norm_eps": 1e-6, "approximate": "tanh"}  # flax's numbers


class Learner(nn.Module):
    """Base of the learners: checks and folds the input, and pools positions by maps."""

    active_tokens: int | None = None
    """How many tokens are learned, the first ones; None is all. `set_num_tokens` sets it."""

    def __init__(self, in_channels: int, num_tokens: int, norm_eps: float):
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.norm = nn.LayerNorm(in_channels, eps=check_eps(norm_eps))

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Pools every frame of `x` into `num_tokens` tokens, or the first `active_tokens`.

        Args:
            x: Floating point, channels last, of the parameters' dtype (any under autocast).
            grid: Height and width of a flat `x`. Only V1 needs it, and only if `n` is not a square.

        Shape:
            `b n c -> b k c`, `b h w c -> b k c`, `b t h w c -> b t k c`; the dtype is that of `x`.

        Raises:
            ValueError: The rank, channels, dtype or grid do not fit.
        """
        positions, grid = self._fold(x, grid)
        pooled = [self._tokens(p, self._active(p, grid)) for p in chunks(positions)]
        tokens = torch.cat(pooled) if len(pooled) > 1 else pooled[0]
        return tokens.to(x.dtype).reshape(*leading_dims(x), *tokens.shape[1:])

    def attention(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Returns the maps that pool `x`: where each learned token looks.

        Takes what `forward` takes. V1 maps are gates in (0, 1); V1.1 maps sum to 1 over a frame.

        Shape:
            `b n c -> b k n`, `b h w c -> b k h w`, `b t h w c -> b t k h w`.
        """
        positions, grid = self._fold(x, grid)
        maps = self._active(positions, grid).to(x.dtype)
        return maps.reshape(*leading_dims(x), maps.shape[1], *x.shape[len(leading_dims(x)) : -1])

    def extra_repr(self) -> str:
        """Returns the sizes for `print`."""
        return f"in_channels={self.in_channels}, num_tokens={self.num_tokens}"

    def _fold(self, x: Tensor, grid: Grid | None) -> tuple[Tensor, Grid | None]:
        """Folds frames into the batch and the grid into one axis: `b n c` and the grid."""
        check_input("the input", x, POSITIONS, self.in_channels, self.norm.weight.dtype)
        if x.ndim == 3:
            return x, None if grid is None else check_grid(grid, x.shape[1])
        h, w = x.shape[-3:-1]
        if grid is not None and check_pair(grid) != (h, w):
            raise ValueError(f"grid is {grid}, but the input has a {h} x {w} grid; leave grid out")
        return flatten(x), (h, w)

    def _active(self, x: Tensor, grid: Grid | None) -> Tensor:
        """Computes the maps of the tokens that are learned."""
        maps = self._maps(x, grid)
        return maps if self.active_tokens is None else maps[:, : self.active_tokens]

    def _maps(self, x: Tensor, grid: Grid | None) -> Tensor:
        """Computes the maps: `b n c -> b k n`, in float32 or wider."""
        raise NotImplementedError

    def _tokens(self, x: Tensor, maps: Tensor) -> Tensor:
        """Pools positions by maps: `b n c, b k n -> b k c`."""
        return pool(maps, x)


class TokenLearner(Learner):
    """Learns tokens by four 3 x 3 convolutions and a sigmoid: V1, used in the paper's experiments.

    The defaults are those of the small PyTorch port that many started from. The official numbers
    are `use_sum_pooling=True, norm_eps=1e-6, approximate="tanh"`. Sum pooling makes tokens about
    `n` times as large as V1.1 does, so it needs the fuser's normalization.

    Args:
        in_channels: Channels `c` of the input.
        num_tokens: Tokens `k` to learn, 8 or 16 in the paper.
        use_sum_pooling: Sum over the positions (the official default) instead of their mean.
        norm_eps: LayerNorm's epsilon.
        approximate: The GELU, `"none"` (exact) or `"tanh"`.

    Raises:
        ValueError: An argument is out of range.

    Source: scenic `TokenLearnerModule`. Takes grids that are not square, in every form.

    >>> TokenLearner(in_channels=128, num_tokens=8)(torch.ones(2, 32, 32, 128)).shape
    torch.Size([2, 8, 128])
    """

    def __init__(
        self,
        in_channels: int,
        num_tokens: int,
        use_sum_pooling: bool = False,
        *,
        norm_eps: float = 1e-5,
        approximate: str = "none",
    ):
        super().__init__(in_channels, num_tokens, norm_eps)
        self.use_sum_pooling = use_sum_pooling
        approximate = check_gelu(approximate)
        layers: list[nn.Module] = []
        for channels in (in_channels, num_tokens, num_tokens):
            layers += [conv3x3(channels, num_tokens), nn.GELU(approximate)]
        self.attention_maps = nn.Sequential(*layers, conv3x3(num_tokens, num_tokens))

    def _maps(self, x: Tensor, grid: Grid | None) -> Tensor:
        first, *others = self.attention_maps
        logits = wide_conv3x3(first, self.norm(x), grid or square_grid(x.shape[1]))
        for layer in others:
            logits = layer(logits)
        return torch.sigmoid(rearrange(upcast(logits), "b k h w -> b k (h w)"))

    def _tokens(self, x: Tensor, maps: Tensor) -> Tensor:
        return pool(maps if self.use_sum_pooling else maps / x.shape[1], x)


class TokenLearnerModuleV11(Learner):
    """Learns tokens by grouped 1 x 1 convolutions and a softmax: V1.1 of December 2021.

    Kept for checkpoints of that time; new models use `TokenLearnerV11`. Linear parts run in
    the cheaper order: two convolutions in a row as one, the values after pooling, not before.

    Args:
        in_channels: Channels `c` of the input.
        num_tokens: Tokens `k` to learn.
        num_groups: Groups of the convolutions; divides `in_channels`. Officially 8, and after
            January 2022 one for every 128 channels.
        dropout_rate: Dropout of the learned tokens.
        norm_eps: LayerNorm's epsilon; officially 1e-6.
        approximate: GELU between the convolutions: None leaves it out, as in December 2021;
            `"tanh"` is the official form of January 2022, `"none"` the exact GELU.

    Raises:
        ValueError: An argument is out of range.

    Source: scenic `TokenLearnerModuleV11` at commits dcc80d0 and d21199f.
    """

    def __init__(
        self,
        in_channels: int,
        num_tokens: int,
        num_groups: int,
        dropout_rate: float = 0.0,
        *,
        norm_eps: float = 1e-5,
        approximate: str | None = None,
    ):
        super().__init__(in_channels, num_tokens, norm_eps)
        self.num_groups = check_count("num_groups", num_groups)
        if in_channels % num_groups:
            raise ValueError(f"{num_groups} groups do not divide {in_channels} channels evenly")
        self.approximate = None if approximate is None else check_gelu(approximate)
        self.attention_maps = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1, groups=num_groups, bias=False),
            nn.Conv2d(in_channels, num_tokens, 1, bias=False),
        )
        self.feat_conv = nn.Conv2d(in_channels, in_channels, 1, groups=num_groups, bias=False)
        self.dropout = nn.Dropout(check_rate(dropout_rate))

    def _maps(self, x: Tensor, grid: Grid | None) -> Tensor:
        layers: Any = self.attention_maps
        first, second = layers
        x = self.norm(x)
        if self.approximate is None and is_plain_conv(first) and is_plain_conv(second):
            hidden = rearrange(first.weight, "(g o) i 1 1 -> g o i", g=self.num_groups)
            out = rearrange(second.weight, "k (g o) 1 1 -> k g o", g=self.num_groups)
            both = rearrange(einsum(out, hidden, "k g o, g o i -> k g i"), "k g i -> k (g i)")
            return softmax(F.linear(x, both))
        x = self._grouped(first, x)
        if self.approximate is not None:
            x = F.gelu(x, approximate=self.approximate)
        if is_plain_conv(second):
            return softmax(F.linear(x, second.weight[:, :, 0, 0]))
        return softmax(_conv1x1(second, x))

    def _tokens(self, x: Tensor, maps: Tensor) -> Tensor:
        return self.dropout(self._grouped(self.feat_conv, pool(maps, x).to(x.dtype)))

    def _grouped(self, conv: Any, x: Tensor) -> Tensor:
        """Applies a linear map to each group of channels: `b n c -> b n c`."""
        if not is_plain_conv(conv):
            return _conv1x1(conv, x)
        x = rearrange(x, "b n (g i) -> b n g i", g=self.num_groups)
        weight = rearrange(conv.weight, "(g o) i 1 1 -> g o i", g=self.num_groups)
        return rearrange(einsum(x, weight, "b n g i, g o i -> b n g o"), "b n g o -> b n (g o)")


def _conv1x1(conv: nn.Module, x: Tensor) -> Tensor:
    """Calls a 1 x 1 convolution on positions: `b n c -> b n k`."""
    return rearrange(conv(rearrange(x, "b n c -> b c n 1")), "b k n 1 -> b n k")


class TokenLearnerV11(Learner):
    """Learns tokens by an MLP and a softmax: V1.1 since March 2022, the default since May 2022.

    Every map is a distribution over the positions, whose number, order and arrangement do not
    matter.

    Args:
        in_channels: Channels `c` of the input.
        num_tokens: Tokens `k` to learn.
        bottleneck_dim: Hidden width of the MLP.
        dropout_rate: Dropout of the hidden layer and of the logits, before the softmax.
        norm_eps: LayerNorm's epsilon.
        approximate: The GELU, `"none"` (exact) or `"tanh"`.

    Raises:
        ValueError: An argument is out of range.

    Source: scenic `TokenLearnerModuleV11` since commit 09480e7, with its initialization.

    >>> learner = TokenLearnerV11(in_channels=64, num_tokens=8)
    >>> learner(torch.ones(2, 196, 64)).shape, learner.attention(torch.ones(2, 14, 14, 64)).shape
    (torch.Size([2, 8, 64]), torch.Size([2, 8, 14, 14]))
    """

    def __init__(
        self,
        in_channels: int,
        num_tokens: int,
        bottleneck_dim: int = 64,
        dropout_rate: float = 0.0,
        *,
        norm_eps: float = 1e-6,
        approximate: str = "tanh",
    ):
        super().__init__(in_channels, num_tokens, norm_eps)
        check_count("bottleneck_dim", bottleneck_dim)  # the shared mlp would take None
        self.attention_maps = mlp(
            in_channels, bottleneck_dim, num_tokens, dropout_rate, approximate
        )

    def _maps(self, x: Tensor, grid: Grid | None) -> Tensor:
        return softmax(self.attention_maps(self.norm(x)))


LEARNERS: dict[str, Callable[[int, int], nn.Module]] = {
    "v11": TokenLearnerV11,
    "v1": lambda c, k: TokenLearner(c, k, use_sum_pooling=True, **_OFFICIAL),
    "v1-mean": lambda c, k: TokenLearner(c, k, use_sum_pooling=False, **_OFFICIAL),
    "grouped": lambda c, k: TokenLearnerModuleV11(c, k, max(1, c // 128), **_OFFICIAL),
    "grouped-linear": lambda c, k: TokenLearnerModuleV11(c, k, 8, norm_eps=1e-6),
}
