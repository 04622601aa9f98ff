"""Experimental: linear layers by oneDNN, which some CPUs run faster than torch's own product.

torch multiplies float32 matrices with MKL. On processors that are not Intel's, and for products
with few rows, as behind a TokenLearner, oneDNN can be faster (docs/bench.md has measurements). It
is used only in models that are passed to `use_onednn`, through an operator that torch keeps
private.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..utils.validation import require

Model = TypeVar("Model", bound=nn.Module)


def use_onednn(model: Model, on: bool = True) -> Model:
    """Experimental: computes a model's linear layers by oneDNN; changes the model in place.

    This applies to eager float32 on a CPU, forward and backward. Under autocast, in a compiler or
    an exporter, and on other devices the layers run as before. Parameters and state dicts do not
    change, results differ by rounding, and a saved model does not keep it.

    Args:
        model: Any module. Layers that are exactly `nn.Linear` are changed, subclasses are not.
        on: False goes back to torch's own product.

    Returns:
        The model.

    Raises:
        ValueError: `model` is not a module, or this torch was built without oneDNN.

    >>> linear = use_onednn(nn.Linear(64, 8))
    >>> linear(torch.ones(2, 196, 64)).shape
    torch.Size([2, 196, 8])
    """
    require(
        isinstance(model, nn.Module),
        f"the model is a {type(model).__name__}, expected a torch.nn.Module",
    )
    require(
        not on or torch.backends.mkldnn.is_available(),
        "this torch was built without oneDNN; leave use_onednn out, or install torch from PyPI",
    )
    cls: Any = OneDNNLinear if on else nn.Linear
    for module in model.modules():
        if type(module) in (nn.Linear, OneDNNLinear):
            module.__class__ = cls
    return model


class OneDNNLinear(nn.Linear):
    """Computes what `nn.Linear` computes by oneDNN; `use_onednn` makes it."""

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer: `... i -> ... o`."""
        if not _is_supported(input, self):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]
        return _linear(input, self.weight, self.bias)


def _is_supported(x: Tensor, layer: nn.Linear) -> bool:
    """Returns whether oneDNN can take a call: plain float32 tensors on a CPU, in eager mode.

    Tracers and torch's dispatch modes, which count operations, get torch's own operation; so do the
    transforms of `torch.func`, for which oneDNN's product has no rule, and forward-mode
    differentiation, for which it has no formula and raises no error.
    """
    weight = layer.weight
    return (
        not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and not any(map(_has_tangent, (x, weight, layer.bias)))
    )


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and unpack_dual(tensor).tangent is not None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `F.linear` by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Computes `F.linear` and its gradients by oneDNN; second gradients are torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        linear = F.linear if torch.is_grad_enabled() else _linear
        rows = grad.flatten(0, -2)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if for_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )
