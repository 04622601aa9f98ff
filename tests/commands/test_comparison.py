"""Two models side by side: the table, the notes and the files say what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenlearner import TrainConfig, create_model, evaluate, insert
from tokenlearner.commands._comparison import (
    Candidate,
    ModelComparison,
    compare_with_host,
    held_out_images,
    one_of_each,
    write_comparison,
)
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.latency import Cost, Timing
from tokenlearner.training.calibration import Calibration
from tokenlearner.training.run import TrainResult

MODULE = import_module("tokenlearner.commands._comparison")
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}


def cost(scale: float) -> Cost:
    timing = Timing(10 * scale, 9 * scale, 11 * scale)
    return Cost(1000, 2 / scale, timing, timing, timing, timing, 5.0, 6.0)


def candidate(name: str, top1: float, scale: float = 1.0, epochs: int = 0) -> Candidate:
    history = [{"train_seconds": 1.5, "test_top1_percent": top1} for _ in range(epochs)]
    return Candidate(name, top1, cost(scale), history)


def comparison(first: float = 90.0, second: float = 88.0, images: int = 10_000) -> ModelComparison:
    pair = (candidate("host", first), candidate("8 tokens", second, 2.0, epochs=2))
    return ModelComparison(pair, images, ["Training: short."])


def make_images(c: int = 1, classes: int = 4, n: int = 40) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, c, 28, 28), generator=generator).byte()
    names = tuple(f"class {i}" for i in range(classes))
    labels = torch.arange(n - 1, -1, -1) % classes
    return ImageDataset("noise", "test", images, labels, names, (0.3,) * c, (0.2,) * c)


# --- the notes ----------------------------------------------------------------------------------


def test_the_notes_are_the_accuracy_with_its_error_and_the_remarks() -> None:
    for images, margin in ((10_000, 0.9), (400, 4.3)):  # 196 sqrt((0.9 * 0.1 + 0.88 * 0.12) / n)
        accuracy, *remarks = comparison(images=images).notes
        assert accuracy.startswith("Accuracy: -2.0 points")
        assert f"±{margin} (95 %, {images} images" in accuracy
        assert remarks == ["Training: short."]


# --- the table and the files --------------------------------------------------------------------


def row(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if label in line)
    return re.split(r"  +", line.partition(label)[2].strip())


def test_the_table_and_the_metrics_hold_all_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path, comparison(second=0.0), {"seed": 3})
    table = (tmp_path / "table.txt").read_text()
    assert capsys.readouterr().out.split() == table.split()
    assert row(table, "GMACs an image") == ["2.0000", "1.0000", "0.50"]
    assert row(table, "images/s, inference") == ["10.0", "20.0", "20.00 (18.00–22.00)"]
    assert row(table, "top-1 on held-out images, %") == ["90.0", "0.0000"]
    assert row(table, "seconds of training") == ["-", "3.0000"]  # one was not trained here
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["config"] == {"seed": 3}
    assert written["notes"] == comparison(second=0.0).notes
    assert written["environment"]["threads"] == torch.get_num_threads()
    first, second = written["models"]
    assert (first["name"], first["top1_percent"], first["cost"]["gmacs"]) == ("host", 90.0, 2.0)
    assert [epoch["train_seconds"] for epoch in second["epochs"]] == [1.5, 1.5]


def test_clips_are_called_clips(tmp_path: Path) -> None:
    write_comparison(tmp_path, replace(comparison(), unit="clips"), {})
    table = (tmp_path / "table.txt").read_text()
    assert row(table, "clips/s, inference")[0] == "10.0"
    assert row(table, "GMACs a clip")[0] == "2.0000"
    assert "10000 clips" in table
    assert "image" not in table


# --- the images -------------------------------------------------------------------------------


def test_an_image_of_each_of_at_most_six_classes_is_drawn() -> None:
    some = make_images()
    kept = some.labels != 2
    for data, expected in (
        (some, [0, 1, 2, 3]),
        (make_images(classes=20), [0, 4, 8, 11, 15, 19]),
        (replace(some, images=some.images[kept], labels=some.labels[kept]), [0, 1, 3]),
    ):
        assert data.labels[one_of_each(data)].tolist() == expected


@pytest.mark.parametrize(("c", "learner"), [(1, "v11"), (3, "v1")])
def test_maps_are_drawn_of_gray_and_colored_images(
    c: int, learner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = insert(create_model("vit_mini_patch4_28", **TINY, in_chans=c), 3, learner=learner)
    drawn: list[Any] = []
    monkeypatch.setattr(MODULE, "draw_maps", lambda path, *shown: drawn.extend(shown))
    data = make_images(c)
    held_out_images(tmp_path / "maps.png", model, data, [5, 2], "title")
    images, maps, names, *_ = drawn
    torch.testing.assert_close(images, data.images[[5, 2]].float() / 255)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3))  # V1's too
    assert names == [data.classes[label] for label in data.labels[[5, 2]]]


# --- a host against what was made of it ---------------------------------------------------------


def trained(config: TrainConfig) -> TrainResult:
    """What `train` leaves, without the training."""
    host = create_model("vit_mini_patch4_28", **TINY, num_classes=4).eval()
    model = insert(create_model("vit_mini_patch4_28", **TINY, num_classes=4).eval(), config.insert)
    row = {"epoch": 3, "step": 2, "train_seconds": 3.0, "test_top1_percent": 12.5}
    history = [row, row | {"epoch": 4, "test_top1_percent": 10.0}]
    done = Calibration(16, 300, 1.25, 0.5, 7.0, held_out=2)
    path = Path(config.out) / "model.safetensors"
    return TrainResult(model, path, history, 32, host, done, make_images(), kept=0)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(MODULE, "MAX_IMAGES", 1)
    monkeypatch.setattr(MODULE, "benchmark", lambda models, images: dict.fromkeys(models, cost(1)))
    return TrainConfig(out=str(tmp_path), model="host", insert=3, teacher="host", epochs=4)


def test_a_host_is_compared_with_what_was_made_of_it(config: TrainConfig) -> None:
    result = trained(config)
    comparison = compare_with_host(config, result)
    host, reduced = comparison.pair
    assert (host.name, reduced.name) == ("host", "3 learned tokens")
    assert host.top1_percent == evaluate(result.host, make_images()).top1_percent
    assert (reduced.top1_percent, host.history) == (12.5, [])
    _, calibration, training = comparison.notes
    assert calibration.startswith("Calibration: 16 images without labels, 7 s; ")
    assert calibration.endswith("on 2 others 125% before, 50% after.")
    assert training == "Training: 4 epochs of 32 images, distilled from host, without labels."
    assert {p.name for p in Path(config.out).iterdir()} == {"table.txt", "metrics.json", "maps.png"}
    written = json.loads((Path(config.out) / "metrics.json").read_text())
    assert written["config"]["insert"] == 3
    config = replace(config, teacher=None)
    _, training = compare_with_host(config, replace(result, calibration=None)).notes
    assert training == "Training: 4 epochs of 32 images, with labels."


def test_a_model_that_was_built_new_has_no_host_to_compare_with(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="no host"):
        compare_with_host(config, replace(trained(config), host=None))
