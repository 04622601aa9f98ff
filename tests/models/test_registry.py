"""From a table to names that timm knows: registration, and weights as timm loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import images_for, randomized, stem
from torch import nn

import tokenlearner
from tokenlearner.models.registry import register, sized
from tokenlearner.models.vit import TokenLearnerViT

PLAIN, MINI = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
CLIP, FRAMES = "vivit_mini_patch8x2_tl4at3_32", "framevit_mini_patch8_f6_tl4at3_32"
MIXER = "mixer_mini_patch4_tl8at3_28"
SMALL: dict[str, dict[str, Any]] = {  # arguments with which the models are smaller than by name
    MINI: {"embed_dim": 16, "depth": 4, "num_tokens": 5, "at": 1, "learner": "v1", "fuse": True},
    MIXER: {"embed_dim": 16, "num_blocks": 2, "at": 1, "num_tokens": 5},
    CLIP: {"embed_dim": 16, "depth": 2, "at": 1, "num_frames": 4, "input_format": "bcthw"},
    FRAMES: {"embed_dim": 16, "depth": 2, "at": 1, "learner": "grouped-linear"},
}
each_class = pytest.mark.parametrize("name", SMALL)


def folder(path: Path, model: nn.Module, **config: Any) -> str:
    """What timm calls a local-dir, written by hand."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), str(path / "model.safetensors"))
    return f"local-dir:{path}"


def folder_of(path: Path, model: Any, **kwargs: Any) -> str:
    """The same with all that timm's own folders have."""
    cfg = {key: model.default_cfg[key] for key in ("classifier", "first_conv")}
    cfg["input_size"] = [stem(model).proj.in_channels, *stem(model).img_size]
    config = {"num_classes": model.num_classes, "model_args": kwargs, "pretrained_cfg": cfg}
    architecture = model.tokenlearner_config["name"]
    return folder(path, model, architecture=architecture, **config)


@torch.no_grad()
def check_equal(loaded: Any, model: Any) -> None:
    x = images_for(model)
    assert torch.equal(loaded.eval()(x), model(x))  # the same operations on the same machine


# --- registration ------------------------------------------------------------------------------


class MyViT(TokenLearnerViT):
    """A class of one's own."""


def test_a_class_of_ones_own_gets_names_that_timm_builds() -> None:
    row = sized("mini", 4, 28, depth=2) | {"in_chans": 1}
    before, kwargs = dict(row), {"num_classes": 3}
    build = register(MyViT, {"my_vit_28": row}, first_conv="patch_embed.proj", crop_pct=1.0)
    model: Any = timm.create_model("my_vit_28", **kwargs)
    assert type(model) is type(build("my_vit_28")) is MyViT
    assert (len(model.blocks), model.embed_dim, model.num_classes) == (2, 64, 3)
    assert model.tokenlearner_config == {"name": "my_vit_28", "kwargs": kwargs}
    assert (row, kwargs) == (before, {"num_classes": 3})
    config = model.default_cfg
    assert (config["input_size"], config["num_classes"]) == ((1, 28, 28), 1000)
    assert (config["crop_pct"], config["first_conv"]) == (1.0, "patch_embed.proj")
    assert timm.model_entrypoint("my_vit_28").__module__ == __name__
    with pytest.raises(ValueError, match="my_vit_28"):
        build("my_vit_28", pretrained=True)


@each_class
def test_timm_and_tokenlearner_build_the_same_model(name: str) -> None:
    torch.manual_seed(7)
    ours = tokenlearner.create_model(name, **SMALL[name])
    torch.manual_seed(7)
    timms = timm.create_model(name, **SMALL[name])
    torch.testing.assert_close(dict(ours.state_dict()), dict(timms.state_dict()))
    assert ours.tokenlearner_config == timms.tokenlearner_config
    assert timms.tokenlearner_config == {"name": name, "kwargs": SMALL[name]}


# --- weights -----------------------------------------------------------------------------------


