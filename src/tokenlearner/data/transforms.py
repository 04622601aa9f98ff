"""Augmentation of training images and clips: torchvision's transforms, with timm's policies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.preprocessing import Preprocessing
from ..utils.random import derive_seed, fixed_seed
from ..utils.validation import require
from .config import AugmentConfig
from .dataset import LabeledDataset
from .loader import Transform
from .token_dataset import TokenDataset

_OPTIONS = ("scale", "hflip", "color_jitter", "aa", "reprob")
_EXAMPLE = "'rand-m9-mstd0.5-inc1'"
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
)
_CLIP_POLICY = re.compile(r"rand(?:-(?:m(?P<m>10|\d)|n(?P<n>\d+)|mstd[\d.]+|inc[01]))*")
_STRONGEST = 10  # magnitude of RandAugment, in timm's words


def train_transform(config: AugmentConfig, data: LabeledDataset) -> Transform | None:
    """Builds the augmentation that makes of a loaded image or clip the input of a model.

    Args:
        config: The options. Of RandAugment's options clips take two, m and n.
        data: The images, `c h w`, or clips, `c t h w`, all frames of which are augmented alike.

    Returns:
        None without augmentation: `data.eval_transform` will do.

    Raises:
        ValueError: timm or torchvision does not know the policy, or the data are tokens.
    """
    given = [name for name in (*_OPTIONS, "cutmix") if getattr(config, name)]
    require(
        not (given and isinstance(data, TokenDataset)),
        f"{' and '.join(given)} change pixels, which tokens have no more; leave them out",
    )
    if not any(getattr(config, name) for name in _OPTIONS):
        return None
    from torchvision.transforms import ToTensor, v2

    is_clip = len(data.shape) == 4
    steps = _crop(config, data, is_clip)
    if config.hflip:
        steps.append(v2.RandomHorizontalFlip(config.hflip))
    if config.color_jitter and is_clip:
        steps.append(v2.ColorJitter(*[config.color_jitter] * 3))
    if config.aa:
        steps.append(_clip_policy(config.aa) if is_clip else _image_policy(config.aa, data))
    if config.color_jitter and not is_clip:
        steps.append(v2.ColorJitter(*[config.color_jitter] * 3))
    steps.append(v2.ToDtype(torch.float32, scale=True) if is_clip else ToTensor())
    steps.append(v2.Normalize(list(data.mean), list(data.std)))
    if config.reprob:
        steps.append(_erase(config.reprob, is_clip))
    return v2.Compose([*steps, _time_second] if is_clip else steps)


def mixup_transform(
    config: AugmentConfig, num_classes: int, seed: int
) -> Callable[..., Any] | None:
    """Builds Mixup and CutMix of a batch, `(images, labels, step) -> (images, targets b classes)`.

    The same step of the same seed mixes alike. Returns None without mixup and cutmix.
    """
    if not (config.mixup or config.cutmix):
        return None
    from timm.data.mixup import Mixup

    mixup = Mixup(
        config.mixup,
        config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        flat = images.flatten(1, -3) if images.ndim == 5 else images  # frames as channels
        with fixed_seed(derive_seed(seed, step)):
            mixed, targets = mixup(flat, labels)
        return mixed.reshape(images.shape), targets

    return mix


def _crop(config: AugmentConfig, data: LabeledDataset, is_clip: bool) -> list[Any]:
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import v2

    (h, w), scale = data.shape[-2:], config.scale
    ratio: Any = config.ratio or (3 / 4, 4 / 3)
    if scale and is_clip:
        return [v2.RandomResizedCrop((h, w), (scale[0], scale[1]), ratio)]
    if scale:
        args: Any = {"scale": scale, "ratio": ratio}
        return [RandomResizedCropAndInterpolation((h, w), **args, interpolation=data.interpolation)]
    if data.in_memory:  # at its size already; evaluation takes the whole of it
        return []
    if is_clip:
        return [v2.Resize(round(h / data.crop_pct)), v2.CenterCrop((h, w))]
    steps = Preprocessing.of(data).eval_transform(data.shape, normalize=False).transforms
    *resize_and_crop, _to_tensor = steps
    return resize_and_crop


def _image_policy(aa: str, data: LabeledDataset) -> Any:
    """Builds one of timm's policies; timm itself passes over parts that it does not know."""
    from timm.data import auto_augment

    require(
        not aa.startswith("rand") or _RAND_AUGMENT.fullmatch(aa) is not None,
        f"aa is {aa!r}, expected parts such as m9, n2, mstd0.5 and inc1, as in {_EXAMPLE}",
    )
    params: dict[str, Any] = {
        "translate_const": int(min(data.shape[-2:]) * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in data.mean),
        "interpolation": auto_augment.Image.Resampling.BICUBIC,
    }
    try:
        if aa.startswith("rand"):
            return auto_augment.rand_augment_transform(aa, params)
        if aa.startswith("augmix"):
            return auto_augment.augment_and_mix_transform(aa, params | {"translate_pct": 0.3})
        return auto_augment.auto_augment_transform(aa, params)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"aa is {aa!r}, unknown to timm ({error}); try {_EXAMPLE}") from error


def _clip_policy(aa: str) -> Any:
    from torchvision.transforms import v2

    match = _CLIP_POLICY.fullmatch(aa)
    if match is None:
        raise ValueError(
            f"aa is {aa!r}, expected RandAugment for clips, such as 'rand-m9-n2', with m up to "
            f"{_STRONGEST}"
        )
    return v2.RandAugment(int(match["n"] or 2), int(match["m"] or 9), _STRONGEST + 1)


def _erase(probability: float, is_clip: bool) -> Any:
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import v2

    if is_clip:
        return v2.RandomErasing(probability)
    return RandomErasing(probability, mode="pixel", device="cpu")


def _time_second(frames: Tensor) -> Tensor:
    """Rearranges a clip, `t c h w -> c t h w`."""
    return frames.transpose(0, 1).contiguous()
