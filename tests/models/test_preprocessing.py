"""Preprocessing and the names of classes are the model's, wherever it goes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import transformers_vit

from tokenlearner import (
    TrainConfig,
    calibrate,
    create_model,
    evaluate,
    export,
    load_data,
    load_model,
    save_model,
    train,
)
from tokenlearner.commands._inputs import input_pipeline
from tokenlearner.commands.eval import eval_command
from tokenlearner.data.config import AugmentConfig
from tokenlearner.data.transforms import train_transform
from tokenlearner.deploy import load_exported
from tokenlearner.evaluation.accuracy import preprocess_for
from tokenlearner.models.preprocessing import (
    Preprocessing,
    from_image_processor,
    get_classes,
    get_preprocessing,
    set_preprocessing,
)
from tokenlearner.training import setup
from tokenlearner.training.setup import Renormalized

HALF = (0.5, 0.5, 0.5)
SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def make_folder(root: Path, classes: str, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Writes images of one color a class, with noise."""
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            color = np.array([200 * (name == c) for c in "abc"])
            for i in range(8):
                noise = np.random.default_rng([ord(name), i]).integers(0, 50, (40, 40, 3))
                image = Image.fromarray((color + noise).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def fit(root: Path, out: Path, **options: Any) -> Any:
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    shape = {} if "insert" in options else {"model_kwargs": kwargs}
    given: dict[str, Any] = {"model": "vit_tiny_patch16_224", "warmup_epochs": 0, "lr": 3e-3}
    given |= {"epochs": 12, "batch_size": 8, "workers": 0, "img_size": 32, **shape, **options}
    return train(TrainConfig(data="folder", root=str(root), out=str(out), **given)).model


def test_a_model_says_what_timm_says_and_gray_takes_the_mean_of_color() -> None:
    vit: Any = create_model("vit_tiny_patch16_224", **SMALL)
    said = timm.data.resolve_model_data_config(vit)
    found = get_preprocessing(vit)
    assert found == Preprocessing(HALF, HALF, said["crop_pct"], said["interpolation"])
    set_preprocessing(vit, Preprocessing((0.1, 0.2, 0.3), HALF, 0.9, "bilinear"), ["a", "b"])
    assert timm.data.resolve_model_data_config(vit)["mean"] == (0.1, 0.2, 0.3)
    gray = get_preprocessing(vit, 1)
    assert gray is not None
    assert gray.mean == pytest.approx((0.2,))
    assert get_preprocessing(torch.nn.Identity()) is None


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_images_and_videos_are_cropped_in_the_mode_of_the_model(mode: str, tmp_path: Path) -> None:
    vit: Any = create_model("vit_tiny_patch16_224", **SMALL)
    said = {"crop_mode": mode, "mean": (0.3, 0.5, 0.7), "input_size": (3, 32, 32)}
    vit.pretrained_cfg = vit.pretrained_cfg | said
    (tmp_path / "test" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "test" / "a" / "1.png")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    expected: Any = transform(image)
    data = preprocess_for(vit, load_data("folder", "test", root=str(tmp_path), img_size=32))
    torch.testing.assert_close(data.get_batch([0])[0][0], expected)
    trained: Any = train_transform(AugmentConfig(hflip=1.0), data)
    torch.testing.assert_close(trained(data.load(0)).flip(-1), expected)
    inputs = input_pipeline(vit, (3, 32, 32), None)
    torch.testing.assert_close(inputs.from_image(image, "a").model_input[0], expected)
    frames = inputs.from_frames(torch.from_numpy(pixels).permute(2, 0, 1)[None], "a").model_input
    if mode != "center":  # where videos are resized as in training, by another filter
        torch.testing.assert_close(frames[0], expected)


PROCESSORS = (
    *("ViT", "CLIP", "Beit", "DeiT", "Siglip", "VideoMAE", "Bit"),
    "Vivit",  # which subtracts 1 before it normalizes
)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_model_of_transformers_takes_what_its_processor_makes(name: str, tmp_path: Path) -> None:
    processor: Any = getattr(transformers, f"{name}ImageProcessor")()
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 300), Image.Resampling.BICUBIC)
    given: Any = [image] if name in ("VideoMAE", "Vivit") else image
    expected = processor(given, return_tensors="pt")["pixel_values"].reshape(3, 224, 224)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model: Any = transformers.ViTForImageClassification(config)
    assert get_preprocessing(model) is None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    said = get_preprocessing(transformers.ViTForImageClassification.from_pretrained(tmp_path))
    assert said == from_image_processor(processor)
    assert said is not None
    made: Any = said.eval_transform((3, 224, 224))(image)
    assert (made - expected).abs().max() < 0.1


def test_a_processor_of_images_of_any_size_is_refused() -> None:
    processor: Any = transformers.ViTImageProcessor(size={"shortest_edge": 224})
    with pytest.raises(ValueError, match="shortest_edge"):
        from_image_processor(processor)


