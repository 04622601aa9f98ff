"""`tokenlearner maps`: files become what the model takes, and sheets, animations and numbers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from files import MINI, make_image, make_video
from PIL import Image
from rich.console import Console
from torch import nn

from tokenlearner import attention_maps, create_model, insert, load_data, save_model
from tokenlearner.commands import maps as map_run
from tokenlearner.commands._inputs import InputPipeline, input_pipeline, list_inputs
from tokenlearner.commands._models import load_sized
from tokenlearner.commands.maps import MapsConfig, run_maps
from tokenlearner.data.config import DataConfig
from tokenlearner.data.video_folder import VideoFolderDataset
from tokenlearner.utils.preprocessing import Preprocessing

MIXER = "mixer_mini_patch4_tl8at3_28"
VIVIT, FRAMEVIT = "vivit_mini_patch8x2_tl4at3_32", "framevit_mini_patch8_f6_tl4at3_32"
PIPELINE = InputPipeline(
    (3, 8, 8), Preprocessing((0.5,) * 3, (0.25,) * 3, 1.0), 4, 1, False, "a test"
)


def run_on(model: str | Path, source: Path, out: Path, **options: Any) -> tuple[str, Any]:
    """What the command prints, and what is in maps.json."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print(*run_maps(MapsConfig(str(model), str(source), str(out), **options)), sep="\n")
    return text.getvalue(), json.loads((out / "maps.json").read_text(encoding="utf-8"))


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nothing is known of but its file."""
    model = create_model(MINI, num_tokens=3, depth=2, in_chans=3)
    return save_model(model, tmp_path_factory.mktemp("mini") / "mini.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, a video, two broken files, and what is none of these."""
    root = tmp_path_factory.mktemp("folder")
    (root / "deep").mkdir()
    (root / ".hidden").mkdir()
    make_image(root / "a.png")
    make_image(root / "deep" / "b.jpg", (90, 30))
    make_video(root / "c.mkv")
    (root / "broken.png").write_bytes(b"no image")
    (root / "broken.mp4").write_bytes(b"no video")
    (root / "notes.txt").write_text("no image either")
    make_image(root / ".hidden" / "d.png")
    return root


@pytest.fixture(scope="module")
def results(mini: Path, folder: Path, tmp_path_factory: Any) -> tuple[Path, str, Any]:
    out = tmp_path_factory.mktemp("maps") / "new" / "out"
    return (out, *run_on(mini, folder, out, frames=4, stride=1))


# --- a folder -----------------------------------------------------------------------------------


def test_a_folder_gives_figures_animations_and_a_row_for_each_kind_of_file(
    results: tuple[Path, str, Any], folder: Path
) -> None:
    out, printed, _ = results
    assert names(out) == {"a.png", "deep-b.png", "c.png", "c.gif", "c.mp4", "maps.json"}
    for name in ("broken.png", "broken.mp4"):
        assert f"left out: {folder / name} cannot be read" in printed.replace("\n", " ")
    rows = [line.split() for line in printed.splitlines() if " 3 " in line[:40]]
    assert [row[:4] for row in rows[:2]] == [["2", "images", "1", "3"], ["1", "video", "1", "3"]]


def test_the_numbers_are_those_of_the_maps(
    results: tuple[Path, str, Any], mini: Path, folder: Path
) -> None:
    model, size = load_sized(str(mini), 0, "cpu")
    pipeline = input_pipeline(model, size, str(mini))
    seen = [pipeline.read(folder / name, "") for name in ("a.png", "deep/b.jpg")]
    [maps] = attention_maps(model, torch.cat([one.model_input for one in seen])).values()
    expected = map_run.map_stats(maps)
    stats = results[2]["stats"]["image"]["1"]
    assert (stats["images"], stats["grid"]) == (2, [7, 7])
    for name in ("pairs", "across_images"):
        np.testing.assert_allclose(stats[name], getattr(expected, name), atol=1e-4)
    assert stats["over_frames"] is None
    assert len(results[2]["stats"]["video"]["1"]["over_frames"]) == 3


def test_the_first_files_are_taken_at_the_size_that_is_set(
    mini: Path, folder: Path, tmp_path: Path
) -> None:
    printed, numbers = run_on(mini, folder, tmp_path / "out", limit=1, img_size=16)
    assert names(tmp_path / "out") == {"a.png", "maps.json"}
    assert "4 more files in" in printed
    assert numbers["intake"]["size"] == [3, 16, 16]
    assert numbers["stats"]["image"]["1"]["grid"] == [4, 4]


