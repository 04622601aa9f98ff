"""The tables of the pages are those of the results that were kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = re.compile(r"<!-- \[\[\[cog (.*?) \]\]\] -->(.*?)<!-- \[\[\[end\]\]\] -->", re.DOTALL)
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md"))
    if WRITTEN.search(page.read_text("utf-8"))
]


def is_right(page: Path) -> bool:
    """Whether a page has what `make numbers` would write into it."""
    command = [Path(sys.executable).with_name("cog"), "-I", ROOT / "benchmarks", "-P"]
    command += ["-p", "import gpu_report, tables", "--check", "--verbosity=0", page]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 5), result.stderr  # 5: it would be changed
    return result.returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_changed_cell_is_found_out(page: Path, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    tables = [match[2] for match in WRITTEN.finditer(text)]
    copy = tmp_path / page.name
    copy.write_text(text, "utf-8")
    assert is_right(copy)
    cell = re.search(r"\| \D*\d+\.\d", tables[-1])[0]
    changed = tables[-1].replace(cell, f"{cell[:-1]}{(int(cell[-1]) + 1) % 10}", 1)
    copy.write_text(text.replace(tables[-1], changed), "utf-8")
    assert not is_right(copy)


@pytest.mark.parametrize("page", ["docs/gpu.md", "benchmarks/README.md"])
def test_no_table_of_a_gpu_and_of_insertion_is_typed(page: str) -> None:
    typed = WRITTEN.sub("", (ROOT / page).read_text("utf-8"))
    assert "left open |" not in typed
    assert not re.search(r"^\|", typed.partition("\n## Measured\n")[2], re.MULTILINE)
