"""The recipes that come with the package: they say what they are, and every one of them runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import yaml
from files import make_image_folder, make_video

from tokenlearner import calibrate, create_model, save_model, train
from tokenlearner.commands.main import main
from tokenlearner.commands.train import train_options
from tokenlearner.data.factory import list_data, load_data
from tokenlearner.evaluation import encode
from tokenlearner.models.vit import VARIANTS
from tokenlearner.training.config import TrainConfig
from tokenlearner.training.recipes import find_recipe, list_recipes
from tokenlearner.training.run import TrainResult

RECIPES = list(list_recipes())


def config_of(recipe: str, *options: str) -> TrainConfig:
    return TrainConfig(**train_options([recipe, *options]))


def read(recipe: str) -> dict[str, Any]:
    return yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))


# what they say


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_what_is_written_in_it(name: str) -> None:
    config = config_of(name)
    written = {key: value for key, value in read(name).items() if not isinstance(value, str)}
    assert written
    assert {key: getattr(config, key) for key in written} == written
    assert config.out == f"runs/{name}"
    assert config.root is None


def test_the_paper_s_recipe_has_the_numbers_of_scenic_s() -> None:
    config = config_of("imagenet1k_paper")
    model = VARIANTS[config.model]
    assert [model[key] for key in ("depth", "num_tokens", "at", "learner")] == [12, 16, 9, "v11"]
    adam = config.opt, config.betas, config.weight_decay, config.clip_grad
    assert adam == ("adamw", [0.9, 0.999], 0.3, 1.0)
    rate = config.lr, config.min_lr, config.sched, config.warmup_steps
    assert rate == (5e-3, 1e-5, "linear", 10_000)
    assert (config.epochs, config.batch_size) == (90, 4096)
    assert (config.loss, config.head_bias, config.drop_path) == ("sigmoid", -10, 0)


# what they do


def write_videos(root: Path) -> None:
    for split, number in (("train", 2), ("val", 1)):
        lines = ["path,label"]
        for name in ("dark", "light"):
            for i in range(number):
                path = root / f"{split}-{name}-{i}.mkv"
                path.parent.mkdir(exist_ok=True)
                lines.append(f"{make_video(path, (24, 18), 6).name},{name}")
        (root / f"{split}.csv").write_text("\n".join(lines))


def write_tokens(root: Path) -> None:
    """Those of such videos, in splits that lists name."""
    write_videos(root.parent / "videos")
    model = create_model("vit_mini_patch4_28", **TINY, in_chans=3, img_size=16, num_tokens=3, at=1)
    encode(model, root.absolute().parent / "videos", root, stride=2, workers=0)


def write_cifar(root: Path) -> None:
    """CIFAR-10 as torchvision keeps it, with 2 images in each file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), "labels": [3, 8]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data sets in memory only a few images are used, and calibrating takes two steps."""
    module = import_module("tokenlearner.data.factory")
    whole: Callable[..., Any] = module.load_data

    def load(*args: Any, **options: Any) -> Any:
        data = whole(*args, **options)
        return data.sample(20) if data.in_memory else data

    monkeypatch.setattr(import_module("tokenlearner.training.run"), "load_data", load)
    monkeypatch.setattr(import_module("tokenlearner.commands.eval"), "load_data", load)
    setup = import_module("tokenlearner.training.setup")
    monkeypatch.setattr(setup, "calibrate", partial(calibrate, steps=2))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("tokenlearner.data.moving_photos.MOVING_SIZES", {"train": 90, "test": 90})


TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
AT_1 = {**TINY, "at": 1}
CLIP = {**TINY, "num_frames": 4}
VIDEOS = ["--images", "4", "--batch_size", "2", "--frames", "4", "--stride", "1"]
SMALL: dict[str, tuple[dict[str, Any], list[str]]] = {  # model_kwargs, other options
    "imagenet1k_paper": (AT_1, ["--img_size", "16"]),
    "imagenet1k_deit": (AT_1, ["--img_size", "16"]),
    "finetune_384": (AT_1, ["--img_size", "24", "--init_from", "from/model.safetensors"]),
    "cifar10_keras": (TINY, ["--img_size", "16", "--at", "1"]),
    "kinetics400": (AT_1 | CLIP, ["--img_size", "16", "--init_from", "plain.safetensors", *VIDEOS]),
    "tokens": ({"embed_dim": 16, "depth": 2, "num_heads": 2}, [*VIDEOS, "--stride", "2"]),
    "fashion_mnist": (TINY, []),
    "fashion_mnist_tl8": (AT_1, []),
    "distill_inserted": ({}, ["--model", "host", "--calibrate", "8"]),
    "moving_photographs": (TINY | {"tubelet_size": 4}, []),
    "moving_photographs_full": (TINY | {"tubelet_size": 4}, []),
}
WRITE = {
    "folder": partial(make_image_folder, classes=("dark", "light"), count=4),
    "video-folder": write_videos,
    "torch/cifar10": write_cifar,
    "tokens": write_tokens,
}
SLOW = {"moving_photographs_full", "imagenet1k_deit"}  # as their neighbors, but for a few options
QUICK = ["--images", "8", "--batch_size", "4", "--epochs", "1", "--warmup_steps", "0"]


def run_small(name: str) -> TrainResult:
    """Runs a recipe for two steps, with a small model and what it starts from."""
    kwargs, options = SMALL[name]
    image = {**TINY, "img_size": 16, "num_classes": 3}
    save_model(create_model("vit_base_patch16_gap_384", **image), "plain.safetensors")
    save_model(create_model("vit_base_patch16_tl16at9_224", **image, at=1), "from")
    save_model(create_model("vit_mini_patch4_28", **TINY), "host")
    if write := WRITE.get(read(name)["data"]):
        write(Path("data"))
        options = ["--root", "data", "--workers", "0", *options]
    if kwargs:
        options = ["--model_kwargs", json.dumps(kwargs), *options]
    return train(config_of(name, *QUICK, *options, "--device", "cpu"))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RECIPES]
)
def test_a_recipe_trains_and_is_evaluated_again_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [row] = run_small(name).history
    assert row["step"] == 2
    assert row["train_loss"] > 0
    main(["eval", f"runs/{name}", "--batch_size", "3"])
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(printed["loss"]) == pytest.approx(row["test_loss"], abs=2e-4)
    assert int(printed["images"]) == row["test_images"] > 0


@pytest.mark.usefixtures("few")
def test_videos_can_be_evaluated_by_several_clips_and_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = run_small("kinetics400").model
    main(["eval", "runs/kinetics400", "--views", "2", "--crops", "3"])
    loss = capsys.readouterr().out.split("loss: ")[1].split()[0]
    clip = {"frames": 4, "stride": 1, "img_size": 16, "views": 2, "crops": 3}
    [(views, labels)] = load_data("video-folder", "test", root="data", **clip).batches(2)
    logits = model(views.flatten(0, 1)).unflatten(0, (2, 6)).mean(1)
    assert float(loss) == pytest.approx(F.cross_entropy(logits, labels).item(), abs=2e-4)


@pytest.mark.slow
def test_a_shorter_run_of_a_recipe_learns_most_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    history = train(replace(config_of("moving_photographs"), epochs=5)).history
    assert history[-1]["test_top1_percent"] > 75


# how they are found


def test_a_file_is_a_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-5\nmodel_kwargs:\n  depth: 3\n")
    config = config_of(str(path))
    assert (config.lr, config.model_kwargs) == (1e-5, {"depth": 3})


@pytest.mark.parametrize(("length", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_how_long_a_run_is_may_be_said_in_steps_or_epochs_whatever_its_recipe_says(
    length: str, other: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"{other}: 9\nbatch_size: 8\n")
    config = config_of(str(recipe), f"--{length}", "5")
    assert (getattr(config, length), getattr(config, other)) == (5, None)
    with pytest.raises(ValueError, match=r"steps is .* and epochs is "):
        config_of(str(recipe), f"--{length}=5", f"--{other}=4")


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'imagenet1k_papre'") as error:
        find_recipe("imagenet1k_papre")
    assert all(name in str(error.value) for name in RECIPES)


# docs/training.md

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_page_lists_every_recipe_and_every_data_set() -> None:
    text = DOCS.read_text()
    names = [*list_recipes(), *(name.rstrip("/") for name in list_data())]
    assert not [name for name in names if f"`{name}" not in text]
