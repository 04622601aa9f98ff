"""The Mixers on learned tokens: equal to loops written out, known to timm, at the expected cost."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.mlp_mixer import MlpMixer, ResBlock
from timm.optim import param_groups_layer_decay
from tiny import check_compiled, randomized
from torch import Tensor, nn

from tokenlearner import attention_maps
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import FusedBlock, ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models import mixer as mixer
from tokenlearner.models.mixer import MIXERS, TokenLearnerMixer, build_mixer

MINI = "mixer_mini_patch4_tl8at3_28"
REDUCED = [name for name in MIXERS if "fuser" not in name]
TINY: dict[str, Any] = {
    "img_size": (8, 12),
    "patch_size": 2,
    "embed_dim": 16,
    "num_blocks": 4,
    "num_classes": 5,
    "num_tokens": 3,
    "at": 2,
}
each_name = pytest.mark.parametrize("name", MIXERS)
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def tiny(**kwargs: Any) -> TokenLearnerMixer:
    return randomized(TokenLearnerMixer(**(TINY | kwargs)))


def narrow(name: str, **kwargs: Any) -> TokenLearnerMixer:
    """A named Mixer with its blocks, patches and tokens, but of little width."""
    return randomized(timm.create_model(name, embed_dim=16, num_classes=7, **kwargs))


@cache
def on_meta(name: str) -> TokenLearnerMixer:
    """The whole Mixer without numbers, to be looked at only."""
    with torch.device("meta"):
        return timm.create_model(name)


def make_images(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.stem.proj.in_channels, *model.stem.img_size)


# --- numbers -----------------------------------------------------------------------------------


@each_learner
@torch.no_grad()
def test_a_reduced_mixer_is_blocks_then_learner_then_blocks(learner: str) -> None:
    model, grid = tiny(learner=learner), (4, 6)
    images = make_images(model)
    x = model.blocks[1](model.blocks[0](model.stem(images)))
    assert x.shape[:2] == (2, 24)
    tokens = model.blocks[2].learner(x, grid)
    tokens = model.blocks[3](model.blocks[2].block(tokens))
    assert tokens.shape[:2] == (2, 3)
    torch.testing.assert_close(model(images), model.head(model.norm(tokens).mean(dim=1)))


@each_learner
@torch.no_grad()
def test_a_fused_mixer_adds_what_its_fusers_make_of_the_blocks_tokens(learner: str) -> None:
    model, grid = tiny(fuse=True, learner=learner), (4, 6)
    images = make_images(model)
    x = model.blocks[1](model.blocks[0](model.stem(images)))
    for wrapped in model.blocks[2:]:
        tokens = wrapped.block(wrapped.learner(x, grid))
        assert tokens.shape[:2] == (2, 3)
        x = x + wrapped.fuser(tokens, x)
    assert x.shape[:2] == (2, 24)
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean(dim=1)))


@torch.no_grad()
def test_without_tokens_it_is_timms_mixer_with_tanh_gelu() -> None:
    ours = tiny(num_tokens=0)
    plain = {key: value for key, value in TINY.items() if key not in ("num_tokens", "at")}
    timms = MlpMixer(**plain, act_layer=partial(nn.GELU, approximate="tanh")).eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    images = make_images(ours)
    assert torch.equal(ours(images), timms(images))
    exact = MlpMixer(**plain).eval()
    exact.load_state_dict(ours.state_dict(), strict=True)
    assert not torch.equal(ours(images), exact(images))


@torch.no_grad()
def test_v1_sees_the_grid_of_an_image_that_is_no_square() -> None:
    model, other = tiny(learner="v1"), tiny(learner="v1", img_size=(12, 8))
    assert (model.blocks[2].grid, other.blocks[2].grid) == ((4, 6), (6, 4))
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 24, 16)
    assert torch.equal(model.blocks[2].learn(x), model.blocks[2].learner(x, (4, 6)))
    assert not torch.allclose(model.blocks[2].learn(x), other.blocks[2].learn(x))


@each_name
def test_layer_norms_and_gelus_have_the_official_numbers(name: str) -> None:
    modules = list(on_meta(name).modules())
    assert {m.eps for m in modules if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.approximate for m in modules if isinstance(m, nn.GELU)} == {"tanh"}


@both_ways
def test_learners_and_fusers_keep_their_own_initialization(fuse: bool) -> None:
    torch.manual_seed(3)
    model = TokenLearnerMixer(**TINY, fuse=fuse)
    torch.manual_seed(3)
    other = TokenLearnerMixer(**TINY, fuse=fuse, learner="v1")
    assert torch.equal(model.blocks[0].mlp_tokens.fc1.weight, other.blocks[0].mlp_tokens.fc1.weight)
    assert model.head.weight.abs().max() == 0  # timm's
    bias = model.blocks[2].learner.attention_maps[0].bias
    assert 0 < bias.abs().max() < 1e-5  # timm's would be 0
    for wrapped in model.blocks[2:] if fuse else ():
        assert wrapped.fuser.mix.weight.abs().max() == 0


@torch.no_grad()
def test_a_new_fused_mixer_is_as_if_its_blocks_with_fusers_were_not_there() -> None:
    model = TokenLearnerMixer(**TINY, fuse=True).eval()
    images = make_images(model)
    x = model.norm(model.blocks[1](model.blocks[0](model.stem(images))))
    assert torch.equal(model.forward_features(images), x)


# --- cost --------------------------------------------------------------------------------------


def block_macs(n: int, c: int) -> int:
    return 2 * n * (c // 2) * c + 8 * n * c * c


def learner_macs(learner: str, n: int, c: int, k: int) -> int:
    groups = 8 if learner == "grouped-linear" else max(1, c // 128)
    maps = {
        "v11": 64 * n * c + 64 * n * k,
        "v1": 9 * n * k * (c + 3 * k),
        "v1-mean": 9 * n * k * (c + 3 * k),
        "grouped": n * c * c // groups + n * c * k + k * c * c // groups,
        "grouped-linear": k * c * c // groups + n * c * k + k * c * c // groups,
    }
    return maps[learner] + n * k * c


def fuser_macs(n: int, c: int, k: int, hidden: int | None = 64) -> int:
    gates = n * c * k if hidden is None else hidden * n * c + hidden * n * k
    return k * k * c + gates + n * k * c


def mixer_macs(config: dict[str, Any]) -> int:
    side, chans = config.get("img_size", 224), config.get("in_chans", 3)
    patch, c, k = config["patch_size"], config["embed_dim"], config["num_tokens"]
    n, at, after = (side // patch) ** 2, config["at"], config["num_blocks"] - config["at"]
    learner = learner_macs(config.get("learner", "v11"), n, c, k)
    total = n * patch * patch * chans * c + c * config.get("num_classes", 1000)
    total += at * block_macs(n, c) + after * block_macs(k, c)
    if config.get("fuse"):
        return total + after * (
            learner + fuser_macs(n, c, k, config.get("fuser_bottleneck_dim", 64))
        )
    return total + learner


def counted(model: nn.Module) -> int:
    return count_macs(model, torch.empty(1, *model.default_cfg["input_size"], device="meta"))


@each_name
def test_counted_multiply_adds_are_those_of_the_closed_form(name: str) -> None:
    assert counted(on_meta(name)) == mixer_macs(MIXERS[name])


@each_learner
@pytest.mark.parametrize("fuser", [{}, {"fuse": True, "fuser_bottleneck_dim": None}])
def test_the_closed_form_holds_for_every_learner_and_fuser(
    fuser: dict[str, Any], learner: str
) -> None:
    kwargs = {"learner": learner, "num_tokens": 4, "num_blocks": 2, "at": 1, "embed_dim": 256}
    with torch.device("meta"):
        model = build_mixer(MINI, **kwargs, **fuser)
    assert counted(model) == mixer_macs(MIXERS[MINI] | kwargs | fuser)


def test_tokens_from_the_middle_on_save_almost_half() -> None:
    ratio = counted(on_meta("mixer_b16_tl8at6_224")) / counted(on_meta("mixer_b16_224"))
    assert ratio == pytest.approx(0.525, abs=0.005)


# --- names -------------------------------------------------------------------------------------


def test_the_names_say_what_is_built() -> None:
    for name, config in MIXERS.items():
        tokens, at = config["num_tokens"], config["at"]
        assert f"_tl{tokens}at{at}_" in name
        assert at == config["num_blocks"] // 2
        assert ("_fuser_" in name) == config.get("fuse", False)
        assert name.endswith(f"_{config.get('img_size', 224)}")


SIZES = ["s32", "s16", "b32", "b16", "l32", "l16"]


@pytest.mark.parametrize("size", SIZES)
def test_the_blocks_in_front_of_the_learner_are_timms_of_that_size(size: str) -> None:
    [name] = [name for name in REDUCED if name.startswith(f"mixer_{size}_")]
    ours, timms = on_meta(name), on_meta(f"mixer_{size}_224")
    at = MIXERS[name]["at"]
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    expected = {k: v.shape for k, v in timms.state_dict().items()}
    behind = tuple(f"blocks.{i}." for i in range(at, len(timms.blocks)))
    common = {k: v for k, v in expected.items() if not k.startswith(behind)}
    assert {k: shapes[k] for k in common} == common
    assert len(ours.blocks) == len(timms.blocks)


def test_these_sizes_and_no_others_are_listed() -> None:
    assert len(REDUCED) == len(SIZES) + 1
    assert [name.split("_")[1] for name in MIXERS if "fuser" in name] == ["s16", "b16", "l16"]


@each_name
def test_importing_the_file_registers_the_names_with_timm(name: str) -> None:
    assert timm.is_model(name)
    assert timm.model_entrypoint(name) is getattr(mixer, name)


@each_name
def test_timms_config_names_the_input_and_the_layers_of_the_model(name: str) -> None:
    model = on_meta(name)
    config = model.default_cfg
    assert config["input_size"] == (model.stem.proj.in_channels, *model.stem.img_size)
    assert config["num_classes"] == model.num_classes == model.head.out_features
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    data = timm.data.resolve_data_config(model=model)
    assert set(data["mean"]) == set(data["std"]) == {0.5}
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")
    assert config["fixed_input_size"]


def test_the_model_knows_its_name_and_the_callers_arguments() -> None:
    assert build_mixer(MINI).tokenlearner_config == {"name": MINI, "kwargs": {}}
    kwargs = {"num_classes": 3, "drop_path_rate": 0.1}
    model = timm.create_model(MINI, **kwargs)
    assert model.tokenlearner_config == {"name": MINI, "kwargs": kwargs}


OVERRIDES: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({"num_classes": 3}, (1, 28, 28), (2, 3)),
    ({"in_chans": 3}, (3, 28, 28), (2, 10)),
    ({"img_size": (24, 36), "patch_size": 6}, (1, 24, 36), (2, 10)),
    ({"num_classes": 0, "embed_dim": 48, "num_blocks": 4}, (1, 28, 28), (2, 48)),
    ({"global_pool": ""}, (1, 28, 28), (2, 8, 10)),
    ({"at": 0.9, "num_tokens": 4, "global_pool": ""}, (1, 28, 28), (2, 4, 10)),
    ({"num_tokens": 0, "global_pool": ""}, (1, 28, 28), (2, 49, 10)),
    ({"block_layer": ResBlock, "mlp_ratio": 4}, (1, 28, 28), (2, 10)),
]


@pytest.mark.parametrize(("kwargs", "image", "out"), OVERRIDES, ids=[str(o[0]) for o in OVERRIDES])
@torch.no_grad()
def test_arguments_go_before_the_variants_own(
    kwargs: dict[str, Any], image: tuple[int, ...], out: tuple[int, ...]
) -> None:
    assert timm.create_model(MINI, **kwargs)(torch.randn(2, *image)).shape == out


def test_a_share_of_the_depth_is_a_block() -> None:
    at = [i for i, b in enumerate(build_mixer(MINI, at=0.9).blocks) if isinstance(b, ReducedBlock)]
    assert at == [5]


# --- weights -----------------------------------------------------------------------------------


def folder(path: Path, model: nn.Module, **config: Any) -> str:
    """What timm calls a local-dir."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), str(path / "model.safetensors"))
    return f"local-dir:{path}"


