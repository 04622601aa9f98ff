"""Attention maps: those the learner made of what it was given, and nothing left behind."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokenlearner.models.vivit  # noqa: F401  (registers names)
from tokenlearner import TokenLearnerV11, attention_maps, insert
from tokenlearner.evaluation.maps import draw_maps, has_gates
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS

TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduce", "fuse"])


def vit(h: int = 16, w: int = 40, **kwargs: Any) -> VisionTransformer:
    """A small host on a grid that is not square, its parameters drawn at random."""
    host = VisionTransformer(img_size=(h, w), num_classes=5, **TINY, **kwargs).eval()
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.2)
    return host


def images(h: int = 16, w: int = 40) -> Tensor:
    return torch.randn(2, 3, h, w)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("fuse", "blocks"), [(False, [1]), (True, [1, 2, 3])])
@each_learner
def test_there_are_maps_on_the_grid_for_every_block_that_learns_tokens(
    learner: str, fuse: bool, blocks: list[int]
) -> None:
    maps = attention_maps(insert(vit(), 3, 1, learner=learner, fuse=fuse), images())
    assert list(maps) == blocks
    assert [one.shape for one in maps.values()] == [(2, 3, 2, 5)] * len(blocks)


@both_ways
@each_learner
@torch.no_grad()
def test_maps_are_those_of_what_the_block_was_given(
    learner: str, fuse: bool, device: torch.device
) -> None:
    model = insert(vit(reg_tokens=2).double().to(device), 3, 1, learner=learner, fuse=fuse)
    x = images().double().to(device)
    maps = attention_maps(model, x)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, block in enumerate(model.blocks):
        if i in maps:
            positions = tokens[:, 3:].unflatten(1, (2, 5))
            torch.testing.assert_close(maps[i], block.learner.attention(positions))
        tokens = block(tokens)


@both_ways
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_stays_on_the_model_after_an_error_either(
    training: bool, fails: bool, fuse: bool
) -> None:
    model = insert(vit(), 3, fuse=fuse).train(training)
    if fails:
        model.norm = nn.Linear(1, 1).train(training)  # does not fit: it fails behind the learner
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) if fails else nullcontext():
        assert not attention_maps(model, images())[2].requires_grad
    assert hooks(model) == 0
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_runs_in_evaluation_mode() -> None:
    model, x = insert(vit(proj_drop_rate=0.5), 3).train(), images()
    assert torch.equal(attention_maps(model, x)[2], attention_maps(model, x)[2])


@pytest.mark.parametrize("fuse", [False, True])
def test_maps_of_a_clip_are_those_of_its_frames(fuse: bool) -> None:
    model = timm.create_model("vivit_mini_patch8x2_tl4at3_32", fuse=fuse).eval()
    clip = torch.randn(2, 3, 8, 32, 32)
    for index, maps in attention_maps(model, clip).items():
        assert maps.shape == (2, 4, 4, 4, 4)  # clips, frames, tokens, height, width
        block = model.blocks[index]
        inputs: list[torch.Tensor] = []
        block.learner.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        model(clip)
        third = inputs[0].unflatten(0, (2, 4))[1, 2]  # of the second clip the third frame
        expected = block.learner.attention(third[None])[0].unflatten(-1, (4, 4))
        torch.testing.assert_close(maps[1, 2], expected)


@torch.no_grad()
def test_maps_of_tokens_that_are_learned_from_tokens_lead_back_to_the_grid() -> None:
    model, x = insert(vit(), (5, 2), at=(1, 3)), images()
    maps, (first, second) = attention_maps(model, x), (model.blocks[1], model.blocks[3])
    inputs: list[Tensor] = []
    for block in (first, second):
        block.learner.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(x)
    direct, of_tokens = first.learner.attention(inputs[0]), second.learner.attention(inputs[1])
    expected = torch.einsum("b j k, b k n -> b j n", of_tokens, direct)
    torch.testing.assert_close(maps[3], expected.unflatten(-1, (2, 5)))
    torch.testing.assert_close(maps[1], direct.unflatten(-1, (2, 5)))


def test_maps_that_lead_back_to_the_grid_sum_to_1() -> None:
    maps = attention_maps(insert(vit(), (10, 5, 2), at=(0, 1, 3)), images())
    for one in maps.values():
        torch.testing.assert_close(one.sum((-2, -1)), torch.ones(one.shape[:2]))


def test_fused_maps_at_several_places_are_of_positions_everywhere() -> None:
    model, x = insert(vit(), (10, 2), at=(0, 2), fuse=True), images()
    maps = attention_maps(model, x)
    into: list[Tensor] = []
    model.blocks[2].learner.register_forward_pre_hook(lambda _, args: into.append(args[0]))
    model(x)
    expected = model.blocks[2].learner.attention(into[0]).unflatten(-1, (2, 5))
    torch.testing.assert_close(maps[2], expected)


@torch.no_grad()
def test_maps_of_a_clip_lead_back_frame_by_frame() -> None:
    model = timm.create_model("vivit_mini_patch8x2_32").eval()
    maps = attention_maps(insert(model, (4, 2), at=(1, 3)), torch.randn(2, 3, 8, 32, 32))
    assert {i: one.shape for i, one in maps.items()} == {1: (2, 4, 4, 4, 4), 3: (2, 4, 2, 4, 4)}
    torch.testing.assert_close(maps[3].sum((-2, -1)), torch.ones(2, 4, 2))


def test_a_block_that_someone_wrapped_by_hand_is_found_too() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid = ReducedBlock(nn.Identity(), TokenLearnerV11(24, 3), grid=(2, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.mid(x.flatten(2).transpose(1, 2))

    (maps,) = attention_maps(Pooled(), torch.randn(2, 24, 2, 5)).values()
    assert maps.shape == (2, 3, 2, 5)


@pytest.mark.parametrize("learner", LEARNERS)
def test_v1s_maps_are_gates_and_the_others_are_not(learner: str) -> None:
    assert has_gates(insert(vit(), 3, learner=learner)) == (learner in ("v1", "v1-mean"))


@pytest.mark.parametrize("build", [vit, lambda: nn.Linear(3, 3)], ids=["host", "linear"])
def test_a_model_without_learned_tokens_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="no learned tokens"):
        attention_maps(build(), images())


def test_a_grid_that_no_longer_fits_is_refused() -> None:
    model = insert(vit(), 3, grid=(5, 2))
    model.set_input_size((16, 48))
    with pytest.raises(ValueError, match=r"12 positions .* \(5, 2\)"):
        attention_maps(model, images(16, 48))


@pytest.mark.parametrize("dynamic", [False, True])
def test_maps_have_the_grid_of_the_image(dynamic: bool) -> None:
    model = insert(vit(dynamic_img_size=dynamic), 3)
    if not dynamic:
        model.set_input_size((40, 16))
    assert attention_maps(model, images(40, 16))[2].shape == (2, 3, 5, 2)


# --- the figure --------------------------------------------------------------------------------


def test_a_name_for_every_image_is_needed_and_nothing_is_written_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_maps(tmp_path / "a.png", torch.rand(2, 1, 8, 8), torch.rand(2, 1, 2, 2), ["a"], "t")
    assert list(tmp_path.iterdir()) == []
