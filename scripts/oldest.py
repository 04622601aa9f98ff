"""Run the tests of the hosts with the oldest timm and transformers that pyproject.toml allows.

`python scripts/oldest.py` puts both, and what transformers of that time needs, into build/oldest,
beside the torch that is installed, and runs pytest there. Further arguments go to pytest, such as
`-m slow`. Needs an environment in which the tests run, and the package index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "oldest"
TESTED = ("timm", "transformers")
BESIDES = ["huggingface_hub==0.34.0", "tokenizers==0.22.0"]  # what transformers 4.56 takes
HTTP = ["requests", "urllib3", "idna", "certifi", "charset-normalizer"]  # huggingface_hub before 1
TESTS = ["tests/models/test_hosts.py", "tests/models/test_insertion.py"]


def lower_bound(package: str, pyproject: str) -> str:
    """Returns the version of a package that pyproject.toml names as the oldest."""
    match = re.search(rf'"{package}>=([\d.]+)"', pyproject)
    if match is None:
        raise SystemExit(f"pyproject.toml names no oldest {package}; write {package}>=VERSION")
    return match[1]


def main(arguments: Sequence[str]) -> int:
    """Installs and runs; returns pytest's exit code."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = [f"{package}=={lower_bound(package, pyproject)}" for package in TESTED]
    wanted = [*oldest, *BESIDES, *HTTP]
    print("installing", *wanted, flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(TARGET), *wanted], check=True)
    environment = os.environ | {"PYTHONPATH": str(TARGET)}
    # an old package may warn on a new torch
    command = [sys.executable, "-m", "pytest", "-W", "default", *TESTS, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