@each_name
def test_pretrained_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no pretrained weights for {name}; pass pretrained=Fal"):
        timm.create_model(name, pretrained=True)


@torch.no_grad()
def test_timm_loads_a_folder_with_weights(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 24, "fuse": True, "num_tokens": 5, "img_size": [20, 28]}
    model = randomized(build_mixer(MINI, num_classes=3, **kwargs))
    cfg = {"input_size": [1, 20, 28], "classifier": "head", "first_conv": "stem.proj"}
    told = {"num_classes": 3, "model_args": kwargs, "pretrained_cfg": cfg}
    name = folder(tmp_path, model, architecture=MINI, **told)
    loaded = timm.create_model(name, pretrained=True).eval()
    images = make_images(model)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("name", [MINI, "mixer_s32_tl8at4_224"])
@torch.no_grad()
def test_a_folder_that_tells_only_classes_and_input_keeps_its_head_and_stem(
    name: str, tmp_path: Path
) -> None:
    small = {"embed_dim": 16, "num_blocks": 2, "at": 1}
    two_ends = {"num_classes": 3, "in_chans": 4, "img_size": (96, 96)}
    model = randomized(build_mixer(name, **small, **two_ends))
    cfg = {"input_size": [4, 96, 96], "classifier": "head", "first_conv": "stem.proj"}
    told = {"num_classes": 3, "model_args": small, "pretrained_cfg": cfg}
    source = folder(tmp_path, model, architecture=name, **told)
    loaded = timm.create_model(source, pretrained=True).eval()
    images = make_images(model)
    assert torch.equal(loaded(images), model(images))
    assert loaded.tokenlearner_config == {"name": name, "kwargs": two_ends | small}
    other = timm.create_model(source, pretrained=True, num_classes=6).eval()
    assert other(images).shape == (2, 6)
    assert torch.equal(other.forward_features(images), model.forward_features(images))