def test_files_of_one_name_get_different_figures(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.png", "a.jpg", "a.jpeg", "b/c.png", "b-c.png"):
        make_image(tmp_path / name)
    paths = list_inputs(str(tmp_path))
    assert sorted(map(str, paths.values())) == sorted(str(p) for p in tmp_path.rglob("*.*"))
    assert set(paths) == {"a", "a.jpg", "a.png", "b-c", "b-c.png"}


# --- as the model takes them --------------------------------------------------------------------


def test_an_image_is_cropped_as_in_evaluation(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.png")
    seen = PIPELINE.read(path, "a")
    plain = timm.data.create_transform(
        (3, 8, 8), crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic"
    )
    with Image.open(path) as image:
        torch.testing.assert_close(seen.model_input[0], plain(image))
    torch.testing.assert_close(seen.pixels, seen.model_input * 0.25 + 0.5)


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (8, 8)])
def test_a_video_is_cropped_as_in_evaluation(tmp_path: Path, size: tuple[int, int]) -> None:
    path = make_video(tmp_path / "a.mkv", size)
    config = DataConfig(img_size=16, in_chans=3, frames=4, stride=2, crop_pct=0.875)
    data = VideoFolderDataset("video", "test", (str(path),), torch.zeros(1).long(), ("",), config)
    pipeline = InputPipeline(
        (3, 4, 16, 16), Preprocessing(data.mean, data.std, 0.875), 4, 2, False, ""
    )
    seen = pipeline.read(path, "").model_input[0]
    torch.testing.assert_close(seen, data.eval_transform(data.load(0)))


def test_of_frames_that_are_not_square_the_middle_is_taken(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", (48, 40), frames=4)
    wide = InputPipeline((1, 4, 20, 48), Preprocessing((0.0,), (1.0,), 1.0), 4, 1, False, "").read(
        path, ""
    )
    full = InputPipeline((1, 4, 40, 48), Preprocessing((0.0,), (1.0,), 1.0), 4, 1, False, "").read(
        path, ""
    )
    torch.testing.assert_close(wide.pixels, full.pixels[:, :, 10:30])


def test_clips_have_their_axes_in_the_models_order(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv")
    first, last = (
        InputPipeline((3, 4, 8, 8), Preprocessing((0.5,) * 3, (0.5,) * 3, 1.0), 4, 1, order, "")
        .read(path, "")
        .model_input
        for order in (True, False)
    )
    assert first.shape == (1, 4, 3, 8, 8)
    assert torch.equal(first.transpose(1, 2), last)


def test_numbers_are_those_of_the_run_s_data_or_else_imagenet_s(tmp_path: Path) -> None:
    model, recipe = nn.Linear(1, 1), tmp_path / "train.json"
    recipe.write_text(json.dumps({"data": "fashion-mnist-small", "crop_pct": 0.875}))
    data = load_data("fashion-mnist-small", "test")
    pipeline = input_pipeline(model, [1, 28, 28], str(tmp_path))
    assert pipeline.preprocessing == Preprocessing(data.mean, data.std, 1.0)
    assert pipeline.origin.startswith("fashion-mnist-small")
    recipe.write_text(json.dumps({"data": "folder", "root": "/nowhere", "crop_pct": 0.7}))
    pipeline = input_pipeline(model, [3, 28, 28], str(tmp_path))
    assert (pipeline.preprocessing.mean, pipeline.preprocessing.crop_pct) == (
        (0.485, 0.456, 0.406),
        0.7,
    )
    assert input_pipeline(model, [3, 8, 8], None).preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("run", "size", "stride"),
    [
        ({"data": "video-folder", "stride": 7}, [3, 8, 32, 32], 7),
        ({"data": "moving-photographs", "stride": 4}, [1, 8, 32, 32], 1),
        ({"data": "folder"}, [3, 28, 28], 4),
        ({}, [3, 8, 32, 32], 4),
    ],
)
def test_videos_are_read_at_the_stride_of_the_training(
    run: dict[str, Any], size: list[int], stride: int, tmp_path: Path
) -> None:
    if run:
        (tmp_path / "train.json").write_text(json.dumps(run))
    assert input_pipeline(nn.Identity(), size, str(tmp_path)).stride == stride
    assert input_pipeline(nn.Identity(), size, str(tmp_path), stride=2).stride == 2


def test_without_a_run_timms_configuration_counts() -> None:
    numbers: dict[str, Any] = {"mean": (0.1, 0.2, 0.6), "std": (0.5, 0.6, 0.7), "crop_pct": 0.8}
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    vit.pretrained_cfg |= numbers
    pipeline = input_pipeline(vit, [3, 224, 224], None)
    assert pipeline.preprocessing == Preprocessing(**numbers)
    assert input_pipeline(vit, [1, 224, 224], None).preprocessing.mean == pytest.approx((0.3,))


# --- kinds of models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "tokens"),
    [
        (MIXER, {}, {"3": 8}),
        (MINI, {"num_tokens": 2, "at": 1, "fuse": True, "depth": 3}, {"1": 2, "2": 2}),
        (MINI, {"num_tokens": 2, "img_size": (28, 40)}, {"3": 2}),
        (MINI, {"num_tokens": 2, "learner": "v1"}, {"3": 2}),
    ],
)
def test_models_of_images_have_maps_block_by_block(
    model: str, options: dict[str, Any], tokens: dict[str, int], tmp_path: Path
) -> None:
    saved: Any = model
    if options:
        saved = save_model(create_model(model, **options), tmp_path / "m.safetensors")
    printed, numbers = run_on(saved, make_image(tmp_path / "a.png"), tmp_path / "out")
    stats = numbers["stats"]["image"]
    assert {i: len(block["pairs"]) for i, block in stats.items()} == tokens
    is_v1 = options.get("learner") == "v1"
    assert numbers["maps"] == ("gates" if is_v1 else "distributions")
    assert ("gates from 0 to 1" in printed) == is_v1
    is_random = "is a name and no checkpoint: its weights are random"
    assert (f"{model} {is_random}" in printed) == (saved == model)
    assert any("weights are random" in remark for remark in numbers["remarks"]) == (saved == model)
    assert names(tmp_path / "out") == {"a.png", "maps.json"}


