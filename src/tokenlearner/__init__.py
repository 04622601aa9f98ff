"""Image and video transformers on a few learned tokens: TokenLearner (arXiv 2106.11297).

A public name is imported when it is first used, so that `import tokenlearner` takes no time.
"""

from .utils.lazy import lazy_exports
from .utils.moved import alias, install

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:  # for editors and type checkers; the table below is for Python
    from .checkpoints import init_from as adapt  # noqa: F401
    from .checkpoints import scenic as convert  # noqa: F401
    from .data.factory import load_data as load_data
    from .deploy.exporting import export as export
    from .evaluation.accuracy import evaluate as evaluate
    from .evaluation.latency import benchmark as benchmark
    from .evaluation.maps import attention_maps as attention_maps
    from .evaluation.planning import plan as plan
    from .layers.onednn import use_onednn as use_onednn
    from .layers.token_connector import TokenConnector as TokenConnector
    from .layers.token_fuser import TokenFuser as TokenFuser
    from .layers.token_learner import TokenLearner as TokenLearner
    from .layers.token_learner import TokenLearnerModuleV11 as TokenLearnerModuleV11
    from .layers.token_learner import TokenLearnerV11 as TokenLearnerV11
    from .models.compilation import compile_model as compile_model
    from .models.connection import connect as connect
    from .models.connection import disconnect as disconnect
    from .models.connection import load_connected as load_connected
    from .models.factory import create_model as create_model
    from .models.factory import list_models as list_models
    from .models.factory import load_adapter as load_adapter
    from .models.factory import load_model as load_model
    from .models.factory import push_to_hub as push_to_hub
    from .models.factory import save_model as save_model
    from .models.insertion import insert as insert
    from .models.insertion import remove as remove
    from .models.insertion import set_num_tokens as set_num_tokens
    from .training.calibration import calibrate as calibrate
    from .training.config import TrainConfig as TrainConfig
    from .training.connector_fit import fit_connector as fit_connector
    from .training.reduction import reduce as reduce
    from .training.run import train as train

__version__ = "0.4.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "layers": (
            "TokenConnector",
            "TokenFuser",
            "TokenLearner",
            "TokenLearnerModuleV11",
            "TokenLearnerV11",
            "use_onednn",
        ),
        "data": ("load_data",),
        "models": (
            "compile_model",
            "connect",
            "create_model",
            "disconnect",
            "insert",
            "list_models",
            "load_adapter",
            "load_connected",
            "load_model",
            "push_to_hub",
            "remove",
            "save_model",
            "set_num_tokens",
        ),
        "checkpoints": (),
        "evaluation": ("attention_maps", "benchmark", "evaluate", "plan"),
        "training": ("TrainConfig", "calibrate", "fit_connector", "reduce", "train"),
        "deploy": ("export",),
    },
    alias,
)
install()
