"""From a table to names that timm knows: refusals, weights from a folder, what a model tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import randomized
from torch import Tensor, nn

from tokenlearner.models import registry as registry
from tokenlearner.models.registry import SIZES, blocks_with_grid, build_variant, sized, variant_cfg
from tokenlearner.models.vit import TokenLearnerViT, build_vit
from tokenlearner.models.vivit import ViViT, build_vivit

PLAIN, MINI = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
CLIP = "vivit_mini_patch8x2_tl4at3_32"
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_tokens": 5, "at": 1}


def inputs(model: Any) -> Tensor:
    clip = [model.num_frames] if isinstance(model, ViViT) else []
    return torch.randn(2, model.in_chans, *clip, *model.patch_embed.img_size)


def folder(path: Path, model: nn.Module, **config: Any) -> str:
    """What timm calls a local-dir, written by hand."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), str(path / "model.safetensors"))
    return f"local-dir:{path}"


def check_equal(loaded: Any, model: Any) -> None:
    x = inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), model(x))


# --- weights -----------------------------------------------------------------------------------

REFUSED = "there are no pretrained weights for .*; pass pretrained=False, or load a checkpoint of"


@pytest.mark.parametrize("name", [PLAIN, MINI, CLIP])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pretrained_cfg": {}},
        {"pretrained_cfg": {"num_classes": 3, "url": ""}},
        {"pretrained_cfg_overlay": {"file": None, "hf_hub_id": None}},
    ],
)
def test_weights_without_a_source_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED.replace(".*", name)):
        timm.create_model(name, pretrained=True, **arguments)


def test_a_class_of_ones_own_is_refused_weights_under_its_name() -> None:
    with pytest.raises(ValueError, match=REFUSED.replace(".*", "my_vit")):
        build_variant(TokenLearnerViT, "my_vit", {}, True, {})


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("learner", ["v1", "v11", "grouped-linear"])
def test_timm_loads_a_folder_with_weights(learner: str, fuse: bool, tmp_path: Path) -> None:
    kwargs = SMALL | {"learner": learner, "fuse": fuse, "img_size": [20, 28]}
    model = randomized(build_vit(MINI, num_classes=3, **kwargs))
    cfg = {"input_size": [1, 20, 28], "classifier": "head", "first_conv": "patch_embed.proj"}
    told = {"num_classes": 3, "model_args": kwargs, "pretrained_cfg": cfg}
    loaded: Any = timm.create_model(folder(tmp_path, model, architecture=MINI, **told), True)
    assert loaded.blocks[1].grid == (5, 7)
    check_equal(loaded, model)


def test_a_folder_loads_the_representation_layer_too(tmp_path: Path) -> None:
    kwargs = {"representation_size": 6, "global_pool": "sum"}
    model = randomized(build_vit(MINI, **kwargs))
    told = {"num_classes": 10, "model_args": kwargs, "pretrained_cfg": {}}
    loaded = timm.create_model(folder(tmp_path, model, architecture=MINI, **told), True)
    check_equal(loaded, model)


def test_timm_loads_a_folder_with_weights_of_a_video_model(tmp_path: Path) -> None:
    kwargs = {"num_frames": 4, "img_size": [16, 24], "input_format": "bcthw", "learner": "v1"}
    model = randomized(build_vivit(CLIP, num_classes=3, in_chans=2, **kwargs))
    cfg = {"input_size": [2, 16, 24], "classifier": "head", "first_conv": "patch_embed.proj"}
    told = {"num_classes": 3, "model_args": kwargs, "pretrained_cfg": cfg}
    loaded: Any = timm.create_model(folder(tmp_path, model, architecture=CLIP, **told), True)
    assert (loaded.in_chans, loaded.num_frames) == (2, 4)
    check_equal(loaded, model)
    with pytest.raises(ValueError, match="in_chans is 3, but the weights are for 2 channels"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=3)


@pytest.mark.parametrize("name", [MINI, "vit_small_patch32_tl8at6_224"])
def test_head_and_channels_are_those_that_the_folders_config_tells(
    name: str, tmp_path: Path
) -> None:
    small = {"embed_dim": 24, "depth": 2, "at": 1}
    ends = {"num_classes": 3, "in_chans": 4, "img_size": (96, 96)}
    model = randomized(build_vit(name, **small, **ends))
    cfg = {"input_size": [4, 96, 96], "classifier": "head", "first_conv": "patch_embed.proj"}
    told = {"num_classes": 3, "model_args": small, "pretrained_cfg": cfg}
    source = folder(tmp_path, model, architecture=name, **told)
    loaded: Any = timm.create_model(source, pretrained=True)
    assert loaded.head.out_features == loaded.num_classes == loaded.default_cfg["num_classes"] == 3
    assert loaded.tokenlearner_config == {"name": name, "kwargs": ends | small}
    check_equal(loaded, model)


