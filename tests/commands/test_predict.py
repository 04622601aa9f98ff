"""`tokenlearner predict`: files get the labels that `eval` counts, and names cannot do harm."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearner import create_model, load_model, save_model
from tokenlearner.commands.main import main
from tokenlearner.evaluation import predict
from tokenlearner.models.preprocessing import Preprocessing, set_preprocessing

CLASSES = ("=1+1", "-5", "ok")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of gray images in `model`, and images in `photos`, with what is none."""
    folder = tmp_path_factory.mktemp("predict")
    model = create_model(
        "vit_mini_patch4_28", num_classes=3, embed_dim=16, depth=2, patch_size=7, num_heads=2
    )
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    set_preprocessing(model, Preprocessing((0.5,), (0.2,), 0.9, "bilinear"), CLASSES)
    save_model(model, folder / "model")
    noise = np.random.default_rng(0).integers(0, 255, (9, 30, 40, 3), dtype=np.uint8)
    deep = folder / "photos" / "deep"
    deep.mkdir(parents=True)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save((deep if i % 2 else folder / "photos") / f"{i}.png")
    (deep / "broken, [bold]\n.png").write_bytes(b"no image")
    (folder / "photos" / "notes.txt").write_text("no image either")
    return folder


def rows_of(arguments: Sequence[str | Path], out: Path) -> list[dict[str, str]]:
    main(["predict", *map(str, arguments), "--out", str(out)])
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_gets_a_row_for_each_file_that_the_model_labels(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([files / "model", files / "photos", "--top", "2"], tmp_path / "a" / "out.csv")
    assert [*rows[0]] == ["file", "label", "probability", "label_2", "probability_2", "error"]
    assert len(rows) == 10
    [broken] = [row for row in rows if row["error"]]
    assert broken["file"].endswith("broken, [bold]\n.png")
    assert [broken[name] for name in ("label", "probability", "label_2")] == ["", "", ""]
    read = [row for row in rows if not row["error"]]
    assert {row["label"] for row in read} <= {"'=1+1", "-5", "ok"}
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in read)
    printed = capsys.readouterr()
    assert "9 files are in" in printed.out
    assert "1 file cannot be read" in printed.err
    assert "broken, [bold]" in printed.err


def test_labels_are_those_that_eval_counts(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [*found] = predict(load_model(files / "model"), [files / "photos"], workers=0)
    good = [row for row in found if not row.error]
    for split in ("train", "val"):
        for i, row in enumerate(good):
            place = tmp_path / split / row.labels[0]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(row.file, place / f"{i}.png")
    capsys.readouterr()
    data = ["--data", "folder", "--root", str(tmp_path), "--img_size", "28", "--in_chans", "1"]
    main(["eval", str(files / "model"), *data])
    assert "top1_percent: 100.0000" in capsys.readouterr().out


def test_an_exported_file_labels_alike_in_small_batches(files: Path, tmp_path: Path) -> None:
    main(["export", str(files / "model"), str(tmp_path / "m.pt2"), "--rounds", "2"])
    options = ["--batch_size", "4", "--workers", "0"]
    of_model = rows_of([files / "model", files / "photos"], tmp_path / "model.csv")
    of_file = rows_of([tmp_path / "m.pt2", files / "photos", *options], tmp_path / "file.csv")
    assert [row["label"] for row in of_file] == [row["label"] for row in of_model]
    shares = [[float(row["probability"] or 0) for row in rows] for rows in (of_file, of_model)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


def test_without_out_csv_goes_to_a_pipe_and_names_begin_no_formula(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(files / "photos" / "0.png", "=cmd.png")
    main(["predict", str(files / "model"), "=cmd.png", "=cmd.png"])
    [_, row] = capsys.readouterr().out.splitlines()
    assert row.startswith("./=cmd.png,")


def test_mistakes_are_named_before_any_work(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"")
    model = files / "model"
    for arguments, message in (
        ([model, tmp_path / "none"], "there is no file or folder"),
        ([model, tmp_path / "empty"], "holds no image"),
        ([model, tmp_path / "broken.png"], "1 file, and none can be read"),
        ([model, files / "photos", "--out", tmp_path], "which is a folder"),
        ([model, files / "photos", "--top", "0"], "top is 0"),
        ([tmp_path / "none", files / "photos"], "there is no file or folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["predict", *map(str, arguments)])
        assert message in capsys.readouterr().err


def test_videos_are_labeled_and_a_model_without_names_gives_numbers(tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = create_model("vivit_mini_patch8x2_32", num_frames=4, num_classes=7, **sizes)
    save_model(model, tmp_path / "model.safetensors")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 20, "gray"
        for i in range(6):
            pixels = np.full((20, 24), 40 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
        container.mux(stream.encode())
    [row] = rows_of([tmp_path / "model.safetensors", tmp_path], tmp_path / "out.csv")
    assert row["label"] in set("0123456")
    assert row["file"] == str(tmp_path / "clip.mkv")


def test_numbers_that_are_not_finite_are_refused(files: Path) -> None:
    model = load_model(files / "model")
    torch.nn.init.constant_(model.get_parameter("head.weight"), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        next(predict(model, [files / "photos" / "0.png"]))
    with pytest.raises(ValueError, match="top is 0"):
        predict(model, [files / "photos" / "0.png"], top=0)


def test_a_backbone_without_classifier_labels_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = create_model("vit_mini_patch4_28", num_classes=0, depth=1)
    with pytest.raises(ValueError, match="has no classifier"):
        predict(bare, [files / "photos"])
    save_model(bare, tmp_path / "bare")
    with pytest.raises(SystemExit) as left:
        main(["predict", str(tmp_path / "bare"), str(files / "photos")])
    assert left.value.code == 2
    assert "has no classifier" in capsys.readouterr().err
