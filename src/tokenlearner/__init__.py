"""Image and video transformers on a few learned tokens: TokenLearner (arXiv 2106.11297)."""

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
]
