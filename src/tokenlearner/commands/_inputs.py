"""Images and videos in files, cut and normalized as a model takes them, and as a person sees them.

Axes: `t` frames, `c h w`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.factory import load_data
from ..data.image_folder import decoded, imagenet_mean_std
from ..data.video_folder import VIDEO_EXTENSIONS, VideoFolderDataset
from ..training.recipes import run_options
from ..utils.validation import require

if TYPE_CHECKING:
    from PIL import Image

VIDEO_FRAMES = 16  # that a model of images looks at, one by one
STRIDE = 4  # as `tokenlearner train` has it


@dataclass(frozen=True)
class MapInput:
    """An image or a video.

    Args:
        name: What its sheets are called.
        seen: float32 `t c h w` in [0, 1]; of an image `t` is 1.
        taken: What the model takes, with a batch axis: an image or a clip, or for a model of
            images the frames of a video as a batch.
        is_video: Whether it is one.
    """

    name: str
    seen: Tensor
    taken: Tensor
    is_video: bool


@dataclass(frozen=True)
class InputPipeline:
    """How a model takes images or clips.

    Args:
        size: `(c, h, w)`, of clips `(c, t, h, w)`.
        mean: Subtracted from pixels in [0, 1], one number a channel.
        std: Divided by, one number a channel.
        crop_pct: Share of the resized image's side that is kept.
        frames: Frames of a video.
        stride: Frames of the video from one to the next; 0 spreads them over the whole video.
        time_first: Whether clips are `b t c h w` rather than `b c t h w`.
        told_by: Where mean, std and crop_pct are from.
    """

    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    frames: int
    stride: int
    time_first: bool
    told_by: str

    def __post_init__(self) -> None:
        c = self.size[0]
        require(c in (1, 3), f"the model takes {c} channels; files have 3 (color) or 1 (gray)")
        fits = len(self.mean) == len(self.std) == c and min(self.std) > 0
        require(
            fits,
            f"mean is {self.mean}, std {self.std}, expected {c} each for {c} channels, "
            "every std above 0",
        )

    @property
    def takes_clips(self) -> bool:
        """Whether the model is one of videos."""
        return len(self.size) == 4

    def read(self, path: Path, name: str) -> MapInput:
        """Reads a file.

        Raises:
            UnreadableFile: It cannot be read.
        """
        if is_video(path):
            return self.from_frames(self._video(path), name)
        return self.from_image(decoded(partial(_open, path), str(path), self.size[0]), name)

    def from_image(self, image: Image.Image, name: str) -> MapInput:
        """Resizes, cuts and normalizes an image that is decoded."""
        image = image.convert("L" if self.size[0] == 1 else "RGB")
        return self._normalized(self._plain(image)[None], name, is_video=False)

    def from_frames(self, frames: Tensor, name: str) -> MapInput:
        """Resizes, cuts and normalizes frames of a video, uint8 `t c h w`."""
        return self._normalized(self._cut(frames), name, is_video=True)

    def _normalized(self, pixels: Tensor, name: str, *, is_video: bool) -> MapInput:
        """Normalizes frames in [0, 1], `t c h w`, and puts their axes in the model's order."""
        mean, std = torch.tensor([self.mean, self.std])[..., None, None]
        taken = (pixels - mean) / std
        if self.takes_clips:
            taken = taken[None] if self.time_first else taken.transpose(0, 1)[None]
        return MapInput(name, pixels.clip(0, 1), taken, is_video)

    @cached_property
    def _plain(self) -> Any:
        """The transform with which `evaluate` reads images, but for the numbers."""
        from timm.data import create_transform

        c, *_, h, w = self.size
        return create_transform(
            (c, h, w),
            crop_pct=self.crop_pct,
            mean=(0.0,) * c,
            std=(1.0,) * c,
            interpolation="bicubic",
        )

    def _video(self, path: Path) -> Tensor:
        """The frames of a clip in the middle of a video, uint8 `t c h w`."""
        config = DataConfig(
            in_chans=1 if self.size[0] == 1 else 3, frames=self.frames, stride=self.stride
        )
        video = VideoFolderDataset(
            "video", "test", (str(path),), torch.zeros(1).long(), ("",), config
        )
        return video.load(0)

    def _cut(self, frames: Tensor) -> Tensor:
        """Resizes frames until they cover the model's, and cuts out the middle; in [0, 1]."""
        from torchvision.transforms.v2 import functional as TF

        (h, w), (tall, wide) = self.size[-2:], frames.shape[-2:]
        if h / tall >= w / wide:
            new_h = round(h / self.crop_pct)
            size = [new_h, max(w, int(new_h * wide / tall))]
        else:
            new_w = round(w / self.crop_pct)
            size = [max(h, int(new_w * tall / wide)), new_w]
        return TF.center_crop(TF.resize(frames, size, antialias=True), [h, w]).float() / 255


