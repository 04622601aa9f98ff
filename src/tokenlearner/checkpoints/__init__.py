"""Weights of other code: files read without running anything, scenic's parameters in and out."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_exports
from ..utils.moved import moved_names

if TYPE_CHECKING:
    from .readers import read_weights as read_weights
    from .scenic import load_scenic as load_scenic
    from .scenic import to_scenic as to_scenic

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "convert": (),
        "init_from": (),
        "readers": ("read_weights",),
        "scenic": (
            "load_scenic",
            "to_scenic",
        ),
        "scenic_config": (),
    },
    moved_names("checkpoints"),
)
