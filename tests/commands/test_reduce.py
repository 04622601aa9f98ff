"""`tokenlearner reduce`: from a model and images to a cheaper model, or to one clear sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearner import create_model, load_model, save_model
from tokenlearner.commands.main import main
from tokenlearner.commands.reduce import ReduceConfig
from tokenlearner.models.preprocessing import get_input_size
from tokenlearner.training import reduction

HOST: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("host")
    save_model(create_model("vit_tiny_patch16_224", **HOST, num_classes=5), folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_LEAST_STEPS", 2)


def call(host: str, photos: Path, out: Path | str, *options: str) -> None:
    quick = ("--time=0.01s", "--views=1", "--batch_size=8", "--latency_batch=2", "--tokens=2,4")
    main(["reduce", host, f"--images={photos}", f"--out={out}", "--device=cpu", *quick, *options])


def test_a_model_a_table_maps_and_a_report_are_made(
    host: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "broken.png").write_bytes(b"no image")
    call(host, folder, tmp_path / "out", "--budget=0.6", "--resume=auto")
    out, err = capsys.readouterr()
    assert "broken.png" in err
    result = json.loads((tmp_path / "out" / "reduction.json").read_text())
    best = result["candidates"][1]
    assert f"{best['name']} is closest to the host within the budget" in " ".join(out.split())
    assert all(row["name"] in out for row in result["candidates"])
    assert "No time was left to try 4 tokens at 0" in " ".join(out.split())
    assert "No time was left to try 4 tokens at 0" in " ".join(result["notes"])
    assert (result["images"], result["held_out"]) == (16, 4)
    assert f"fitted by {best['steps']} updates on 16 images, which ranks" in " ".join(out.split())
    assert f"{tmp_path / 'out' / 'candidates'} (0 MB) is for going on with this run only" in out
    assert "round 1 of 3: running the whole model, on images and crops of them" in err
    assert "measuring times" in err
    assert "reduce" in result["command"]
    assert best["macs_share"] <= 0.6
    model = load_model(tmp_path / "out")
    assert model(torch.zeros(1, *get_input_size(model))).shape == (1, 5)
    assert (tmp_path / "out" / "maps.png").exists() == bool(best["candidate"]["num_tokens"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert all(row["name"] in report for row in result["candidates"])
    assert "Error against multiply-adds" in report
    capsys.readouterr()
    call(host, folder, tmp_path / "out", "--budget=0.6", "--resume=auto")  # nothing is left to do
    assert "round" not in capsys.readouterr().err


def test_plan_lists_the_same_candidates(
    host: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--time=0.01s", "--batch_size=2", "--tokens=4,8", "--device=cpu"]
    main(["plan", host, f"--images={photos}", "--budget=0.6", *quick])
    out = capsys.readouterr().out
    assert "rounds" in out
    assert "pixels" in out
    assert "is closest to the host within the budget" in " ".join(out.split())


def refused(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    assert error.value.code == 2
    return ""


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--budget=0.001", "nothing meets a budget of 0.001"),
        ("--budget=1", "budget is 1"),
        ("--time=soon", "time is 'soon', expected such as 90s"),
        ("--tokens=4,many", "tokens is '4,many'"),
        ("--images=nowhere", "there is no file or folder 'nowhere'"),
        ("--device=abacus", "device 'abacus'"),
    ],
)
def test_nonsense_is_one_sentence(
    option: str,
    message: str,
    host: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(host, photos, tmp_path / "out", option)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_or_no_images_are_one_sentence(
    host: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(host, photos / "00.png", tmp_path / "out")
    assert "images is [1, 3, 32, 32], expected a tensor of 16" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    refused(host, tmp_path / "empty", tmp_path / "out")
    assert "empty" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / "empty" / f"{i}.png").write_bytes(b"no image")
    refused(host, tmp_path / "empty", tmp_path / "out")
    assert "none of 3 files can be read" in capsys.readouterr().err


def test_what_an_earlier_run_left_is_gone_on_with_only_if_asked(
    host: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "candidates").mkdir(parents=True)
    (tmp_path / "out" / "candidates" / "state.json").write_text("{}")
    refused(host, photos, tmp_path / "out")
    assert "--resume auto" in capsys.readouterr().err
    refused(host, photos, host)
    assert "would be written over" in capsys.readouterr().err
    refused(host, photos, tmp_path / "out", "--resume=auto")
    assert "another model, other images or other options" in capsys.readouterr().err


def test_weights_that_cannot_be_fetched_are_one_sentence(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("vit_tiny_patch16_224", photos, tmp_path / "out")
    assert "the trained weights of vit_tiny_patch16_224 cannot be had" in capsys.readouterr().err


@pytest.mark.parametrize(("time", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_times_have_units(time: str, seconds: float) -> None:
    assert ReduceConfig(model="a", images="b", time=time).seconds == seconds
