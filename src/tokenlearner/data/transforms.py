"""Training images and clips, changed at random: timm's transforms, torchvision's for clips."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.random import derive_seed, fixed_seed
from ..utils.validation import require
from .config import AugmentConfig
from .dataset import LabeledDataset
from .loader import Transform

_ASKED_FOR = ("scale", "hflip", "color_jitter", "aa", "reprob")
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
)
_OF_CLIPS = re.compile(r"rand(?:-(?:m(?P<m>10|\d)|n(?P<n>\d+)|mstd[\d.]+|inc[01]))*")
_STRONGEST = 10  # magnitude of RandAugment, in timm's words


def train_transform(
    options: AugmentConfig, data: LabeledDataset, crop_pct: float = 0.875
) -> Transform | None:
    """What makes of an image as it is read one that is changed at random, ready for a model.

    Args:
        options: What is asked for. Of RandAugment's options clips take two, m and n.
        data: The images, `c h w`, or clips, `c t h w`, all frames of which are changed alike.
        crop_pct: Share of the resized side that is kept where nothing is cut out at random.

    Returns:
        None where nothing is asked for: `data.eval_transform` will do.

    Raises:
        ValueError: timm or torchvision does not know the policy.
    """
    if not any(getattr(options, name) for name in _ASKED_FOR):
        return None
    # Images in memory have their size; evaluation takes the whole of them.
    kept = None if data.in_memory else crop_pct
    if len(data.shape) == 4:
        return _of_clips(options, data, kept)
    return _of_images(options, data, kept)


def mixup_transform(
    options: AugmentConfig, num_classes: int, seed: int
) -> Callable[..., Any] | None:
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
        with fixed_seed(derive_seed(seed, step)):
            mixed, targets = mixup(flat, labels)
        return mixed.reshape(images.shape), targets

    return mix


def _check_policy(aa: str | None) -> None:
    """Refuses a RandAugment of which timm would pass over a part."""
    require(
        not (aa or "").startswith("rand") or _RAND_AUGMENT.fullmatch(aa or "") is not None,
        f"aa is {aa!r}, expected parts such as m9, n2, mstd0.5 and inc1, as in "
        "'rand-m9-mstd0.5-inc1'",
    )


def _of_images(options: AugmentConfig, data: LabeledDataset, crop_pct: float | None) -> Transform:
    from timm.data import create_transform
    from torchvision import transforms

    size: Any = data.shape[-2:]
    options_of_crop: dict[str, Any] = {"scale": options.scale, "ratio": options.ratio}
    _check_policy(options.aa)
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
        whole: Any = create_transform(size, crop_pct=crop_pct, interpolation="bicubic")
        crop.transforms[:1] = whole.transforms[:2] if crop_pct else []
    if options.aa and options.color_jitter:  # timm leaves it out beside a policy
        policy.transforms.append(transforms.ColorJitter(*[options.color_jitter] * 3))
    return transforms.Compose([crop, policy, final])


def _of_clips(options: AugmentConfig, data: LabeledDataset, crop_pct: float | None) -> Transform:
    from torchvision.transforms import v2

    size, steps = data.shape[-2:], list[Any]()
    if options.scale:
        shape: Any = options.ratio or (3 / 4, 4 / 3)
        cut: Any = options.scale
        steps += [v2.RandomResizedCrop(size, cut, shape, antialias=True)]
    elif crop_pct:
        steps += [v2.Resize(round(size[0] / crop_pct), antialias=True), v2.CenterCrop(size)]
    if options.hflip:
        steps.append(v2.RandomHorizontalFlip(options.hflip))
    if options.color_jitter:
        steps.append(v2.ColorJitter(*[options.color_jitter] * 3))
    if options.aa:
        found = _OF_CLIPS.fullmatch(options.aa)
        require(
            found is not None,
            f"aa is {options.aa!r}, expected RandAugment for clips, such as 'rand-m9-n2', with m "
            f"up to {_STRONGEST}",
        )
        magnitude, number = found["m"], found["n"]  # type: ignore[index]
        steps.append(v2.RandAugment(int(number or 2), int(magnitude or 9), _STRONGEST + 1))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    if options.reprob:
        steps.append(v2.RandomErasing(options.reprob))
    change = v2.Compose(steps)
    return lambda frames: change(frames).transpose(0, 1).contiguous()
