"""`tokenlearner eval`: a checkpoint is evaluated as its run evaluated it, unless options differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from files import make_image_folder

from tokenlearner.commands._runs import run_options
from tokenlearner.commands.eval import EvalConfig
from tokenlearner.commands.main import main
from tokenlearner.commands.train import train_options
from tokenlearner.data import load_data

SMALL_RUN = [
    *("--model", "vit_mini_patch4_28", "--epochs", "1", "--warmup_epochs", "0.1"),
    *("--model_kwargs", '{"embed_dim": 16, "depth": 2, "patch_size": 7}'),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, and a run that was trained on it at 14 pixels, in gray."""
    tmp_path = tmp_path_factory.mktemp("eval")
    make_image_folder(tmp_path / "data", "ab", count=3)
    size = ["--img_size", "14", "--in_chans", "1", "--batch_size", "3", "--workers", "0"]
    data = ["--data", "folder", "--root", str(tmp_path / "data")]
    main(["train", *SMALL_RUN, *size, *data, "--out", str(tmp_path / "run")])
    return tmp_path


def test_a_run_is_evaluated_as_it_was_in_training_and_broken_images_are_counted(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [row] = map(json.loads, (images / "run" / "metrics.jsonl").read_text().splitlines())
    broken = images / "data" / "val" / "b" / "1.png"
    whole = broken.read_bytes()
    outputs, printed = [], capsys.readouterr()
    for content in (whole, b"no image"):
        broken.write_bytes(content)
        capsys.readouterr()
        main(["eval", str(images / "run")])
        printed = capsys.readouterr()
        outputs.append(printed.out.splitlines())
    broken.write_bytes(whole)
    assert outputs[0][:2] == ["images: 6", f"loss: {row['test_loss']:.4f}"]
    assert (len(outputs[0]), outputs[1][0], outputs[1][-1]) == (4, "images: 5", "broken: 1")
    assert f"left out: {broken}" in printed.err


@pytest.mark.parametrize("split", ["val", "test"])
def test_one_held_out_part_has_both_names(
    split: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main(["eval", str(images / "run"), "--split", split])
    assert "images: 6" in capsys.readouterr().out
    assert load_data("fashion-mnist-small", split).split == "test"


def test_broken_files_are_named_in_the_metrics_and_the_report_of_a_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images / "data", tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a" / "0.png").write_bytes(b"no image")
    data = ["--data", "folder", "--root", str(tmp_path / "data"), "--workers", "0"]
    size = ["--img_size", "14", "--in_chans", "1", "--batch_size", "3"]
    main(["train", *SMALL_RUN, *size, *data, "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    report = (tmp_path / "run" / "report.html").read_text()
    for key, split in (("broken", "train"), ("test_broken", "val")):
        name = f"{split}/a/0.png"
        assert (row[key], len(row[f"{key}_files"])) == (1, 1)
        assert name in row[f"{key}_files"][0]
        assert name in report
        assert f"left out: {tmp_path}/data/{name}" in out
    assert "2 files cannot be read" in out


def test_sizes_are_the_model_s_where_neither_options_nor_the_data_have_any(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "folder", "--root", str(images / "data"), "--workers", "0"]
    kwargs = {"embed_dim": 16, "depth": 2, "patch_size": 7, "img_size": 21}
    small = ["--model", "vit_mini_patch4_28", "--model_kwargs", json.dumps(kwargs)]
    more = ["--epochs", "1", "--batch_size", "3", "--out", str(tmp_path / "run")]
    main(["train", *small, *data, *more])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["img_size"] == 21
    (tmp_path / "run" / "train.json").unlink()
    main(["eval", str(tmp_path / "run"), *data])
    assert "images: 6" in capsys.readouterr().out


def test_a_message_on_sizes_ends_with_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = ["--data", "moving-photographs"]
    for model, options, way_out in (
        ("vit_tiny_patch16_224", [], "; pass --img_size 224"),
        ("vivit_mini_patch8x2_32", [], "; take data of clips"),
        ("vivit_mini_patch8x2_32", [*clips, "--frames", "4"], "; pass --frames 8"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--model", model, *options, "--out", str(tmp_path / "run")])
        assert capsys.readouterr().err.endswith(f"{way_out}\n")


def test_eval_s_options_go_before_those_of_the_run(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--img_size", "21"], "does not take images of [1, 21, 21]"),
        (["--in_chans", "3"], "does not take images of [3, 14, 14]"),
        (["--root", "nowhere"], "nowhere"),
        (["--data", "torch/cifar10"], "pass root"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["eval", str(images / "run"), *options])
        assert message in capsys.readouterr().err


def test_a_model_is_trained_on_from_its_run_with_the_data_of_that_run(images: Path) -> None:
    run, again = images / "run", images / "again"
    more = ["--epochs", "1", "--batch_size", "3", "--workers", "0", "--keep", "best"]
    main(["train", "--model", str(run), "--out", str(again), *more])
    first, second = (json.loads((path / "train.json").read_text()) for path in (run, again))
    names = ("data", "root", "img_size", "in_chans")
    assert [second[name] for name in names] == [first[name] for name in names]


@pytest.mark.parametrize("name", ["runs/no", "./runs/no", "runs/no@x", "rüns/no/", "hf_hub:a/no"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["eval", name], ["export", name, "no.onnx"], ["train", "--model", name]):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert f"there is no file or folder {name}" in capsys.readouterr().err


# --- runs that were moved, or are read from another folder ---------------------------------------


@pytest.mark.parametrize(
    ("root", "out", "place", "working_folder"),
    [
        ("/gone/data", "/gone/runs/a", "runs/a", "elsewhere"),  # the whole project
        ("{project}/data", "/gone/runs/a", "archive/deep/run", "elsewhere"),  # the run alone
        ("data", "runs/a", "runs/a", "elsewhere"),  # written relative, as before version 0.5
        ("data", "runs/a", "archive/deep/run", "."),
    ],
)
def test_a_run_that_was_moved_finds_its_data(
    images: Path,
    root: str,
    out: str,
    place: str,
    working_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copy_project(images, tmp_path, root, out, place)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / working_folder)
    capsys.readouterr()
    main(["eval", str(run)])
    [row] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert f"loss: {row['test_loss']:.4f}" in capsys.readouterr().out
    assert Path(train_options([str(run / "train.json")])["root"]).samefile(tmp_path / "data")


def test_data_that_are_found_nowhere_are_asked_for_with_the_places(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_project(images, tmp_path, "/gone/data", "/gone/a", "archive/run")
    for command in (["eval", str(run)], ["train", str(run / "train.json"), "--resume", "auto"]):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert f"/gone/data or {tmp_path}/archive/data; pass --root" in capsys.readouterr().err
    main(["eval", str(run), "--root", str(tmp_path / "data")])


@pytest.mark.slow
def test_a_run_goes_on_where_its_project_was_moved(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    copy_project(images, old, "data", "host", "host")
    monkeypatch.chdir(old)
    size = ["--batch_size", "3", "--workers", "0", "--epochs", "1"]
    data = ["--data", "folder", "--root", "data", "--img_size", "14", "--in_chans", "1"]
    start = ["--model", "./host", "--teacher", "host/model.safetensors", "--out", "runs/a"]
    main(["train", *start, *data, *size])
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    recipe = ["train", str(new / "runs" / "a" / "train.json")]
    main([*recipe, "--resume", "auto"])
    moved = [word.replace("host", "new/host") for word in start]
    places = ["--root", "new/data", "--out", "new/runs/a"]
    main(["train", "--resume", "auto", *data, *size, *moved, *places])
    assert not old.exists()
    for arguments, message in (
        (recipe, "holds a run already"),
        ([*recipe, "--resume", "auto", "--teacher", "new/runs/a/model.safetensors"], "teacher was"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err


def copy_project(images: Path, project: Path, root: str, out: str, place: str) -> Path:
    """Copies data and run to a project; train.json names other places."""
    shutil.copytree(images / "data", project / "data")
    run = project / place
    shutil.copytree(images / "run", run)
    options = json.loads((run / "train.json").read_text())
    options |= {"root": root.format(project=project), "out": out}
    (run / "train.json").write_text(json.dumps(options))
    return run


# --- options of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_options_of_a_run_are_those_of_its_data(name: str, tmp_path: Path) -> None:
    assert run_options(str(tmp_path / name)) == {}
    run = {"data": "folder", "root": "there", "img_size": 9, "lr": 1.0, "images": 5}
    (tmp_path / "train.json").write_text(json.dumps(run))
    known = {"data": "folder", "root": "there", "img_size": 9}
    assert run_options(str(tmp_path / name)) == known


def test_a_damaged_train_json_is_named_and_options_out_of_range(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", "3"):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(ValueError, match=r"train\.json"):
            run_options(str(tmp_path))
    options: dict[str, Any] = {"split": "valid", "batch_size": 0, "workers": -1}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            EvalConfig(checkpoint="x", **{name: value})


@pytest.mark.parametrize(
    ("options", "shape", "number"),
    [
        ({}, (1, 28, 28), 500),
        ({}, (3, 224, 224), 222),
        ({}, (3, 8, 112, 112), 111),
        ({"views": 4, "crops": 3}, (3, 8, 112, 112), 9),
        ({"views": 99}, (3, 8, 224, 224), 1),
        ({"views": 4, "batch_size": 7}, (3, 8, 112, 112), 7),
    ],
)
def test_batches_are_smaller_where_a_clip_has_many_views(
    options: dict[str, Any], shape: tuple[int, ...], number: int
) -> None:
    assert EvalConfig(checkpoint="x", **options).at_once(shape) == number
