"""The command `tokenlearner`: one file or folder for each of its commands."""

from ..utils.lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .demo import DemoConfig as DemoConfig
    from .eval import EvalConfig as EvalConfig
    from .main import COMMANDS as COMMANDS
    from .maps import MapsConfig as MapsConfig
    from .maps import run_maps as run_maps

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "demo": ("DemoConfig",),
        "eval": ("EvalConfig",),
        "main": ("COMMANDS",),
        "maps": ("MapsConfig", "run_maps"),
    },
)
