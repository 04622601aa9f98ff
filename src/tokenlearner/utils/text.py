"""Names of strangers as text."""

from __future__ import annotations

import re

_CONTROLS = re.compile(  # C0, C1, lines and directions of Unicode, parts of surrogate pairs
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain_text(name: object, kept: str = "\n") -> str:
    """Returns a name for a terminal, a log, a page or a figure: control characters as escapes.

    These are what moves a cursor, sets a title, or turns the direction of what follows; bytes that
    are no UTF-8, too.

    Args:
        name: Anything; its text is taken.
        kept: Control characters that stay.
    """
    return _CONTROLS.sub(lambda m: m[0] if m[0] in kept else ascii(m[0])[1:-1], str(name))
