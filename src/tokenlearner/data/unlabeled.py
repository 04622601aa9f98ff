"""Images or videos without labels, in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..utils.imports import require_package
from ..utils.validation import require
from .config import DataConfig
from .dataset import MapDataset
from .file_lists import split_by_suffix, walk_files, warn_left_out
from .image_folder import ImageFileDataset, ImagePaths, image_extensions
from .video_folder import VIDEO_EXTENSIONS, VideoFolderDataset


def list_files(
    sources: Sequence[str | Path], *, videos: bool = False, follow_links: bool = False
) -> list[str]:
    """Lists images or videos, each once; opens none of them.

    Args:
        sources: Files, whatever their names end in, and folders, of which files of other kinds and
            hidden ones are left out.
        videos: List videos rather than images.
        follow_links: Take files out of a folder too, where links in it lead there.

    Raises:
        ValueError: There is no such file or folder, a folder has nothing of the kind, or a link
            leads out of it.
    """
    kind, ends = ("video", VIDEO_EXTENSIONS) if videos else ("image", image_extensions())
    files: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        require(path.exists(), f"there is no file or folder {str(source)!r}; correct the path")
        if not path.is_dir():
            files.append(str(path))
            continue
        fitting, others = split_by_suffix(
            walk_files(path, None if follow_links else path), tuple(ends)
        )
        require(
            bool(fitting),
            f"{source} holds no {kind}, a file that ends in {', '.join(ends)}; pass another folder",
        )
        warn_left_out(path, others)
        files += fitting
    return list(dict.fromkeys(files))


def load_unlabeled(files: Sequence[str], config: DataConfig, *, videos: bool = False) -> MapDataset:
    """Returns images or videos as a data set, whose labels are the numbers of the files.

    Raises:
        ValueError: PyAV is missing, for videos.
    """
    numbers = torch.arange(len(files), device="cpu")
    if videos:
        require_package("av", "video", "reading videos")
        return VideoFolderDataset("videos", "test", tuple(files), numbers, (), config)
    source = ImagePaths(files)
    return ImageFileDataset(
        "images", "test", (), config, source=source, numbers=numbers, labels=numbers
    )
