"""The video models: equal to a loop over frames, with timm's interface for clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from tiny import OBLONG, randomized
from torch import Tensor

from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

SHAPE = OBLONG | {"depth": 4, "num_heads": 2, "num_frames": 6}
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
    learner: str, fuse: bool, device: torch.device
) -> None:
    model = tiny(learner=learner, fuse=fuse).double().to(device)
    x = clips().double().to(device)
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    assert tokens.shape == (2, T * (N if fuse else 4), 16)
    torch.testing.assert_close(model(x), model.head(tokens.mean(dim=1)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), tokens)


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


@torch.no_grad()
def test_uniform_sampling_makes_each_chosen_frame_one_of_the_models() -> None:
    model = tiny(sampling="uniform", num_frames=3, learner="v1")
    x = torch.randn(2, 3, 9, 8, 12)
    assert model.blocks[2].frames == 3
    tokens = model.norm(tokens_by_blocks(model, x)[-1])
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    torch.testing.assert_close(model(x), model(x[:, :, [2, 4, 7]]))  # 2.25, 4.5, 6.75


@torch.no_grad()
def test_one_frame_is_an_image() -> None:
    model = tiny(num_frames=2, learner="v1")
    kwargs = {key: value for key, value in TINY.items() if key != "num_frames"}
    image_model, image = TokenLearnerViT(**kwargs, learner="v1").eval(), torch.randn(2, 3, 8, 12)
    state = model.state_dict()
    kernel = state["patch_embed.proj.weight"]
    image_model.load_state_dict(state | {"patch_embed.proj.weight": kernel.sum(2)}, strict=True)
    torch.testing.assert_close(model(torch.stack([image, image], 2)), image_model(image))


# --- features ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_reaches_the_blocks_of_a_plain_model_and_is_refused_by_others() -> None:
    model, x = tiny(num_tokens=0), clips()
    alone = torch.eye(T * N).bool()  # every position sees itself only
    masked, _ = model.forward_intermediates(x, attn_mask=alone)
    torch.testing.assert_close(masked, model.forward_features(x, attn_mask=alone))
    assert not torch.allclose(masked, model.forward_features(x))
    for fuse in (False, True):
        with pytest.raises(ValueError, match="attention mask"):
            tiny(fuse=fuse).forward_intermediates(x, output_fmt="NLC", attn_mask=alone)
    with pytest.raises(ValueError, match="output_fmt is 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NCHW")


# --- sizes -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("learner", ["v1", "v11"])
@pytest.mark.parametrize("size", [(12, 8), (9, 14)], ids=str)
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
    model = tiny()
    before = model.pos_embed
    with pytest.raises(ValueError, match=r"img_size is \(1, 12\)"):
        model.set_input_size((1, 12))
    with pytest.raises(ValueError, match="patch_size is 4"):
        model.set_input_size((16, 12), 4)
    assert model.pos_embed is before
    assert model(clips()).shape == (2, 5)


@torch.no_grad()
def test_a_model_without_position_embeddings_can_be_resized() -> None:
    model = tiny(pos_embed="none")
    model.set_input_size((12, 8))
    assert model.pos_embed is None
    assert model(clips(12, 8)).shape == (2, 5)


# --- learners in and out -----------------------------------------------------------------------
