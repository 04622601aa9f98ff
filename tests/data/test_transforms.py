"""Random changes: each option has its effect, clips change as a whole, and nonsense is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenlearner import TrainConfig
from tokenlearner.data.config import DataConfig
from tokenlearner.data.factory import ImageDataset
from tokenlearner.data.image_folder import ImageFileDataset
from tokenlearner.data.loader import Transform
from tokenlearner.data.transforms import mixup_transform, train_transform
from tokenlearner.utils.random import fixed_seed


def make_images(c: int = 3, h: int = 16, w: int = 16, frames: int = 0) -> ImageDataset:
    images = torch.randint(0, 256, (4, c, *[frames] * bool(frames), h, w)).byte()
    mean, std = (0.4, 0.5, 0.6)[:c], (0.2, 0.3, 0.4)[:c]
    return ImageDataset("noise", "train", images, torch.arange(4), tuple("abcd"), mean, std)


def change_of(data: Any, **options: Any) -> Transform:
    change = train_transform(TrainConfig(**options), data)
    assert change is not None
    return change


def changed(data: Any, seed: int = 0, **options: Any) -> Tensor:
    """The first image as training sees it."""
    with fixed_seed(seed):
        return change_of(data, **options)(data.load(0))


def plain(data: Any) -> Tensor:
    return data.eval_transform(data.load(0))


EACH: list[dict[str, Any]] = [
    {"scale": [0.2, 0.5]},
    {"scale": [0.5, 0.9], "ratio": [0.5, 0.6]},
    {"hflip": 1.0},
    {"color_jitter": 0.8},
    {"aa": "rand-m9-n4"},
    {"reprob": 1.0},
]


def test_where_nothing_is_asked_for_nothing_changes_or_is_mixed() -> None:
    asked = TrainConfig(mixup=0.2, smoothing=0.1, crop_pct=0.5)
    assert train_transform(asked, make_images()) is None
    assert mixup_transform(TrainConfig(smoothing=0.1), 4, 0) is None


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("options", EACH, ids=str)
def test_every_option_changes_images_and_clips_alike_by_a_seed_and_keeps_their_shape(
    options: dict[str, Any], frames: int, c: int
) -> None:
    data = make_images(c, frames=frames)
    seen = [changed(data, seed, **options) for seed in range(4)]
    assert all(x.shape == data.shape and x.dtype == torch.float32 for x in seen)
    assert any(not torch.allclose(x, plain(data)) for x in seen)
    assert all(x.isfinite().all() for x in seen)
    assert torch.equal(changed(data, 3, **options), seen[3])


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("frames", [0, 3])
def test_mirroring_is_exact(size: tuple[int, int], frames: int) -> None:
    data = make_images(3, *size, frames=frames)
    torch.testing.assert_close(changed(data, hflip=1.0), plain(data).flip(-1), rtol=0, atol=1e-6)


def test_half_of_the_images_are_mirrored() -> None:
    data = make_images()
    change, mirrored = change_of(data, hflip=0.5), plain(data).flip(-1)
    hits = [torch.allclose(change(data.load(0)), mirrored) for _ in range(100)]
    assert 30 < sum(hits) < 70


class Files(ImageFileDataset):
    """One file, wider than high."""

    def __init__(self, size: int, crop_pct: float):
        object.__setattr__(self, "config", DataConfig(img_size=size, crop_pct=crop_pct))

    def load(self, index: int) -> Any:
        from PIL import Image

        y, x = np.mgrid[:50, :80]
        return Image.fromarray(np.stack([x * 3, y * 5, x + y], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("crop_pct", [0.875, 0.6, 1.0])
def test_without_scale_what_evaluation_cuts_out_is_taken(size: int, crop_pct: float) -> None:
    data = Files(size, crop_pct)
    mirrored = changed(data, hflip=1.0)
    torch.testing.assert_close(mirrored.flip(-1), plain(data), rtol=0, atol=1e-6)


def test_brightness_changes_beside_a_policy_too() -> None:
    data, policy = make_images(), "rand-m9-n1-p0"  # a policy that does nothing
    assert torch.allclose(changed(data, aa=policy), plain(data), atol=1e-6)
    assert not torch.allclose(changed(data, aa=policy, color_jitter=0.8), plain(data), atol=0.01)


# --- clips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EACH, ids=str)
def test_all_frames_of_a_clip_are_changed_alike(options: dict[str, Any]) -> None:
    still = make_images(frames=3)
    still.images[:] = still.images[:, :, :1]
    for seed in range(4):
        clip = changed(still, seed, **options)
        torch.testing.assert_close(clip, clip[:, :1].expand_as(clip), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_frames_keep_their_order(options: dict[str, Any]) -> None:
    rising = make_images(frames=4)
    rising.images[:] = torch.arange(40, 240, 50, dtype=torch.uint8)[:, None, None]
    if "aa" in options:
        options = {"aa": "rand-m0-n1"}  # strong ones may turn dark and bright round
    clip = changed(rising, **options)
    middle = clip.flatten(2).median(-1).values  # what is erased is less than half
    assert (middle.diff(dim=1) > 0).all()


def test_the_magnitude_for_clips_is_timms_up_to_10() -> None:
    data = make_images(frames=2)
    assert changed(data, aa="rand-m10-n2").shape == data.shape
    with pytest.raises(ValueError, match=r"aa is 'rand-m11', .*RandAugment for clips, .* 10"):
        train_transform(TrainConfig(aa="rand-m11"), data)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [0, 2])
@pytest.mark.parametrize(
    "aa",
    [
        *("banana", "rand-x9", "rand-banana", "rand-mfoo", "rand9", "rand-m9-", "rand-m9-mstdx"),
        *("rand-m9-tbanana", "original-x5", "augmix-x1"),
    ],
)
def test_a_policy_that_is_none_is_refused(aa: str, frames: int) -> None:
    with pytest.raises(ValueError, match=f"aa is '{aa}', .*'rand-m9"):
        train_transform(TrainConfig(aa=aa), make_images(frames=frames))


@pytest.mark.parametrize(
    "aa", ["rand-m9-mstd0.5-inc1", "rand", "rand-n3-tweights", "v0", "augmix-m5-w4-d2", "3a"]
)
@pytest.mark.parametrize("c", [1, 3])
def test_policies_of_timm_are_taken(aa: str, c: int) -> None:
    data = make_images(c)
    for seed in range(5):
        assert changed(data, seed, aa=aa).shape == data.shape


# --- mixing -------------------------------------------------------------------------------------

MIXES: list[dict[str, Any]] = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


def unmixed(frames: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, *[frames] * bool(frames), 16, 16, generator=generator)


def mixed(step: int = 1, seed: int = 0, frames: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    mix = mixup_transform(TrainConfig(**options), 4, seed)
    assert mix is not None
    return mix(unmixed(frames), torch.arange(4), step)


@pytest.mark.parametrize("options", MIXES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_are_shares_that_add_up_to_1(
    options: dict[str, Any], smoothing: float
) -> None:
    targets = mixed(smoothing=smoothing, **options)[1]
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() == pytest.approx(smoothing / 4)
    assert targets.max() < 1


@pytest.mark.parametrize("frames", [0, 5])
def test_labels_are_mixed_as_images_and_clips_are(frames: int) -> None:
    images, targets = mixed(mixup=0.8, frames=frames)
    share, before = targets[0, 0], unmixed(frames)
    torch.testing.assert_close(images, share * before + (1 - share) * before.flip(0))


def test_a_box_is_cut_out_of_all_frames_alike() -> None:
    images, targets = mixed(cutmix=1.0, frames=5)
    cut = images != unmixed(5)
    assert torch.equal(cut, cut[:1, :1, :1].expand_as(cut))
    assert targets[0, 3].item() == pytest.approx(cut[0, 0, 0].float().mean().item())


@pytest.mark.parametrize("options", MIXES, ids=str)
def test_the_same_step_of_the_same_seed_mixes_alike_and_leaves_the_random_states_alone(
    options: dict[str, Any],
) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, targets = mixed(**options)
    again, same = mixed(**options)
    assert torch.equal(first, again)
    assert torch.equal(targets, same)
    assert not torch.equal(mixed(step=2, **options)[1], targets)
    assert not torch.equal(mixed(seed=1, **options)[1], targets)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
