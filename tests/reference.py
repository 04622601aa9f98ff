"""The paper's equations in float64, one position at a time: slow, plain, and without torch.

Nothing here is shared with the library, so that agreement of the two means something.
Axes: `b` batch, `h w` grid, `n` positions, `k` tokens, `c` channels, `g` groups.
Parameters come under the names of the library's state dicts, kernels as `[out, in, ...]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = Mapping[str, Array]


def _gelu_exact(v: float) -> float:
    return v / 2 * (1 + math.erf(v / math.sqrt(2)))


def _gelu_tanh(v: float) -> float:
    return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def _gelu(approximate: str) -> Callable[[Array], Array]:
    return np.vectorize({"none": _gelu_exact, "tanh": _gelu_tanh}[approximate], otypes=[float])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _softmax_over_positions(logits: Array) -> Array:
    """`b n k -> b k n`."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.moveaxis(e / e.sum(1, keepdims=True), 1, 2)


def _layer_norm(x: Array, params: Params, name: str, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    normal = (x - mean) / np.sqrt(variance + eps)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def _conv3x3(x: Array, kernel: Array) -> Array:
    """`b h w i, o i 3 3 -> b h w o`; outside the grid there are zeros."""
    b, h, w, _ = x.shape
    out = np.zeros((b, h, w, len(kernel)))
    for y in range(h):
        for z in range(w):
            for dy in (-1, 0, 1):
                for dz in (-1, 0, 1):
                    if 0 <= y + dy < h and 0 <= z + dz < w:
                        out[:, y, z] += x[:, y + dy, z + dz] @ kernel[:, :, dy + 1, dz + 1].T
    return out


def _grouped(x: Array, kernel: Array) -> Array:
    """`b n c, c (c/g) -> b n c`: output o sees the channels of its own group only."""
    size = kernel.shape[1]
    out = np.zeros(x.shape)
    for o, weights in enumerate(kernel):
        start = o // size * size
        out[..., o] = x[..., start : start + size] @ weights
    return out


def _mlp(x: Array, params: Params, name: str, approximate: str) -> Array:
    hidden = x @ params[f"{name}.0.weight"].T + params[f"{name}.0.bias"]
    return _gelu(approximate)(hidden) @ params[f"{name}.3.weight"].T + params[f"{name}.3.bias"]


def _pool(maps: Array, x: Array) -> Array:
    """`b k n, b n c -> b k c`: token k sums all positions, each times its value in map k."""
    out = np.zeros((*maps.shape[:2], x.shape[-1]))
    for k in range(maps.shape[1]):
        for n in range(x.shape[1]):
            out[:, k] += maps[:, k, n, None] * x[:, n]
    return out


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1, x.shape[-1])


def v1(
    x: Array, params: Params, *, use_sum_pooling: bool, norm_eps: float, approximate: str
) -> tuple[Array, Array]:
    """V1, `b h w c -> b k c` and the maps `b k n`."""
    logits = _layer_norm(x, params, "norm", norm_eps)
    for layer in (0, 2, 4, 6):
        logits = _conv3x3(logits, params[f"attention_maps.{layer}.weight"])
        if layer < 6:
            logits = _gelu(approximate)(logits)
    maps = np.moveaxis(_sigmoid(_flat(logits)), 1, 2)
    tokens = _pool(maps, _flat(x))
    return (tokens if use_sum_pooling else tokens / maps.shape[2]), maps


def v11_grouped(
    x: Array, params: Params, *, norm_eps: float, approximate: str | None
) -> tuple[Array, Array]:
    """V1.1 of December 2021, and of January 2022 with a GELU: tokens `b k c`, maps `b k n`."""
    hidden = _grouped(
        _layer_norm(_flat(x), params, "norm", norm_eps),
        params["attention_maps.0.weight"][:, :, 0, 0],
    )
    if approximate is not None:
        hidden = _gelu(approximate)(hidden)
    maps = _softmax_over_positions(hidden @ params["attention_maps.1.weight"][:, :, 0, 0].T)
    return _pool(maps, _grouped(_flat(x), params["feat_conv.weight"][:, :, 0, 0])), maps


def v11(x: Array, params: Params, *, norm_eps: float, approximate: str) -> tuple[Array, Array]:
    """V1.1 since March 2022: tokens `b k c`, maps `b k n`."""
    normal = _layer_norm(_flat(x), params, "norm", norm_eps)
    maps = _softmax_over_positions(_mlp(normal, params, "attention_maps", approximate))
    return _pool(maps, _flat(x)), maps


def fuser(
    tokens: Array,
    original: Array,
    params: Params,
    *,
    bottleneck: bool,
    use_normalization: bool,
    norm_eps: float,
    approximate: str,
) -> Array:
    """The fuser, `b k c` and `b n c` or `b h w c -> ` the original's shape, without residual."""
    y = tokens
    if use_normalization:
        y = _layer_norm(y, params, "mix_norm1", norm_eps)
    mixed = np.zeros(y.shape)
    for out, weights in enumerate(params["mix.weight"]):
        for k, weight in enumerate(weights):
            mixed[:, out] += weight * y[:, k]
        mixed[:, out] += params["mix.bias"][out]
    if use_normalization:
        mixed = _layer_norm(mixed, params, "mix_norm2", norm_eps)
    normal = _layer_norm(_flat(original), params, "norm", norm_eps)
    if bottleneck:
        gates = _sigmoid(_mlp(normal, params, "gates", approximate))
    else:
        gates = _sigmoid(normal @ params["gates.weight"].T)
    return _pool(gates, mixed).reshape(original.shape)
