"""What a run can be told of images: which ones, how they are read, how they are changed.

The words are timm's wherever timm has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..utils.validation import check_count, check_from_zero, check_rate, require


@dataclass(frozen=True)
class DataOptions:
    """What it is trained on, and how images and clips are read.

    Args:
        data: A name that `load_data` knows.
        root: Folder in which the data set is looked for.
        download: Fetch a data set that is not found, where torchvision can.
        images: Training images to use, drawn by the seed; 0 is all.
        img_size: Height and width in pixels; None is the data set's own, or 224.
        in_chans: 3 for color, 1 for gray; None is the data set's own, or 3.
        crop_pct: Share of the resized image's side that is kept for evaluation.
        frames: Frames of a clip.
        stride: Frames of the video from one frame of a clip to the next; 0 spreads a clip over it.
        views: Clips of a video that are judged in evaluation, and averaged.
        crops: Squares of each of them: 1 or 3.
        num_samples: Images of a stream that does not tell.
        num_classes: Classes of a stream that does not tell.
        workers: Processes that read files; None is one a processor, and none for data in memory.
        max_broken: Files that may be unreadable; they are left out, counted and reported.
    """

    data: str = "fashion-mnist-small"
    root: str | None = None
    download: bool = False
    images: int = 0
    img_size: int | None = None
    in_chans: int | None = None
    crop_pct: float = 0.875
    frames: int = 8
    stride: int = 4
    views: int = 1
    crops: int = 1
    num_samples: int | None = None
    num_classes: int | None = None
    workers: int | None = None
    max_broken: int = 10

    def check_data(self) -> None:
        """Refuses numbers out of range; the rest is for `labeled.Wanted` to say."""
        for name in ("images", "max_broken"):
            check_count(name, getattr(self, name), least=0)
        if self.workers is not None:
            check_count("workers", self.workers, least=0)


@dataclass(frozen=True)
class AugmentOptions:
    """How training images are changed at random, by timm; nothing is, unless asked for.

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

    def check_augment(self) -> None:
        """Refuses numbers out of range."""
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
