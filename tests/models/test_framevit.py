"""The model for live video: every frame alone until it is tokens, then all frames together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tokenlearner.evaluation.maps import attention_maps
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.models.framevit import FrameViT

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
def test_the_other_order_of_axes_is_the_same_clip() -> None:
    model, clip = randomized(), torch.randn(2, 3, 4, 16, 16)
    other = FrameViT(**SHAPE, input_format="btchw").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(clip.transpose(1, 2)), model(clip))


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


@pytest.mark.parametrize("tubelet_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@torch.no_grad()
def test_it_compiles_whole_for_clips_of_every_length(tubelet_size: int) -> None:
    model = randomized(tubelet_size=tubelet_size)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (4, 2, 3):  # the second length makes torch compile for any
        clip = torch.randn(1, 3, frames * tubelet_size, 16, 16)
        torch.testing.assert_close(compiled(clip), model(clip))


def test_maps_are_those_of_each_frame() -> None:
    model, clip = randomized(), torch.randn(2, 3, 4, 16, 16)
    (maps,) = attention_maps(model, clip).values()
    assert maps.shape == (2, 4, 5, 4, 4)
    (single,) = attention_maps(model, clip[:, :, 2:3]).values()
    torch.testing.assert_close(maps[:, 2:3], single)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"tubelet_size": 0}, "tubelet_size is 0"),
        ({"at": 4}, "at is 4"),
        ({"learner": "v2"}, "learner is 'v2'"),
        ({"input_format": "bhwc"}, "input_format is 'bhwc'"),
        ({"global_pool": "max"}, "no global_pool"),
        ({"fuse": True}, "no fuse"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameViT(**(SHAPE | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "shape", "message"),
    [
        ({}, (3, 4, 16, 16), r"clips are \[3, 4, 16, 16\], expected \[b, c, t, h, w\]"),
        ({}, (1, 3, 5, 16, 16), "5 frames, expected 1 to 4"),
        ({}, (1, 3, 4, 16, 20), r"clips are \[4, 3, 1, 16, 20\]"),
        ({}, (1, 1, 4, 16, 16), r"with 3 channels"),
        ({"tubelet_size": 2}, (1, 3, 3, 16, 16), "3 frames, expected 1 to 8 in whole tubelets"),
    ],
)
def test_clips_that_do_not_fit_are_refused(
    kwargs: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FrameViT(**SHAPE, **kwargs)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 5, 5, 24), (1, 4, 4, 24), (1, 4, 5, 20), (1, 5, 24)])
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[b, t, 5, 24\] with 1 to 4 frames"):
        FrameViT(**SHAPE).forward_tokens(torch.randn(shape))
