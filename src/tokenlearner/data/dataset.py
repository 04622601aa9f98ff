"""What every data set of labeled images offers, and how they can be wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..utils.validation import check_count, require


@dataclass(frozen=True)
class DataConfig:
    """How images and clips are wanted, as far as a data set leaves the choice.

    Args:
        root: Folder or file in which to look.
        download: Fetch a set that is not found, where there is a way to.
        img_size: Height and width in pixels; None takes a set's own, or 224.
        in_chans: 3 for color, 1 for gray; None takes a set's own, or 3.
        crop_pct: Share of the resized image's side that is kept when judging.
        frames: Frames of a clip.
        stride: Frames of the video from one frame of a clip to the next; 0 spreads the clip evenly
            over the whole video.
        views: Clips of a video that are judged, spread over its length; their logits are averaged.
        crops: Squares of each such clip that are judged: 1 is the middle, 3 are side by side.
        num_samples: Images of a stream that does not tell.
        num_classes: Classes of a stream that does not tell.
        workers: Processes that read files.

    Raises:
        ValueError: A number is out of range.
    """

    root: Path | None = None
    download: bool = False
    img_size: int | None = None
    in_chans: int | None = None
    crop_pct: float = 0.875
    frames: int = 8
    stride: int = 4
    views: int = 1
    crops: int = 1
    num_samples: int | None = None
    num_classes: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("img_size", "frames", "views", "num_samples", "num_classes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("stride", "workers"):
            check_count(name, getattr(self, name), least=0)
        require(
            self.in_chans in (None, 1, 3),
            f"in_chans is {self.in_chans!r}, expected 3 for color or 1 for gray",
        )
        require(self.crops in (1, 3), f"crops is {self.crops!r}, expected 1 or 3")
        require(
            0 < self.crop_pct <= 1,
            f"crop_pct is {self.crop_pct!r}, expected a share above 0, up to 1",
        )


class UnreadableFile(ValueError):
    """An image or a clip that cannot be read; the message names the file and says why."""


class LabeledDataset(Protocol):
    """One split of labeled images or clips, wherever they are kept."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        ...

    @property
    def split(self) -> str:
        """Which part of it this is: `"train"` or `"test"`."""
        ...

    @property
    def labels(self) -> Tensor:
        """Of each image, int64 `[n]`, 0 to `len(classes) - 1`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted, one number a channel, for images in [0, 1]."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """What is divided by, one number a channel."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image as `batches` gives it: `(c, h, w)`, of a clip `(c, t, h, w)`."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """One image as it is kept, a PIL image; of a clip its frames, uint8 `t c h w`.

        Raises:
            BrokenFile: It cannot be read.
        """
        ...

    def plain(self, raw: Any) -> Tensor:
        """What `read` gives as a model takes it, float32 `shape`, normalized, nothing at random.

        Where a clip is judged by several views, they come first: `v c t h w`.
        """
        ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields plain batches and their labels, in order, without what cannot be read."""
        ...

    def sample(self, n: int, seed: int = 0) -> LabeledDataset:
        """Returns `n` of them, drawn by a seed; fewer are the first of more."""
        ...
