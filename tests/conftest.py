"""What all tests share: a fixed seed, two threads, a device, and the golden files."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path

# Before torch is loaded: threads that wait for each other spin only briefly. With the default,
# tests take 10 times as long where another program wants the same cores. The Makefile does it too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hypothesis
import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# A thread for each of several test processes (`make test` starts them), two for a single one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


class _TorchRandom:
    """Lets hypothesis seed torch for every example, so that a failing one fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis holds only a weak reference
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device for the tests that take one")


def pytest_configure(config: pytest.Config) -> None:
    """Any warning is an error in CI; elsewhere, with versions we have not seen, those of our code.

    What `filterwarnings` in pyproject.toml says comes after it, and counts more.
    """
    every, ours = "error", "error:::tokenlearner"
    config.getini("filterwarnings").insert(0, every if os.environ.get("CI") else ours)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets `-m device` choose the tests that run on the device named by --device."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every later search for garbage or for modules.

    These are half a million objects, most of torch's and transformers'; `insert` searches them too.
    And garbage is searched for less often: with so many tests, each search takes long.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10 * gc.get_threshold()[0], *gc.get_threshold()[1:])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device named by --device; the test is skipped when this machine lacks it."""
    device = torch.device(pytestconfig.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads tests/golden/<name>.npz: `golden("token_fuser")["out"]`."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in GOLDEN.glob("*.npz")))
            raise FileNotFoundError(f"no golden file {name!r}; there are: {known}")
        with np.load(path) as arrays:
            return dict(arrays)

    return load
