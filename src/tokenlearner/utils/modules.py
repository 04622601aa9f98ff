"""Training mode, structural copies and devices of modules."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWING = {getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "erfinv", "clamp")}
_DRAWING |= {getattr(Tensor, f"{name}_") for name in ("mul", "add", "fill", "zero")}
_DRAWING |= {nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_}


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the model that `torch.compile` was called with, or the model itself."""
    return getattr(model, "_orig_mod", model)


class _EagerStance:
    """Sets torch's stance, which is one for all threads, while at least one of them asks for it."""

    def __init__(self) -> None:
        self._lock, self._users, self._stance = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)


_EAGER = _EagerStance()


@contextmanager
def eager() -> Iterator[None]:
    """Runs compiled models uncompiled: what is compiled already would run without new hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
    else:
        with _EAGER:
            yield


@contextmanager
def eager_gradients() -> Iterator[None]:
    """Runs compiled models uncompiled and with gradients, whatever is set around the call."""
    with eager(), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in training or evaluation mode, and restores the mode of each module after.

    Nothing is written to a model that is in this mode, so that threads may share it.
    """
    before = [(module, module.training) for module in model.modules()]
    if any(was_training != training for _, was_training in before):
        model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            if module.training != was_training:
                module.training = was_training


def clone_structure(model: nn.Module, device: str | None = None) -> nn.Module:
    """Returns a copy of a model that can be changed and run without changing the model.

    Args:
        model: Any that can be deep-copied.
        device: None shares what is in the weights, not their flags: the copy can be frozen alone.
            On a device such as `"meta"` the weights are new and empty.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if device is None:
            memo[id(tensor)] = copy.copy(tensor)
        else:
            empty = torch.empty_like(tensor, device=device)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False)
    return copy.deepcopy(model, memo)  # tensors of the memo are not copied


@contextmanager
def building_on_meta() -> Iterator[None]:
    """Builds what is built in the block on the meta device, without drawing any first values.

    There are none on that device, but timm's way to draw them takes longer than all the rest.
    """
    with torch.device("meta"), _WithoutDrawing():
        yield


class _WithoutDrawing(TorchFunctionMode):
    """Leaves out what changes the values of a tensor without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor", args[0] if args else None)
        return tensor if func in _DRAWING and tensor.is_meta else func(*args, **kwargs)


def check_plain(name: str, tensor: torch.Tensor, what: str) -> None:
    """Checks that a tensor is no subclass, as torchao's of quantized weights.

    Raises:
        ValueError: It is one; the message says to do `what` before.
    """
    kind = type(tensor.detach())
    if kind is not torch.Tensor:
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, no plain tensor; {what} the model "
            "before it is quantized or shared out"
        )


def stream_dtype(block: nn.Module) -> torch.dtype:
    """Returns the dtype of the tokens that run through a block.

    It is that of most of its floating point parameters: norms may be kept in float32, and weights
    be integers.
    """
    sizes: dict[torch.dtype, int] = {}
    for parameter in block.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())


def stream_device(block: nn.Module) -> torch.device:
    """Returns the device that a block runs on; accelerate keeps offloaded weights elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in block.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    if device is None:
        return next((p.device for p in block.parameters()), torch.device("cpu"))
    return torch.device(device)


def pick_device(name: str = "auto") -> torch.device:
    """Returns the named device, or with `"auto"` a GPU where there is one.

    Raises:
        ValueError: torch does not know the device, or this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        message = f"device {name!r} is not to be had here ({error}); pass cpu or auto"
        raise ValueError(message) from error
    return torch.device(name)
