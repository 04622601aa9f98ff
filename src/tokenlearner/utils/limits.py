"""How large an image or a file in an archive may become when it is unpacked."""

from __future__ import annotations

import os

from .validation import require

VARIABLE = "TOKENLEARNER_MAX_GIB"  # of the environment, which worker processes inherit


def max_unpacked_bytes() -> int:
    """Returns the bytes that one image or file may unpack to: 1 GiB, or what the variable says.

    Raises:
        ValueError: The variable is no number above 0.
    """
    given = os.environ.get(VARIABLE, "1")
    try:
        limit = int(float(given) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    require(limit > 0, f"{VARIABLE} is {given!r}, expected a number above 0, of GiB")
    return limit


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
