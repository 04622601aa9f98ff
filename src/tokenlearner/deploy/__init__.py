"""Models as files that run without their code, and in fewer bits."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_exports

if TYPE_CHECKING:
    from .exporting import export as export
    from .formats import load_exported as load_exported

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "exporting": ("export",),
        "formats": ("load_exported",),
        "quantization": (),
    },
)
