"""What commands take of a run's train.json, which may be a stranger's: data within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from files import make_checkpoint, make_image_folder

from tokenlearner.commands._runs import run_options
from tokenlearner.commands.eval import eval_options
from tokenlearner.commands.main import main
from tokenlearner.commands.report.render import show_data_of_runs
from tokenlearner.commands.train import train_options
from tokenlearner.data.config import DataConfig
from tokenlearner.utils.processors import usable_processors


def test_a_run_gives_no_orders(tmp_path: Path) -> None:
    orders = {"workers": 10**5, "download": True, "device": "cuda", "tracker": "wandb", "out": "/"}
    orders |= {"follow_links": True}
    folder = make_checkpoint(tmp_path / "run", 2, **orders, crop_pct=0.9)
    assert run_options(str(folder)).keys() == {"data", "root", "crop_pct"}
    options = eval_options([str(folder)])
    assert (options["workers"], options["download"], options["device"]) == (None, False, "auto")
    options = train_options(["--model", str(folder), "--out", str(tmp_path / "new")])
    assert (options["workers"], options["download"]) == (None, False)
    assert options["follow_links"] is False
    assert DataConfig(workers=10**5).reading_workers <= 2 * usable_processors()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("crop_pct", value) for value in (1e-5, 2, "0.9", float("nan"), True)],
        *[("img_size", value) for value in (200_000, -1, 1.5, "224", [224])],
        *[("mean", value) for value in ("abc", [float("inf")], [[1]], 0.5)],
        *[("std", value) for value in ([0.0], [-1], [float("nan")] * 3)],
        *[("interpolation", "x"), ("crop_mode", "x"), ("frames", 10**6), ("views", 10**6)],
        *[("stride", 10**9), ("root", 3), ("root", "a" * 10**5), ("data", ["folder"])],
        *[("num_classes", 10**9), ("num_samples", 10**13), ("crops", 10**4), ("in_chans", 10**4)],
        ("img_size", {"data": "video-folder", "img_size": 8192, "frames": 1024, "views": 100}),
        ("img_size", {"data": "video-folder", "img_size": 2048, "frames": 1024}),
        ("img_size", {"data": "film", "views": 100, "frames": 64, "crops": 3}),
    ],
)
def test_a_run_out_of_bounds_is_refused_by_name(name: str, value: Any, checkpoint: Path) -> None:
    given = value if isinstance(value, dict) else {name: value}
    (checkpoint / "train.json").write_text(json.dumps({"data": "folder", "root": None} | given))
    with pytest.raises(ValueError, match=rf"train\.json .*{name}"):
        run_options(str(checkpoint))


@pytest.mark.parametrize("data", ["hfds/a/b", "hfids/a/b", "hfds//", "hfids/."])
def test_data_of_the_hub_or_of_a_folder_that_may_name_it_are_asked_for_only_where_the_user_says_so(
    data: str, tmp_path: Path
) -> None:
    folder = str(make_checkpoint(tmp_path, 2, data=data))
    with pytest.raises(ValueError, match=f"pass --data {data}"):
        eval_options([folder])
    assert eval_options([folder, "--data", data])["data"] == data


def test_what_is_used_of_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "data", [*map(str, range(10))])
    data = {"data": "folder", "root": str(tmp_path / "data"), "in_chans": 1, "img_size": 28}
    folder = make_checkpoint(tmp_path / "run", 2, **data)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n')
    main(["eval", str(folder), "--img_size", "28"])
    given = capsys.readouterr().err
    show_data_of_runs(folder)
    whole = capsys.readouterr().err
    for line in (given, whole):
        assert f"train.json says: data 'folder', root '{tmp_path / 'data'}'" in line
        assert ("img_size" in line) == (line == whole)
