"""Functions that the layers share: folding frames, applying maps, building small networks.

Axes: `b` batch, `t` frames, `h w` grid, `n` positions, `k` tokens, `c` channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..utils.validation import Grid, check_choice, check_count, check_rate

_CACHE_BYTES = 4 * 2**20  # of a CPU core, about


def leading_dims(x: Tensor) -> tuple[int, ...]:
    """Returns the sizes of the axes that count frames: `(b,)`, or `(b, t)` for `b t h w c`."""
    return tuple(x.shape[: 2 if x.ndim == 5 else 1])


def flatten(x: Tensor) -> Tensor:
    """Folds frames into the batch: `b n c`, `b h w c` or `b t h w c` to `(b t) n c`."""
    lead = leading_dims(x)
    return x.reshape(math.prod(lead), math.prod(x.shape[len(lead) : -1]), x.shape[-1])


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Splits `b n c` along the batch where all frames together do not fit a CPU's cache.

    This pays for many frames of few channels (benchmarks/modules_speed.py) and saves memory in the
    backward pass. Wide frames gain nothing, and a compiler gets one piece.
    """
    b, n, c = x.shape
    if not _is_eager_on_cpu(x):
        return (x,)
    chunk_size = max(1, _CACHE_BYTES // max(1, n * c * x.element_size()))
    return x.split(chunk_size) if c <= 256 and b > chunk_size else (x,)


def _is_eager_on_cpu(x: Tensor) -> bool:
    """Returns whether the CPU shortcuts of this file apply; a compiler does better without them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def square_grid(n: int) -> Grid:
    """Returns the grid of `n` positions, which have to be a square."""
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{n} positions are not a square; pass grid=(height, width)")
    return side, side


def upcast(x: Tensor) -> Tensor:
    """Converts to float32 unless `x` is wider, for a sigmoid."""
    return x.to(_wide_dtype(x))


def softmax(logits: Tensor) -> Tensor:
    """Turns logits into maps, each a distribution over the positions: `b n k -> b k n`.

    They are float32 or wider, which a GPU reads half precision as without a copy.
    """
    return logits.transpose(1, 2).softmax(-1, dtype=_wide_dtype(logits))


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Returns float32, or float64 for that; `torch.promote_types` would be an operator more."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pool(maps: Tensor, x: Tensor) -> Tensor:
    """Pools positions by maps: `b k n, b n c -> b k c`, without a tensor of `b k n c`.

    The batched product sums in float32 for float16 and bfloat16 too.
    """
    return torch.bmm(maps.to(x.dtype), x)


def check_gelu(approximate: str) -> str:
    """Returns the name of a GELU if torch knows it."""
    return check_choice("approximate", approximate, ("none", "tanh"))


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Returns a 3 x 3 convolution that keeps the grid, without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


def is_plain_conv(layer: nn.Module) -> bool:
    """Returns whether a layer's weight may be used without a call of the layer.

    Pruning, parametrizations, adapters and offloading prepare the weight, or change what is done
    with it, in the call.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks)
    return type(layer) is nn.Conv2d and not any(hooks) and "forward" not in layer.__dict__


def wide_conv3x3(conv: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Applies a `conv3x3` from many channels to few: `b n c -> b k h w`.

    For a large `c`, one matrix product to the 9 taps of each output channel and a sum of the
    overlaps are up to 4 times as fast on a CPU as oneDNN's convolution
    (benchmarks/modules_speed.py); with the backward pass from 1024 channels on.
    """
    b, _, c = x.shape
    wide = c >= (1024 if torch.is_grad_enabled() else 256)
    half = x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    if not wide or half or not _is_eager_on_cpu(x) or not is_plain_conv(conv):
        return conv(rearrange(x, "b (h w) c -> b c h w", h=grid[0]))  # type: ignore[no-any-return]
    weight: Any = conv.weight
    taps = rearrange(weight.flip(2, 3), "k c i j -> (k i j) c")  # a sum turns them around
    spread = torch.bmm(taps.expand(b, *taps.shape), x.transpose(1, 2))
    return F.fold(spread, output_size=(grid[0], grid[1]), kernel_size=3, padding=1)


def mlp(
    in_channels: int, hidden: int | None, out_channels: int, dropout_rate: float, approximate: str
) -> nn.Module:
    """Returns two linear layers with GELU and dropout, initialized as scenic's MlpBlock.

    Without a hidden width it is one linear layer without bias.
    """
    check_rate(dropout_rate)
    gelu = nn.GELU(check_gelu(approximate))
    if hidden is None:
        return _xavier(nn.Linear(in_channels, out_channels, bias=False))
    first = _xavier(nn.Linear(in_channels, check_count("bottleneck_dim", hidden)))
    second = _xavier(nn.Linear(hidden, out_channels))
    return nn.Sequential(first, gelu, nn.Dropout(dropout_rate), second, nn.Dropout(dropout_rate))


def _xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.normal_(linear.bias, std=1e-6)
    return linear
