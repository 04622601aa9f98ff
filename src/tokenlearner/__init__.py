"""Image and video transformers on a few learned tokens: TokenLearner (arXiv 2106.11297).

A public name is imported when it is first used, so that `import tokenlearner` takes no time.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; the table below is for Python
    from . import adapt as adapt
    from . import convert as convert
    from .benchmark import benchmark
    from .calibrate import calibrate
    from .data import load_data
    from .evaluate import evaluate
    from .export import export
    from .fuser import TokenFuser
    from .insert import insert, remove
    from .maps import attention_maps
    from .modules import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
    from .onednn import use_onednn
    from .plan import plan
    from .recipe import TrainConfig
    from .train import train
    from .zoo import create_model, list_models, load_model, push_to_hub, save_model

__version__ = "0.3.0"

__all__ = [
    "TokenFuser",
    "TokenLearner",
    "TokenLearnerModuleV11",
    "TokenLearnerV11",
    "TrainConfig",
    "attention_maps",
    "benchmark",
    "calibrate",
    "create_model",
    "evaluate",
    "export",
    "insert",
    "list_models",
    "load_data",
    "load_model",
    "plan",
    "push_to_hub",
    "remove",
    "save_model",
    "train",
    "use_onednn",
]

_FILES = {  # where a public name lives, unless in the file of the same name
    "TokenFuser": "fuser",
    "TokenLearner": "modules",
    "TokenLearnerModuleV11": "modules",
    "TokenLearnerV11": "modules",
    "TrainConfig": "recipe",
    "attention_maps": "maps",
    "create_model": "zoo",
    "list_models": "zoo",
    "load_data": "data",
    "load_model": "zoo",
    "push_to_hub": "zoo",
    "remove": "insert",
    "save_model": "zoo",
    "use_onednn": "onednn",
}
_MODULES = ("adapt", "convert")  # public as a whole


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES.get(name, name)}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(ModuleType):
    """Keeps `tokenlearner.insert` the function when Python imports the file insert.py.

    Python sets an imported file as an attribute of its package, over what is there.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
