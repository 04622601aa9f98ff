"""Labeled images in memory, as files are: read one by one, and fitted to what is wanted."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from tokenlearner.data.factory import ImageDataset


def make_images(c: int = 1, *more: int) -> ImageDataset:
    """Five images of noise `c 6 8`, or with a number of frames clips."""
    images = torch.randint(0, 256, (5, c, *more, 6, 8)).byte()
    mean, std = (0.1, 0.2, 0.3)[:c], (0.5, 0.6, 0.7)[:c]
    return ImageDataset("noise", "train", images, torch.arange(5), tuple("abcde"), mean, std)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("frames", [(), (4,)])
def test_images_and_clips_that_are_taken_or_read_one_by_one_are_those_of_batches(
    c: int, frames: tuple[int, ...]
) -> None:
    data = make_images(c, *frames)
    (images, labels) = next(data.batches(5))
    one_by_one = torch.stack([data.eval_transform(data.load(i)) for i in range(5)])
    torch.testing.assert_close(one_by_one, images, rtol=0, atol=0)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    taken, numbers = data.get_batch(torch.tensor([4, 0, 4]))
    assert numbers.tolist() == [4, 0, 4]
    torch.testing.assert_close(taken, images[numbers], rtol=0, atol=0)


def test_an_image_is_read_as_an_image_and_a_clip_as_frames() -> None:
    data, clips = make_images(3), make_images(3, 4)
    image, frames = data.load(2), clips.load(2)
    assert image.mode == "RGB"  # type: ignore[union-attr]
    assert image.getpixel((7, 5)) == tuple(data.images[2, :, 5, 7].tolist())  # type: ignore[union-attr]
    assert isinstance(frames, torch.Tensor)
    assert torch.equal(frames, clips.images[2].transpose(0, 1))


def test_images_are_resized_whole() -> None:
    data = make_images(3)
    fitted = data.resized(4)
    expected = F.interpolate(data.images.float(), (4, 4), mode="bilinear", antialias=True)
    assert fitted.shape == (3, 4, 4)
    assert (fitted.images.float() - expected).abs().max() <= 0.5


def test_gray_images_are_given_in_three_equal_channels() -> None:
    data = make_images()
    fitted = data.resized(in_chans=3)
    assert torch.equal(fitted.images, data.images.expand(-1, 3, -1, -1))
    assert (fitted.mean, fitted.std) == ((0.1,) * 3, (0.5,) * 3)


def test_color_is_not_made_gray() -> None:
    with pytest.raises(ValueError, match="in_chans is 1, but noise has 3"):
        make_images(3).resized(in_chans=1)


def test_a_pickled_set_comes_back_whole() -> None:
    data = make_images(3)
    back = pickle.loads(pickle.dumps(data.with_preprocessing(mean=(0.5, 0.5, 0.5))))
    assert torch.equal(back.images, data.images)
    assert torch.equal(back.labels, data.labels)
    assert (back.name, back.split, back.classes) == (data.name, data.split, data.classes)
    assert (back.mean, back.std, back.in_memory) == ((0.5, 0.5, 0.5), data.std, True)
