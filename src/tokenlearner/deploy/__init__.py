"""Models as files that run without their code, and quantized models."""

from ..utils.lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .exporting import export as export
    from .formats import load_exported as load_exported
    from .quantization import compare_precisions as compare_precisions
    from .quantization import quantize as quantize
    from .streams import export_stream as export_stream
    from .streams import load_stream as load_stream

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "exporting": ("export",),
        "formats": ("load_exported",),
        "quantization": ("compare_precisions", "quantize"),
        "streams": ("export_stream", "load_stream"),
    },
)
