"""The paper's TokenFuser: `k` learned tokens back onto the `n` positions they came from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.validation import (
    POSITIONS,
    check_choice,
    check_count,
    check_eps,
    check_input,
    check_rate,
)
from .functional import flatten, leading_dims, mlp, pool, upcast


class TokenFuser(nn.Module):
    """Spreads learned tokens over the positions of the original; the caller adds the result to it.

    Every position gets a sum of the mixed tokens, weighted by sigmoid gates computed from the
    original. A new fuser returns exactly 0, so a model starts as if it had none.

    That 0 comes from the mix over tokens, whose kernel starts at 0. The slope of the LayerNorm
    behind it is 1 / sqrt(eps) = 1000 there: the kernel's first gradient dwarfs all others, and a
    global clip spends the first step on it. `zero_init="norm"` starts the gain of that norm at 0
    instead: the same function and parameters, the same 0, ordinary gradients. It is for where the
    size of a gradient matters, such as float16. The default is the official start, which was ahead
    for the first 50 steps under AdamW and level after an epoch (`benchmarks/README.md`).

    Args:
        in_channels: Channels `c` of tokens and original.
        num_tokens: Tokens `k` that come in.
        bottleneck_dim: Hidden width of the gates' MLP; None is the paper's single linear layer.
        dropout_rate: Dropout in the gates' MLP and of the result.
        use_normalization: LayerNorm before and after the mix; needed after sum pooling.
        zero_init: The part that starts at 0, `"mix"` or `"norm"`; the mix without normalization.
        norm_eps: LayerNorm's epsilon.
        approximate: The GELU, `"none"` (exact) or `"tanh"`.

    Raises:
        ValueError: An argument is out of range.

    Source: scenic `TokenFuser`; here the result has the original's shape in 4-D too, where the
    official code returns it flat.
    """

    def __init__(
        self,
        in_channels: int,
        num_tokens: int,
        bottleneck_dim: int | None = 64,
        dropout_rate: float = 0.0,
        use_normalization: bool = True,
        *,
        zero_init: str = "mix",
        norm_eps: float = 1e-6,
        approximate: str = "tanh",
    ):
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.bottleneck_dim = bottleneck_dim
        check_choice("zero_init", zero_init, ("mix", "norm"))
        eps = check_eps(norm_eps)
        self.mix_norm1 = nn.LayerNorm(in_channels, eps=eps) if use_normalization else nn.Identity()
        self.mix = nn.Linear(num_tokens, num_tokens)
        self.mix_norm2 = nn.LayerNorm(in_channels, eps=eps) if use_normalization else nn.Identity()
        self.norm = nn.LayerNorm(in_channels, eps=eps)
        self.gates = mlp(in_channels, bottleneck_dim, num_tokens, dropout_rate, approximate)
        self.dropout = nn.Dropout(check_rate(dropout_rate))
        self.zero_init = zero_init
        self.init_weights()

    def init_weights(self) -> None:
        """Resets the fuser to return 0; timm's models call this when they are initialized."""
        nn.init.zeros_(self.mix.bias)
        if isinstance(self.mix_norm2, nn.LayerNorm) and self.zero_init == "norm":
            nn.init.xavier_uniform_(self.mix.weight)
            nn.init.zeros_(self.mix_norm2.weight)
        else:
            nn.init.zeros_(self.mix.weight)

    def forward(self, tokens: Tensor, original: Tensor) -> Tensor:
        """Spreads `tokens` over the positions of `original`, without adding it.

        Args:
            tokens: The tokens of each frame.
            original: What the tokens were learned from.

        Shape:
            `b k c, b n c -> b n c`; `b k c, b h w c -> b h w c`; `b t k c, b t h w c -> b t h w c`.

        Raises:
            ValueError: The two do not fit each other or the module.
        """
        self._check(tokens, original)
        positions = flatten(original)
        y = self.mix_norm1(tokens.reshape(positions.shape[0], self.num_tokens, self.in_channels))
        y = self.mix_norm2(self.mix(y.transpose(1, 2)).transpose(1, 2))
        gates = torch.sigmoid(upcast(self.gates(self.norm(positions))))
        return self.dropout(pool(gates, y)).to(original.dtype).reshape(original.shape)

    def _check(self, tokens: Tensor, original: Tensor) -> None:
        dtype = self.norm.weight.dtype
        check_input("the original", original, POSITIONS, self.in_channels, dtype)
        axes = {4: "[b, t, k, c]"} if original.ndim == 5 else {3: "[b, k, c]"}
        check_input("the token tensor", tokens, axes, self.in_channels, dtype)
        expected = (*leading_dims(original), self.num_tokens, self.in_channels)
        if tuple(tokens.shape) != expected:
            raise ValueError(
                f"the tokens are {list(tokens.shape)}, expected {list(expected)} for an original "
                f"of {list(original.shape)} and {self.num_tokens} tokens a frame"
            )
