"""The ViT on learned tokens: equal to loops written out, for images of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tiny import randomized
from torch import Tensor, nn

from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.insertion import get_insertion, insert, remove
from tokenlearner.models.vit import TokenLearnerViT

PLAIN, LEARNED = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
SHAPE: dict[str, Any] = {
    "img_size": (8, 12),
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
TINY = SHAPE | {"num_tokens": 3, "at": 2}
GRID = (4, 6)
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def tiny(**kwargs: Any) -> Any:
    return randomized(TokenLearnerViT(**(TINY | kwargs)))


def make_images(height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(2, 3, height, width)


def in_front_of_the_learner(model: Any, images: Tensor) -> Tensor:
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed
    return model.blocks[1](model.blocks[0](x))


def final_tokens(model: Any, images: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    """What a reduced or fused model of `TINY` computes, written out."""
    x = in_front_of_the_learner(model, images)
    for block in model.blocks[2:]:
        if not isinstance(block, ReducedBlock):
            x = block(x)
            continue
        tokens = block.block(block.learner(x, grid))
        assert tokens.shape == (len(images), 3, 16)
        x = x + block.fuser(tokens, x) if hasattr(block, "fuser") else tokens
    return model.norm(x)


# --- numbers -----------------------------------------------------------------------------------


@both_ways
@each_learner
@torch.no_grad()
def test_the_model_is_blocks_learners_and_fusers_then_norm_mean_and_head(
    learner: str, fuse: bool
) -> None:
    model, images = tiny(learner=learner, fuse=fuse), make_images()
    tokens = final_tokens(model, images)
    assert tokens.shape == (2, 24 if fuse else 3, 16)
    torch.testing.assert_close(model(images), model.head(tokens.mean(dim=1)))


@torch.no_grad()
def test_a_learner_in_front_of_the_first_block_sees_the_embedded_patches() -> None:
    model, images = tiny(at=0), make_images()
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed
    x = model.blocks[0].block(model.blocks[0].learner(x))
    expected = model.head(model.norm(model.blocks[1:](x)).mean(dim=1))
    torch.testing.assert_close(model(images), expected)


@torch.no_grad()
def test_without_tokens_it_is_timms_vision_transformer() -> None:
    ours, images = tiny(num_tokens=0, fuse=True), make_images()
    options = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    timms = VisionTransformer(**SHAPE, **options, act_layer="gelu_tanh").eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours(images), timms(images))  # the same operations on the same machine
    exact = VisionTransformer(**SHAPE, **options).eval()
    exact.load_state_dict(ours.state_dict(), strict=True)
    assert not torch.equal(ours(images), exact(images))


@torch.no_grad()
def test_timms_arguments_reach_timm() -> None:
    kwargs = {"class_token": True, "reg_tokens": 2, "global_pool": "token", "qk_norm": True}
    kwargs |= {"init_values": 0.1, "mlp_ratio": 2, "act_layer": "gelu", "no_embed_class": True}
    ours, images = randomized(TokenLearnerViT(**SHAPE, **kwargs)), make_images()
    timms = VisionTransformer(**SHAPE, **kwargs).eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images), timms(images))


@both_ways
@torch.no_grad()
def test_a_class_token_goes_around_the_learner(fuse: bool) -> None:
    model, images = tiny(class_token=True, global_pool="token", fuse=fuse), make_images()
    assert model.num_prefix_tokens == 1
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1) + model.pos_embed
    x = model.blocks[1](model.blocks[0](x))
    for block in model.blocks[2:]:
        if not isinstance(block, ReducedBlock):
            x = block(x)
            continue
        tokens = block.block(torch.cat([x[:, :1], block.learner(x[:, 1:])], dim=1))
        assert tokens.shape == (2, 4, 16)
        if fuse:
            rest = x[:, 1:] + block.fuser(tokens[:, 1:], x[:, 1:])
            tokens = torch.cat([tokens[:, :1], rest], dim=1)
        x = tokens
    torch.testing.assert_close(model(images), model.head(model.norm(x)[:, 0]))


@torch.no_grad()
def test_a_class_token_takes_no_part_in_the_mean_over_tokens() -> None:
    model, images = tiny(class_token=True), make_images()
    features = model.forward_features(images)
    assert features.shape == (2, 4, 16)
    torch.testing.assert_close(model(images), model.head(features[:, 1:].mean(dim=1)))


@each_learner
@torch.no_grad()
def test_images_that_patches_do_not_fill_lose_their_rim(learner: str) -> None:
    model = tiny(learner=learner, img_size=(9, 15), patch_size=4, num_tokens=2)
    images = torch.randn(2, 3, 9, 15)
    assert model.patch_embed.grid_size == (2, 3)
    assert model.pos_embed.shape == (1, 6, 16)
    other = images.clone()
    other[:, :, 8:], other[:, :, :, 12:] = 7, 7
    torch.testing.assert_close(model(images), model(other))


# --- pooling and head --------------------------------------------------------------------------

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "sum": lambda x: x.sum(1),
    "avgmax": lambda x: 0.5 * (x.mean(1) + x.amax(1)),
    "": lambda x: x,
}
each_pool = pytest.mark.parametrize("pool", POOLS)


@both_ways
@each_pool
@torch.no_grad()
def test_every_pooling_is_what_its_name_says(pool: str, fuse: bool) -> None:
    model, images = tiny(global_pool=pool, fuse=fuse), make_images()
    assert model.global_pool == pool
    expected = model.head(POOLS[pool](final_tokens(model, images)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("pool", [*POOLS, None])
@torch.no_grad()
def test_reset_classifier_changes_the_pooling_if_one_is_given(pool: str | None) -> None:
    model, images = tiny(global_pool="sum"), make_images()
    model.reset_classifier(4, pool)
    assert model.global_pool == ("sum" if pool is None else pool)
    expected = model.head(POOLS[model.global_pool](final_tokens(model, images)))
    assert expected.shape[-1] == 4
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("own", POOLS)
@each_pool
@torch.no_grad()
def test_pool_takes_another_pooling_for_one_call(pool: str, own: str) -> None:
    model, x = tiny(global_pool=own), torch.randn(2, 3, 16)
    torch.testing.assert_close(model.pool(x, pool), POOLS[pool](x))
    torch.testing.assert_close(model.pool(x), POOLS[own](x))
    assert model.global_pool == own


@pytest.mark.parametrize("include", [False, True])
@torch.no_grad()
def test_the_sum_includes_prefix_tokens_only_if_requested(include: bool) -> None:
    model = tiny(class_token=True, global_pool="sum", pool_include_prefix=include)
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(model.pool(x), x[:, 0 if include else 1 :].sum(1))


@both_ways
@torch.no_grad()
def test_pre_logits_are_tanh_of_a_linear_layer_in_front_of_the_head(fuse: bool) -> None:
    model, images = tiny(representation_size=7, fuse=fuse), make_images()
    pooled = final_tokens(model, images).mean(1)
    represented = torch.tanh(pooled @ model.pre_logits.weight.T + model.pre_logits.bias)
    assert represented.shape == (2, 7)
    torch.testing.assert_close(model(images), model.head(represented))
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), represented)


@pytest.mark.parametrize("pool", [None, "sum", ""])
@torch.no_grad()
def test_the_head_behind_pre_logits_can_be_replaced(pool: str | None) -> None:
    model, images = tiny(representation_size=7), make_images()
    before = model.pre_logits.weight.clone()
    model.reset_classifier(3, pool)
    assert torch.equal(model.pre_logits.weight, before)
    assert (model.head.in_features, model.head.out_features) == (7, 3)
    assert model(images).shape == ((2, 3, 3) if pool == "" else (2, 3))


@torch.no_grad()
def test_without_classes_the_output_is_the_representation() -> None:
    model, images = tiny(representation_size=7, num_classes=0), make_images()
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), model.forward_head(features, pre_logits=True))
    model.reset_classifier(2)
    assert model(images).shape == (2, 2)


def test_dropout_stands_between_pre_logits_and_head() -> None:
    model = tiny(drop_rate=0.5, representation_size=64).train()
    out = model.forward_head(torch.randn(2, 3, 16), pre_logits=True)
    dropped = (out == 0).float().mean().item()
    assert 0.3 < dropped < 0.7
    assert out.abs().max() > 1  # doubled: tanh alone stays below


# --- initialization ----------------------------------------------------------------------------


@both_ways
def test_a_new_model_starts_as_the_official_one(fuse: bool) -> None:
    model = TokenLearnerViT(**(TINY | {"embed_dim": 64, "img_size": 32}), fuse=fuse)
    assert model.head.weight.abs().max() == 0
    assert model.head.bias.abs().max() == 0
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(model.pos_embed.mean().item()) < 1e-3
    qkv = model.blocks[0].attn.qkv
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < qkv.weight.abs().max().item() <= bound
    assert qkv.bias.abs().max() == 0
    fc1 = model.blocks[0].mlp.fc1
    assert fc1.bias.std().item() == pytest.approx(1e-6, rel=0.3)
    fan_in = 3 * 2 * 2
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
    assert model.patch_embed.proj.bias.abs().max() == 0
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in norms)


def test_new_pre_logits_start_lecun_normal_in_front_of_a_head_of_0() -> None:
    model = TokenLearnerViT(**(TINY | {"embed_dim": 64}), representation_size=128)
    assert model.pre_logits.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert model.pre_logits.bias.abs().max() == 0
    assert model.head.weight.abs().max() == model.head.bias.abs().max() == 0


@each_learner
def test_learners_keep_their_own_initialization(learner: str) -> None:
    torch.manual_seed(3)
    model = TokenLearnerViT(**TINY, learner=learner)
    torch.manual_seed(3)
    plain = TokenLearnerViT(**SHAPE)
    expected = LEARNERS[learner](16, 3).state_dict()
    torch.testing.assert_close(dict(model.blocks[2].learner.state_dict()), dict(expected))
    remove(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


@each_learner
@torch.no_grad()
def test_a_new_fused_model_leaves_the_positions_exactly_as_they_are(learner: str) -> None:
    model, images = TokenLearnerViT(**TINY, fuse=True, learner=learner).eval(), make_images()
    expected = model.norm(in_front_of_the_learner(model, images))
    torch.testing.assert_close(model.forward_features(images), expected)


@pytest.mark.parametrize("width", [7, None])
def test_fusers_have_the_width_that_is_given(width: int | None) -> None:
    gates = tiny(fuse=True, fuser_bottleneck_dim=width).blocks[2].fuser.gates
    assert isinstance(gates, nn.Linear) if width is None else gates[0].out_features == width


# --- images of any size ----------------------------------------------------------------------

SIZES = [(12, 8), (16, 16), (10, 14)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def built_for(size: tuple[int, int], model: Any, **kwargs: Any) -> Any:
    """A model built for images of this size, with the other's weights, positions resampled."""
    other = TokenLearnerViT(**(TINY | kwargs | {"img_size": size, "dynamic_img_size": False}))
    state = model.state_dict()
    grid = (size[0] // 2, size[1] // 2)
    prefix = model.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), list(GRID), prefix)
    other.load_state_dict(state, strict=True)
    return other.eval()


