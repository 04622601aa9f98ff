"""Training pictures and clips, changed at random: timm's transforms, torchvision's for clips."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import require
from .labelled import LabelledData
from .loader import Change, draw, seeded
from .options import AugmentOptions

_ASKED_FOR = ("scale", "ratio", "hflip", "color_jitter", "aa", "reprob")
_RAND_AUGMENT = re.compile(r"rand(?:-(?:m(?P<m>\d+)|n(?P<n>\d+)|mstd[\d.]+|inc\d))*")


def training_change(options: AugmentOptions, data: LabelledData, crop_pct: float) -> Change | None:
    """What makes of a picture as it is read one that is changed at random, ready for a model.

    Args:
        options: What is asked for.
        data: The pictures, `c h w`, or clips, `c t h w`, all frames of which are changed alike.
        crop_pct: As in evaluation, for pictures of which no random part is cut out.

    Returns:
        None where nothing is asked for: `data.plain` will do.

    Raises:
        ValueError: timm or torchvision does not know the policy.
    """
    if not any(getattr(options, name) for name in _ASKED_FOR):
        return None
    if len(data.shape) == 4:
        return _of_clips(options, data, crop_pct)
    return _of_pictures(options, data, crop_pct)


def mixing(options: AugmentOptions, num_classes: int, seed: int) -> Callable[..., Any] | None:
    """Mixup and CutMix of a batch, as `(images, labels, step) -> (images, targets b classes)`.

    The same step of the same seed mixes alike. Returns None where neither is asked for.
    """
    if not (options.mixup or options.cutmix):
        return None
    from timm.data.mixup import Mixup

    mixup = Mixup(
        options.mixup,
        options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        flat = images.flatten(1, -3) if images.ndim == 5 else images  # frames as channels
        with seeded(draw(seed, step)):
            mixed, targets = mixup(flat, labels)
        return mixed.reshape(images.shape), targets

    return mix


def _of_pictures(options: AugmentOptions, data: LabelledData, crop_pct: float) -> Change:
    from timm.data import create_transform
    from torchvision import transforms

    size = data.shape[-1]
    options_of_crop: dict[str, Any] = {"scale": options.scale, "ratio": options.ratio}
    try:
        crop, policy, final = create_transform(  # type: ignore[misc]
            size,
            is_training=True,
            **options_of_crop,
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            auto_augment=options.aa,
            re_prob=options.reprob,
            re_mode="pixel",
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"aa is {options.aa!r}, which timm does not take ({error}); try 'rand-m9-mstd0.5-inc1'"
        ) from error
    if options.scale is None:
        whole = transforms.InterpolationMode.BICUBIC
        crop.transforms[:1] = [
            transforms.Resize(round(size / crop_pct), whole),
            transforms.CenterCrop(size),
        ]
    return transforms.Compose([crop, policy, final])


def _of_clips(options: AugmentOptions, data: LabelledData, crop_pct: float) -> Change:
    from torchvision.transforms import v2

    size, steps = data.shape[-1], list[Any]()
    if options.scale:
        shape: Any = options.ratio or (3 / 4, 4 / 3)
        cut: Any = options.scale
        steps += [v2.RandomResizedCrop(size, cut, shape, antialias=True)]
    else:
        steps += [v2.Resize(round(size / crop_pct), antialias=True), v2.CenterCrop(size)]
    if options.hflip:
        steps.append(v2.RandomHorizontalFlip(options.hflip))
    if options.color_jitter:
        steps.append(v2.ColorJitter(*[options.color_jitter] * 3))
    if options.aa:
        found = _RAND_AUGMENT.fullmatch(options.aa)
        require(
            found is not None,
            f"aa is {options.aa!r}, expected RandAugment for clips, such as 'rand-m9-n2'",
        )
        magnitude, number = found["m"], found["n"]  # type: ignore[index]
        steps.append(v2.RandAugment(int(number or 2), int(magnitude or 9)))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    if options.reprob:
        steps.append(v2.RandomErasing(options.reprob))
    change = v2.Compose(steps)
    return lambda frames: change(frames).transpose(0, 1).contiguous()