@torch.no_grad()
def test_timm_loads_a_file_that_an_overlay_names(tmp_path: Path) -> None:
    model = randomized(build_mixer(MINI, num_classes=3))
    folder(tmp_path, model)
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 3}
    loaded = timm.create_model(MINI, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = make_images(model)
    assert torch.equal(loaded(images), model(images))


def test_a_folder_builds_an_untrained_model_too(tmp_path: Path) -> None:
    model = randomized(build_mixer(MINI, num_classes=3))
    name = folder(tmp_path, model, architecture=MINI, num_classes=3, pretrained_cfg={})
    assert timm.create_model(name).head.weight.abs().max() == 0


# --- timm's interface --------------------------------------------------------------------------


@both_ways
@torch.no_grad()
def test_features_and_head_are_the_model(fuse: bool) -> None:
    model = tiny(fuse=fuse)
    images = make_images(model)
    features = model.forward_features(images)
    assert features.shape == (2, 24 if fuse else 3, 16)
    assert torch.equal(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(images))


@both_ways
@torch.no_grad()
def test_the_head_can_be_exchanged(fuse: bool) -> None:
    model = tiny(fuse=fuse)
    model.reset_classifier(3)
    assert model(make_images(model)).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(make_images(model)).shape == (2, 24 if fuse else 3, 16)


def test_layer_decay_puts_a_learner_and_a_fuser_in_their_blocks_layer() -> None:
    model = tiny(fuse=True)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name["stem.proj.weight"] < by_name["blocks.0.norm1.weight"]
    for i in (2, 3):
        prefix = f"blocks.{i}."
        own = {scale for name, scale in by_name.items() if name.startswith(prefix)}
        assert own == {by_name[f"blocks.{i}.learner.norm.weight"]}
        assert by_name[f"blocks.{i}.fuser.mix.weight"] > by_name["blocks.1.norm1.weight"]


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@torch.no_grad()
def test_intermediates_of_a_fused_mixer_have_the_grid_everywhere(fmt: str) -> None:
    model = tiny(fuse=True)
    images = make_images(model)
    final, maps = model.forward_intermediates(images, output_fmt=fmt, norm=True)
    assert torch.equal(final, model.forward_features(images))
    assert len(maps) == 4
    last = maps[-1] if fmt == "NLC" else maps[-1].flatten(2).transpose(1, 2)
    assert torch.equal(last, final)
    if fmt == "NCHW":
        assert {m.shape for m in maps} == {(2, 16, 4, 6)}


@torch.no_grad()
def test_intermediates_of_a_reduced_mixer_are_maps_and_then_tokens() -> None:
    model = tiny()
    images = make_images(model)
    final, tokens = model.forward_intermediates(images, output_fmt="NLC")
    assert [t.shape[1] for t in tokens] == [24, 24, 3, 3]
    assert torch.equal(model.norm(tokens[-1]), final)
    maps = model.forward_intermediates(images, [0, 1], intermediates_only=True, stop_early=True)
    for one, flat in zip(maps, tokens, strict=False):
        assert torch.equal(one, flat.transpose(1, 2).unflatten(2, (4, 6)))


@pytest.mark.parametrize(
    ("indices", "named"), [(None, "2, 3"), (1, "3"), ([0, 2], "2"), ([-1], "3")]
)
def test_a_map_of_a_reduced_block_is_refused(indices: Any, named: str) -> None:
    model = tiny()
    message = (
        f"from block 2 on there are learned tokens and no grid.*block {named} is asked for; take "
        "indices below 2, output_fmt='NLC', or a model with fuse=True"
    )
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(make_images(model), indices)


@each_name
@torch.no_grad()
def test_a_feature_pyramid_ends_where_the_grid_does(name: str) -> None:
    model, config = timm.create_model(name, features_only=True, embed_dim=16), MIXERS[name]
    end = config["num_blocks"] if config.get("fuse") else config["at"]
    assert list(model.out_indices) == [end - 3, end - 2, end - 1]
    side, chans = config.get("img_size", 224), config.get("in_chans", 3)
    grid = side // config["patch_size"]
    maps = model(torch.randn(2, chans, side, side))
    assert [m.shape for m in maps] == [(2, 16, grid, grid)] * 3
    assert model.feature_info.reduction() == [config["patch_size"]] * 3


@torch.no_grad()
def test_a_feature_pyramid_of_chosen_blocks_is_that_of_the_model() -> None:
    model = randomized(build_mixer(MINI))
    chosen = timm.create_model(MINI, features_only=True, out_indices=(0, 2)).eval()
    chosen.model.load_state_dict(model.state_dict(), strict=False)
    images = make_images(model)
    expected = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    for one, other in zip(chosen(images), expected, strict=True):
        assert torch.equal(one, other)


def test_a_pyramid_in_front_of_which_tokens_are_learned_is_refused() -> None:
    model = timm.create_model(MINI, features_only=True, at=0)
    assert list(model.out_indices) == [0]
    with pytest.raises(ValueError, match="from block 0 on there are learned tokens"):
        model(torch.randn(2, 1, 28, 28))


@both_ways
def test_attention_maps_are_those_of_the_learners(fuse: bool) -> None:
    model = tiny(fuse=fuse)
    images = make_images(model)
    maps = attention_maps(model, images)
    assert list(maps) == ([2, 3] if fuse else [2])
    x = model.blocks[1](model.blocks[0](model.stem(images)))
    expected = model.blocks[2].learner.attention(x).unflatten(-1, (4, 6))
    torch.testing.assert_close(maps[2], expected.detach())


# --- every variant, narrow ---------------------------------------------------------------------

# A softmax over positions takes no notice of the first, LayerNorms over channels of the others.
WITHOUT_EFFECT = ("learner.attention_maps.3.bias", "fuser.mix.bias", "mlp_tokens.fc2.bias")


@each_name
def test_every_parameter_is_trained(name: str) -> None:
    model = narrow(name).double().train()
    model(make_images(model).double()).square().sum().backward()
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters()}
    without = {n for n in largest if n.endswith(WITHOUT_EFFECT)}
    assert max(largest[n] for n in without) < 1e-9
    assert min(value for n, value in largest.items() if n not in without) > 1e-9