def test_names_of_a_head_that_was_replaced_are_not_the_models() -> None:
    vit = create_model("vit_mini_patch4_28", num_classes=3)
    set_preprocessing(vit, Preprocessing((0.5,), (0.5,)), ["a", "b"])
    assert get_classes(vit) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images, and a run that was trained on it from scratch."""
    folder = tmp_path_factory.mktemp("trained")
    root = make_folder(folder / "abc", "abc")
    options: dict[str, Any] = {"mean": [*HALF], "std": [0.25] * 3, "crop_pct": 0.9}
    fit(root, folder / "run", **options, interpolation="bilinear")
    return root, folder / "run"


@pytest.mark.parametrize("exported", [(), pytest.param((".onnx", ".pt2"), marks=pytest.mark.slow)])
def test_training_from_scratch_writes_what_it_used_and_everything_reads_it(
    exported: tuple[str, ...],
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, timm's own transform and the exported file agree on every image."""
    root, run = trained
    model: Any = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    said = timm.data.resolve_model_data_config(model)
    assert (tuple(said["mean"]), tuple(said["std"])) == (HALF, (0.25,) * 3)
    assert (said["crop_pct"], said["interpolation"]) == (0.9, "bilinear")
    ours = load_model(run)
    assert get_classes(ours) == ("a", "b", "c")
    transform: Any = timm.data.create_transform(**said)
    files = sorted((root / "val").rglob("*.png"))
    right = [
        "abc"[model(transform(Image.open(file).convert("RGB"))[None]).argmax()] == file.parent.name
        for file in files
    ]
    accuracy = 100 * sum(right) / len(right)
    assert accuracy > 80
    eval_command([str(run), "--workers", "0"])
    assert f"top1_percent: {accuracy:.4f}" in capsys.readouterr().out
    for suffix in exported:
        path = export(ours, tmp_path / f"m{suffix}", torch.rand(2, 3, 32, 32), rounds=2).path
        assert get_preprocessing(load_exported(path)) == get_preprocessing(ours)
        words = ["--data", "folder", "--root", str(root), "--img_size", "32", "--workers", "0"]
        eval_command([str(path), *words])
        assert f"top1_percent: {accuracy:.4f}" in capsys.readouterr().out


def test_a_file_alone_says_how_images_are_prepared_and_what_classes_are_called(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, alone = trained[1], tmp_path / "alone.safetensors"
    expected = get_preprocessing(load_model(folder))
    assert expected is not None
    assert expected.std == (0.25,) * 3
    shutil.copy(folder / "model.safetensors", alone)
    for path in (folder / "model.safetensors", alone):
        model = load_model(path)
        assert get_preprocessing(model) == expected
        assert get_classes(model) == ("a", "b", "c")


def test_a_file_of_before_takes_them_of_the_config_beside_it_if_it_is_its_own(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, old = trained[1], tmp_path / "model.safetensors"
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["tokenlearner"])
    del said["pretrained_cfg"]
    save_file(weights, old, {"tokenlearner": json.dumps(said)})
    shutil.copy(folder / "config.json", tmp_path)
    assert get_preprocessing(load_model(old)) == get_preprocessing(load_model(folder))
    save_model(create_model("vit_mini_patch4_28", depth=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path)
    assert get_classes(load_model(old)) is None
    with pytest.raises(ValueError, match="of two models"):
        load_model(tmp_path)


def test_labels_go_by_name_where_a_folder_lacks_a_class_or_has_another(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load_model(trained[1])
    few, other = (
        load_data("folder", "test", root=make_folder(tmp_path / s, s, ("val",)), img_size=32)
        for s in ("bc", "ax")
    )
    preprocessing = get_preprocessing(model)
    assert preprocessing is not None
    few = few.with_preprocessing(**preprocessing.to_kwargs())
    assert evaluate(model, few).top1_percent > 80
    with pytest.raises(ValueError, match="x"):
        evaluate(model, other)
    nameless = create_model("vit_tiny_patch16_224", **SMALL, num_classes=1000)
    with pytest.raises(ValueError, match="1000"):
        evaluate(nameless, few)


def test_a_pretrained_host_is_shown_images_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "calibrate", partial(calibrate, steps=2))
    root = make_folder(tmp_path / "ab", "ab")
    host = create_model("vit_tiny_patch16_224", **SMALL, num_classes=2)
    save_model(host, tmp_path / "host")
    seen: list[torch.Tensor] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if type(module) is type(host) else None
    )
    options: dict[str, Any] = {"model": str(tmp_path / "host"), "insert": 2, "epochs": 1}
    fit(root, tmp_path / "run", **options, calibrate=4, teacher="host", batch_size=4)
    hook.remove()
    data = load_data("folder", "test", root=root, img_size=32, mean=[*HALF], std=[*HALF])
    pixels, _ = data.with_preprocessing(crop_pct=0.9).get_batch(range(len(data)))
    batches = [x for x in seen if len(x) == 4]  # of training; before, the size is tried
    assert len(batches) > 4
    assert max(x.max().item() for x in batches) <= pixels.max().item() + 0.1
    assert min(x.min().item() for x in batches) >= -1.0001  # black; -2.1 by ImageNet's constants


def test_a_teacher_with_another_mean_sees_images_as_it_was_trained() -> None:
    student, own = Preprocessing((0.4,) * 3, (0.2,) * 3), Preprocessing(HALF, (0.25,) * 3)
    pixels = torch.rand(2, 3, 4, 4)
    teacher = Renormalized(torch.nn.Identity(), student, own)
    torch.testing.assert_close(teacher((pixels - 0.4) / 0.2), (pixels - 0.5) / 0.25)


def test_a_name_that_two_classes_have_is_no_label() -> None:
    data = load_data("fashion-mnist-small", "test").sample(20)
    vit = create_model("vit_mini_patch4_28", num_classes=11)
    set_preprocessing(vit, Preprocessing((0.5,), (0.5,)), [*data.classes, data.classes[0]])
    with pytest.raises(ValueError, match=data.classes[0]):
        evaluate(vit, data)


def test_a_model_that_says_nothing_of_its_images_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, model = load_data("fashion-mnist-small", "test"), transformers_vit()
    preprocess_for(model, data, {"mean": (0.5,), "std": (0.5,)})
    assert "set_preprocessing" not in caplog.text
    assert preprocess_for(model, data).mean == data.mean
    assert "set_preprocessing" in caplog.text
    assert str(data.mean) in caplog.text
