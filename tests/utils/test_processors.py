"""The number of processors is what affinity and cgroups leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokenlearner.utils.processors import usable_processors

AFFINITY = 8


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, AFFINITY),
        ("0::/", {"cpu.max": "max 100000"}, AFFINITY),
        ("0::/", {"cpu.max": "350000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a", {"a/cpu.max": "50000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "6400000 100000"}, AFFINITY),
        ("0::/", {"cpu.max": "damaged"}, AFFINITY),
        (
            "3:cpuset:/x\n1:cpu:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "1:cpu,cpuacct:/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            AFFINITY,
        ),
    ],
)
def test_affinity_and_quota_count(
    own: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(AFFINITY)))
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert usable_processors(tmp_path / "cgroup", tmp_path / "own") == expected
