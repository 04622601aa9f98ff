"""The paper's models by name, learned tokens in models of others, and both as files."""

from ..utils.lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from ..utils.preprocessing import Preprocessing as Preprocessing
    from .actions import ActionBins as ActionBins
    from .compilation import compile_model as compile_model
    from .connection import ConnectionConfig as ConnectionConfig
    from .connection import connect as connect
    from .connection import connect_processor as connect_processor
    from .connection import disconnect as disconnect
    from .connection import disconnected as disconnected
    from .connection import load_connected as load_connected
    from .factory import create_model as create_model
    from .factory import list_models as list_models
    from .frame_encoder import FrameEncoder as FrameEncoder
    from .framevit import FrameViT as FrameViT
    from .hosts import HOSTS as HOSTS
    from .hosts import Host as Host
    from .hosts import find_host as find_host
    from .hub import load_adapter as load_adapter
    from .hub import load_model as load_model
    from .hub import push_to_hub as push_to_hub
    from .hub import save_model as save_model
    from .insertion import InsertionConfig as InsertionConfig
    from .insertion import insert as insert
    from .insertion import remove as remove
    from .insertion import set_num_tokens as set_num_tokens
    from .mixer import TokenLearnerMixer as TokenLearnerMixer
    from .preprocessing import from_image_processor as from_image_processor
    from .preprocessing import get_preprocessing as get_preprocessing
    from .preprocessing import set_preprocessing as set_preprocessing
    from .streaming import TokenStream as TokenStream
    from .temporal import TemporalTransformer as TemporalTransformer
    from .vit import TokenLearnerViT as TokenLearnerViT
    from .vivit import ViViT as ViViT

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "actions": ("ActionBins",),
        "compilation": ("compile_model",),
        "connection": (
            "ConnectionConfig",
            "connect",
            "connect_processor",
            "disconnect",
            "disconnected",
            "load_connected",
        ),
        "factory": (
            "create_model",
            "list_models",
        ),
        "frame_encoder": ("FrameEncoder",),
        "framevit": ("FrameViT",),
        "hosts": (
            "HOSTS",
            "Host",
            "find_host",
        ),
        "hub": ("load_adapter", "load_model", "push_to_hub", "save_model"),
        "insertion": (
            "InsertionConfig",
            "insert",
            "remove",
            "set_num_tokens",
        ),
        "mixer": ("TokenLearnerMixer",),
        "preprocessing": (
            "Preprocessing",
            "from_image_processor",
            "get_preprocessing",
            "set_preprocessing",
        ),
        "streaming": ("TokenStream",),
        "temporal": ("TemporalTransformer",),
        "vit": ("TokenLearnerViT",),
        "vivit": ("ViViT",),
    },
)
