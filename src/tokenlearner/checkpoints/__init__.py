"""Weights of other code: files read without executing them, scenic's parameters in and out."""

from ..utils.lazy import lazy_exports
from ..utils.moved import moved_names

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .convert import ConvertConfig as ConvertConfig
    from .convert import convert_checkpoint as convert_checkpoint
    from .flax_msgpack import read_flax as read_flax
    from .flax_msgpack import write_flax as write_flax
    from .init_from import InitReport as InitReport
    from .readers import read_weights as read_weights
    from .scenic import load_scenic as load_scenic
    from .scenic import to_scenic as to_scenic

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "convert": ("ConvertConfig", "convert_checkpoint"),
        "flax_msgpack": ("read_flax", "write_flax"),
        "init_from": ("InitReport",),
        "readers": ("read_weights",),
        "scenic": (
            "load_scenic",
            "to_scenic",
        ),
        "scenic_config": (),
    },
    moved_names("checkpoints"),
)
