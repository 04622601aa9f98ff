"""Clips of kept tokens: the same as those of the videos, trained on, and not mixed up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import make_video
from tiny import TIMM, randomized

from tokenlearner import TrainConfig, create_model, evaluate, load_data, load_model, train
from tokenlearner.commands.main import main
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.evaluation import encode
from tokenlearner.models import FrameEncoder
from tokenlearner.models.preprocessing import Preprocessing, set_preprocessing

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = randomized(create_model("vit_tiny_patch16_224", **TIMM, num_tokens=3, at=1))
    set_preprocessing(model, Preprocessing((0.5,) * 3, (0.2,) * 3, 1.0, "bilinear"))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of 16 x 16 pixels, of two classes and two splits, and their tokens."""
    folder = tmp_path_factory.mktemp("kept")
    for split, count in (("train", 6), ("val", 2)):
        for label in "ab":
            (folder / "videos" / split / label).mkdir(parents=True)
            for i in range(count):
                path = folder / "videos" / split / label / f"{i}.mkv"
                make_video(path, (16, 16), frames=13, codec="ffv1")
    encode(vit(), folder / "videos", folder / "tokens", stride=2, dtype="float32", workers=0)
    return folder


def recipe(folder: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"data": "tokens", "root": str(folder / "tokens"), "out": str(out)}
    options |= {"model": "temporal_mini", "model_kwargs": TINY, "frames": 3, "stride": 2}
    options |= {"epochs": 1, "batch_size": 4, "warmup_epochs": 0.0, "device": "cpu"}
    return TrainConfig(**options | changes)