@both_ways
@each_learner
@each_size
@torch.no_grad()
def test_an_image_of_any_size_gives_what_a_model_built_for_it_gives(
    size: tuple[int, int], learner: str, fuse: bool
) -> None:
    kwargs: dict[str, Any] = {"learner": learner, "fuse": fuse}
    model = tiny(**kwargs, dynamic_img_size=True)
    images = make_images(*size)
    torch.testing.assert_close(model(images), built_for(size, model, **kwargs)(images))


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_a_class_token_is_no_position_of_an_image_of_another_size(fuse: bool) -> None:
    kwargs: dict[str, Any] = {"learner": "v1", "fuse": fuse, "class_token": True}
    model, images = tiny(**kwargs, dynamic_img_size=True), make_images(12, 8)
    torch.testing.assert_close(model(images), built_for((12, 8), model, **kwargs)(images))


@torch.no_grad()
def test_v1_gets_the_grid_of_each_image() -> None:
    model = tiny(learner="v1", dynamic_img_size=True)
    images, grids = make_images(12, 8), []
    hook = model.blocks[2].learner.register_forward_pre_hook(lambda _, args: grids.append(args[1]))
    model(images)
    model(make_images(8, 12))
    hook.remove()
    assert grids == [(6, 4), (4, 6)]


