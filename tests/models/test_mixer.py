"""The Mixers on learned tokens: equal to loops written out, in timm's sizes."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer, ResBlock
from tiny import randomized
from torch import Tensor, nn

from tokenlearner import attention_maps
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import FusedBlock, ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
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


@cache
def on_meta(name: str) -> TokenLearnerMixer:
    """The whole Mixer without numbers, to look at only."""
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
    assert torch.equal(ours(images), timms(images))  # the same operations on the same machine
    exact = MlpMixer(**plain).eval()
    exact.load_state_dict(ours.state_dict(), strict=True)
    assert not torch.equal(ours(images), exact(images))


@torch.no_grad()
def test_v1_sees_the_grid_of_an_image_that_is_no_square() -> None:
    model, other = tiny(learner="v1"), tiny(learner="v1", img_size=(12, 8))
    assert (model.blocks[2].grid, other.blocks[2].grid) == ((4, 6), (6, 4))
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 24, 16)
    torch.testing.assert_close(model.blocks[2].learn(x), model.blocks[2].learner(x, (4, 6)))
    assert not torch.allclose(model.blocks[2].learn(x), other.blocks[2].learn(x))


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
    torch.testing.assert_close(model.forward_features(images), x)


def counted(model: nn.Module) -> int:
    return count_macs(model, torch.empty(1, *model.default_cfg["input_size"], device="meta"))


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


@both_ways
def test_attention_maps_are_those_of_the_learners(fuse: bool) -> None:
    model = tiny(fuse=fuse)
    images = make_images(model)
    maps = attention_maps(model, images)
    assert list(maps) == ([2, 3] if fuse else [2])
    x = model.blocks[1](model.blocks[0](model.stem(images)))
    expected = model.blocks[2].learner.attention(x).unflatten(-1, (4, 6))
    torch.testing.assert_close(maps[2], expected.detach())


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


@pytest.mark.parametrize("width", [7, None])
def test_fusers_have_the_width_that_is_given(width: int | None) -> None:
    block = tiny(fuse=True, fuser_bottleneck_dim=width).blocks[2]
    assert isinstance(block, FusedBlock)
    gates = block.fuser.gates
    assert isinstance(gates, nn.Linear) if width is None else gates[0].out_features == width


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"num_tokens": -1}, "num_tokens"),
        ({"num_tokens": True}, "num_tokens"),
        ({"num_tokens": 25}, "num_tokens"),
        ({"at": 4}, "at"),
        ({"at": 1.0}, "at"),
        ({"learner": "v2"}, "learner"),
        ({"fuser_bottleneck_dim": -1}, "fuser_bottleneck_dim"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {kwargs[argument]!r}"):
        TokenLearnerMixer(**(TINY | kwargs))


def test_as_many_tokens_as_positions_fit() -> None:
    assert tiny(num_tokens=24)(torch.randn(2, 3, 8, 12)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 3, 16, 24), (2, 1, 8, 12), (3, 8, 12)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny(fuse=True)
    text = r"images are \[" + ", ".join(map(str, shape)) + r"\], expected \[b, 3, 8, 12\]"
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=text):
            run(torch.randn(shape))
