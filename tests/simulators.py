"""The simulator of the page on robots."""

from __future__ import annotations

import os
from importlib import import_module

import pytest

MISSING = "gym_pusht cannot be imported ({}); OpenCV wants apt-get install libgl1 libglib2.0-0"


def require_gym_pusht() -> None:
    """CI has to have it, elsewhere a test is skipped where the libraries of OpenCV are missing."""
    try:
        import_module("gym_pusht")
    except ImportError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING.format(error))
