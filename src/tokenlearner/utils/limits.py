"""How large an image or a file in an archive may become, and how long a video may be decoded."""

from __future__ import annotations

import os

from .validation import require

# Of the environment, which worker processes inherit.
VARIABLE = "TOKENLEARNER_MAX_GIB"
SECONDS = "TOKENLEARNER_MAX_SECONDS"


def max_unpacked_bytes() -> int:
    """Returns the bytes that one image or file may unpack to: 1 GiB, or what the variable says.

    Raises:
        ValueError: The variable is no number above 0.
    """
    return int(_number(VARIABLE, 1, "GiB") * 2**30)


def max_seconds() -> float:
    """Returns how long the clip of one video may be decoded: 600 s, or what the variable says.

    Raises:
        ValueError: The variable is no number above 0.
    """
    return _number(SECONDS, 600, "seconds")


def _number(variable: str, default: float, unit: str) -> float:
    given = os.environ.get(variable, str(default))
    try:
        value = float(given)
    except ValueError:
        value = 0
    expected = f"{variable} is {given!r}, expected a number above 0, of {unit}"
    require(0 < value < 2**60 and value * 2**30 >= 1, expected)
    return value


def check_unpacked(what: str, size: int, least: int = 0) -> None:
    """Checks the size that something declares; `least` is allowed in any case.

    Raises:
        ValueError: It is larger than `max_unpacked_bytes()`.
    """
    limit = max(max_unpacked_bytes(), least)
    require(
        size <= limit,
        f"{what} {size} bytes, more than {limit}; set {VARIABLE}={-(-size // 2**30)} in the "
        "environment if it is meant to be so large",
    )
