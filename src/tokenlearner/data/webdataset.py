"""WebDataset: labeled images in tar files, read as a stream."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import get_worker_info

from ..utils.validation import require, shortened
from .config import DataConfig
from .dataset import UnreadableFile
from .image_folder import FOLDERS
from .iterable import SHUFFLE_BUFFER, Record, StreamDataset, check_stream

if TYPE_CHECKING:
    from PIL import Image


def load_shards(name: str, split: str, config: DataConfig) -> StreamDataset:
    """Gets ready to read WebDataset's tar files in `config.root`.

    They are those that `_info.json` names for the split, in timm's format, or else are called
    train-*.tar and val-*.tar (or valid, validation, test). An image is a file that ends as timm
    knows it, its label the number in the .cls file of the same name, or the number that the .json
    file calls what `alt_label` in _info.json says. `config.num_classes` tells how many classes
    there are, `config.num_samples` how many images, if there is no _info.json.

    Raises:
        ValueError: webdataset, the files or the number of classes are missing, or none of the
            first few images can be read.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        message = f"{name} needs webdataset; run pip install 'tokenlearner[data]'"
        raise ValueError(message) from error
    root = config.folder
    require(root is not None, f"{name} needs the folder that holds the tar files; pass root")
    info = _info_of(Path(str(root)), split)
    require(
        config.num_classes is not None,
        f"{name} does not tell how many classes it has; pass num_classes",
    )
    return check_stream(
        StreamDataset(
            name,
            split,
            tuple(map(str, range(config.num_classes or 0))),
            config,
            source=TarShards(info.paths, info.label_key),
            num_samples=info.num_samples or config.num_samples,
        )
    )


@dataclass(frozen=True)
class TarShards:
    """The images of tar files, which are shared out whole.

    Args:
        paths: The tar files.
        label_key: What .json files call the label; empty takes .cls files.
    """

    paths: tuple[str, ...]
    label_key: str = ""

    def readers(self, process: int, num_processes: int) -> int:
        """As many as there are tar files."""
        return len(self.paths[process::num_processes])

    def records(
        self, process: int, num_processes: int, seed: int | None
    ) -> Iterator[Record | UnreadableFile]:
        """Reads one tar file after the other."""
        from webdataset.filters import shuffle

        paths = list(self.paths)
        if seed is not None:
            random.Random(seed).shuffle(paths)
        own, worker = paths[process::num_processes], get_worker_info()
        if worker:
            own = own[worker.id :: worker.num_workers]
        found = chain.from_iterable(map(self._of_shard, own))
        if seed is None:
            return found
        return shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(seed))(found)

    def _of_shard(self, path: str) -> Iterator[Record | UnreadableFile]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        broken: list[UnreadableFile] = []

        def note(error: Exception) -> bool:
            reason = error.args[0] if error.args else type(error).__name__
            broken.append(UnreadableFile(f"{path} cannot be read to its end ({reason})"))
            return True

        try:
            with open(path, "rb") as file:
                files = tar_file_expander([{"url": path, "stream": file}], handler=note)
                for sample in group_by_keys(files, handler=note):
                    yield self._record(f"{path}: {sample['__key__']}", sample)
        except OSError as error:
            broken.append(UnreadableFile(f"{path} cannot be opened ({error})"))
        yield from broken

    def _record(self, where: str, sample: Mapping[str, Any]) -> Record | UnreadableFile:
        from timm.data import is_img_extension

        found = [sample[key] for key in sample if is_img_extension(f".{key}")]
        if not found:
            return UnreadableFile(f"{where} has no image, expected a file such as .jpg")
        try:
            key = self.label_key
            label = int(json.loads(sample["json"])[key] if key else sample["cls"])
        except (KeyError, ValueError, TypeError) as error:
            expected = f"a .json file with {key!r}" if key else "a .cls file with a number"
            return UnreadableFile(f"{where} has no label ({error!r}), expected {expected}")
        return Record(where, partial(_opened, found[0]), label)


class _Info(NamedTuple):
    """What a folder of tar files tells of a split."""

    paths: tuple[str, ...]
    num_samples: int | None = None
    label_key: str = ""


def _info_of(root: Path, split: str) -> _Info:
    require(root.is_dir(), f"{root} is not a folder; pass the one that holds the tar files as root")
    told = _told(root, split)
    if told:
        gone = [path for path in told.paths if not Path(path).is_file()]
        require(not gone, f"{root} lacks what its _info.json names: {shortened(gone)}")
        return told
    patterns = [f"{name}-*.tar" for name in FOLDERS[split]]
    found = (tuple(map(str, sorted(root.glob(pattern)))) for pattern in patterns)
    paths = next(filter(None, found), ())
    require(
        bool(paths),
        f"{root} has nothing for split {split!r}, expected {', '.join(patterns)} or an _info.json "
        "that names the tar files, as timm reads it",
    )
    return _Info(paths)


def _told(root: Path, split: str) -> _Info | None:
    path = root / "_info.json"
    if not path.is_file():
        return None
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        told = next((splits[name] for name in FOLDERS[split] if name in splits), None)
        if told is None:
            return None
        paths = tuple(str(root / name) for name in told["filenames"])
        return _Info(paths, int(told["num_samples"]), told.get("alt_label", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not as timm writes it ({error!r}); correct it or take it away"
        raise ValueError(message) from error


def _opened(data: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(BytesIO(data))
