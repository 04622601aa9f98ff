"""The learners and fusers that the tests of layers build, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import drawn
from torch import Tensor, nn

from tokenlearner import TokenFuser, TokenLearner, TokenLearnerModuleV11, TokenLearnerV11

Golden = Callable[[str], dict[str, np.ndarray]]
Make = Callable[..., Any]

LEARNERS: dict[str, Make] = {
    "v1_sum": partial(TokenLearner, use_sum_pooling=True, norm_eps=1e-6, approximate="tanh"),
    "v1_mean": TokenLearner,
    "v11_grouped": partial(TokenLearnerModuleV11, num_groups=3),
    "v11_grouped_gelu": partial(TokenLearnerModuleV11, num_groups=3, approximate="tanh"),
    "v11": partial(TokenLearnerV11, bottleneck_dim=10),
}
FUSERS: dict[str, Make] = {
    "gain_at_0": partial(TokenFuser, bottleneck_dim=10, zero_init="norm"),
    "default": partial(TokenFuser, bottleneck_dim=10),
    "linear": partial(TokenFuser, bottleneck_dim=None, norm_eps=1e-5),
    "without_norm": partial(TokenFuser, bottleneck_dim=10, use_normalization=False),
    "exact_gelu": partial(TokenFuser, bottleneck_dim=10, approximate="none"),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
half_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
randomized = partial(drawn, std=0.5)


def uneven(*shape: int) -> Tensor:
    """Random float64 values, the channels of which differ in offset and by 10^4 in scale."""
    scale = 10 ** torch.linspace(-2, 2, shape[-1], dtype=torch.float64)
    offset = 30 * torch.randn(shape[-1], dtype=torch.float64)
    return offset + scale * torch.randn(shape, dtype=torch.float64)


def tokens_for(original: Tensor, k: int = 4) -> Tensor:
    """Tokens of the original's frames, for a fuser."""
    frames = original.shape[: 2 if original.ndim == 5 else 1]
    return torch.randn(*frames, k, original.shape[-1]).to(original)


def inputs_for(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The input of a learner; tokens and original of a fuser."""
    is_fuser = isinstance(module, TokenFuser)
    return (tokens_for(x, module.num_tokens), x) if is_fuser else (x,)


def check_golden(module: nn.Module, arrays: dict[str, np.ndarray], rtol: float = 1e-5) -> None:
    """Output, with and without gradients, and the gradient of the first input are as recorded."""
    inputs = [torch.from_numpy(arrays[key]) for key in ("input0", "input1") if key in arrays]
    inputs[0].requires_grad_()
    out = module(*inputs)
    (out * torch.from_numpy(arrays["cotangent"])).sum().backward()
    with torch.inference_mode():
        for result in (out.detach(), module(*inputs)):
            np.testing.assert_allclose(result, arrays["output"], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(inputs[0].grad, arrays["grad_input"], rtol=1e-5, atol=1e-5)
