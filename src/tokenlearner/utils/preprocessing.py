"""Preprocessing: how an image becomes the input of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NAMES = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # timm's words


@dataclass(frozen=True)
class Preprocessing:
    """Holds how an image becomes the input of a model, in timm's words.

    Args:
        mean: Subtracted from pixels in [0, 1], one number a channel.
        std: Divided by, one number above 0 a channel.
        crop_pct: Share of the resized image's side that is kept.
        interpolation: How it is resized, such as bicubic.
        crop_mode: `center` keeps the shape of the image and cuts its middle out, `squash` makes it
            a square, `border` keeps all of it between margins.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"

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
