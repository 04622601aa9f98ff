"""The comparisons in benchmarks/: every contender runs, spends its budget and gets its row."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner import create_model
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.utils.io import write_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES = tuple("abcdefghij")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("contenders", "compare", "compare_report", "compare_frozen", "baselines")
    return {name: importlib.import_module(name) for name in names}


def few(name: str, split: str = "train", **_: Any) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (160, 1, 28, 28), generator=generator).byte()
    return ImageDataset(name, split, images, torch.arange(160) % 10, CLASSES, (0.3,), (0.3,))


@pytest.fixture
def options(scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: Any) -> Namespace:
    monkeypatch.setattr(scripts["compare"], "load_data", few)
    monkeypatch.setattr(scripts["contenders"], "CALIBRATION_STEPS", 2)
    return Namespace(
        out=str(tmp_path), data="few", root=None, seeds=[0], budgets=["half"], epochs=1, share=0.5,
        short_epochs=1, rounds=2, contenders=list(scripts["contenders"].CONTENDERS), jobs=1,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture
def host(scripts: dict[str, ModuleType]) -> nn.Module:
    return create_model(scripts["contenders"].HOST, **scripts["contenders"].SHAPE).eval()


@pytest.mark.slow
def test_every_contender_is_trained_and_evaluated(
    scripts: dict[str, ModuleType], options: Namespace, host: nn.Module
) -> None:
    before = {key: value.clone() for key, value in host.state_dict().items()}
    for name, contender in scripts["contenders"].CONTENDERS.items():
        row = scripts["compare"].run(options, host, name, "half", 0)
        assert 0 <= row["top1_percent"] <= 100
        assert row["images"] == (160 if contender.from_scratch else 80)
        assert row["images_seen"] == row["images"] // 64 * 64
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


@pytest.mark.parametrize("budget", ["half", pytest.param("third", marks=pytest.mark.slow)])
def test_contenders_spend_about_the_same(
    scripts: dict[str, ModuleType], options: Namespace, host: nn.Module, budget: str
) -> None:
    images, _ = next(few("few").batches(2))
    setup = scripts["contenders"].BUDGETS[budget]
    for contender in scripts["contenders"].CONTENDERS.values():
        model = contender.build(host, setup, images).eval()
        share = count_macs(model, images[:1]) / count_macs(host, images[:1])
        assert abs(share - setup.share) < 0.03, contender.label


@pytest.mark.slow
def test_without_labels_the_labels_do_not_matter(
    scripts: dict[str, ModuleType],
    options: Namespace,
    host: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other_labels(name: str, split: str = "train", **setup: Any) -> ImageDataset:
        data = few(name, split, **setup)
        changed = data.labels.flip(0) if split == "train" else data.labels
        return ImageDataset(name, split, data.images, changed, CLASSES, (0.3,), (0.3,))

    run = scripts["compare"].run
    rows = [run(options, host, name, "half", 0) for name in ("calibrated", "plain")]
    monkeypatch.setattr(scripts["compare"], "load_data", other_labels)
    others = [run(options, host, name, "half", 0) for name in ("calibrated", "plain")]
    same = [a["loss"] == b["loss"] for a, b in zip(rows, others, strict=True)]
    assert same == [True, False]


@pytest.mark.slow
def test_the_table_has_a_row_for_the_host_and_each_contender(
    scripts: dict[str, ModuleType], options: Namespace, host: nn.Module
) -> None:
    out = Path(options.out)
    row = {"step": 2, "test_top1_percent": 80.0}
    (out / "host").mkdir()
    (out / "host" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_json(out / "host" / "train.json", {"batch_size": 64, "epochs": 1})
    options.contenders = ["pool", "calibrated"]
    for name, seed in (("pool", 0), ("calibrated", 0), ("calibrated", 1)):
        found = scripts["compare"].run(options, host, name, "half", seed)
        write_json(out / f"{name}-half-{seed}.json", found)
    write_json(out / "costs.json", scripts["compare"].costs(options, host))
    lines = scripts["compare_report"].write_report(out, "command").splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "**host** (budget 0.5)",
        "average pooling, distilled",
        "inserted, calibrated, distilled",
    ]
    assert {line.count("|") for line in lines[2:]} == {lines[2].count("|")}
    assert (out / "plot.png").stat().st_size > 10_000


def test_a_saved_comparison_gets_its_table_and_plot(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = (BENCHMARKS / "results" / "compare.json").read_text()
    (tmp_path / "compare.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["compare_report.py", str(tmp_path / "compare.json")])
    scripts["compare_report"].main()
    tops = [
        run["top1_percent"]
        for run in json.loads(content)["runs"]
        if (run["contender"], run["budget"]) == ("v11", "half")
    ]
    low, middle, high = sorted(tops)
    assert f"| {middle:.2f} ({low:.2f}–{high:.2f}) |" in capsys.readouterr().out
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_the_evaluation_tells_good_features_from_noise(scripts: dict[str, ModuleType]) -> None:
    labels = torch.arange(200) % 4
    good = nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(200, 4)
    evaluate = scripts["compare_frozen"].evaluate_features
    found = evaluate(good[:100], labels[:100], good[100:], labels[100:])
    assert min(found.values()) > 95
    noise = torch.randn(200, 4)
    assert max(evaluate(noise[:100], labels[:100], noise[100:], labels[100:]).values()) < 60


@pytest.fixture
def frozen(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """compare_frozen.py with a small host and few images in the place of the large ones."""

    def drawings(root: Path, size: int) -> tuple[ImageDataset, ImageDataset]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (64, 3, size, size), generator=generator).byte()
        norm = (0.5, 0.5, 0.5)
        sets = (ImageDataset("d", s, images, torch.arange(64) % 4, tuple("abcd"), norm, norm)
                for s in ("train", "test"))  # fmt: skip
        train, test = sets
        return train, test

    def small_host(wheel: Path, size: int) -> nn.Module:
        shape = {"embed_dim": 24, "depth": 8, "num_heads": 2, "patch_size": 8, "init_values": 0.1}
        return VisionTransformer(img_size=size, num_classes=0, **shape).eval()

    script = scripts["compare_frozen"]
    monkeypatch.setattr(script, "load_openclipart", drawings)
    monkeypatch.setattr(script, "dinov2_small", small_host)
    for name, value in {"SIZE": 32, "EPOCHS": 1, "CALIBRATION_STEPS": 2}.items():
        monkeypatch.setattr(script, name, value)
    argv = ["compare_frozen.py", "--out", str(tmp_path), "--wheel", "w", "--drawings", "d"]
    monkeypatch.setattr(sys, "argv", [*argv, "--seeds", "0", "--rounds", "2"])
    return script


@pytest.mark.slow
def test_the_frozen_comparison_evaluates_everybody_and_goes_on_where_it_stopped(
    frozen: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 * (1 + len(frozen.CONTENDERS))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(0 <= row["before"]["knn_percent"] <= 100 for row in results["runs"])
    [calibrated, *_] = [line.split("|") for line in table if "calibrated" in line]
    [row, *_] = [row for row in results["runs"] if "calibrated" in row]
    assert float(calibrated[2]) == pytest.approx(row["calibrated"]["probe_percent"], abs=0.05)
    frozen.main()
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if line.startswith("|")] == table
    assert not [line for line in again if line.startswith("{")]
