"""The command `tokenlearner`: one file or folder for each of its commands."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_exports

if TYPE_CHECKING:
    from .main import main as main

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "main": ("main",),
    },
)