@torch.no_grad()
def test_padded_images_have_the_padded_grid() -> None:
    model = tiny(learner="v1", dynamic_img_size=True, dynamic_img_pad=True)
    images = make_images(9, 11)
    padded = nn.functional.pad(images, (0, 1, 0, 1))
    torch.testing.assert_close(model(images), model(padded))


@pytest.mark.parametrize("learner", ["v1", "v11"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.zeros(24, 24)}])
def test_a_mask_over_positions_is_refused(
    mask: dict[str, Any], dynamic: bool, learner: str
) -> None:
    model = tiny(learner=learner, dynamic_img_size=dynamic)
    with pytest.raises(ValueError, match="attention mask"):
        model(make_images(), **mask)


@both_ways
@each_learner
@torch.no_grad()
def test_set_input_size_makes_the_model_that_is_built_for_that_size(
    learner: str, fuse: bool
) -> None:
    kwargs: dict[str, Any] = {"learner": learner, "fuse": fuse}
    model, images = tiny(**kwargs), make_images(12, 16)
    expected = built_for((12, 16), model, **kwargs)(images)
    model.set_input_size((12, 16))
    assert model.blocks[2].grid == (6, 8)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("size", [(12, 8), (10, 12), (7, 11)])
@pytest.mark.parametrize("learner", ["v1", "v11"])
def test_images_of_another_size_are_refused_unless_dynamic_img_size(
    learner: str, size: tuple[int, int]
) -> None:
    with pytest.raises(AssertionError, match="Input height"):
        tiny(learner=learner)(make_images(*size))


