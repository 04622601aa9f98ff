"""Whole checkpoints from scenic and back: the same numbers, and what has to be given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tokenlearner import load_model, save_model
from tokenlearner.checkpoints.convert import ConvertConfig, convert_checkpoint
from tokenlearner.checkpoints.flax_msgpack import write_flax
from tokenlearner.checkpoints.readers import read_weights
from tokenlearner.checkpoints.scenic import nest, to_scenic
from tokenlearner.commands.main import main
from tokenlearner.models.factory import create_model

Golden = Callable[[str], dict[str, np.ndarray]]

CASES: dict[str, dict[str, Any]] = {
    "vit_v11": {"at": 2},
    "vit_v1_fuser_prelogits": {},
    "vit_patch_baseline": {"global_pool": "max", "height": 32, "width": 24},
    "video_3dconv_v11": {"at": 2, "num_frames": 6},
    "video_3dconv_fuser": {"num_frames": 6},
    "video_sampling": {"at": 2, "num_frames": 4},
    "representation_video": {"at": 2, "num_frames": 3},
}


def checkpoint(arrays: dict[str, np.ndarray], path: Path) -> Path:
    """A train state as scenic writes it, with the step and an optimizer's state."""
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    state = {"0": {"mu": nest(params)}}
    write_flax(path, {"global_step": np.int32(7), "params": nest(params), "opt_state": state})
    return path


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_converted_checkpoint_has_scenics_numbers_and_comes_back_bit_for_bit(
    name: str, golden: Golden, tmp_path: Path
) -> None:
    arrays = golden(name)
    source, out = checkpoint(arrays, tmp_path / "checkpoint_7"), tmp_path / "model.safetensors"
    convert_checkpoint(ConvertConfig(str(source), str(out), **CASES[name]))
    x = torch.from_numpy(arrays["input0"]).movedim(-1, 1)  # channels first
    result = load_model(out)(x).numpy()
    np.testing.assert_allclose(result, arrays["output"], rtol=1e-5, atol=1e-5)
    weights = read_weights(convert_checkpoint(ConvertConfig(str(out), str(tmp_path / "back_8"))))
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    assert weights.keys() == params.keys()
    assert all(np.array_equal(weights[key].numpy(), value) for key, value in params.items())


@pytest.mark.parametrize("out", ["new.safetensors", "new_7"])
def test_a_disk_without_room_is_named_before_anything_is_written(
    out: str, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint(golden("vit_v11"), tmp_path / "checkpoint_7"))
    if out == "new_7":
        source = str(convert_checkpoint(ConvertConfig(source, f"{tmp_path}/a.safetensors", at=2)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"MiB are to be written there"):
        convert_checkpoint(ConvertConfig(source, str(tmp_path / out), at=2))
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("learner", ["v1", "v1-mean"])
@torch.no_grad()
def test_the_pooling_of_v1_is_an_argument(learner: str, tmp_path: Path) -> None:
    model = create_model("vit_mini_patch4_28", num_tokens=4, at=1, learner=learner).eval()
    np.savez(tmp_path / "params.npz", **to_scenic(model))
    out = str(tmp_path / "model.safetensors")
    source = str(tmp_path / "params.npz")
    given = None if learner == "v1" else learner  # the sum is scenic's default
    convert_checkpoint(ConvertConfig(source, out, at=1, learner=given))
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(load_model(out)(x), model(x))


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, str]:
    """A checkpoint with tokens, and where to write."""
    model = create_model("vit_mini_patch4_tl8at3_28")
    write_flax(tmp_path / "checkpoint", {"params": nest(to_scenic(model))})
    return {"checkpoint": str(tmp_path / "checkpoint"), "out": str(tmp_path / "out.safetensors")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "--at"),
        ({"at": 6}, "at is 6"),
        ({"at": 3, "num_frames": 5}, "49 positions do not make 5 frames"),
        ({"at": 3, "height": 28, "width": 32}, "49 positions do not make 1 frames of 28 x 32"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    more: dict[str, Any], message: str, plain: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(ConvertConfig(**plain, **more))
    assert not Path(plain["out"]).exists()


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("video_3dconv_v11", 2, "tubelets of 2; pass --num_frames"),
        ("vit_v1_fuser_prelogits", 1, "at is 1, but the fusers start at block 2"),
    ],
)
def test_what_scenics_model_needs_is_said(
    name: str, at: int, message: str, golden: Golden, tmp_path: Path
) -> None:
    source = checkpoint(golden(name), tmp_path / "checkpoint_7")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(ConvertConfig(str(source), str(tmp_path / "x.safetensors"), at=at))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"global_pool": "gap"}, "global_pool is 'gap'"),
        ({"learner": "v2"}, "learner is 'v2'"),
        ({"height": 28}, "height and width"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertConfig("a", "b", **arguments)


def test_the_command_converts(plain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", plain["checkpoint"], plain["out"], "--at", "3"])
    assert capsys.readouterr().out == f"The checkpoint is {plain['out']}\n"
    model = load_model(plain["out"])
    assert isinstance(model, nn.Module)
    assert save_model(model, plain["out"])