def is_video(path: Path) -> bool:
    """Whether a file's name ends as that of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS


def list_inputs(source: str) -> dict[str, Path]:
    """Finds the images and videos of a folder, or the one file, each with a name of its own.

    Hidden files are left out, and so is what ends in no known extension.

    Raises:
        ValueError: There is nothing.
    """
    from timm.data import get_img_extensions

    root = Path(source).expanduser()
    require(root.exists(), f"there is no file or folder {source!r}; pass an image, video or folder")
    known = (*get_img_extensions(), *VIDEO_EXTENSIONS)
    if root.is_file():
        ends = root.suffix.lower()
        require(ends in known, f"{source} ends in {ends!r}, expected one of {', '.join(known)}")
        return {root.stem: root}
    below = sorted(Path(at) / name for at, _, names in os.walk(root) for name in names)
    shown = [p for p in below if not any(x.startswith(".") for x in p.relative_to(root).parts)]
    paths = [p for p in shown if p.suffix.lower() in known]
    require(bool(paths), f"{source} holds no image or video, of any of {', '.join(known)}")
    named: dict[str, Path] = {}
    for path in paths:
        short = "-".join(path.relative_to(root).with_suffix("").parts)
        whole = "-".join(path.relative_to(root).parts)
        number = next(i for i in range(len(paths) + 1) if _numbered(short, whole, i) not in named)
        named[_numbered(short, whole, number)] = path
    return named


def input_pipeline(
    model: nn.Module,
    size: Sequence[int],
    checkpoint: str | None,
    *,
    frames: int | None = None,
    stride: int | None = None,
) -> InputPipeline:
    """Finds out how a model takes its images or clips.

    Mean, std and crop_pct are those of the data set that it was trained on, which train.json beside
    the checkpoint tells; otherwise those of its timm configuration.

    Args:
        model: Any model.
        size: As `load_sized` tells it.
        checkpoint: What the model was loaded from, if it was.
        frames: Of a video, for a model of images; None is 16. A model of clips has its own.
        stride: As in `Intake`; None is that of the training on videos, 1 for a model that was
            trained on other clips, or 4.

    Raises:
        ValueError: Frames are given for a model of clips, train.json or its data set cannot be
            read, or the model's channels are not those of images.
    """
    takes_clips = len(size) == 4
    if takes_clips and frames not in (None, size[1]):
        raise ValueError(
            f"frames is {frames}, but the model takes clips of {size[1]}; leave it out"
        )
    run = run_options(checkpoint) if checkpoint and Path(checkpoint).expanduser().exists() else {}
    mean, std, crop_pct, told_by = _of_run(run, size) if run else _of_config(model, size[0])
    embed = getattr(getattr(model, "encoder", model), "patch_embed", None)
    order = getattr(model, "input_format", getattr(embed, "input_format", "bcthw"))
    return InputPipeline(
        size=tuple(size),
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        frames=size[1] if takes_clips else frames or VIDEO_FRAMES,
        stride=_stride(run, takes_clips) if stride is None else stride,
        time_first=order == "btchw",
        told_by=told_by,
    )


def _stride(run: dict[str, Any], takes_clips: bool) -> int:
    if run.get("data") == "video-folder":
        return run.get("stride", STRIDE)
    return 1 if run and takes_clips else STRIDE  # clips in memory have all frames


Numbers = tuple[tuple[float, ...], tuple[float, ...], float, str]


def _of_run(run: dict[str, Any], size: Sequence[int]) -> Numbers:
    """What the data set of a run is normalized by."""
    name, c = run["data"], size[0]
    told_by = f"{name}, on which it was trained"
    if name in ("folder", "video-folder") or "/" in name:  # read from files, so ImageNet's
        return *imagenet_mean_std(c), run.get("crop_pct", 0.875), told_by
    data = load_data(name, "test", root=run.get("root"), in_chans=c)
    return data.mean, data.std, 1.0, told_by  # in memory, and nothing is cut off


def _of_config(model: nn.Module, c: int) -> Numbers:
    """What timm's configuration says, ImageNet's numbers where there is none."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean = _for_channels(config.get("mean", IMAGENET_DEFAULT_MEAN), c)
    std = _for_channels(config.get("std", IMAGENET_DEFAULT_STD), c)
    told_by = "its timm configuration" if config else "ImageNet, as it has no configuration"
    return mean, std, config.get("crop_pct", 0.875), told_by


def _for_channels(numbers: Any, c: int) -> tuple[float, ...]:
    """One number a channel; those of color are averaged for gray."""
    return tuple(numbers) if len(numbers) == c else (sum(numbers) / len(numbers),) * c


def _numbered(short: str, whole: str, number: int) -> str:
    """The name without its end, then with it, then with a number."""
    return (short, whole)[number] if number < 2 else f"{whole}-{number}"


def _open(path: Path) -> Any:
    from PIL import Image

    return Image.open(path)
