"""The model for live video: every frame alone until it is tokens, then all frames together."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from tiny import check_compiled
from torch import nn

from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.maps import attention_maps
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.models.framevit import FRAMES, FrameViT

SHAPE: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 4, "at": 3,
    "num_frames": 4, "num_tokens": 5, "num_classes": 7,
}  # fmt: skip
LEARNERS = ["v1", "v1-mean", "v11", "grouped", "grouped-linear"]


def randomized(**kwargs: Any) -> FrameViT:
    model = FrameViT(**(SHAPE | kwargs))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("t", [1, 3, 4])
@torch.no_grad()
def test_it_is_an_encoder_in_a_loop_over_frames_and_blocks_on_all_tokens(
    t: int, learner: str
) -> None:
    model, clip = randomized(learner=learner), torch.randn(2, 3, t, 16, 16)
    encoder, frames = model.encoder, []
    for i in range(t):
        x = encoder.patch_embed(clip[:, :, i : i + 1]) + encoder.pos_embed
        for block in encoder.blocks[:3]:
            x = block(x)
        frames.append(encoder.blocks[3].learner(x))
    tokens = torch.stack(frames, dim=1)
    torch.testing.assert_close(model.encode(clip), tokens, rtol=1e-5, atol=1e-5)
    x = (tokens + model.time_embed[:, 4 - t :]).flatten(1, 2)
    for block in model.blocks:
        x = block(x)
    expected = model.head(model.norm(x).mean(1))
    torch.testing.assert_close(model(clip), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tubelets_are_embedded_one_by_one() -> None:
    model, clip = randomized(tubelet_size=2), torch.randn(2, 3, 6, 16, 16)
    parts = [model.encode(clip[:, :, i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(model.encode(clip), torch.cat(parts, dim=1))


@torch.no_grad()
def test_the_other_order_of_axes_is_taken_when_told() -> None:
    model, clip = randomized(), torch.randn(2, 3, 4, 16, 16)
    other = FrameViT(**SHAPE, input_format="btchw").eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(clip.transpose(1, 2)), model(clip))


@torch.no_grad()
def test_the_newest_frame_has_the_last_time_embedding() -> None:
    model, clip = randomized(), torch.randn(1, 3, 2, 16, 16)
    before = model(clip)
    model.time_embed[:, :2] = 9
    assert torch.equal(model(clip), before)
    model.time_embed[:, 3] = 9
    assert not torch.equal(model(clip), before)


def test_the_blocks_keep_the_numbers_of_the_whole_network() -> None:
    names = dict(FrameViT(**SHAPE).named_modules())
    assert isinstance(names["encoder.blocks.3"], ReducedBlock)
    assert {n for n in names if n.count(".") == 1 and n.startswith("blocks.")} == {"blocks.3"}


def test_timm_groups_the_learner_with_the_block_behind_it() -> None:
    model = FrameViT(**SHAPE)
    groups = group_parameters(model, model.group_matcher())
    with_learner = next(g for g in groups.values() if any("learner" in name for name in g))
    assert any(name.startswith("blocks.3") for name in with_learner)
    assert {"time_embed", "encoder.pos_embed"} <= model.no_weight_decay() | set(groups)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_every_parameter_gets_a_gradient() -> None:
    model = randomized().double()
    out = model(torch.randn(2, 3, 4, 16, 16, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    flat = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    shift = "encoder.blocks.3.learner.attention_maps.3.bias"  # a softmax does not see it
    assert set(flat) <= {shift}


def test_gradient_checkpointing_changes_no_number() -> None:
    model, clip = randomized().train(), torch.randn(2, 3, 4, 16, 16)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(clip).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_copies_give_the_same() -> None:
    model, clip = randomized(), torch.randn(1, 3, 4, 16, 16)
    loaded = FrameViT(**SHAPE).eval()
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(clip), model(clip))


@pytest.mark.parametrize("tubelet_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@torch.no_grad()
def test_it_compiles_whole_for_clips_of_every_length(tubelet_size: int) -> None:
    model = randomized(tubelet_size=tubelet_size)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (4, 2, 3):  # the second length makes torch compile for any
        clip = torch.randn(1, 3, frames * tubelet_size, 16, 16)
        torch.testing.assert_close(compiled(clip), model(clip))


@torch.no_grad()
def test_bfloat16_stays_bfloat16() -> None:
    model, clip = randomized(), torch.randn(1, 3, 4, 16, 16)
    out = model.to(torch.bfloat16)(clip.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@torch.no_grad()
def test_the_head_can_be_exchanged_and_left_out() -> None:
    model, clip = randomized(), torch.randn(2, 3, 4, 16, 16)
    model.reset_classifier(3)
    assert model(clip).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(clip), model.forward_head(model.forward_features(clip), True))


def test_maps_are_those_of_each_frame() -> None:
    model, clip = randomized(), torch.randn(2, 3, 4, 16, 16)
    (maps,) = attention_maps(model, clip).values()
    assert maps.shape == (2, 4, 5, 4, 4)
    (single,) = attention_maps(model, clip[:, :, 2:3]).values()
    torch.testing.assert_close(maps[:, 2:3], single)


def test_named_models_cost_what_the_closed_form_says() -> None:
    for name, config in FRAMES.items():
        with torch.device("meta"):
            model = timm.create_model(name)
            side = config["img_size"]
            counted = count_macs(model, torch.empty(1, 3, config["num_frames"], side, side))
        n, c, k = (side // config["patch_size"]) ** 2, config["embed_dim"], config["num_tokens"]
        t, at, depth = config["num_frames"], config["at"], config["depth"]
        frame = n * c * 3 * config["patch_size"] ** 2 + at * (12 * n * c * c + 2 * n * n * c)
        learner = 64 * n * c + 64 * n * k + n * k * c
        tail = (depth - at) * (12 * t * k * c * c + 2 * (t * k) ** 2 * c)
        assert counted == t * (frame + learner) + tail + c * config["num_classes"]


@pytest.fixture(params=FRAMES)
def narrow(request: pytest.FixtureRequest) -> FrameViT:
    """Every named model at a small width, with parameters that all matter."""
    small = {"embed_dim": 24, "num_heads": 3, "img_size": 48, "num_classes": 5, "depth": 3, "at": 1}
    model = timm.create_model(request.param, **small).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: nn.Module, clip: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    return list(torch.autograd.grad(model(clip).square().sum(), parameters))


def test_every_named_model_trains_and_goes_through_what_models_go_through(narrow: FrameViT) -> None:
    clip = torch.randn(2, 3, narrow.num_frames, 48, 48, dtype=torch.float64)
    expected, logits = gradients(narrow, clip), narrow(clip)
    unmoved = [
        n for (n, _), g in zip(narrow.named_parameters(), expected, strict=True) if not g.any()
    ]
    assert set(unmoved) <= {"encoder.blocks.1.learner.attention_maps.3.bias"}
    loaded = copy.deepcopy(narrow)
    loaded.load_state_dict(narrow.state_dict(), strict=True)
    narrow.set_grad_checkpointing()
    for other in (loaded, pickle.loads(pickle.dumps(narrow)), narrow):
        torch.testing.assert_close(gradients(other, clip), expected)
    narrow.set_grad_checkpointing(False)
    check_compiled(narrow, {"clips": clip})
    narrower = narrow.to(torch.bfloat16)(clip.to(torch.bfloat16))
    torch.testing.assert_close(narrower, logits.to(torch.bfloat16), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"tubelet_size": 0}, "tubelet_size is 0"),
        ({"at": 4}, "at is 4, expected a block from 0 to 3"),
        ({"learner": "v2"}, "learner is 'v2', expected one of 'v11'"),
        ({"input_format": "bhwc"}, "input_format is 'bhwc', expected one of 'bcthw', 'btchw'"),
        ({"global_pool": "max"}, "has no global_pool; leave them out"),
        ({"fuse": True}, "has no fuse; leave them out"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameViT(**(SHAPE | kwargs))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4, 16, 16), r"clips are \[3, 4, 16, 16\], expected \[b, c, t, h, w\]"),
        ((1, 3, 5, 16, 16), "a clip has 5 frames, expected 1 to 4; cut it"),
        ((1, 3, 4, 16, 20), r"clips are \[4, 3, 1, 16, 20\], expected"),
        ((1, 1, 4, 16, 16), r"with 3 channels"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameViT(**SHAPE)(torch.randn(shape))


def test_a_part_of_a_tubelet_is_refused() -> None:
    with pytest.raises(ValueError, match="a clip has 3 frames, expected 1 to 8 in whole tubelets"):
        FrameViT(**SHAPE, tubelet_size=2)(torch.randn(1, 3, 3, 16, 16))


@pytest.mark.parametrize("shape", [(1, 5, 5, 24), (1, 4, 4, 24), (1, 4, 5, 20), (1, 5, 24)])
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[b, t, 5, 24\] with 1 to 4 frames"):
        FrameViT(**SHAPE).forward_tokens(torch.randn(shape))
