"""Costs that do not depend on the machine: multiply-adds, and tensors alive at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..utils.modules import training_mode

_ONE_AT_A_TIME = threading.Lock()  # the form of attention is one for all threads


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Counts the multiply-adds of matrix products, convolutions and attention in one forward pass.

    Attention runs in its plain form for this: torch's counter does not see the fused one on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads triton, where there is one

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: _int8_flops})
    plain = sdpa_kernel(SDPBackend.MATH)
    with _ONE_AT_A_TIME, training_mode(model, False), torch.inference_mode(), plain, counter:
        model(images)
    return counter.get_total_flops() // 2


def _int8_flops(a: torch.Size, b: torch.Size, **_: Any) -> int:
    """Returns twice the multiply-adds of a product of int8 matrices, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def live_peak_mib(run: Callable[[], object]) -> float:
    """Runs a function and returns the most memory that its new tensors took at once, in MiB.

    What an operation allocates and frees inside itself is not seen.
    """
    with _LiveTensors() as live:
        run()
    return live.peak / 2**20


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off as they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = _storages((args, kwargs))
        for storage in _storages(out):
            if storage not in inputs:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
