"""Images in files: how they are decoded, made plain, batched, and what is refused."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import png_bomb
from PIL import Image
from timm.data import create_transform

from tokenlearner.data import image_folder
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.factory import load_data
from tokenlearner.data.image_folder import ImageFileDataset, ImagePaths, decoded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def gray(value: int, h: int = 40, w: int = 48) -> Image.Image:
    return Image.new("RGB", (w, h), (value,) * 3)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Splits train and val of classes cat and dog, whose images are gray: 0, 10, 20 and so on."""
    for split in ("train", "val"):
        for number in range(6):
            name = ("cat", "dog")[number // 3]
            save(gray(10 * number), tmp_path / split / name / f"{number}.png")
    return tmp_path


def load(root: Path, split: str = "train", **wanted: object) -> ImageFileDataset:
    return load_data("folder", split, root=root, **{"img_size": 16, **wanted})


def values(data: ImageFileDataset) -> list[int]:
    """The gray values of the images, which tell which they are."""
    return [data.load(i).getpixel((0, 0))[0] for i in range(len(data))]  # type: ignore[index]


def as_file(image: Image.Image, kind: str, **options: object) -> Callable[[], Image.Image]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return lambda: Image.open(io.BytesIO(buffer.getvalue()))


def pixel(image: Image.Image, kind: str = "PNG", in_chans: int = 3, **options: object) -> object:
    return decoded(as_file(image, kind, **options), "it", in_chans).getpixel((0, 0))


# What a folder gives


def test_a_folder_has_images_labels_and_classes_in_color_at_224(root: Path) -> None:
    data = load_data("folder", root=root)
    assert values(data) == [0, 10, 20, 30, 40, 50]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.name, data.split, data.classes) == ("folder", "train", ("cat", "dog"))
    assert data.shape == data.eval_transform(data.load(0)).shape == (3, 224, 224)
    assert (data.mean, data.std) == (MEAN, STD)


def test_gray_takes_the_mean_of_imagenets_numbers(root: Path) -> None:
    data, mean, std = load(root, in_chans=1), np.mean(MEAN), np.mean(STD)
    assert (*data.mean, *data.std) == pytest.approx((mean, std))
    plain = data.eval_transform(data.load(2)).numpy()
    assert plain == pytest.approx(np.full((1, 16, 16), (20 / 255 - mean) / std))


def test_plain_is_timms_transform_for_evaluation(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    save(Image.fromarray(noise), tmp_path / "train" / "a" / "0.png")
    data = load(tmp_path, img_size=32, crop_pct=0.8)
    theirs = create_transform(
        32, interpolation="bicubic", crop_pct=0.8, mean=data.mean, std=data.std
    )
    torch.testing.assert_close(data.eval_transform(data.load(0)), theirs(Image.fromarray(noise)))  # type: ignore[operator]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_order_and_leave_out_what_cannot_be_read(root: Path, workers: int) -> None:
    (root / "train" / "cat" / "1.png").write_bytes(b"")
    batches = list(load(root, workers=workers).batches(4))
    assert [labels.tolist() for _, labels in batches] == [[0, 0, 1], [1, 1]]
    firsts = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    expected = (torch.tensor([0, 20, 30, 40, 50]) / 255 - MEAN[0]) / STD[0]
    torch.testing.assert_close(firsts, expected)


# Samples


def test_a_sample_is_drawn_by_its_seed_each_image_once(root: Path) -> None:
    one, two = (values(load(root).sample(6, seed)) for seed in (0, 1))
    assert sorted(one) == sorted(two) == values(load(root))
    assert one != two
    three = load(root).sample(3, seed=1)
    assert values(three) == two[:3]
    assert three.labels.tolist() == [value // 30 for value in two[:3]]


# Kinds of images


DEEP = Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))
PALETTE = Image.new("P", (2, 2), 1)
PALETTE.putpalette([200, 0, 0, 0, 90, 0])


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        # Gray of 16 bits keeps its upper 8.
        (DEEP, {}, (128,) * 3),
        (DEEP, {"in_chans": 1}, 128),
        (DEEP, {"kind": "TIFF"}, (128,) * 3),
        (Image.new("1", (2, 2), 1), {"in_chans": 1}, 255),
        # What is transparent is laid on white.
        (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), {}, (255,) * 3),
        (Image.new("LA", (2, 2), (0, 0)), {"in_chans": 1}, 255),
        (Image.new("RGBA", (2, 2), (9, 8, 7, 255)), {}, (9, 8, 7)),
        (PALETTE, {}, (0, 90, 0)),
        (PALETTE, {"transparency": 1}, (255,) * 3),
        (PALETTE, {"transparency": bytes([255, 0])}, (255,) * 3),
    ],
)
def test_images_of_any_mode_become_color_or_gray(
    image: Image.Image, options: dict[str, Any], expected: object
) -> None:
    assert pixel(image, **options) == expected


