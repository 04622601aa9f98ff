"""Training, distilling and calibrating: from a config to a checkpoint and its metrics."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_exports

if TYPE_CHECKING:
    from .calibration import Calibration as Calibration
    from .calibration import calibrate as calibrate
    from .config import TrainConfig as TrainConfig
    from .distillation import Distillation as Distillation
    from .run import TrainResult as TrainResult
    from .run import train as train

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "calibration": (
            "Calibration",
            "calibrate",
        ),
        "config": ("TrainConfig",),
        "distillation": ("Distillation",),
        "run": (
            "TrainResult",
            "train",
        ),
    },
)