@torch.no_grad()
def test_a_caller_that_wants_other_classes_gets_a_new_head_on_the_same_features(
    tmp_path: Path,
) -> None:
    model = randomized(build_vit(MINI, num_classes=3))
    cfg = {"input_size": [1, 28, 28], "classifier": "head", "first_conv": "patch_embed.proj"}
    source = folder(tmp_path, model, architecture=MINI, num_classes=3, pretrained_cfg=cfg)
    other: Any = timm.create_model(source, pretrained=True, num_classes=6).eval()
    x = inputs(model)
    assert other(x).shape == (2, 6)
    assert torch.equal(other.forward_features(x), model.forward_features(x))


@torch.no_grad()
def test_a_caller_that_wants_another_size_gets_resampled_positions(tmp_path: Path) -> None:
    model = randomized(build_vit(MINI, learner="v1"))
    cfg = {"input_size": [1, 28, 28], "classifier": "head", "first_conv": "patch_embed.proj"}
    told = {"num_classes": 10, "model_args": {"learner": "v1"}, "pretrained_cfg": cfg}
    source = folder(tmp_path, model, architecture=MINI, **told)
    loaded: Any = timm.create_model(source, pretrained=True, img_size=(20, 36)).eval()
    model.set_input_size((20, 36))
    x = inputs(model)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_folder_builds_an_untrained_model_too(tmp_path: Path) -> None:
    model = randomized(build_vit(MINI, num_classes=3, weight_init="jax"))
    told = {"num_classes": 3, "model_args": {"weight_init": "jax"}, "pretrained_cfg": {}}
    new: Any = timm.create_model(folder(tmp_path, model, architecture=MINI, **told))
    assert new.head.weight.shape == (3, 64)
    assert new.head.weight.abs().max() == 0


def test_timm_loads_a_file_that_an_overlay_names(tmp_path: Path) -> None:
    model = randomized(build_vit(MINI, num_classes=3))
    folder(tmp_path, model)
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 3}
    check_equal(timm.create_model(MINI, pretrained=True, pretrained_cfg_overlay=overlay), model)


def test_timm_takes_weights_from_a_state_dict_in_its_config() -> None:
    model = randomized(build_vit(MINI))
    overlay = {"state_dict": dict(model.state_dict())}
    check_equal(timm.create_model(MINI, pretrained=True, pretrained_cfg_overlay=overlay), model)


HUB: list[tuple[str, dict[str, Any], Any]] = [
    (PLAIN, {"in_chans": 3}, None),
    (MINI, {"in_chans": 3, "fuse": True, "learner": "v1", "global_pool": "max"}, None),
    (MINI, {"in_chans": 3, "representation_size": 6}, lambda m: m.reset_classifier(4, "sum")),
    (MINI, {"in_chans": 3, "learner": "v1"}, lambda m: m.set_input_size((20, 36))),
    (CLIP, {"fuse": True}, lambda m: m.set_input_size((40, 24))),
    (CLIP, {"sampling": "uniform", "num_frames": 3}, lambda m: m.reset_classifier(2, "sum")),
]


