"""Training, distilling and calibrating: from a config to a checkpoint and its metrics."""

from ..utils.lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .calibration import Calibration as Calibration
    from .calibration import calibrate as calibrate
    from .checkpointing import TrainingInterrupted as TrainingInterrupted
    from .config import TrainConfig as TrainConfig
    from .connector_fit import ConnectorFit as ConnectorFit
    from .connector_fit import fit_connector as fit_connector
    from .distillation import Distillation as Distillation
    from .distillation import feature_loss as feature_loss
    from .distillation import forward_with_features as forward_with_features
    from .distillation import logit_loss as logit_loss
    from .meter import Report as Report
    from .recipes import find_recipe as find_recipe
    from .recipes import list_recipes as list_recipes
    from .reduction import Reduction as Reduction
    from .reduction import reduce as reduce
    from .run import TrainResult as TrainResult
    from .run import train as train
    from .teacher import TeacherCache as TeacherCache
    from .trainer import Trainer as Trainer

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "calibration": ("Calibration", "calibrate"),
        "checkpointing": ("TrainingInterrupted",),
        "config": ("TrainConfig",),
        "connector_fit": ("ConnectorFit", "fit_connector"),
        "distillation": ("Distillation", "feature_loss", "forward_with_features", "logit_loss"),
        "meter": ("Report",),
        "recipes": ("find_recipe", "list_recipes"),
        "reduction": ("Reduction", "reduce"),
        "run": ("TrainResult", "train"),
        "teacher": ("TeacherCache",),
        "trainer": ("Trainer",),
    },
)