@each_class
def test_weights_without_a_source_are_refused(name: str) -> None:
    for kwargs in (
        {},
        {"pretrained_cfg": {}},
        {"pretrained_cfg": {"num_classes": 3, "url": ""}},
        {"pretrained_cfg_overlay": {"file": None, "hf_hub_id": None}},
    ):
        with pytest.raises(ValueError, match=f"weights for {name}; pass pretrained=False"):
            timm.create_model(name, pretrained=True, **kwargs)


@each_class
@torch.no_grad()
def test_timm_loads_a_folder_with_the_head_and_channels_of_its_config(
    name: str, tmp_path: Path
) -> None:
    small = SMALL[name]
    ends = {"num_classes": 3, "in_chans": 4, "img_size": (32, 48)}
    model = randomized(timm.create_model(name, **small, **ends))
    source = folder_of(tmp_path, model, **small)
    loaded: Any = timm.create_model(source, pretrained=True)
    assert loaded.head.out_features == loaded.num_classes == loaded.default_cfg["num_classes"] == 3
    assert loaded.tokenlearner_config == {"name": name, "kwargs": ends | small}
    check_equal(loaded, model)
    other: Any = timm.create_model(source, pretrained=True, num_classes=6).eval()
    x = images_for(model)
    assert other(x).shape == (2, 6)
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
    new: Any = timm.create_model(source)
    assert new.head.weight.shape == (3, 16)
    assert not torch.equal(new.head.weight, model.head.weight)


@pytest.mark.parametrize("name", [CLIP, FRAMES])
def test_other_channels_than_those_of_a_video_models_weights_are_refused(
    name: str, tmp_path: Path
) -> None:
    model = timm.create_model(name, in_chans=2, **SMALL[name])
    source = folder_of(tmp_path, model, **SMALL[name])
    with pytest.raises(ValueError, match=r"in_chans is 3.* 2 channels"):
        timm.create_model(source, pretrained=True, in_chans=3)


@torch.no_grad()
def test_another_size_than_the_folders_gets_resampled_positions(tmp_path: Path) -> None:
    model = randomized(timm.create_model(MINI, learner="v1"))
    source = folder_of(tmp_path, model, learner="v1")
    loaded: Any = timm.create_model(source, pretrained=True, img_size=(20, 36)).eval()
    model.set_input_size((20, 36))
    x = images_for(model)
    torch.testing.assert_close(loaded(x), model(x))


@each_class
def test_timm_loads_the_file_or_the_state_dict_that_an_overlay_names(
    name: str, tmp_path: Path
) -> None:
    model = randomized(timm.create_model(name, **SMALL[name]))
    folder(tmp_path, model)
    file = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10}
    for overlay in (file, {"state_dict": dict(model.state_dict())}):
        options = {"pretrained_cfg_overlay": overlay, "cache_dir": str(tmp_path)}
        loaded: Any = timm.create_model(name, True, **options, **SMALL[name])
        check_equal(loaded, model)
        assert loaded.tokenlearner_config["name"] == name
        assert not {*options} & {*loaded.tokenlearner_config["kwargs"]}


HUB: list[tuple[str, dict[str, Any], Any]] = [
    (PLAIN, {"in_chans": 3}, None),
    (MINI, {"in_chans": 3, "fuse": True, "learner": "v1", "global_pool": "max"}, None),
    (MINI, {"in_chans": 3, "representation_size": 6}, lambda m: m.reset_classifier(4, "sum")),
    (MINI, {"in_chans": 3, "learner": "v1"}, lambda m: m.set_input_size((20, 36))),
    (MIXER, {"in_chans": 3, "fuse": True}, lambda m: m.reset_classifier(4)),
    (FRAMES, {"learner": "v1"}, lambda m: m.reset_classifier(4)),
    (CLIP, {"sampling": "uniform", "num_frames": 3}, lambda m: m.reset_classifier(2, "sum")),
]


@pytest.mark.parametrize(("name", "kwargs", "change"), HUB)
def test_what_timm_writes_for_its_hub_is_the_same_model_when_read(
    name: str, kwargs: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    model: Any = timm.create_model(name, **kwargs)
    if change is not None:
        change(model)
    save_for_hf(randomized(model), tmp_path)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert getattr(loaded, "global_pool", None) == getattr(model, "global_pool", None)
    check_equal(loaded, model)
