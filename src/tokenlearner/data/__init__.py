"""Labeled images and videos: data sets by name, their batches and their transforms."""

from ..utils.lazy import lazy_exports
from ..utils.moved import moved_names

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time

if TYPE_CHECKING:
    from .config import AugmentConfig as AugmentConfig
    from .config import DataConfig as DataConfig
    from .dataset import IterableDataset as IterableDataset
    from .dataset import MapDataset as MapDataset
    from .dataset import UnreadableFile as UnreadableFile
    from .factory import list_data as list_data
    from .factory import load_data as load_data
    from .tensor_dataset import ImageDataset as ImageDataset

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "config": ("AugmentConfig", "DataConfig"),
        "dataset": ("IterableDataset", "MapDataset", "UnreadableFile"),
        "factory": (
            "list_data",
            "load_data",
        ),
        "tensor_dataset": ("ImageDataset",),
    },
    moved_names("data"),
)
