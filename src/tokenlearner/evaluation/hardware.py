"""The machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from statistics import median

import torch

from .latency import time_interleaved

_READ_BYTES = 2**28  # more than caches hold


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """Names the processors, and the versions of what runs on them."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    is_cuda = device.type == "cuda"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if is_cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read_gigabytes_per_second(device: torch.device) -> float:
    """Measures how fast a device reads memory, with as many threads as torch has, in 1e9 bytes."""
    numbers = torch.ones(_READ_BYTES // 4, device=device)  # zeros may be no memory at all
    seconds = time_interleaved({"sum": partial(torch.sum, numbers)}, rounds=5)["sum"]
    return _READ_BYTES / 1e9 / median(seconds)