@each_name
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model = narrow(name).train()
    images = make_images(model)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@each_name
@torch.no_grad()
def test_copies_and_a_strict_round_trip_give_the_same_numbers(name: str) -> None:
    model = narrow(name)
    images = make_images(model)
    expected = model(images)
    rebuilt = narrow(name)
    assert not torch.equal(rebuilt(images), expected)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    for other in [rebuilt, *(copied(model) for copied in COPIES.values())]:
        assert torch.equal(other(images), expected)
        first = next(b for b in other.blocks if isinstance(b, ReducedBlock))
        assert first._grid[0] is other.stem


@each_name
@torch.no_grad()
def test_bfloat16_is_close_to_float32(name: str) -> None:
    model = timm.create_model(name, embed_dim=16, num_classes=7).eval()
    nn.init.normal_(model.head.weight)
    images = make_images(model)
    expected = model(images)
    out = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


COMPILED = [MINI, "mixer_s16_tl8at4_fuser_224"]


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_the_whole_graph_for_any_batch(name: str) -> None:
    model = narrow(name, num_blocks=2, at=1)
    check_compiled(model, {"x": make_images(model)}, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_torch_compile_takes_the_whole_graph_of_every_variant(name: str) -> None:
    model = narrow(name)
    check_compiled(model, {"x": make_images(model)})


# Not with aot_eager: torch 2.15 expects the gradient of a LayerNorm, as in front of a fuser's mix,
# to have the strides of the gradient that comes in, and the CPU's has others. Inductor has its own.
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_gradients_of_a_compiled_mixer_are_those_of_the_plain_one(name: str) -> None:
    model = narrow(name, num_blocks=2, at=1)
    images, parameters = make_images(model), list(model.parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    found = torch.autograd.grad(compiled(images).square().sum(), parameters)
    expected = torch.autograd.grad(model(images).square().sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@each_name
def test_the_blocks_stand_where_the_name_says(name: str) -> None:
    model = on_meta(name)
    at, depth = MIXERS[name]["at"], MIXERS[name]["num_blocks"]
    kinds = [type(block).__name__ for block in model.blocks]
    if MIXERS[name].get("fuse"):
        assert kinds == ["MixerBlock"] * at + ["FusedBlock"] * (depth - at)
    else:
        assert kinds == ["MixerBlock"] * at + ["ReducedBlock"] + ["MixerBlock"] * (depth - at - 1)
    lengths = [
        (b.block if isinstance(b, ReducedBlock) else b).mlp_tokens.fc1.in_features
        for b in model.blocks
    ]
    assert lengths == [model.stem.num_patches] * at + [8] * (depth - at)


def test_new_parts_take_device_dtype_and_the_fusers_width() -> None:
    model = TokenLearnerMixer(
        **TINY, fuse=True, fuser_bottleneck_dim=7, device="meta", dtype=torch.float64
    )
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert isinstance(model.blocks[2], FusedBlock)
    assert model.blocks[2].fuser.gates[0].out_features == 7
    linear = TokenLearnerMixer(**TINY, fuse=True, fuser_bottleneck_dim=None)
    assert isinstance(linear.blocks[2].fuser.gates, nn.Linear)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_tokens": -1}, "num_tokens is -1, expected an integer of 0 or more"),
        ({"num_tokens": True}, "num_tokens is True"),
        ({"num_tokens": 25}, "num_tokens is 25, but an image has 24 positions; ask for fewer"),
        ({"at": 4}, "at is 4, expected a block from 0 to 3"),
        ({"at": 1.0}, "at is 1.0, expected"),
        ({"learner": "v2"}, "learner is 'v2', expected one of 'v11', 'v1'"),
        ({"fuser_bottleneck_dim": -1}, "fuser_bottleneck_dim is -1, expected an integer of 1"),
        ({"num_blocks": 0}, "num_blocks is 0, expected an integer of 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLearnerMixer(**(TINY | kwargs))


def test_as_many_tokens_as_positions_fit() -> None:
    assert tiny(num_tokens=24)(torch.randn(2, 3, 8, 12)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 3, 16, 24), (2, 1, 8, 12), (3, 8, 12)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny(fuse=True)
    text = r"the images are \[" + ", ".join(map(str, shape))
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=text + r"\], expected \[b, 3, 8, 12\]; a Mixer takes"):
            run(torch.randn(shape))
