"""Images and videos in files, resized, cropped and normalized for a model.

Axes: `t` frames, `c h w`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.factory import load_data
from ..data.file_lists import walk_files
from ..data.image_folder import decoded, image_extensions, imagenet_mean_std
from ..data.video_folder import VIDEO_EXTENSIONS, VideoFolderDataset
from ..models.preprocessing import get_preprocessing
from ..utils.files import open_image
from ..utils.preprocessing import Preprocessing
from ..utils.validation import require
from ._runs import run_options

if TYPE_CHECKING:
    from PIL import Image

VIDEO_FRAMES = 16  # that a model of images looks at, one by one
STRIDE = 4  # as `tokenlearner train` has it
_LONGEST = 200  # bytes of a name of figures, to which ends are added; systems allow 255


@dataclass(frozen=True)
class MapInput:
    """An image or a video.

    Args:
        name: Of its files.
        pixels: Pixels, float32 `t c h w` in [0, 1]; of an image `t` is 1.
        model_input: Input of the model, with a batch axis: an image or a clip, or for a model of
            images the frames of a video as a batch.
        is_video: Whether it is a video.
    """

    name: str
    pixels: Tensor
    model_input: Tensor
    is_video: bool


@dataclass(frozen=True)
class InputPipeline:
    """Turns files into the inputs of a model of images or clips.

    Args:
        size: `(c, h, w)`, of clips `(c, t, h, w)`.
        preprocessing: That of the model.
        frames: Frames of a video.
        stride: Frames of the video from one to the next; 0 spreads them over the whole video.
        time_first: Whether clips are `b t c h w` rather than `b c t h w`.
        origin: Where the preprocessing is from.
    """

    size: tuple[int, ...]
    preprocessing: Preprocessing
    frames: int
    stride: int
    time_first: bool
    origin: str

    def __post_init__(self) -> None:
        c = self.size[0]
        require(c in (1, 3), f"the model takes {c} channels; files have 3 (color) or 1 (gray)")
        mean, std = self.preprocessing.mean, self.preprocessing.std
        fits = len(mean) == len(std) == c and min(std) > 0
        require(
            fits,
            f"mean is {mean}, std {std}, expected {c} each for {c} channels, every std above 0",
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Subtracted from pixels in [0, 1], one number a channel."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Divided by, one number a channel."""
        return self.preprocessing.std

    @property
    def crop_pct(self) -> float:
        """Share of the resized image's side that is kept."""
        return self.preprocessing.crop_pct

    @property
    def takes_clips(self) -> bool:
        """Returns whether the model takes clips rather than images."""
        return len(self.size) == 4

    def read(self, path: Path, name: str) -> MapInput:
        """Reads a file.

        Raises:
            UnreadableFile: It cannot be read.
        """
        if is_video(path):
            return self.from_frames(self._video(path), name)
        return self.from_image(decoded(partial(open_image, path), str(path), self.size[0]), name)

    def from_image(self, image: Image.Image, name: str) -> MapInput:
        """Resizes, cuts and normalizes an image that is decoded."""
        image = image.convert("L" if self.size[0] == 1 else "RGB")
        return self._normalized(self._plain(image)[None].float() / 255, name, is_video=False)

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
        """The transform of images for evaluation, without normalization: to uint8."""
        c, *_, h, w = self.size
        return self.preprocessing.eval_transform((c, h, w), normalize=False)

    def _video(self, path: Path) -> Tensor:
        """Reads a clip in the middle of a video, uint8 `t c h w`."""
        in_chans = 1 if self.size[0] == 1 else 3
        config = DataConfig(in_chans=in_chans, frames=self.frames, stride=self.stride)
        label = torch.zeros(1).long()
        return VideoFolderDataset("video", "test", (str(path),), label, ("",), config).load(0)

    def _cut(self, frames: Tensor) -> Tensor:
        """Resizes frames to the model's size, and crops the middle; in [0, 1].

        Frames that are not to keep their shape are resized as images are.
        """
        from torchvision.transforms.v2 import functional as TF

        if self.preprocessing.crop_mode != "center":
            images = [self._plain(TF.to_pil_image(frame)) for frame in frames]
            return torch.stack(images).float() / 255
        (h, w), (tall, wide) = self.size[-2:], frames.shape[-2:]
        if h / tall >= w / wide:
            new_h = round(h / self.crop_pct)
            size = [new_h, max(w, int(new_h * wide / tall))]
        else:
            new_w = round(w / self.crop_pct)
            size = [max(h, int(new_w * tall / wide)), new_w]
        return TF.center_crop(TF.resize(frames, size, antialias=True), [h, w]).float() / 255


