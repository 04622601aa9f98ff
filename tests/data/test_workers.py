"""Workers read the same of every data set: forked ones, and spawned ones, which get it pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from files import make_video
from running import each_start_method
from streams import png, write_shards

from tokenlearner import TrainConfig
from tokenlearner.data.dataset import Batch, IterableDataset
from tokenlearner.data.factory import load_data
from tokenlearner.data.loader import epoch_keys, load_batches
from tokenlearner.data.transforms import train_transform

N = 4
AUGMENT: dict[str, Any] = {"scale": [0.5, 1.0], "hflip": 0.5, "reprob": 0.5}


def images(root: Path) -> dict[str, Any]:
    for i in range(N):
        path = root / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(40 * i))
    return {"name": "folder", "root": root}


def videos(root: Path) -> dict[str, Any]:
    for i in range(N):
        (root / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        make_video(root / "train" / "ab"[i % 2] / f"{i}.avi", frames=20, codec="ffv1")
    return {"name": "video-folder", "root": root, "frames": 2, "stride": 2}


def shards(root: Path) -> dict[str, Any]:
    write_shards(root, 1)
    return {"name": "wds/", "root": root, "num_samples": 5, "num_classes": 5}


def hub(root: Path, name: str = "hfds") -> dict[str, Any]:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    rows = {"image": [{"bytes": png(40 * i), "path": None} for i in range(N)], "label": [0, 1] * 2}
    root.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "train.parquet"))
    return {"name": f"{name}/{root}", "root": root.with_name("cache"), "num_samples": N}


def stream(root: Path) -> dict[str, Any]:
    return hub(root, "hfids") | {"root": None}


@pytest.fixture(params=[images, videos, shards, hub, stream], ids=lambda kind: kind.__name__)
def data(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    make: Callable[[Path], dict[str, Any]] = request.param
    return load_data(img_size=14, **make(tmp_path / "data"))


def read(data: Any, workers: int, transform: Any) -> list[Batch]:
    """An epoch, augmented."""
    if isinstance(data, IterableDataset):
        return [*data.train_batches(transform, 2, epoch=0, seed=1, workers=workers)]
    return [*load_batches(data, epoch_keys(N, 2, seed=1, epoch=0), transform, workers=workers)]


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected) == 2
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch.images, other.images)
        assert batch.labels.tolist() == other.labels.tolist()


def test_a_pickled_data_set_and_its_transform_read_the_same(data: Any) -> None:
    transform = train_transform(TrainConfig(**AUGMENT), data)
    again, copied = pickle.loads(pickle.dumps((data, transform)))
    assert_same(read(again, 0, copied), read(data, 0, transform))


@pytest.mark.slow
def test_spawned_workers_read_what_forked_ones_do(data: Any) -> None:
    transform = train_transform(TrainConfig(**AUGMENT, aa="rand-m9-mstd0.5-inc1"), data)
    forked, spawned = (read(data, 1, transform) for _ in each_start_method())
    assert_same(spawned, forked)
