"""Sets of torchvision and of Hugging Face datasets, made small on this disk."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from streams import gray, png, seen

from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.factory import load_data
from tokenlearner.data.hub_datasets import TORCH_SETS
from tokenlearner.data.image_folder import ImageFileDataset
from tokenlearner.data.iterable import StreamDataset

NUMBER, WORD = datasets.Value("int64"), datasets.Value("string")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test asks the Hub; datasets draws no progress bars.

    HF_HUB_OFFLINE would come too late where another test has loaded huggingface_hub.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def load(name: str, split: str = "train", **wanted: object) -> ImageFileDataset:
    return load_data(name, split, **{"img_size": 8, **wanted})


def stream(name: str, split: str = "train", **wanted: object) -> StreamDataset:
    return load_data(name, split, **{"img_size": 8, **wanted})


def values(data: ImageFileDataset) -> list[int]:
    return [data.load(i).getpixel((0, 0))[0] for i in range(len(data))]  # type: ignore[index]


# torchvision


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST of 4 and 2 images, in torchvision's folder; image i is of the gray i."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, labels in (("train", [3, 0, 9, 3]), ("t10k", [7, 0])):
        images = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((28, 28), "u1")
        for kind, array in (("images-idx3", images), ("labels-idx1", np.array(labels, "u1"))):
            head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            (raw / f"{stem}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return tmp_path


def test_a_torchvision_set_has_its_images_labels_and_classes(fashion: Path) -> None:
    data = load("torch/fashion_mnist", root=fashion, in_chans=1)
    ((images, labels),) = data.batches(9)
    assert images.shape == (4, 1, 8, 8)
    assert labels.tolist() == data.labels.tolist() == [3, 0, 9, 3]
    assert [data.load(i).getpixel((0, 0)) for i in range(4)] == [0, 1, 2, 3]
    assert list(data.classes) == torchvision.datasets.FashionMNIST.classes
    assert (data.name, data.split, len(data)) == ("torch/fashion_mnist", "train", 4)
    assert load("torch/fashion_mnist", "test", root=fashion).labels.tolist() == [7, 0]


def made_up(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """timm gives a set of images i with the labels 2 - i."""

    class MadeUp(SimpleNamespace):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return gray(index), 2 - index

    monkeypatch.setattr(timm.data, "create_dataset", lambda *args, **kw: MadeUp(**attributes))


@pytest.mark.parametrize(
    ("attributes", "labels", "classes"),
    [
        ({"targets": [1, 0, 1]}, [1, 0, 1], "01"),
        ({"targets": torch.tensor([[1, 9], [0, 8], [1, 7]])}, [1, 0, 1], "01"),
        ({"index": [(1, "a.jpg"), (0, "b.jpg"), (2, "c.jpg")]}, [1, 0, 2], "012"),
        ({}, [2, 1, 0], "012"),
        ({"targets": [1, 0, 1], "classes": ["x", "y", "z"]}, [1, 0, 1], "xyz"),
        ({"targets": [1, 0, 1], "classes": [("a", "A a"), ("b",)]}, [1, 0, 1], ["a, A a", "b"]),
    ],
    ids=["targets", "qmnist", "inaturalist", "read once", "classes", "several names"],
)
def test_labels_and_classes_are_found_where_torchvision_keeps_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attributes: dict[str, object],
    labels: list[int],
    classes: Sequence[str],
) -> None:
    made_up(monkeypatch, **attributes)
    data = load("torch/mnist", root=tmp_path)
    assert (data.labels.tolist(), data.classes) == (labels, tuple(classes))
    four = load("torch/mnist", root=tmp_path, num_classes=4).classes
    assert four == (*classes, *map(str, range(len(classes), 4)))


@pytest.mark.parametrize(
    ("split", "part", "download"), [("train", "train", True), ("test", "validation", False)]
)
def test_timm_gets_the_download_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, part: str, download: bool
) -> None:
    def create(*args: object, **options: object) -> object:
        raise RuntimeError(str((*args, options)))

    monkeypatch.setattr(timm.data, "create_dataset", create)
    asked = str(("torch/mnist", str(tmp_path), part, {"download": download}))
    with pytest.raises(ValueError, match=re.escape(asked)):
        load("torch/mnist", split, root=tmp_path, download=download)


def test_a_broken_torchvision_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, targets=[0, 1, 0])
    data = load("torch/mnist", root=tmp_path)
    monkeypatch.setattr(type(data.source.read.args[0]), "__getitem__", lambda self, i: 1 / 0)  # type: ignore[attr-defined]
    with pytest.raises(UnreadableFile, match=r"image 1 of torch/mnist train cannot be read .*Zero"):
        data.load(1)


@pytest.mark.parametrize(
    ("name", "has_root", "message"),
    [
        ("torch/cifar10", True, r"cannot read cifar10 in \S+ \(.*\); pass download=True"),
        ("torch/cifar10", False, "needs torchvision's folder of data; pass root"),
        ("torch/nothing", True, "torchvision set 'nothing', expected .*cifar10, cifar"),
        ("torch/image_folder", True, "torchvision set 'image_folder', expected .*cifar10"),
        ("torch/", False, "'torch/' names no data set; write one behind"),
        ("hfds/", False, "'hfds/' names no data set; write one behind"),
        ("hfids", False, "'hfids' names no data set; write one behind"),
    ],
)
def test_names_and_places_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, has_root: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, root=tmp_path if has_root else None)


@pytest.mark.parametrize("name", TORCH_SETS)
def test_timm_knows_every_name_that_is_listed(tmp_path: Path, name: str) -> None:
    """It then misses the files, which is what torchvision says."""
    with pytest.raises(ValueError, match="cannot read") as caught:
        load(f"torch/{name}", root=tmp_path)
    assert "Unknown" not in str(caught.value)


# Hugging Face datasets


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of cats and dogs, as datasets reads them: 6 to train, 4 to validate, 2 to test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "birds"
    for split, n in (("train", 6), ("validation", 4), ("test", 2)):
        for number in range(n):
            place = root / split / ("cat", "dog")[2 * number // n]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(png(10 * number))
    return root


def write_parquet(root: Path, kind: object = None, files: int = 4) -> Path:
    """Files of 5 rows each: image i is gray of the value i, and its label is i, of that kind."""
    root.mkdir()
    names = [str(i) for i in range(5 * files)]
    features = datasets.Features(img=datasets.Image(), kind=datasets.ClassLabel(names=names))
    if kind:
        features = datasets.Features(image=datasets.Image(), label=kind)
    image, label = features
    for file in range(files):
        numbers = range(5 * file, 5 * file + 5)
        rows = {image: [{"bytes": png(i), "path": None} for i in numbers]}
        rows[label] = [*(map(str, numbers) if kind is WORD else numbers)]
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / f"train-{file:05}-of-{files:05}.parquet"))
    return root


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_parquet(tmp_path / "numbers")


def test_a_local_folder_is_read_by_datasets(folder: Path, tmp_path: Path) -> None:
    """Its split val is validation before test; root is where datasets keeps what it makes."""
    data = load(f"hfds/{folder}", root=tmp_path / "kept")
    assert sorted(values(data)) == [0, 10, 20, 30, 40, 50]
    assert data.labels.tolist() == [value // 30 for value in values(data)]
    assert (data.classes, data.name) == (("cat", "dog"), f"hfds/{folder}")
    assert list((tmp_path / "kept").rglob("*.arrow"))
    assert [len(load(f"hfds/{folder}", split)) for split in ("val", "test")] == [4, 2]


def test_columns_are_found_by_their_kind_and_classes_by_that_of_the_labels(
    tmp_path: Path, parquet: Path
) -> None:
    data = load(f"hfds/{parquet}")
    assert values(data) == data.labels.tolist() == list(range(20))
    assert data.classes == tuple(map(str, range(20)))
    words = load(f"hfds/{write_parquet(tmp_path / 'words', WORD, files=3)}")
    assert words.classes == tuple(sorted(map(str, range(15))))
    assert [words.classes[label] for label in words.labels] == list(map(str, values(words)))
    numbered = load(f"hfds/{write_parquet(tmp_path / 'numbered', NUMBER, files=1)}")
    assert numbered.classes == tuple("01234")


def test_a_broken_image_of_datasets_is_named(folder: Path) -> None:
    (folder / "train" / "dog" / "4.png").write_bytes(b"no image")
    data = load(f"hfds/{folder}")
    with pytest.raises(UnreadableFile, match=r"image \d of hfds/\S+ train cannot be read"):
        values(data)
    assert sum(len(labels) for _, labels in data.batches(4)) == 5


def test_a_set_without_the_split_names_those_it_has(parquet: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'test', expected test or valid.*its train"):
        load(f"hfds/{parquet}", "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"label": [-1], "image": [gray(1)]}, "a label is -1, expected 0 or more"),
        ({"text": ["a"], "label": [0]}, "has the columns text, label, expected one of images"),
    ],
)
def test_labels_below_0_and_sets_without_images_are_refused(
    tmp_path: Path, parquet: Path, rows: dict[str, list[object]], message: str
) -> None:
    (root := tmp_path / "other").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(root / "train.parquet"))
    with pytest.raises(ValueError, match=message):
        load(f"hfds/{root}")


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_a_set_that_cannot_be_had_gives_the_librarys_reason(parquet: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"cannot load {kind}/no/such .*Offline.*; pass the name"):
        load(f"{kind}/no/such")


def test_without_datasets_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets; run pip install '\.\[data\]"):
        load("hfds/any")


# Streams of Hugging Face datasets


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_stream_has_every_image_once_in_an_order_of_its_own(
    parquet: Path, workers: int
) -> None:
    data = stream(f"hfids/{parquet}", num_samples=20)
    order = seen(data, workers=workers)
    assert sorted(order) == list(range(20))
    assert order == seen(data, workers=workers)
    others = [seen(data, epoch=1, workers=workers), seen(data, seed=1, workers=workers)]
    assert len({*map(tuple, (order, *others, range(20)))}) == 4
    assert data.classes == tuple(map(str, range(20)))
    judged = [labels.tolist() for _, labels in data.batches(15)]  # in order
    assert judged == [[*range(15)], [*range(15, 20)]]


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_a_stream_without_overlap(
    parquet: Path, workers: int, num_processes: int
) -> None:
    """3 processes share 4 files image by image."""
    data = stream(f"hfids/{parquet}", num_samples=20)
    parts = [
        seen(data, size=6, workers=workers, process=i, num_processes=num_processes)
        for i in range(num_processes)
    ]
    together = [label for part in parts for label in part]
    assert len(together) == len(set(together)) == 6 * num_processes * (20 // (6 * num_processes))


def test_a_broken_image_of_a_stream_is_reported(folder: Path) -> None:
    (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    (batch,) = stream(f"hfids/{folder}").eval_batches(9)
    assert len(batch.labels) == 5
    assert re.match(r"image \d of hfids/\S+ train cannot be read", batch.unreadable[0])


def test_the_length_the_classes_and_numbers_as_labels_of_a_stream_are_asked_for(
    tmp_path: Path, parquet: Path
) -> None:
    with pytest.raises(ValueError, match="num_samples"):
        len(stream(f"hfids/{parquet}"))
    root = write_parquet(tmp_path / "numbered", NUMBER, files=1)
    with pytest.raises(ValueError, match="num_classes"):
        stream(f"hfids/{root}")
    assert stream(f"hfids/{root}", num_classes=5).classes == tuple("01234")
    root = write_parquet(tmp_path / "words", WORD, files=1)
    with pytest.raises(ValueError, match="has label '0', expected a number"):
        stream(f"hfids/{root}", num_classes=5)
