"""Linear layers by oneDNN, which many CPUs run faster than torch's own product of float32.

torch multiplies float32 matrices with MKL. On processors that are not Intel's, and wherever a
product has few rows, as behind a TokenLearner, oneDNN may be the faster of the two, for the same
numbers; `use_onednn` takes it (docs/bench.md says what that gave).
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
    """Lets oneDNN compute the linear layers of a model, forward and backward, in place.

    It takes part in eager float32 on a CPU and nowhere else: under autocast, in a compiler or an
    exporter, and on other devices the layers are what they were. Parameters, their names and state
    dicts stay as they are; results differ by rounding. Not kept in a saved model.

    Args:
        model: Any. Layers that are exactly `nn.Linear` take part, subclasses do not.
        on: False goes back to torch's own product.

    Returns:
        The model.

    Raises:
        ValueError: It is no module, or this torch was built without oneDNN.

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
    kind: Any = OneDNNLinear if on else nn.Linear
    for module in model.modules():
        if type(module) in (nn.Linear, OneDNNLinear):
            module.__class__ = kind
    return model


class OneDNNLinear(nn.Linear):
    """What `use_onednn` makes of `nn.Linear`: the same layer, multiplied by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`: `... i -> ... o`."""
        if not _takes_part(input, self):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]
        return _linear(input, self.weight, self.bias)


def _takes_part(x: Tensor, layer: nn.Linear) -> bool:
    """Plain tensors of float32 on a CPU, in eager mode; all else is left to torch.

    So is what something looks at: a tracer, torch's dispatch modes, which count operations, the
    transforms of `torch.func`, for which oneDNN's product has no rule, and forward-mode
    differentiation, for which it has no formula and gives no error.
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
    """`F.linear` by oneDNN, which knows no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """`F.linear` with its gradients; of those, torch computes further gradients, if asked for."""

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
