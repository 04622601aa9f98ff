"""`tokenlearner demo`: it makes what it says, and says what it measured."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from tokenlearner import TrainConfig, load_model
from tokenlearner.commands.demo import DemoConfig, demo
from tokenlearner.commands.main import main
from tokenlearner.commands.report.render import write_report
from tokenlearner.data import factory as data

IMAGES = {"curves.png", "maps-clothes.png", "maps-photographs.png"}
MADE = IMAGES | {"metrics.json", "report.html", "table.txt"}
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a demo of tiny models with few images leaves behind."""
    out, module = tmp_path_factory.mktemp("demo") / "out", import_module(demo.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("tokenlearner.training.run"), "load_data", few)
        patch.setattr(module, "write_report", partial(write_report, images=64))
        patch.setattr(module, "TrainConfig", partial(TrainConfig, model_kwargs=TINY))
        demo(DemoConfig(out=str(out), epochs=2, tokens=2))
    return out


def few(name: str, split: str = "train", **kwargs: Any) -> data.ImageDataset:
    whole = data.load_data(name, split, **kwargs)
    part = {"images": whole.images[:256], "labels": whole.labels[:256]}
    return data.ImageDataset(**{**vars(whole), **part})


def test_the_folder_has_everything_and_both_checkpoints_load(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == MADE | {"vit", "vit-tl2"}
    assert all(min(imread(made / name).shape[:2]) >= 300 for name in IMAGES)
    images = torch.zeros(1, 1, 28, 28)
    plain, learned = load_model(made / "vit"), load_model(made / "vit-tl2")
    assert plain(images).shape == learned(images).shape == (1, 10)
    assert learned.blocks[1].learner.num_tokens == 2


def test_the_table_shows_what_the_metrics_hold(made: Path) -> None:
    metrics = json.loads((made / "metrics.json").read_text())
    table = (made / "table.txt").read_text()
    for model in metrics["models"]:
        assert model["name"] in table
        assert f"{model['epochs'][-1]['test_top1_percent']:.1f}" in table
        assert f"{model['cost']['gmacs']:.4f}" in table
    assert all(note[:40] in table for note in metrics["notes"])
    assert [note.split()[0] for note in metrics["notes"]] == ["Accuracy:", "Training:"]


def test_the_report_has_both_models_maps_and_confusions(made: Path) -> None:
    report = (made / "report.html").read_text()
    assert "<h1>tokenlearner demo</h1>" in report
    assert report.count("<img ") == 2
    assert [f"<h3>{name}</h3>" in report for name in ("ViT", "ViT, 2 learned tokens")] == [True] * 2
    assert 'class="problems"' not in report


def test_a_second_run_takes_another_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []

    def train(config: Any, report: Any) -> None:
        configs.append(config)
        raise InterruptedError

    monkeypatch.setattr(import_module(demo.__module__), "train", train)
    with pytest.raises(InterruptedError):
        demo(DemoConfig(out=str(made)))
    assert configs[0].out == str(made.with_name("out-2") / "vit")


def test_it_ends_with_the_next_commands_each_on_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(import_module(demo.__module__), "demo", lambda config: Path(config.out))
    main(["demo"])
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[1] for line in lines if line.startswith("  tokenlearner ")]
    assert commands == ["reduce", "train", "maps"]


@pytest.mark.parametrize(("package", "extra"), [("skimage.data", "demo"), ("matplotlib", "train")])
def test_a_missing_package_is_named_before_any_work(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"run pip install '\.\[{extra}\]'"):
        demo(DemoConfig(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_options_out_of_range_are_refused() -> None:
    for options, message in (({"tokens": 0}, "tokens is 0"), ({"epochs": 1}, "epochs is 1")):
        with pytest.raises(ValueError, match=message):
            DemoConfig(**options)
