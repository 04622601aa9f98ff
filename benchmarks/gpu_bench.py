"""How `gpu.py` measures: sizes, models of equal cost, and times on the device's clock.

Whatever is compared runs in turn, in bursts between two events of the device; ratios are taken
round by round.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import timm
import torch
from baselines import merge, schedule_for
from measured import compiled
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.evaluation.flops import count_macs, live_peak_mib
from tokenlearner.evaluation.latency import Seconds

Key = TypeVar("Key")
Run = Callable[[], object]
TOKENS = 8
BF16, TF32 = torch.bfloat16, torch.float32  # products of which may round to TF32


@dataclass(frozen=True)
class Sizes:
    """What is measured, on a GPU or as a toy."""

    shapes: dict[str, tuple[int, ...]]  # folded to b h w c
    hosts: dict[str, tuple[str, float]]  # a name of timm, and multiply-adds of an image in 1e9
    host: str  # for what is measured on one host only
    image: int
    larger: tuple[int, ...]
    most_pixels: int  # of a batch of these
    batches: tuple[int, ...]
    training: tuple[tuple[str, int], ...]
    streams: tuple[str, ...]
    calibration: tuple[str, int, int]  # host, images, steps
    elements: int
    side: int
    rounds: int
    burst: float
    host_options: dict[str, Any] = field(default_factory=dict)


FULL = Sizes(
    shapes={
        "[64, 32, 32, 128]": (64, 32, 32, 128),
        "[256, 14, 14, 768]": (256, 14, 14, 768),
        "[64, 24, 24, 1024]": (64, 24, 24, 1024),
        "[32, 32, 196, 768]": (32 * 32, 14, 14, 768),
    },
    hosts={
        "ViT-B/16": ("vit_base_patch16_224", 17.6),
        "ViT-S/16": ("vit_small_patch16_224", 4.6),
        "ViT-L/16": ("vit_large_patch16_224", 61.6),
    },
    host="ViT-B/16",
    image=224,
    larger=(384, 512),
    most_pixels=128 * 512**2,
    batches=(1, 32, 256, 8, 128),
    training=(("ViT-B/16", 128), ("ViT-B/16", 32), ("ViT-S/16", 256), ("ViT-L/16", 64)),
    streams=tuple(f"framevit_{size}_patch16_f6_tl8at6_224" for size in ("base", "small", "tiny")),
    calibration=("ViT-S/16", 5000, 300),
    elements=2**28,
    side=8192,
    rounds=11,
    burst=0.005,
)
TOY = Sizes(
    shapes={"[2, 4, 4, 128]": (2, 4, 4, 128)},
    hosts={"toy": ("vit_tiny_patch16_224", 0.001)},
    host="toy",
    image=64,
    larger=(96,),
    most_pixels=2 * 96**2,
    batches=(1, 2),
    training=(("toy", 2),),
    streams=("framevit_mini_patch8_f6_tl4at3_32",),
    calibration=("toy", 4, 2),
    elements=2**16,
    side=64,
    rounds=2,
    burst=0.0,
    host_options={"depth": 2, "embed_dim": 32, "num_heads": 2},
)


@dataclass(frozen=True)
class Contender:
    """A model of a comparison, the images it takes, and its multiply-adds for one."""

    model: nn.Module
    size: int
    macs: int

    def images(self, batch: int) -> Tensor:
        weight = next(self.model.parameters())
        return torch.randn(batch, 3, self.size, self.size, device=weight.device, dtype=weight.dtype)


class Bench:
    """The device, the sizes, and what several jobs use: models, and what was compiled of them."""

    def __init__(self, device: torch.device, sizes: Sizes):
        self.device, self.sizes = device, sizes
        self._key: object = None
        self._contenders: dict[str, Contender] = {}
        self._compiled: dict[object, tuple[Callable[[Tensor], Tensor], float]] = {}

    def contenders(self, host: str, size: int, dtype: torch.dtype) -> dict[str, Contender]:
        """All models of a comparison, the plain one first; those of the last call are kept."""
        if self._key != (key := (host, size, dtype)):
            self.forget()
            self._contenders = build(self, host, size, dtype)
            self._key = key
        return self._contenders

    def compiled(
        self, key: object, model: nn.Module, first_run: Callable[[Callable[[Tensor], Tensor]], Run]
    ) -> tuple[Callable[[Tensor], Tensor], float]:
        """What torch.compile makes of a model, once for a key, and the seconds of its first run."""
        if key not in self._compiled:
            forward = compiled(model)
            self._compiled[key] = forward, self.seconds_of(first_run(forward))
        return self._compiled[key]

    def forget(self) -> None:
        """Frees all models."""
        self._key, self._contenders, self._compiled = None, {}, {}

    # --- timing --------------------------------------------------------------------------------

    def time(self, runs: Mapping[Key, Run]) -> dict[Key, Seconds]:
        """Times runs in turn, every other round backwards: seconds of a call, one number a round.

        A number is the mean of a burst of calls, as many as take `burst` seconds together, for the
        device is waited for around a burst only.
        """
        calls = {}
        for name, run in runs.items():
            self.seconds_of(run, 3)  # compiles, chooses algorithms, allocates
            calls[name] = min(100, math.ceil(self.sizes.burst / self.seconds_of(run, 2)) or 1)
        seconds = {name: Seconds() for name in runs}
        for i in range(self.sizes.rounds):
            for name in runs if i % 2 else reversed([*runs]):
                seconds[name].append(self.seconds_of(runs[name], calls[name]))
        return seconds

    def seconds_of(self, run: Run, calls: int = 1) -> float:
        """The seconds of a call, on the device's clock."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000 / calls

    def peak_mib(self, run: Run) -> float:
        """How far memory rises above what is held before a run."""
        if self.device.type != "cuda":
            return live_peak_mib(run)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def copies(self, numbers: int) -> int:
        """How many inputs of so many numbers are twice as much as the device's cache holds."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(16, math.ceil(2 * cache / (2 * numbers)))

    def randn(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)


def build(bench: Bench, host: str, size: int, dtype: torch.dtype) -> dict[str, Contender]:
    """A plain ViT, with either learner, on a smaller image and with merging, at equal cost."""
    torch.manual_seed(0)
    name, _ = bench.sizes.hosts[host]
    with bench.device:
        plain = timm.create_model(name, img_size=size, **bench.sizes.host_options)
    plain = plain.to(bench.device, dtype).eval()
    models: dict[str, tuple[nn.Module, int]] = {"plain": (plain, size)}
    for label, learner in (("V1.1", "v11"), ("V1", "v1")):
        models[label] = (insert(copy.deepcopy(plain), TOKENS, learner=learner), size)

    def macs(model: nn.Module, size: int) -> int:
        return count_macs(model, bench.randn(1, 3, size, size, dtype=dtype))

    target = macs(models["V1.1"][0], size)
    smaller: Any = copy.deepcopy(plain)

    def distance(side: int) -> int:
        smaller.set_input_size(img_size=side)
        return abs(macs(smaller, side) - target)

    patch = smaller.patch_embed.patch_size[0]
    side = min(range(patch * max(1, size // patch // 2), size, patch), key=distance)
    smaller.set_input_size(img_size=side)
    models[f"image of {side}"] = (smaller, side)
    merged: Any = copy.deepcopy(plain)
    r = schedule_for(
        merged, bench.randn(1, 3, size, size, dtype=dtype), target / macs(plain, size)
    ).r
    models[f"merging {r} in every block"] = (merge(merged, r), size)
    return {k: Contender(model, size, macs(model, size)) for k, (model, size) in models.items()}
