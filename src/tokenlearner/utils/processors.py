"""How many processors this process may use, and which of several processes it is."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_processors(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Returns the number of processors of the process: its affinity, and its cgroups' quota.

    Args:
        cgroups: Where the system shows its cgroups, of version 1 or 2.
        own: The file that lists those of this process.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    shares = [share for folder in _folders(cgroups, own) if (share := _quota(folder))]
    return max(1, int(min([count, *shares])))


def is_main_process() -> bool:
    """Returns whether this is the process that writes and prints, of those that train together.

    torchrun and `accelerate launch` number them in the environment, before they know each other.
    """
    return os.environ.get("RANK", "0") == "0"


def local_process() -> int:
    """Returns the number of this process among those of its computer, from 0; it takes that GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _folders(cgroups: Path, own: Path) -> list[Path]:
    """Lists the folders of this process's cgroups that may limit processors, and those above."""
    folders = [cgroups, cgroups / "cpu", cgroups / "cpu,cpuacct"]
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        inner = root / path.lstrip("/")
        folders += [f for f in (inner, *inner.parents) if f.is_relative_to(root)]
    return folders


def _quota(folder: Path) -> float | None:
    """Returns the processors that a cgroup may use, None for any."""
    quota, *rest = _read(folder / "cpu.max").split() or [_read(folder / "cpu.cfs_quota_us").strip()]
    period = rest[0] if rest else _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
