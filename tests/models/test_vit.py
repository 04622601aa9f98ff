"""The ViT on learned tokens: equal to loops written out, for images of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tiny import OBLONG, randomized
from torch import Tensor, nn

from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.vit import TokenLearnerViT

SHAPE = OBLONG | {"depth": 4, "num_heads": 2}
TINY = SHAPE | {"num_tokens": 3, "at": 2}
GRID = (4, 6)
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def tiny(**kwargs: Any) -> Any:
    return randomized(TokenLearnerViT(**(TINY | kwargs)))


def make_images(height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(2, 3, height, width)


def final_tokens(model: Any, images: Tensor) -> Tensor:
    """What a model of `TINY` computes, written out: prefix tokens, then positions or tokens."""
    p, x = model.num_prefix_tokens, model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if p:
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1)
    x = x + model.pos_embed
    for block in model.blocks:
        if not isinstance(block, ReducedBlock):
            x = block(x)
            continue
        positions = x[:, p:]
        x = block.block(torch.cat([x[:, :p], block.learner(positions, GRID)], dim=1))
        assert x.shape == (len(images), p + 3, 16)
        if hasattr(block, "fuser"):
            x = torch.cat([x[:, :p], positions + block.fuser(x[:, p:], positions)], dim=1)
    return model.norm(x)


# --- numbers -----------------------------------------------------------------------------------


@both_ways
@each_learner
@pytest.mark.parametrize(("at", "prefix"), [(0, 0), (2, 0), (2, 1)])
@torch.no_grad()
def test_the_model_is_blocks_learners_and_fusers_then_norm_mean_and_head(
    at: int, prefix: int, learner: str, fuse: bool
) -> None:
    model = tiny(at=at, class_token=prefix > 0, learner=learner, fuse=fuse)
    images = make_images()
    tokens = final_tokens(model, images)
    assert tokens.shape == (2, prefix + (24 if fuse else 3), 16)
    torch.testing.assert_close(model.forward_features(images), tokens)
    torch.testing.assert_close(model(images), model.head(tokens[:, prefix:].mean(dim=1)))
    if prefix:
        model.reset_classifier(5, "token")
        torch.testing.assert_close(model(images), model.head(tokens[:, 0]))


@torch.no_grad()
def test_timms_arguments_reach_timm() -> None:
    kwargs = {"class_token": True, "reg_tokens": 2, "global_pool": "token", "qk_norm": True}
    kwargs |= {"init_values": 0.1, "mlp_ratio": 2, "act_layer": "gelu", "no_embed_class": True}
    ours, images = randomized(TokenLearnerViT(**SHAPE, **kwargs)), make_images()
    timms = VisionTransformer(**SHAPE, **kwargs).eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images), timms(images))


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
def test_every_pooling_is_what_its_name_says_built_for_one_call_or_reset(
    pool: str, fuse: bool
) -> None:
    model, images = tiny(global_pool=pool, fuse=fuse), make_images()
    tokens = final_tokens(model, images)
    torch.testing.assert_close(model(images), model.head(POOLS[pool](tokens)))
    for other, pooling in POOLS.items():
        torch.testing.assert_close(model.pool(tokens, other), pooling(tokens))
    model.reset_classifier(4)
    assert model.global_pool == pool
    for other, pooling in POOLS.items():
        model.reset_classifier(4, other)
        assert model.global_pool == other
        torch.testing.assert_close(model(images), model.head(pooling(tokens)))
    head = model.head
    with pytest.raises(ValueError, match="global_pool is 'mean'"):
        model.reset_classifier(3, "mean")
    assert (model.head, model.num_classes, head.out_features) == (head, 4, 4)


@pytest.mark.parametrize("include", [False, True])
@torch.no_grad()
def test_the_sum_includes_prefix_tokens_only_if_requested(include: bool) -> None:
    model = tiny(class_token=True, global_pool="sum", pool_include_prefix=include)
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(model.pool(x), x[:, 0 if include else 1 :].sum(1))


@both_ways
@torch.no_grad()
def test_pre_logits_are_tanh_of_a_linear_layer_in_front_of_a_head_that_can_be_replaced(
    fuse: bool,
) -> None:
    model, images = tiny(representation_size=7, fuse=fuse), make_images()
    pooled = final_tokens(model, images).mean(1)
    represented = torch.tanh(pooled @ model.pre_logits.weight.T + model.pre_logits.bias)
    assert represented.shape == (2, 7)
    torch.testing.assert_close(model(images), model.head(represented))
    features, before = model.forward_features(images), model.pre_logits.weight.clone()
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), represented)
    for classes in (3, 0, 2):
        model.reset_classifier(classes)
        assert model(images).shape == (2, classes or 7)
        torch.testing.assert_close(model(images), model.head(represented))
    model.reset_classifier(3, "")
    assert model(images).shape == (2, 24 if fuse else 3, 3)
    assert torch.equal(model.pre_logits.weight, before)


def test_dropout_stands_between_pre_logits_and_head() -> None:
    model = tiny(drop_rate=0.5, representation_size=64).train()
    out = model.forward_head(torch.randn(2, 3, 16), pre_logits=True)
    dropped = (out == 0).float().mean().item()
    assert 0.3 < dropped < 0.7
    assert out.abs().max() > 1  # doubled: tanh alone stays below


# --- initialization ----------------------------------------------------------------------------


@both_ways
def test_a_new_model_starts_as_the_official_one(fuse: bool) -> None:
    kwargs: dict[str, Any] = TINY | {"embed_dim": 64, "img_size": 32, "representation_size": 128}
    model: Any = TokenLearnerViT(**kwargs, fuse=fuse)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(model.pos_embed.mean().item()) < 1e-3
    qkv, proj, pre_logits = model.blocks[0].attn.qkv, model.patch_embed.proj, model.pre_logits
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < qkv.weight.abs().max().item() <= bound
    assert model.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.3)
    assert proj.weight.std().item() == pytest.approx((3 * 2 * 2) ** -0.5, rel=0.1)
    assert pre_logits.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    for at_0 in (*model.head.parameters(), qkv.bias, proj.bias, pre_logits.bias):
        assert at_0.abs().max() == 0
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in norms)


# --- images of any size ----------------------------------------------------------------------


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
@pytest.mark.parametrize(
    ("size", "class_token"), [((12, 8), False), ((16, 16), False), ((10, 14), True)]
)
@torch.no_grad()
def test_an_image_of_any_size_gives_what_a_model_built_for_it_or_set_to_it_gives(
    size: tuple[int, int], class_token: bool, learner: str, fuse: bool
) -> None:
    kwargs: dict[str, Any] = {"learner": learner, "fuse": fuse, "class_token": class_token}
    model, fixed = tiny(**kwargs, dynamic_img_size=True), tiny(**kwargs)
    images, other = make_images(*size), make_images()
    fixed.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(other), fixed(other))
    expected = built_for(size, model, **kwargs)(images)
    torch.testing.assert_close(model(images), expected)
    fixed.set_input_size(size)
    assert fixed.blocks[2].grid == (size[0] // 2, size[1] // 2)
    torch.testing.assert_close(fixed(images), expected)


@torch.no_grad()
def test_padded_images_have_the_padded_grid() -> None:
    model = tiny(learner="v1", dynamic_img_size=True, dynamic_img_pad=True)
    images = make_images(9, 11)
    padded = nn.functional.pad(images, (0, 1, 0, 1))
    torch.testing.assert_close(model(images), model(padded))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.zeros(24, 24)}])
def test_a_mask_over_positions_is_refused(mask: dict[str, Any], dynamic: bool) -> None:
    with pytest.raises(ValueError, match="attention mask"):
        tiny(learner="v1", dynamic_img_size=dynamic)(make_images(), **mask)


# --- features ----------------------------------------------------------------------------------


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
