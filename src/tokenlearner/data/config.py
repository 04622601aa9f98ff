"""Options of the data: which images or clips, how they are read, how they are augmented.

The words are timm's wherever timm has one. Types are no strings here: jsonargparse reads those of
inherited options in the file of the class that inherits.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..utils.preprocessing import NAMES, check_channels, check_crop_pct
from ..utils.processors import usable_processors
from ..utils.validation import check_count, check_from_zero, check_literals, check_rate, require

IMG_SIZE, FRAMES = 224, 8  # where neither the data set nor a model has a size
MOST_WORKERS = 2  # a processor
OLD_NAMES = {"film": "video-folder"}  # of version 0.3, which still work


def unit_of(data: object) -> str:
    """Returns what a data set of that name has: images or clips."""
    clips = ("video-folder", "tokens", "moving-photographs", "film")
    return "clips" if data in clips else "images"


def is_in_files(data: str) -> bool:
    """Returns whether a data set is read from files, at any size."""
    return data in ("folder", "video-folder") or "/" in data


@dataclass(frozen=True)
class DataConfig:
    """Options of images or clips: which they are, and how they are read.

    Args:
        data: A name that `load_data` knows.
        root: Folder in which the data set is looked for.
        follow_links: Read files out of root too, where links or lists in it lead there.
        download: Fetch a data set that is missing, where torchvision can.
        images: Training images to use, drawn by the seed; 0 is all.
        img_size: Height and width in pixels; None is the data set's own, or for files the model's,
            or 224.
        in_chans: 3 for color, 1 for gray; None is the data set's own, or 3.
        crop_pct: Share of the resized image's side that is kept for evaluation. None is the
            model's, and 0.875 for one that is trained from scratch; so are the four that follow.
        mean: Subtracted from pixels in [0, 1], one number a channel; or the data set's own, and
            ImageNet's for files.
        std: Divided by, one number above 0 a channel; as mean.
        interpolation: How images are resized; or bicubic.
        crop_mode: `center` keeps an image's shape and cuts its middle out, `squash` makes it a
            square, `border` keeps all of it between margins; or center. Clips have center.
        frames: Frames of a clip; None is the model's, or 8 where there is none.
        stride: Frames of the video from one frame of a clip to the next; 0 spreads a clip over it.
            Of tokens a multiple of the stride that they were encoded with.
        views: Clips of a video in evaluation, spread over its length; their logits are averaged.
        crops: Squares of each of them: 1 is the middle, 3 lie side by side.
        num_samples: Images of a stream of unknown length.
        num_classes: Classes of a stream that does not list them.
        workers: Processes that read files, at most two a processor; None is one a processor that
            may be used, and none for data in memory and for tokens.
        max_broken: Files that may be unreadable; they are left out, counted and reported.

    Raises:
        ValueError: A number is out of range.
    """

    data: str = "fashion-mnist-small"
    root: str | None = None
    follow_links: bool = False
    download: bool = False
    images: int = 0
    img_size: int | None = None
    in_chans: Literal[1, 3] | None = None
    crop_pct: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    frames: int | None = None
    stride: int = 4
    views: int = 1
    crops: Literal[1, 3] = 1
    num_samples: int | None = None
    num_classes: int | None = None
    workers: int | None = None
    max_broken: int = 10

    def __post_init__(self) -> None:
        self.check_data()

    def check_data(self) -> None:
        """Checks the ranges, and replaces an old name of a data set by its new one."""
        object.__setattr__(self, "data", OLD_NAMES.get(self.data, self.data))
        for name in ("img_size", "frames", "views", "num_samples", "num_classes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("images", "stride", "workers", "max_broken"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        check_literals(self)
        if self.crop_pct is not None:
            check_crop_pct(self.crop_pct)
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None:
                check_channels(name, values)
                require(len(values) in (1, 3), f"{name} is {values!r}, expected 1 or 3 numbers")
        require(self.std is None or min(self.std) > 0, f"std is {self.std!r}, expected above 0")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The options of preprocessing that are given, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    @property
    def folder(self) -> Path | None:
        """`root` as a path."""
        return None if self.root is None else Path(self.root).expanduser()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of an image or a frame that is read from a file."""
        size = self.img_size or IMG_SIZE
        return self.in_chans or 3, size, size

    @property
    def clip_frames(self) -> int:
        """Frames of a clip."""
        return self.frames or FRAMES

    @property
    def lacks_size(self) -> bool:
        """Whether a size is missing that the data set has not itself, but a model may have."""
        lacks_frames = self.unit == "clips" and self.frames is None
        return (is_in_files(self.data) and self.img_size is None) or lacks_frames

    @property
    def unit(self) -> str:
        """What the data set has: images or clips."""
        return unit_of(self.data)

    @property
    def reading_workers(self) -> int:
        """Processes that read files, in each process that trains."""
        processors = usable_processors()
        if self.workers is not None:
            return min(self.workers, MOST_WORKERS * processors)
        if self.data == "tokens":  # read in less time than it takes to hand them over
            return 0
        return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass(frozen=True)
class AugmentConfig:
    """Options of augmenting training images, by timm and torchvision; by default there is none.

    Args:
        scale: Smallest and largest share of an image's area that is cut out, as [0.08, 1.0];
            None cuts out what evaluation does.
        ratio: Narrowest and widest shape of what is cut out.
        hflip: Share of images that are mirrored.
        color_jitter: How much brightness, contrast and saturation change.
        aa: RandAugment or another of timm's policies, such as rand-m9-mstd0.5-inc1.
        reprob: Share of images in which a rectangle is erased.
        mixup: Parameter of Mixup's distribution; 0 is none.
        cutmix: Parameter of CutMix's distribution; 0 is none.
        smoothing: Label smoothing, from 0 to below 1.

    Raises:
        ValueError: A number is out of range.
    """

    scale: list[float] | None = None
    ratio: list[float] | None = None
    hflip: float = 0.0
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        self.check_augment()

    def check_augment(self) -> None:
        """Checks the ranges."""
        check_rate(self.smoothing, "smoothing")
        check_from_zero(self, "color_jitter", "mixup", "cutmix")
        for name in ("hflip", "reprob"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value!r}, expected a share from 0 to 1")
        for name, example in (("scale", "[0.08, 1.0]"), ("ratio", "[0.75, 1.333]")):
            pair = getattr(self, name)
            require(
                pair is None or (len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf),
                f"{name} is {pair!r}, expected two numbers above 0 that rise, such as {example}",
            )
        require(
            self.scale is None or self.scale[1] <= 1,
            f"scale is {self.scale!r}, expected shares of an image, up to 1.0",
        )