@pytest.mark.parametrize(("name", "kwargs", "change"), HUB)
def test_what_timm_writes_for_its_hub_is_the_same_model_when_read(
    name: str, kwargs: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    model: Any = timm.create_model(name, **kwargs)
    if change is not None:
        change(model)
    save_for_hf(randomized(model), tmp_path)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.global_pool == model.global_pool
    check_equal(loaded, model)


# --- what a model tells ------------------------------------------------------------------------


def test_a_model_knows_its_name_and_the_callers_arguments() -> None:
    model: Any = timm.create_model(MINI)
    assert model.tokenlearner_config == {"name": MINI, "kwargs": {}}
    kwargs = {"num_classes": 3, "at": 1, "fuse": True}
    assert timm.create_model(MINI, **kwargs).tokenlearner_config == {"name": MINI, "kwargs": kwargs}
    clip: Any = timm.create_model(CLIP, num_frames=4)
    assert clip.tokenlearner_config == {"name": CLIP, "kwargs": {"num_frames": 4}}


def test_where_weights_came_from_is_no_part_of_what_a_model_tells(tmp_path: Path) -> None:
    model = randomized(build_vit(MINI))
    folder(tmp_path, model)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    options = {"pretrained_cfg_overlay": overlay, "cache_dir": str(tmp_path)}
    loaded: Any = timm.create_model(MINI, True, **options)
    assert loaded.tokenlearner_config == {"name": MINI, "kwargs": {}}


def test_arguments_of_the_caller_and_the_table_are_left_as_they_were() -> None:
    config, arguments = {"img_size": 28, "depth": 2}, {"in_chans": 1}
    model = build_variant(
        TokenLearnerViT, MINI, config, False, arguments | {"embed_dim": 12, "num_heads": 2}
    )
    assert (config, arguments) == ({"img_size": 28, "depth": 2}, {"in_chans": 1})
    assert len(model.blocks) == 2


@pytest.mark.parametrize(
    ("config", "size", "classes"),
    [
        ({}, (3, 224, 224), 1000),
        ({"img_size": 32, "in_chans": 1, "num_classes": 7}, (1, 32, 32), 7),
        ({"img_size": (16, 24)}, (3, 16, 24), 1000),
    ],
)
def test_timms_config_follows_the_variant(
    config: dict[str, Any], size: tuple[int, ...], classes: int
) -> None:
    cfg = variant_cfg(config, "stem.proj", crop_pct=1.0)
    assert (cfg["input_size"], cfg["num_classes"]) == (size, classes)
    assert (cfg["first_conv"], cfg["classifier"], cfg["crop_pct"]) == ("stem.proj", "head", 1.0)
    assert cfg["fixed_input_size"] is True


def test_data_for_a_named_model_is_prepared_as_in_the_papers_code() -> None:
    model = timm.create_model("vit_small_patch32_tl8at6_224", embed_dim=12, num_heads=2, depth=7)
    data = timm.data.resolve_data_config(model=model)
    assert (data["input_size"], data["interpolation"]) == ((3, 224, 224), "bicubic")
    assert (data["mean"], data["std"]) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- sizes, maps, names ------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_paper() -> None:
    assert SIZES == {
        "tiny": (192, 3, 12),
        "small": (384, 6, 12),
        "base": (768, 12, 12),
        "large": (1024, 16, 24),
        "huge": (1280, 16, 32),
    }


def test_a_sized_model_has_the_usual_depth_or_the_one_that_is_told() -> None:
    expected = {"img_size": 384, "patch_size": 32, "embed_dim": 384, "num_heads": 6, "depth": 12}
    assert sized("small", 32, 384) == expected
    assert sized("small", 32, 384, 22) == expected | {"depth": 22}


@pytest.mark.parametrize(
    ("config", "depth", "blocks"),
    [
        ({}, 12, (9, 10, 11)),
        ({"num_tokens": 0, "at": 6}, 12, (9, 10, 11)),
        ({"num_tokens": 8, "at": 6}, 12, (3, 4, 5)),
        ({"num_tokens": 8, "at": 6, "fuse": True}, 12, (9, 10, 11)),
        ({"num_tokens": 8, "at": 0.25}, 12, (0, 1, 2)),
        ({"num_tokens": 8}, 12, (3, 4, 5)),
        ({"num_tokens": 8, "at": 2}, 12, (0, 1)),
        ({"num_tokens": 8, "at": 0}, 12, (0,)),
        ({}, 2, (0, 1)),
    ],
)
def test_feature_maps_come_from_the_last_blocks_with_a_grid(
    config: dict[str, Any], depth: int, blocks: tuple[int, ...]
) -> None:
    assert blocks_with_grid(config, depth) == blocks


def test_a_pyramid_in_front_of_which_tokens_are_learned_is_refused() -> None:
    model: Any = timm.create_model(MINI, features_only=True, at=0)
    assert list(model.out_indices) == [0]
    with pytest.raises(ValueError, match="from block 0 on there are learned tokens and no grid"):
        model(torch.randn(2, 1, 28, 28))


def test_names_are_functions_of_the_file_that_has_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: list[Any] = []
    monkeypatch.setattr(registry, "register_model", lambda entry: known.append(entry) or entry)
    monkeypatch.setattr(registry, "my_vit", None, raising=False)
    calls: list[Any] = []

    def build(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        calls.append((name, pretrained, kwargs))
        return nn.Identity()

    registry.register_variants(registry.__name__, ["my_vit"], build)
    [entry] = known
    assert registry.my_vit is entry  # pyright: ignore[reportAttributeAccessIssue]
    assert (entry.__name__, entry.__module__) == ("my_vit", registry.__name__)
    entry(pretrained=True, depth=3)
    assert calls == [("my_vit", True, {"depth": 3})]
