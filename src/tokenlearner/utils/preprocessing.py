"""Preprocessing: how an image becomes the input of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .validation import check_choice, is_number, require

MIN_CROP_PCT = 0.05  # an image is enlarged by what is cut off
_MOST_CROP_PCT = 1.25  # of models; timm's VOLO have 1.15, margins
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")
NAMES = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # timm's words


@dataclass(frozen=True)
class Preprocessing:
    """Holds how an image becomes the input of a model, in timm's words.

    Args:
        mean: Subtracted from pixels in [0, 1], one number a channel.
        std: Divided by, one number above 0 a channel.
        crop_pct: Share of the resized image's side that is kept, from 0.05.
        interpolation: How it is resized, such as bicubic.
        crop_mode: `center` keeps the shape of the image and cuts its middle out, `squash` makes it
            a square, `border` keeps all of it between margins.

    Raises:
        ValueError: A number is out of range, or a word is unknown.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            check_channels(name, getattr(self, name))
        require(min(self.std) > 0, f"std is {self.std!r}, expected above 0")
        check_crop_pct(self.crop_pct, _MOST_CROP_PCT)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)

    @classmethod
    def of(cls, data: Any) -> Preprocessing:
        """Returns the preprocessing of a data set, which has the fields as attributes."""
        return cls(**{name: getattr(data, name) for name in NAMES})

    def to_kwargs(self) -> dict[str, Any]:
        """Returns the fields by name, as timm's configs have them."""
        return asdict(self)

    def eval_transform(self, shape: Sequence[int], *, normalize: bool = True) -> Any:
        """Returns timm's transform for evaluation: of a PIL image to float32 `c h w`.

        Args:
            shape: `(c, h, w)` of the model's input.
            normalize: False gives pixels, uint8.
        """
        from timm.data import create_transform

        c, h, w = shape
        return create_transform((c, h, w), **self.to_kwargs(), normalize=normalize)


def check_crop_pct(value: Any, most: float = 1.0) -> None:
    """Checks a share of an image's side."""
    require(
        is_number(value) and MIN_CROP_PCT <= value <= most,
        f"crop_pct is {value!r}, expected a share from {MIN_CROP_PCT} to {most:g}",
    )


def check_channels(name: str, values: Any) -> None:
    """Checks a mean or std: a finite number for each channel."""
    is_list = isinstance(values, list | tuple) and len(values) > 0
    require(
        is_list and all(map(is_number, values)),
        f"{name} is {values!r}, expected a finite number for each channel",
    )