@pytest.mark.parametrize(
    ("model", "options", "frames", "animation"),
    [
        ("vivit_mini_patch8x2_32", {"num_tokens": 1, "depth": 2}, 4, "gif"),
        pytest.param(FRAMEVIT, {}, 6, "none", marks=pytest.mark.slow),
    ],
)
def test_models_of_clips_have_maps_frame_by_frame(
    model: str, options: dict[str, Any], frames: int, animation: str, tmp_path: Path
) -> None:
    saved, out = save_model(create_model(model, **options), tmp_path / "m"), tmp_path / "out"
    _, numbers = run_on(saved, make_video(tmp_path / "a.mkv"), out, animation=animation)
    (stats,) = numbers["stats"]["video"].values()
    assert stats["frames"] == frames
    assert names(out) == {"a.png", "maps.json"} | ({"a.gif"} if animation == "gif" else set())
    if animation == "gif":
        with Image.open(out / "a.gif") as image:
            assert getattr(image, "n_frames") == 8  # noqa: B009


def test_a_loaded_model_takes_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    host = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    config = MapsConfig("mine", str(make_image(tmp_path / "a.png")), str(tmp_path / "out"))
    _, *lines = run_maps(config, (insert(host, 3), (3, 32, 32)))
    assert names(tmp_path / "out") == {"a.png", "maps.json"}
    assert "normalized as ImageNet" in lines[2]
    assert not any("weights are random" in line for line in lines)


def test_a_frame_of_a_tubelet_shows_the_tubelets_maps() -> None:
    seen = map_run.MapInput("a", torch.rand(8, 1, 4, 4), torch.empty(0), True)
    maps = {3: torch.rand(4, 2, 2, 2)}
    rows = [map_run.time_step_rows(seen, maps, frame)[0] for frame in range(8)]
    assert all(torch.equal(row.image, seen.pixels[i]) for i, row in enumerate(rows))
    assert all(torch.equal(row.maps, maps[3][i // 2]) for i, row in enumerate(rows))
    assert [row.label for row in rows[:2]] == ["frame 1\nblock 3", "frame 2\nblock 3"]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "source", "options", "message"),
    [
        (None, "nowhere", {}, "no file or folder '.*nowhere'"),
        (None, "empty", {}, "empty holds no image or video"),
        (None, "broken.txt", {}, "'.txt'"),
        (None, "broken.png", {}, "broken.png cannot be read"),
        (None, "broken.mp4", {}, "broken.mp4 cannot be read"),
        (MINI, "a.png", {}, f"{MINI} has no learned tokens"),
        ("vit_mini", "a.png", {}, "'vit_mini'"),
        (VIVIT, "a.png", {}, "takes clips of 8 frames"),
        (VIVIT, "a.mkv", {"frames": 4}, "frames is 4, .* 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    model: str | None, source: str, options: Any, message: str, mini: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    make_image(tmp_path / "a.png")
    make_video(tmp_path / "a.mkv")
    for end in ("txt", "png", "mp4"):
        (tmp_path / f"broken.{end}").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=message):
        run_on(model or mini, tmp_path / source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_and_a_video_without_pyav(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "a.png")
    unfit = {"a.png": "a.png is no folder", "a.png/out": "a.png is no folder", "": "outside"}
    for out, message in (unfit | {"deep/out": "outside"}).items():
        with pytest.raises(ValueError, match=message):
            run_on(mini, tmp_path, tmp_path / out)
    video = make_video(tmp_path / "a.mkv")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs av; run pip install '\.\[video\]"):
        run_on(mini, video, tmp_path / "out")


def test_a_loaded_model_that_takes_no_such_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 channels"):
        input_pipeline(nn.Identity(), [2, 28, 28], None)
    config = MapsConfig("mine", str(make_image(tmp_path / "a.png")), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"\[1, 3, 20, 20\]"):
        run_maps(config, (create_model(MINI, num_tokens=3, in_chans=3), (3, 20, 20)))


def test_options_out_of_range_are_refused() -> None:
    counts = {"limit": 0, "frames": 0, "stride": -1, "img_size": -1, "frames_per_second": 0}
    options: dict[str, Any] = {"animation": "webp"} | counts
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            MapsConfig("a", "b", "c", **{name: value})