def is_video(path: Path) -> bool:
    """Returns whether a file has the suffix of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS


def list_inputs(source: str, follow_links: bool = False) -> dict[str, Path]:
    """Lists the images and videos of a folder, or the one file, each with a different name.

    Hidden files and unknown suffixes are left out.

    Raises:
        ValueError: There is no image and no video, or a link leads out of the folder.
    """
    root = Path(source).expanduser()
    require(root.exists(), f"there is no file or folder {source!r}; pass an image, video or folder")
    known = (*image_extensions(), *VIDEO_EXTENSIONS)
    if root.is_file():
        suffix = root.suffix.lower()
        require(suffix in known, f"{source} ends in {suffix!r}, expected one of {', '.join(known)}")
        return {root.stem: root}
    named: dict[str, Path] = {}
    for path in sorted(map(Path, walk_files(root, None if follow_links else root))):
        if path.suffix.lower() in known:
            parts = path.relative_to(root).parts
            named[_new_name("-".join(parts), path.suffix, named)] = path
    require(bool(named), f"{source} holds no image or video, of any of {', '.join(known)}")
    return named


def _new_name(name: str, suffix: str, taken: Collection[str]) -> str:
    """Returns the name without its suffix, or with it, or with a number; cut to what files have."""
    short = name.removesuffix(suffix)
    if len(os.fsencode(short)) > _LONGEST:
        short = short[: _LONGEST // 4]
    numbered = (f"{short}-{number}" for number in count(2))
    return next(x for x in chain((short, f"{short}{suffix}"), numbered) if x not in taken)


def input_pipeline(
    model: nn.Module,
    size: Sequence[int],
    checkpoint: str | None,
    *,
    frames: int | None = None,
    stride: int | None = None,
) -> InputPipeline:
    """Returns the preprocessing of a model.

    It is what the model's timm configuration says, where training writes what it used; otherwise
    ImageNet's. A run of version 0.3 has it from its data set.

    Args:
        model: Any model.
        size: As `load_sized` returns it.
        checkpoint: File or folder that the model was loaded from, if any.
        frames: Of a video, for a model of images; None is 16. A model of clips has its number.
        stride: As in `InputPipeline`; None is that of the training on videos, 1 for a model that
            was trained on other clips, or 4.

    Raises:
        ValueError: Frames are given for a model of clips, train.json or its data set cannot be
            read, or the model's channels are not those of images.
    """
    clips = len(size) == 4
    if clips and frames not in (None, size[1]):
        raise ValueError(f"frames is {frames}, but the model takes clips of {size[1]}; omit it")
    run = run_options(checkpoint) if checkpoint and Path(checkpoint).expanduser().exists() else {}
    of_old_run = run and "mean" not in run
    found, origin = (_of_run if of_old_run else _of_config)(run, model, size[0])
    if stride is None and run.get("data") == "video-folder":
        stride = int(run.get("stride", STRIDE))
    elif stride is None:
        stride = 1 if clips and run else STRIDE  # clips in memory have all frames
    embed = getattr(getattr(model, "encoder", model), "patch_embed", None)
    order = getattr(model, "input_format", getattr(embed, "input_format", "bcthw"))
    frames = size[1] if clips else frames or VIDEO_FRAMES
    return InputPipeline(
        tuple(size),
        found,
        frames=frames,
        stride=stride,
        time_first=order == "btchw",
        origin=origin,
    )


def _of_run(run: dict[str, Any], model: nn.Module, c: int) -> tuple[Preprocessing, str]:
    """Returns the preprocessing of the data set of a run of version 0.3, and where it is from."""
    name, origin = run["data"], f"{run['data']}, on which it was trained"
    if name in ("folder", "video-folder") or "/" in name:  # read from files, so ImageNet's
        return Preprocessing(*imagenet_mean_std(c), run.get("crop_pct") or 0.875), origin
    data = load_data(name, "test", root=run.get("root"), in_chans=c)
    return Preprocessing(data.mean, data.std, 1.0), origin  # in memory, and not cropped


def _of_config(run: dict[str, Any], model: nn.Module, c: int) -> tuple[Preprocessing, str]:
    """Returns the preprocessing that a model says, or ImageNet's, and where it is from."""
    if found := get_preprocessing(model, c):
        return found, f"{run['data']}, on which it was trained" if run else "its timm configuration"
    return Preprocessing(*imagenet_mean_std(c)), "ImageNet, as it has no configuration"
