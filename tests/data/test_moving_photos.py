"""Moving photographs: clips move as their class says, and a single frame tells nothing."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenlearner.data import moving_photos as moving
from tokenlearner.data.factory import load_data
from tokenlearner.data.moving_photos import MAX_SPEED, MOTIONS, MOVING_PHOTOGRAPHS, MOVING_SIZES
from tokenlearner.data.tensor_dataset import ImageDataset

NAMES = tuple(MOTIONS)
SHAPES = np.array([(40, 60), (50, 40)])


@pytest.fixture(scope="module")
def clips() -> dict[str, ImageDataset]:
    return {split: load_data("moving-photographs", split) for split in MOVING_SIZES}


@pytest.fixture(scope="module")
def paths() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each class the photographs and the places of very many clips of small photographs."""
    labels, rng = np.arange(9 * 20_000) % 9, np.random.default_rng(0)
    which, places = moving._draw_paths(labels, SHAPES, 8, rng)
    return {name: (which[labels == k], places[labels == k]) for k, name in enumerate(NAMES)}


def seen_motion(clip: Tensor) -> str | None:
    """The one class and speed that carry each frame over into the next, byte for byte."""
    h, w = clip.shape[1:]
    fitting = {
        name
        for name, (down, right) in MOTIONS.items()
        for speed in range(1, MAX_SPEED + 1)
        if torch.equal(
            inner(clip[1:], down * speed, right * speed, h, w),
            inner(clip[:-1], -down * speed, -right * speed, h, w),
        )
    }
    return fitting.pop() if len(fitting) == 1 else None


def inner(frames: Tensor, down: int, right: int, h: int, w: int) -> Tensor:
    """What is left of frames of which that many first rows and columns are new, or last ones."""
    return frames[:, max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)]


# What is in it


@pytest.mark.parametrize(("split", "size"), [("train", 9000), ("test", 1800)])
def test_each_split_has_its_size_and_as_many_clips_of_each_class(
    clips: dict[str, ImageDataset], split: str, size: int
) -> None:
    data = clips[split]
    assert (data.images.shape, data.images.dtype) == ((size, 1, 8, 32, 32), torch.uint8)
    assert data.labels.bincount().tolist() == [size // 9] * 9
    assert data.labels[:9].tolist() == list(range(9))


def test_the_classes_are_what_the_content_does(clips: dict[str, ImageDataset]) -> None:
    """A class is read off the pixels here; flat pieces of photographs fit several."""
    data = clips["test"]
    seen = [seen_motion(clip[0]) for clip in data.images[:900]]
    told = [data.classes[label] for label in data.labels[:900]]
    clear = [(name, label) for name, label in zip(seen, told, strict=True) if name]
    assert all(name == label for name, label in clear)
    assert len(clear) > 850


@pytest.mark.parametrize(("name", "axis"), [("right", -1), ("down", -2)])
def test_right_is_towards_the_last_column_and_down_towards_the_last_row(
    clips: dict[str, ImageDataset], name: str, axis: int
) -> None:
    data = clips["test"]
    for clip in data.images[data.labels == data.classes.index(name), 0][:50]:
        earlier, later = clip[:-1].transpose(axis, -1), clip[1:].transpose(axis, -1)
        assert any(torch.equal(later[..., s:], earlier[..., :-s]) for s in (1, 2, 3))


def test_every_speed_and_every_photograph_is_as_frequent(
    paths: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    which, places = paths["right"]
    period = 2 * SHAPES[which][:, 1]
    speeds = (places[:, 0, 1] - places[:, 1, 1]) % period
    assert sorted(set(speeds.tolist())) == [1, 2, 3]
    assert np.bincount(speeds)[1:] / len(speeds) == pytest.approx([1 / 3] * 3, abs=0.02)
    for which, _ in paths.values():
        assert np.bincount(which) / len(which) == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_splits_are_cut_out_of_their_own_photographs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import skimage.data

    train, test = (set(MOVING_PHOTOGRAPHS[split]) for split in ("train", "test"))
    assert (len(train), len(test), train & test) == (9, 3, set())
    shades = {"train": 50, "test": 200}
    for split, names in MOVING_PHOTOGRAPHS.items():
        for name in names:
            plain = np.full((256, 256), shades[split], np.uint8)
            if name == names[0]:
                plain[0, 0] += 1  # a std above 0
            monkeypatch.setattr(skimage.data, name, lambda plain=plain: plain)
    for split, shade in shades.items():
        assert load_data("moving-photographs", split).images.float().median() == shade


def test_the_same_clips_come_every_time_and_leave_the_random_states_alone(
    clips: dict[str, ImageDataset],
) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(load_data("moving-photographs", "test").images, clips["test"].images)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


# That nothing but the order of frames tells the class


@pytest.mark.parametrize("name", NAMES)
def test_every_place_is_as_likely_in_every_frame_of_every_class(
    paths: dict[str, tuple[np.ndarray, np.ndarray]], name: str
) -> None:
    """Along either axis, and at the borders too, where a path might have been kept off."""
    which, places = paths[name]
    for (number, shape), frame, axis in product(enumerate(SHAPES), (0, 4, 7), (0, 1)):
        here = places[which == number, frame]
        counts = np.bincount(here[:, axis], minlength=2 * shape[axis])
        assert len(counts) == 2 * shape[axis]
        expected = len(here) / len(counts)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_the_mean_frame_of_a_class_is_that_of_every_other(clips: dict[str, ImageDataset]) -> None:
    data = clips["train"]
    for frame in (0, 3, 7):
        frames = data.images[:, 0, frame].float()
        means = torch.stack([frames[data.labels == k].mean((1, 2)).mean() for k in range(9)])
        spread = frames.mean((1, 2)).std() / 1000**0.5  # of the mean of 1,000 clips
        assert float((means - means.mean()).abs().max()) < 4 * float(spread)


def test_a_photograph_goes_on_in_its_mirror_image() -> None:
    photograph = np.arange(12, dtype=np.uint8).reshape(3, 4)
    places = np.array([[[0, 0], [2, 3], [5, 7], [3, 4]]])
    windows = moving._cut(photograph, places, 2)[0]
    assert windows.tolist() == [
        [[0, 1], [4, 5]],
        [[11, 11], [11, 11]],
        [[0, 0], [0, 0]],
        [[11, 10], [7, 6]],
    ]


# How it is wanted


def test_frames_size_and_channels_of_the_same_gray_are_as_wanted() -> None:
    for wanted, shape in (
        ({"frames": 4}, (1, 4, 32, 32)),
        ({"in_chans": 3, "frames": 2, "img_size": 16}, (3, 2, 16, 16)),
        ({"img_size": 256, "frames": 1}, (1, 1, 256, 256)),
    ):
        data = load_data("moving-photographs", "test", **wanted)
        assert data.shape == shape
        assert torch.equal(data.images[:, 0], data.images[:, -1])
        assert len(data.mean) == len(data.std) == shape[0]


def test_a_window_larger_than_a_photograph_is_refused_and_the_way_to_scikit_image_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="img_size is 257, up to 256"):
        load_data("moving-photographs", img_size=257)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[demo\]'"):
        load_data("moving-photographs")


def test_both_splits_use_the_numbers_of_the_training_photographs(
    clips: dict[str, ImageDataset],
) -> None:
    train, test = clips["train"], clips["test"]
    assert (train.mean, train.std) == (test.mean, test.std)
    std, mean = torch.std_mean(train.images.float() / 255)
    assert train.mean[0] == pytest.approx(float(mean), abs=0.01)
    assert train.std[0] == pytest.approx(float(std), abs=0.01)
