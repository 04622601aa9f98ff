"""Print the option of pip that finds PyTorch without CUDA, where that is the right one.

It is on Linux without an NVIDIA GPU, which needs 0.3 GB of it in place of 6, if its index answers.
Elsewhere nothing is printed, and pip takes what its own indexes have. Standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.request import urlopen

INDEX = "https://download.pytorch.org/whl/cpu"
GPU = Path("/dev/nvidiactl")
SECONDS = 3


def pip_option(index: str = INDEX, gpu: Path = GPU, platform: str = sys.platform) -> str:
    """Returns the option, or nothing."""
    if platform != "linux" or gpu.exists():
        return ""
    try:
        with urlopen(f"{index}/torch/", timeout=SECONDS):
            return f"--extra-index-url {index}"
    except (OSError, ValueError):
        return ""


if __name__ == "__main__":
    print(pip_option())
