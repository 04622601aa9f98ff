"""Helpers for all packages: checks of arguments, files, random numbers, modes of modules."""

from .lazy import lazy_exports

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .imports import require_package as require_package
    from .io import atomic_write as atomic_write
    from .io import unique_path as unique_path
    from .io import write_json as write_json
    from .modules import clone_structure as clone_structure
    from .modules import pick_device as pick_device
    from .modules import training_mode as training_mode
    from .random import derive_seed as derive_seed
    from .random import fixed_seed as fixed_seed
    from .validation import require as require

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "imports": ("require_package",),
        "io": (
            "atomic_write",
            "unique_path",
            "write_json",
        ),
        "modules": (
            "clone_structure",
            "pick_device",
            "training_mode",
        ),
        "random": (
            "derive_seed",
            "fixed_seed",
        ),
        "validation": ("require",),
    },
)