@pytest.mark.parametrize("learner", ["v1", "v11"])
@torch.no_grad()
def test_learners_can_be_exchanged_in_a_model_for_any_size(learner: str) -> None:
    model = tiny(dynamic_img_size=True, learner="v11")
    insert(remove(model), 3, 2, learner=learner)
    images = make_images(12, 8)
    expected = built_for((12, 8), model, learner=learner)(images)
    torch.testing.assert_close(model(images), expected)


# --- features ----------------------------------------------------------------------------------


@torch.no_grad()
def test_intermediates_can_come_with_prefix_tokens_and_as_a_dictionary() -> None:
    model, images = tiny(class_token=True), make_images()
    tokens = model.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)
    found = model.forward_intermediates(images, [1], return_prefix_tokens=True, output_dict=True)
    assert found["image_intermediates_prefix"][0].shape == (2, 1, 16)
    expected = tokens[0].transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(found["image_intermediates"][0], expected)


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_of_v1_for_an_image_of_another_size_are_refused(fmt: str) -> None:
    model = tiny(learner="v1", fuse=True, dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"\(4, 6\) grid, the image is \(12, 8\).*set_input_size"):
        model.forward_intermediates(make_images(12, 8), output_fmt=fmt)
    final, _ = model.forward_intermediates(make_images(), output_fmt=fmt)
    assert final.shape == (2, 24, 16)


