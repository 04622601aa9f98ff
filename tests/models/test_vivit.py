"""The video models: equal to a loop over frames, with timm's interface for clips."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from tiny import randomized
from torch import Tensor, nn

from tokenlearner import attention_maps
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.insertion import get_insertion, insert, remove
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

MINI = "vivit_mini_patch8x2_tl4at3_32"
SHAPE: dict[str, Any] = {
    "img_size": (8, 12),
    "patch_size": 2,
    "num_frames": 6,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
TINY = SHAPE | {"num_tokens": 4, "at": 2}
T, GRID, N = 3, (4, 6), 24
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def tiny(**kwargs: Any) -> Any:
    return randomized(ViViT(**(TINY | kwargs)))


def clips(height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(2, 3, 6, height, width)


def tokens_by_blocks(
    model: Any, x: Tensor, grid: tuple[int, int] = GRID, frames: int = T
) -> list[Tensor]:
    """What a model of `TINY` has behind every block, frame by frame."""
    n, kept = grid[0] * grid[1], []
    x = model.patch_embed(x) + model.pos_embed
    assert x.shape[1] == frames * n
    for block in model.blocks:
        if isinstance(block, ReducedBlock):
            parts = [x[:, i * n : (i + 1) * n] for i in range(frames)]
            tokens = block.block(torch.cat([block.learner(part, grid) for part in parts], dim=1))
            assert tokens.shape == (len(x), frames * 4, 16)
            if hasattr(block, "fuser"):
                each = [tokens[:, 4 * i : 4 * i + 4] for i in range(frames)]
                pairs = zip(each, parts, strict=True)
                tokens = torch.cat([part + block.fuser(own, part) for own, part in pairs], dim=1)
            x = tokens
        else:
            x = block(x)
        kept.append(x)
    return kept


# --- numbers -----------------------------------------------------------------------------------


@both_ways
@each_learner
@torch.no_grad()
def test_the_learner_runs_on_each_frame_and_the_blocks_on_all_of_them(
    learner: str, fuse: bool
) -> None:
    model, x = tiny(learner=learner, fuse=fuse), clips()
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    assert tokens.shape == (2, T * (N if fuse else 4), 16)
    torch.testing.assert_close(model(x), model.head(tokens.mean(dim=1)))


@torch.no_grad()
def test_without_tokens_all_positions_see_each_other() -> None:
    model, x = tiny(num_tokens=0), clips()
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    assert tokens.shape == (2, T * N, 16)
    torch.testing.assert_close(model(x), model.head(tokens.mean(dim=1)))
    other = x.clone()
    other[:, :, :2] += 1.0  # of the first tubelet
    changed = model.forward_features(x) != model.forward_features(other)
    assert changed.any(-1).all()


@pytest.mark.parametrize("learner", ["v1", "v11"])
@torch.no_grad()
def test_uniform_sampling_makes_each_chosen_frame_one_of_the_models(learner: str) -> None:
    model = tiny(sampling="uniform", num_frames=3, learner=learner)
    x = torch.randn(2, 3, 9, 8, 12)
    assert model.blocks[2].frames == 3
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    torch.testing.assert_close(model(x), model(x[:, :, [2, 4, 7]]))  # 2.25, 4.5, 6.75


@torch.no_grad()
def test_one_frame_is_an_image() -> None:
    model = tiny(num_frames=2, learner="v1")
    image_model = randomized(TokenLearnerViT(**_without_clip(TINY), learner="v1"))
    state = model.state_dict()
    kernel = state["patch_embed.proj.weight"]
    image_model.load_state_dict(state | {"patch_embed.proj.weight": kernel.sum(2)}, strict=True)
    image = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(model(torch.stack([image, image], 2)), image_model(image))


def _without_clip(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "num_frames"}


@both_ways
@torch.no_grad()
def test_a_model_without_head_and_pooling_gives_all_tokens(fuse: bool) -> None:
    model, x = tiny(num_classes=0, global_pool="", fuse=fuse), clips()
    expected = model.norm(tokens_by_blocks(model, x)[-1])
    out = model(x)
    assert out.shape == (2, T * (N if fuse else 4), 16)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("sampling", ["tubelet", "uniform"])
@torch.no_grad()
def test_a_format_with_frames_first_is_the_same_clip_permuted(sampling: str) -> None:
    model = tiny(sampling=sampling)
    other = tiny(sampling=sampling, input_format="btchw")
    other.load_state_dict(model.state_dict(), strict=True)
    x = clips()
    torch.testing.assert_close(other(x.transpose(1, 2)), model(x))
    with pytest.raises(ValueError, match=r"input_format='bcthw' takes \[b, c, t, h, w\]"):
        other(x)


@torch.no_grad()
def test_arguments_of_the_clip_reach_the_embedding() -> None:
    kwargs: dict[str, Any] = {"tubelet_size": 3, "tubelet_init": "average", "in_chans": 1}
    model = ViViT(**TINY, **kwargs)
    embed: Any = model.patch_embed
    assert (model.num_frames, embed.frames, embed.tubelet_size) == (6, 2, 3)
    weight = embed.proj.weight
    assert weight.shape == (16, 1, 3, 2, 2)
    assert torch.equal(weight[:, :, 0], weight[:, :, 2])
    assert model(torch.randn(2, 1, 6, 8, 12)).shape == (2, 5)
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 2 * N, 16)


@torch.no_grad()
def test_a_new_model_sees_the_middle_frames_with_a_head_of_0() -> None:
    model, x = ViViT(**TINY).eval(), clips()
    other = x.clone()
    other[:, :, ::2] = 9.0  # the middle of two frames is the second
    assert torch.equal(model.forward_features(x), model.forward_features(other))
    assert model(x).abs().max() == 0
    assert isinstance(model.pos_embed, nn.Parameter)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


@each_learner
@torch.no_grad()
def test_a_new_fused_model_leaves_the_positions_exactly_as_they_are(learner: str) -> None:
    model, x = ViViT(**TINY, fuse=True, learner=learner).eval(), clips()
    model_blocks: Any = model.blocks
    positions = model.patch_embed(x) + model.pos_embed
    expected = model.norm(model_blocks[1](model_blocks[0](positions)))
    torch.testing.assert_close(model.forward_features(x), expected)


# --- features ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_reaches_the_blocks_of_a_plain_model() -> None:
    model, x = tiny(num_tokens=0), clips()
    alone = torch.eye(T * N).bool()  # every position sees itself only
    masked, _ = model.forward_intermediates(x, attn_mask=alone)
    torch.testing.assert_close(masked, model.forward_features(x, attn_mask=alone))
    assert not torch.allclose(masked, model.forward_features(x))


@both_ways
def test_a_mask_over_positions_is_refused_where_tokens_are_learned(fuse: bool) -> None:
    model, mask = tiny(fuse=fuse), torch.zeros(T * N, T * N)
    with pytest.raises(ValueError, match="attention mask"):
        model.forward_intermediates(clips(), output_fmt="NLC", attn_mask=mask)


def test_a_format_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="output_fmt is 'NCHW'"):
        tiny().forward_intermediates(clips(), output_fmt="NCHW")


# --- sizes -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("learner", ["v1", "v11"])
@pytest.mark.parametrize("size", [(12, 8), (12, 16), (9, 14)], ids=str)
@torch.no_grad()
def test_set_input_size_resamples_the_positions_of_each_frame_alike(
    size: tuple[int, int], learner: str, fuse: bool
) -> None:
    model = tiny(learner=learner, fuse=fuse)
    grid = (size[0] // 2, size[1] // 2)
    old = model.pos_embed.detach()
    frames = [old[:, i * N : (i + 1) * N] for i in range(T)]
    expected = torch.cat([resample_abs_pos_embed(f, list(grid), list(GRID), 0) for f in frames], 1)
    model.set_input_size(size)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert model.pos_embed.requires_grad
    assert model.blocks[2].grid == grid
    x = clips(*size)
    tokens = model.norm(tokens_by_blocks(model, x, grid)[-1])
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))


@torch.no_grad()
def test_frames_that_are_alike_stay_so_when_the_size_is_set() -> None:
    model = tiny()
    model.pos_embed.copy_(model.pos_embed[:, :N].repeat(1, T, 1))
    model.set_input_size((16, 10))
    first, *others = model.pos_embed.chunk(T, dim=1)
    assert all(torch.equal(first, other) for other in others)
    assert first.shape == (1, 40, 16)


def test_the_positions_stay_the_same_parameter_if_the_grid_does() -> None:
    model = tiny()
    model.pos_embed.requires_grad_(False)
    before, names = model.pos_embed, list(model.state_dict())
    model.set_input_size((9, 13))
    assert model.pos_embed is before
    assert model.patch_embed.img_size == (9, 13)
    model.set_input_size((12, 12))
    assert model.pos_embed is not before
    assert not model.pos_embed.requires_grad
    assert list(model.state_dict()) == names


def test_a_size_that_is_refused_leaves_the_model_as_it_was() -> None:
    model, x = tiny(), clips()
    before = model.pos_embed
    for size, patch, message in [
        ((1, 12), None, r"img_size is \(1, 12\)"),
        ((16, 12), 4, "patch_size is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.set_input_size(size, patch)
    assert model.pos_embed is before
    assert model(x).shape == (2, 5)


@torch.no_grad()
def test_a_model_without_position_embeddings_can_be_resized() -> None:
    model = tiny(pos_embed="none")
    model.set_input_size((12, 8))
    assert model.pos_embed is None
    assert model(clips(12, 8)).shape == (2, 5)


# --- learners in and out -----------------------------------------------------------------------


@both_ways
@each_learner
@torch.no_grad()
def test_learners_can_be_inserted_in_a_plain_model_and_run_on_each_frame(
    learner: str, fuse: bool
) -> None:
    model, x = tiny(num_tokens=0), clips()
    before = model(x)
    randomized(insert(model, 4, 2, learner=learner, fuse=fuse))
    assert {b.frames for b in model.blocks if isinstance(b, ReducedBlock)} == {T}
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    built = ViViT(**TINY, learner=learner, fuse=fuse).eval()
    built.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(built(x), model(x))
    assert get_insertion(built) == get_insertion(model)
    remove(model)
    assert get_insertion(model) is None
    assert model(x).shape == before.shape


@torch.no_grad()
def test_removing_learners_gives_the_plain_model() -> None:
    model, x = tiny(learner="v1"), clips()
    plain = ViViT(**SHAPE).eval()
    remove(model)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))


@torch.no_grad()
def test_attention_maps_hold_those_of_every_frame() -> None:
    model, x = tiny(learner="v1"), clips()
    before = tokens_by_blocks(model, x)[1]
    learner = model.blocks[2].learner
    frames = [learner.attention(before[:, i * N : (i + 1) * N], GRID) for i in range(T)]
    found = attention_maps(model, x)[2]
    assert found.numel() == 2 * T * 4 * N
    torch.testing.assert_close(found.reshape(2, T, 4, N), torch.stack(frames, 1))


# --- the named models --------------------------------------------------------------------------


@torch.no_grad()
def test_arguments_go_before_the_variants_own() -> None:
    kwargs = {"num_frames": 4, "tubelet_size": 4, "img_size": (16, 24), "num_classes": 3}
    model: Any = timm.create_model(MINI, **kwargs, at=0, learner="v1", input_format="btchw")
    assert model(torch.randn(2, 4, 3, 16, 24)).shape == (2, 3)
    assert model.blocks[0].frames == 1
    assert get_insertion(model) == {"num_tokens": 4, "at": 0, "learner": "v1", "fuse": False}


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_token": True}, "no class_token"),
        ({"reg_tokens": 2}, "no reg_tokens"),
        ({"patch_drop_rate": 0.5}, "no patch_drop_rate"),
        ({"embed_norm_layer": "layernorm"}, "no norm_layer"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad"),
        ({"num_tokens": 25}, "num_tokens is 25"),
        ({"num_frames": 1}, "num_frames is 1"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"tubelet_size": 0}, "tubelet_size is 0"),
        ({"sampling": "even"}, "sampling is 'even'"),
        ({"tubelet_init": "zero"}, "tubelet_init is 'zero'"),
        ({"input_format": "bthwc"}, "input_format is 'bthwc'"),
        ({"global_pool": "mean"}, "global_pool is 'mean'"),
        ({"at": 4}, "at is 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViViT(**(TINY | kwargs))


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 5, 8, 12), (2, 6, 3, 8, 12)])
def test_clips_that_the_model_was_not_built_for_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny(fuse=True)
    text = r"clips are \[" + ", ".join(map(str, shape)) + r"\], expected \[b, c, t, h, w\]"
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=text):
            run(torch.randn(shape))