# --- the same clips ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 3, "stride": 2},
        {"frames": 3, "stride": 4, "views": 2},
        {"frames": 9, "stride": 2},  # longer than the video
        {"frames": 7, "stride": 0},
    ],
)
@torch.no_grad()
def test_clips_of_tokens_are_the_tokens_of_clips(options: dict[str, Any], folder: Path) -> None:
    size = {"img_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 1.0}
    clips = load_data("video-folder", "val", root=folder / "videos", **options, **size)
    tokens = load_data("tokens", "val", root=folder / "tokens", **options)
    assert tokens.shape == (options["frames"], 3, 16)
    assert (tokens.classes, tokens.labels.tolist()) == (clips.classes, clips.labels.tolist())
    if options["stride"] == 0:  # of frames that are kept
        assert next(tokens.batches(4))[0].shape == (4, 7, 3, 16)
        return
    [(pixels, _)], [(found, _)] = clips.batches(4), tokens.batches(4)
    flat = pixels.transpose(-4, -3).flatten(0, -4)
    expected = FrameEncoder(vit())(flat).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_clips_start_anywhere_and_chosen_ones_are_a_data_set(folder: Path) -> None:
    data = load_data("tokens", root=folder / "tokens", frames=2, stride=2)
    assert len({data.load(0).sum().item() for _ in range(40)}) == 6
    chosen = data.select(torch.tensor([3, 9]))
    assert chosen.labels.tolist() == [0, 1]
    assert len(data.sample(5)) == 5


# --- training ----------------------------------------------------------------------------------


def test_a_model_is_trained_evaluated_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(recipe(folder, tmp_path / "run"))
    assert result.model.token_shape == (3, 3, 16)
    main(["eval", str(tmp_path / "run"), "--views", "2"])
    assert "images: 4" in capsys.readouterr().out
    main(["report", str(tmp_path / "run"), "--device", "cpu"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "temporal_mini" in page
    again = recipe(
        folder, tmp_path / "more", model=str(tmp_path / "run"), model_kwargs=None, frames=None
    )
    assert train(again).model.token_source == result.model.token_source
    data = load_data("tokens", "val", root=folder / "tokens", frames=3, stride=2)
    assert evaluate(load_model(tmp_path / "run"), data).images == 4


def test_held_out_videos_stand_for_a_split_that_was_not_encoded(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    shutil.copytree(folder / "videos" / "train", tmp_path / "videos" / "train")
    encode(vit(), tmp_path / "videos", tmp_path / "tokens", stride=2, workers=0)
    result = train(recipe(tmp_path, tmp_path / "run", held_out=0.25))
    assert result.history[0]["test_images"] == 3
    with pytest.raises(ValueError, match=r"'val', only train.*held_out"):
        load_data("tokens", "val", root=tmp_path / "tokens")


def other_tokens(folder: Path, out: Path, stride: int = 2) -> Path:
    encode(vit(1), folder / "videos", out / "tokens", stride=stride, workers=0)
    return out


def test_tokens_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    result = train(recipe(folder, tmp_path / "run"))
    other = other_tokens(folder, tmp_path / "other")
    data = load_data("tokens", "val", root=other / "tokens", frames=3, stride=2)
    with pytest.raises(ValueError, match=r"other tokens than those in .*weights"):
        evaluate(result.model, data)
    changes = {"model": str(tmp_path / "run"), "model_kwargs": None}
    with pytest.raises(ValueError, match="other tokens"):
        train(recipe(other, tmp_path / "more", **changes))
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), "--root", str(other / "tokens")])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "image model": ({"model": "vit_mini_patch4_28", "model_kwargs": None}, "takes pixels"),
    "images": ({"data": "fashion-mnist-small", "root": None}, "takes tokens"),
    "num_tokens": ({"num_tokens": 4}, "tokens are learned already"),
    "stride": ({"stride": 3}, "stride is 3.*every frame in 2"),
    "size": ({"img_size": 32}, "img_size are of pixels"),
    "crops": ({"crops": 3}, "crops are of pixels"),
    "hflip": ({"hflip": 0.5}, "hflip change pixels"),
    "cutmix": ({"cutmix": 1.0}, "cutmix change pixels"),
    "nowhere": ({"root": None}, "pass root"),
    "no tokens": ({"root": "."}, "has no manifest.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_anything_is_written(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        train(recipe(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["num_tokens", "img_size"])
def test_a_model_of_tokens_has_no_options_of_images(option: str) -> None:
    with pytest.raises(ValueError, match=f"temporal_tiny .* no {option}"):
        create_model("temporal_tiny", **{option: 32})


# --- damaged files -----------------------------------------------------------------------------


def change_manifest(root: Path, **values: Any) -> None:
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(content | values))


def change_index(root: Path, **values: Any) -> None:
    content = json.loads((root / "train-000000.json").read_text())
    content["videos"][0] |= values
    (root / "train-000000.json").write_text(json.dumps(content))


ENDLESS = {"videos": 12, "shards": 10**15, "listing": ""}
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not written": (lambda r: (r / "train-000000.json").unlink(), "not written yet"),
    "cut off": (lambda r: (r / "train-000000.tar").write_bytes(b"x"), "not written yet"),
    "endless": (
        lambda r: change_manifest(r, splits={"train": ENDLESS}),
        "expected 1 of 100",
    ),
    "names": (lambda r: change_manifest(r, classes=[1, 2]), "expected names"),
    "video": (lambda r: change_index(r, video=1), "is no text"),
    "format": (lambda r: change_manifest(r, format="2"), "format"),
    "dtype": (lambda r: change_manifest(r, dtype="int8"), "dtype is 'int8'"),
    "no JSON": (lambda r: (r / "manifest.json").write_text("{"), "manifest.json is not"),
    "no labels": (lambda r: change_manifest(r, classes=[]), "no labels"),
    "label": (lambda r: change_index(r, label=7), "from 0 to 7"),
    "number": (lambda r: change_index(r, frames="3"), "no such numbers"),
    "other fields": (lambda r: change_index(r, more=1), "train-000000.json is not"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused_with_what_is_wrong(
    name: str, folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(folder / "tokens", tmp_path / "tokens"))
    damage, message = DAMAGED[name]
    damage(root)
    with pytest.raises(ValueError, match=message):
        load_data("tokens", root=root, stride=2)


def test_a_video_whose_tokens_are_not_there_is_left_out(folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folder / "tokens", tmp_path / "tokens"))
    change_index(root, offset=10**9)
    data = load_data("tokens", root=root, frames=3, stride=2)
    with pytest.raises(UnreadableFile, match=r"ends before the tokens of train/a/0\.mkv"):
        data.load(0)
    assert sum(len(labels) for _, labels in data.batches(4)) == 11