def test_images_are_turned_upright_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decoded(as_file(gray(0, h=4, w=8), "JPEG", exif=exif), "it", 3).size == (4, 8)


def test_dark_gray_of_16_bits_is_named_once_and_bits_of_a_tag_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "_dark", [])
    dark = Image.fromarray(np.full((4, 4), 4000, np.uint16))
    assert pixel(DEEP) == (128,) * 3
    assert "values end" not in caplog.text
    for _ in range(2):
        assert pixel(dark) == (15,) * 3
    assert caplog.text.count("values end at 4000") == 1
    buffer = io.BytesIO()
    packed = Image.frombytes("L", (6, 4), bytes.fromhex("fa0fa0" * 8))  # 4 values of 12 bits a row
    packed.save(buffer, "TIFF", tiffinfo={274: 6})  # to be turned by 90 degrees
    raw = buffer.getvalue()
    for tag, new in ((256, 4), (258, 12)):  # width and bits
        entry = raw.index(struct.pack("<HHI", tag, 4 if tag == 256 else 3, 1))
        raw = raw[: entry + 8] + struct.pack("<I", new) + raw[entry + 12 :]
    for orientation in (6, 1):
        turned = raw.replace(
            struct.pack("<HHII", 274, 3, 1, 6), struct.pack("<HHII", 274, 3, 1, orientation)
        )
        assert (
            decoded(lambda t=turned: Image.open(io.BytesIO(t)), "it", 3).getpixel((0, 0))
            == (250,) * 3
        )


# Broken files

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def damaged(kind: str, damage: Callable[[bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    NOISE.save(buffer, kind)
    return damage(buffer.getvalue())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        damaged("PNG", lambda raw: raw[: len(raw) // 2]),
        damaged("JPEG", lambda raw: raw[: len(raw) // 2]),
        damaged("PNG", lambda raw: raw[:60] + b"\0" * 40 + raw[100:]),
        png_bomb(65536, 65536),
        damaged("TIFF", lambda raw: raw[:4] + b"\xff" * 200 + raw[204:]),
        None,
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "changed png", "bomb", "tiff", "gone"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_a_broken_image_is_named_with_the_reason(root: Path, content: bytes | None) -> None:
    data, path = load(root), root / "train" / "dog" / "4.png"
    path.unlink() if content is None else path.write_bytes(content)
    reason = "FileNotFoundError" if content is None else r"\w+"
    message = re.escape(str(path)) + rf" cannot be read .*\({reason}: .+\)"
    with pytest.raises(UnreadableFile, match=message):
        data.load(4)


def test_a_set_of_which_none_of_the_first_ten_can_be_read_is_refused(root: Path) -> None:
    for number in range(10):
        for split in ("train", "val"):
            save(gray(0), root / split / "ant" / f"{number}.png")
        if number < 9:
            (root / "train" / "ant" / f"{number}.png").write_bytes(b"")
    assert len(load(root)) == 16
    (root / "train" / "ant" / "9.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"folder train: none of the first 10 .*ant/0\.png"):
        load(root)


def test_only_one_image_is_opened_when_a_set_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **options: (opened.append(path), real(path, **options))[1]
    )
    load(root)
    assert len(opened) == 1


def test_a_missing_root_and_a_batch_size_below_1_are_refused_at_once(root: Path) -> None:
    with pytest.raises(ValueError, match=r"folder needs the folder that holds .*; pass root"):
        load_data("folder")
    with pytest.raises(ValueError, match="batch_size is 0, expected an integer of 1"):
        load(root).batches(0)


# --- files as they are in the world --------------------------------------------------------------


def test_all_kinds_that_pil_reads_are_taken_and_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = ("png", "webp", "bmp", "tif", "tiff", "gif", "jpg", "JPEG", "ppm", "tga")
    for number, end in enumerate(ends):
        save(gray(9).convert("RGB"), tmp_path / "train" / "a" / f"{number}.{end}")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    assert len(load(tmp_path)) == len(ends)
    assert "1 file of other kinds left out (.txt)" in caplog.text


@pytest.mark.parametrize("image", [Image.new("L", (3000, 1)), Image.new("L", (1, 3000))])
def test_a_thin_strip_is_unreadable_before_it_is_resized_to_gigabytes(image: Image.Image) -> None:
    with pytest.raises(UnreadableFile, match="3000 x 1 pixels"):
        decoded(as_file(image, "PNG"), "it", 3)


@pytest.mark.parametrize(
    "image", [Image.new("F", (8, 8)), *(Image.new("I", (8, 8), v) for v in (-9, 70000))]
)
def test_values_of_an_unknown_range_are_unreadable(image: Image.Image) -> None:
    with pytest.raises(UnreadableFile, match="values"):
        decoded(as_file(image, "TIFF"), "it", 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_named_as_an_image_is_unreadable_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.jpg")
    source = ImagePaths([str(tmp_path / "0.jpg")])
    with pytest.raises(UnreadableFile, match="pipe"):
        decoded(lambda: source.open(0), source.where(0), 3)
