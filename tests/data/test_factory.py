"""Data sets: what the bundled one holds, what batches give, what damaged or missing files say."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import make_fashion_mnist_small
import tokenlearner.data.fashion_mnist
from tokenlearner.data.factory import ImageDataset, list_data, load_data
from tokenlearner.data.fashion_mnist import IDX_FILES, SMALL

ASSETS = Path(tokenlearner.__file__).parent / "assets" / "fashion_mnist_small"
SIZES = {"train": 8000, "test": 2000}
VALUES = {  # of the idx files of version 0.3, behind their headers
    "train_images": "dc61419f9ef34e934a615912bc878eccd1ce708d987e36d0949480085ee58411",
    "train_labels": "261f07f85a43e09458fef17af487c03eff62515ef325a86dcf3be091ce8af8f4",
    "test_images": "a9a3fef60943d6c23d218c668ff2a8e2537003dbf7a653b962a95bcf38a209bb",
    "test_labels": "19efeabbd5fed476d80e2ce2609cdc76c23b9694a1631c6371599ab362810a91",
}
CHECKSUM = re.compile(r"^ {4}([0-9a-f]{64})  (\S+)$", re.MULTILINE)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what this machine has in the places that are looked at."""
    monkeypatch.delenv("TOKENLEARNER_DATA", raising=False)
    monkeypatch.setattr(tokenlearner.data.fashion_mnist, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(tokenlearner.data.fashion_mnist, "_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bundled() -> dict[str, ImageDataset]:
    """Both splits of the set that comes with the package."""
    return {split: load_data("fashion-mnist-small", split) for split in SIZES}


def make_images(n: int = 10, c: int = 1) -> ImageDataset:
    """Numbered images: every byte of image i is i, and so is its label."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, c, 2, 3).clone()
    classes = tuple(map(str, range(n)))
    return ImageDataset(
        "made-up", "train", images, torch.arange(n), classes, (0.0,) * c, (1.0,) * c
    )


def idx(values: np.ndarray) -> bytes:
    """An idx file, written here a second time, apart from the code that is tested."""
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write_idx(
    folder: Path, suffix: str = "", seeds: tuple[int, int] = (1, 2), per_class: int = 3
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Four idx files of noise, 4 high and 5 wide; returns what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for (split, names), seed in zip(IDX_FILES.items(), seeds, strict=True):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        images = rng.integers(0, 256, (len(labels), 4, 5), dtype=np.uint8)
        for name, values in zip(names, (images, labels), strict=True):
            (folder / (name + suffix)).write_bytes(PACK[suffix](idx(values)))
        written[split] = (images, labels)
    return written


def labels_of(batches: object) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]  # type: ignore[attr-defined]


# The bundled set


def test_the_known_names_are_listed() -> None:
    assert set(list_data()) == {
        *("fashion-mnist-small", "fashion-mnist", "moving-photographs", "folder", "video-folder"),
        "tokens",
        *("torch/", "hfds/", "hfids/", "wds/"),
    }


@pytest.mark.parametrize("split", SIZES)
def test_the_bundled_set_has_the_images_it_promises_and_is_balanced_from_its_start(
    bundled: dict[str, ImageDataset], split: str
) -> None:
    data = bundled[split]
    assert data.images.shape == (SIZES[split], 1, 28, 28)
    assert all(len(ten.unique()) == 10 for ten in data.labels.split(10))
    for name, values in (("images", data.images), ("labels", data.labels.byte())):
        assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == VALUES[f"{split}_{name}"]
    assert list(data.classes) == torchvision.datasets.FashionMNIST.classes


def test_the_readme_names_mean_std_and_sha256_of_the_bundled_file_and_its_arrays(
    bundled: dict[str, ImageDataset],
) -> None:
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    computed = re.search(r"mean (\d\.\d+) and standard deviation\s+(\d\.\d+)", readme)
    assert computed is not None
    data = bundled["train"]
    assert (data.mean, data.std) == ((float(computed[1]),), (float(computed[2]),))
    digest = hashlib.sha256((ASSETS / SMALL).read_bytes()).hexdigest()
    named = {name: digest for digest, name in CHECKSUM.findall(readme)}
    assert named == VALUES | {SMALL: digest}


# One image, and batches


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
def test_batches_hold_every_image_once_and_in_order(batch_size: int) -> None:
    data = make_images()
    found = list(data.batches(batch_size))
    assert labels_of(found) == list(range(10))
    assert {len(images) for images, _ in found[:-1]} <= {batch_size}
    if batch_size <= 10:
        full = [images for images, _ in data.batches(batch_size, drop_last=True)]
        assert [len(images) for images in full] == [batch_size] * (10 // batch_size)


def test_shuffled_batches_hold_every_image_once_in_an_order_that_a_generator_says() -> None:
    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        found = list(make_images(100).batches(7, shuffle=True, generator=generator))
        for images, labels in found:
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        return labels_of(found)

    before = torch.get_rng_state()
    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(100)) != order(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(labels_of(make_images(100).batches(7, shuffle=True))) == list(range(100))


def test_single_images_are_plain_and_batches_normalized_apart_from_the_data_set() -> None:
    data = replace(make_images(c=3), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images, labels = next(data.batches(10))
    mean, std = np.array(data.mean), np.array(data.std)
    expected = (data.images.numpy() / 255.0 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    found = list(data)
    assert [label for _, label in found] == list(range(len(data))) == list(range(10))
    single = torch.stack([image for image, _ in found])
    torch.testing.assert_close(single, data.images / 255)
    with pytest.raises(IndexError):
        data[10]
    images.zero_()
    labels.zero_()
    assert data.images[9, 0, 0, 0] == data.labels[9] == 9


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: make_images().batches(0), "batch_size is 0"),
        (lambda: make_images().batches(11, drop_last=True), "batch of 11; pass batch_size=10"),
        (lambda: make_images().sample(0), r"n is 0.* 10 images"),
        (lambda: make_images().sample(11), r"n is 11.* 10 images"),
        (lambda: load_data("fashion-mnist", "dev"), "mnist .*'dev'.*: train, val, test"),
        (lambda: load_data("fashion-mnist-small", "dev"), "small .*'dev'.*: train, val"),
        (lambda: load_data("fashion-mnist-small", root="no"), "small is missing.* pass no root"),
        (lambda: load_data("mnist"), r"'mnist', expected .*: fashion-mnist-small, fashion-mn"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(refuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse()


# A part of it


def test_a_sample_is_drawn_by_its_seed_each_image_once_with_its_label() -> None:
    data, state = make_images(100), torch.get_rng_state()
    part, again, other = data.sample(30), data.sample(30), data.sample(30, 1)
    assert len(part.labels.unique()) == 30
    assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
    assert torch.equal(part.labels, again.labels)
    assert not torch.equal(part.labels, other.labels)
    assert torch.equal(data.sample(10).labels, part.labels[:10])
    part.images.zero_()
    assert data.images[99, 0, 0, 0] == 99
    assert torch.equal(torch.get_rng_state(), state)


# What a data set refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(10, 2, 3, dtype=torch.uint8)}, r"uint8 \[10, 2, 3\], expected"),
        ({"images": torch.zeros(10, 1, 2, 3)}, r"float32 .* expected torch.uint8 \[n, c, h, w\]"),
        ({"images": torch.zeros(0, 1, 2, 3, dtype=torch.uint8)}, r"\[0, 1, 2, 3\], expected"),
        ({"labels": torch.arange(9)}, r"int64 \[9\], expected torch.int64 \[10\]"),
        ({"labels": torch.arange(10).int()}, r"int32 \[10\], expected torch.int64 \[10\]"),
        ({"labels": torch.arange(10) + 1}, "labels run from 1 to 10, expected 0 to 9"),
        ({"labels": torch.arange(10) - 1}, "labels run from -1 to 8, expected 0 to 9"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), std \(1.0,\), expected 1 each"),
        ({"std": ()}, r"std \(\), expected 1 each"),
        ({"std": (0.0,)}, r"std \(0.0,\), expected 1 each, every std above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_data_set_that_does_not_fit_together_is_refused(
    change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=f"made-up train: .*{message}"):
        replace(make_images(), **change)


# The full set, from files


@pytest.mark.parametrize(
    ("suffix", "place"),
    [
        ("", "environment"),
        ("", "debian/fashion-mnist"),
        (".gz", "cache/FashionMNIST/raw"),
        (".xz", "environment/fashion-mnist"),
    ],
)
def test_the_full_set_is_read_where_it_is_plain_or_packed_but_an_explicit_root_goes_first(
    suffix: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_idx(tmp_path / place, suffix)
    monkeypatch.setenv("TOKENLEARNER_DATA", str(tmp_path / "environment"))
    for split, (images, labels) in written.items():
        data = load_data("fashion-mnist", split)
        np.testing.assert_array_equal(data.images.numpy()[:, 0], images)
        np.testing.assert_array_equal(data.labels.numpy(), labels)
    other = write_idx(tmp_path / "root", seeds=(3, 4))
    data = load_data("fashion-mnist", root=tmp_path / "root")
    np.testing.assert_array_equal(data.labels.numpy(), other["train"][1])
    with pytest.raises(ValueError, match="fashion-mnist is missing"):
        load_data("fashion-mnist", root=tmp_path / "empty")


def test_a_missing_set_names_every_place_and_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / name for name in ("environment", "debian", "cache")]
    monkeypatch.setenv("TOKENLEARNER_DATA", str(places[0]))
    with pytest.raises(ValueError, match="fashion-mnist is missing") as caught:
        load_data("fashion-mnist", "test")
    ways = ["apt-get install dataset-fashion-mnist", "download=True", "root"]
    for expected in [*map(str, places), *IDX_FILES["test"], *ways]:
        assert expected in str(caught.value)


# Downloading, with a stand-in for the network


@pytest.mark.parametrize("given", [True, False])
def test_download_fetches_a_missing_set_into_root_or_the_cache(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        write_idx(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    root = tmp_path / "given" if given else None
    assert len(load_data("fashion-mnist", "test", root=root, download=True)) == 30
    assert ((root or tmp_path / "cache") / "FashionMNIST" / "raw").is_dir()


def test_a_failed_download_says_why_and_none_is_tried_when_the_set_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, download: bool) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    with pytest.raises(ValueError, match=r"could not be fetched .*no route to host.*apt-get"):
        load_data("fashion-mnist", root=tmp_path, download=True)
    write_idx(tmp_path)
    assert len(load_data("fashion-mnist", root=tmp_path, download=True)) == 30


# Damaged files


PLAIN_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[:-1],
    "too long": lambda raw: raw + b"x",
    "no header": lambda raw: raw[:7],
    "empty": lambda raw: b"",
    "labels for images": lambda raw: b"\0\0\x08\x01" + raw[4:],
    "a web page": lambda raw: b"<htm" + raw[4:],
}
PACKED_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda packed: packed[: len(packed) // 2],
    "no archive": lambda packed: b"no archive",
    "changed early": lambda packed: packed[:10] + b"\xff" * 4 + packed[14:],
    "changed inside": lambda packed: (
        packed[:60] + bytes(b ^ 255 for b in packed[60:80]) + packed[80:]
    ),
}


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        pytest.param(suffix, damage, id=f"{name} {suffix}")
        for suffix in PACK
        for name, damage in (PACKED_DAMAGES if suffix else PLAIN_DAMAGES).items()
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    write_idx(tmp_path, suffix)
    path = tmp_path / (IDX_FILES["train"][0] + suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_data("fashion-mnist", root=tmp_path)


# The script that made the bundled set


def test_the_script_takes_the_first_images_of_each_class_and_the_mean_of_all(
    tmp_path: Path,
) -> None:
    images, labels = write_idx(tmp_path / "full")["train"]
    options = ["--train", "2", "--test", "1"]
    make_fashion_mnist_small.main([str(tmp_path / "full"), str(tmp_path / "small"), *options])
    data = load_data("fashion-mnist-small", root=tmp_path / "small")
    kept = [np.flatnonzero(labels == label)[turn] for turn in range(2) for label in range(10)]
    np.testing.assert_array_equal(data.images.numpy()[:, 0], images[kept])
    np.testing.assert_array_equal(data.labels.numpy(), labels[kept])
    readme = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    mean, std = (images / 255).mean(), (images / 255).std()
    assert f"mean {mean:.6f} and standard deviation\n  {std:.6f}." in readme
