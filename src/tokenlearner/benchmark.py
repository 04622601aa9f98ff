"""What models cost, measured side by side: `benchmark({"a": model_a, "b": model_b}, images)`."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .checks import check_count
from .evaluate import mode

Key = TypeVar("Key")


@dataclass(frozen=True)
class Spread:
    """The median of several runs, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarises at least two values."""
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


@dataclass(frozen=True)
class Cost:
    """What one model costs; speeds are taken in turn with the other models of the same call.

    `speedup` and `training_speedup` compare with the first model, round by round.
    """

    parameters: int
    gmacs: float
    """Multiply-adds of one picture, counted as 1, in 1e9; GFLOPs are twice that."""
    images_per_second: Spread
    speedup: Spread
    training_images_per_second: Spread
    training_speedup: Spread
    peak_memory_mib: float
    """Tensors alive at once beyond model and input, at inference on the whole batch."""
    training_peak_memory_mib: float


def benchmark(models: Mapping[str, nn.Module], images: Tensor, rounds: int = 15) -> dict[str, Cost]:
    """Measures models on the same pictures, in turn, so that a busy machine slows all alike.

    A training step is forward and backward of the mean output; there is no optimiser in it. The
    models' modes and gradients are left as they were.

    Args:
        models: Names and models, all on the device of `images`.
        images: One batch, `b c h w`.
        rounds: Timed runs of each model, after two that are not counted.

    Raises:
        ValueError: There is no model or no picture, or fewer than 2 rounds.
    """
    check_count("rounds", rounds, least=2)
    if not models or not len(images):
        raise ValueError(f"{len(models)} models and {len(images)} pictures, expected 1 or more")
    inference = times_in_turn(
        {name: _Inference(model, images) for name, model in models.items()}, rounds
    )
    training = times_in_turn(
        {name: _Training(model, images) for name, model in models.items()}, rounds
    )
    first = next(iter(models))
    return {
        name: Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            gmacs=count_macs(model, images[:1]) / 1e9,
            images_per_second=Spread.of([len(images) / s for s in inference[name]]),
            speedup=speed_ratio(inference[first], inference[name]),
            training_images_per_second=Spread.of([len(images) / s for s in training[name]]),
            training_speedup=speed_ratio(training[first], training[name]),
            peak_memory_mib=_peak_mib(_Inference(model, images)),
            training_peak_memory_mib=_peak_mib(_Training(model, images)),
        )
        for name, model in models.items()
    }


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Counts the multiply-adds of matrix products, convolutions and attention in one forward pass.

    Attention runs in its plain form for this: torch's counter does not see the fused one on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _Inference(model, images)()
    return counter.get_total_flops() // 2


def twin(model: nn.Module, device: str | None = None) -> nn.Module:
    """Copies a model's structure, to be changed and run without touching the model.

    Args:
        model: Any that can be deep-copied.
        device: None shares the weights; on a device such as `"meta"` they are new and empty.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if device is not None:
        for key, tensor in memo.items():
            memo[key] = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
    return copy.deepcopy(model, memo)  # what is in the memo is taken as it is


class _Inference:
    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.images = model, images

    @torch.inference_mode()
    def __call__(self) -> None:
        with mode(self.model, training=False):
            self.model(self.images)


class _Training:
    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.images = model, images

    def __call__(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with mode(self.model, training=True):
            torch.autograd.grad(self.model(self.images).mean(), parameters, allow_unused=True)


def times_in_turn(runs: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, list[float]]:
    """Measures runs one after the other, round by round, so that a busy machine slows all alike.

    Every other round goes backwards, so that none always runs behind the same one.

    Args:
        runs: What to run, by name.
        rounds: Timed runs of each, after two that are not counted.

    Returns:
        The seconds of each run, one number a round.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name in runs if i % 2 else reversed([*runs]):
            _synchronize()
            start = time.perf_counter()
            runs[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def speed_ratio(first: list[float], other: list[float]) -> Spread:
    """How many times as fast the other one is, from the seconds of the same rounds."""
    return Spread.of([a / b for a, b in zip(first, other, strict=True)])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib(run: Callable[[], None]) -> float:
    with _LiveTensors() as live:
        run()
    return live.peak / 2**20


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off as they are freed.

    What an operation allocates and frees inside itself is not seen.
    """

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
