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
from torch import nn

from tokenlearner import create_model
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.flops import count_macs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES = tuple("abcdefghij")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("contenders", "compare", "compare_report", "baselines")
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


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["half", "third"])
def test_contenders_spend_about_the_same(
    scripts: dict[str, ModuleType], options: Namespace, host: nn.Module, budget: str
) -> None:
    images, _ = next(few("few").batches(2))
    setup = scripts["contenders"].BUDGETS[budget]
    for contender in scripts["contenders"].CONTENDERS.values():
        model = contender.build(host, setup, images).eval()
        share = count_macs(model, images[:1]) / count_macs(host, images[:1])
        assert abs(share - setup.share) < 0.03, contender.label


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
    said, page = capsys.readouterr().out, (BENCHMARKS / "README.md").read_text("utf-8")
    assert f"| {middle:.2f} ({low:.2f}–{high:.2f}) |" in said
    assert [row for row in said.splitlines()[1:-1] if row not in page] == []
    assert (tmp_path / "compare.png").stat().st_size > 10_000
