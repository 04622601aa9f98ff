"""Accuracy, multiply-adds and latency of a model, and where its learned tokens look."""

from ..utils.lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .accuracy import Evaluation as Evaluation
    from .accuracy import evaluate as evaluate
    from .accuracy import preprocess_for as preprocess_for
    from .encoding import EncodeResult as EncodeResult
    from .encoding import encode as encode
    from .flops import count_macs as count_macs
    from .latency import Cost as Cost
    from .latency import Seconds as Seconds
    from .latency import Timing as Timing
    from .latency import benchmark as benchmark
    from .maps import attention_maps as attention_maps
    from .planning import plan as plan
    from .prediction import Prediction as Prediction
    from .prediction import predict as predict

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "accuracy": (
            "Evaluation",
            "evaluate",
            "preprocess_for",
        ),
        "encoding": ("EncodeResult", "encode"),
        "maps": ("attention_maps",),
        "flops": ("count_macs",),
        "latency": ("Cost", "Seconds", "Timing", "benchmark"),
        "map_figures": (),
        "map_stats": (),
        "planning": ("plan",),
        "prediction": ("Prediction", "predict"),
    },
)