@torch.no_grad()
def test_intermediates_of_v11_are_there_for_images_of_any_size() -> None:
    model, images = tiny(fuse=True, dynamic_img_size=True), make_images(12, 16)
    final, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [m.shape for m in maps] == [(2, 16, 6, 8)] * 4
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final)


@torch.no_grad()
def test_a_feature_pyramid_of_chosen_blocks_takes_images_of_any_size_in_front_of_v1() -> None:
    kwargs = {"learner": "v1", "dynamic_img_size": True, "out_indices": (0, 2)}
    model: Any = timm.create_model(LEARNED, features_only=True, **kwargs)
    assert [m.shape for m in model(torch.randn(2, 1, 20, 36))] == [(2, 64, 5, 9)] * 2


@torch.no_grad()
def test_torch_compile_takes_the_whole_graph_of_v1_for_any_size() -> None:
    model = tiny(learner="v1", depth=2, at=1, dynamic_img_size=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = make_images(12, 8)
    torch.testing.assert_close(compiled(images), model(images))


# --- the named models --------------------------------------------------------------------------


OVERRIDES: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({"num_classes": 3}, (1, 28, 28), (2, 3)),
    ({"in_chans": 3}, (3, 28, 28), (2, 10)),
    ({"img_size": 32}, (1, 32, 32), (2, 10)),
    ({"img_size": (24, 36), "patch_size": 6}, (1, 24, 36), (2, 10)),
    ({"num_classes": 0, "embed_dim": 48, "depth": 4}, (1, 28, 28), (2, 48)),
    ({"num_tokens": 4, "at": 0, "fuse": True, "learner": "v1"}, (1, 28, 28), (2, 10)),
    ({"num_classes": 0, "representation_size": 7, "global_pool": "max"}, (1, 28, 28), (2, 7)),
    ({"num_classes": 0, "num_tokens": 5, "global_pool": "", "at": 5}, (1, 28, 28), (2, 5, 64)),
]


@pytest.mark.parametrize(("kwargs", "image", "out"), OVERRIDES, ids=[str(o[0]) for o in OVERRIDES])
@torch.no_grad()
def test_arguments_go_before_the_variants_own(
    kwargs: dict[str, Any], image: tuple[int, ...], out: tuple[int, ...]
) -> None:
    assert timm.create_model(LEARNED, **kwargs)(torch.randn(2, *image)).shape == out


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"global_pool": "mean"}, "global_pool"),
        ({"num_tokens": -1}, "num_tokens"),
        ({"num_tokens": True}, "num_tokens"),
        ({"num_tokens": 25}, "num_tokens"),
        ({"at": 4}, "at"),
        ({"at": -1}, "at"),
        ({"at": 1.0}, "at"),
        ({"learner": "v2"}, "learner"),
        ({"fuse": True, "fuser_bottleneck_dim": -1}, "bottleneck_dim"),
        ({"representation_size": 0}, "representation_size"),
        ({"representation_size": 2.5}, "representation_size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], argument: str) -> None:
    value = list(kwargs.values())[-1]
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        TokenLearnerViT(**(TINY | kwargs))


def test_a_pooling_that_is_not_known_is_refused_and_the_head_stays() -> None:
    model = tiny()
    head = model.head
    with pytest.raises(ValueError, match="global_pool is 'mean'"):
        model.reset_classifier(3, "mean")
    assert model.head is head
    assert model.num_classes == 5


@each_learner
@torch.no_grad()
def test_as_many_tokens_as_positions_fit(learner: str) -> None:
    assert tiny(num_tokens=24, learner=learner)(make_images()).shape == (2, 5)


@each_learner
def test_insertion_is_what_the_model_was_built_with(learner: str) -> None:
    options = {"num_tokens": 3, "at": 2, "learner": learner, "fuse": True}
    options |= {"fuser_bottleneck_dim": 7}
    assert get_insertion(tiny(**options)) == options
