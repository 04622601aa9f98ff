"""The model for live video: every frame alone until it is tokens, then all frames together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FRAMES, randomized

from tokenlearner.evaluation.maps import attention_maps
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.framevit import FrameViT


def live(**kwargs: Any) -> FrameViT:
    return randomized(FrameViT(**FRAMES | kwargs))


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("t", [1, 3, 4])
@torch.no_grad()
def test_it_is_an_encoder_in_a_loop_over_frames_and_blocks_on_all_tokens(
    t: int, learner: str
) -> None:
    model, clip = live(learner=learner), torch.randn(2, 3, t, 16, 16)
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


@pytest.mark.slow
@pytest.mark.parametrize("tubelet_size", [1, 2])
@torch.no_grad()
def test_it_compiles_whole_for_clips_of_every_length(tubelet_size: int) -> None:
    model = live(tubelet_size=tubelet_size)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (4, 2, 3):  # the second length makes torch compile for any
        clip = torch.randn(1, 3, frames * tubelet_size, 16, 16)
        torch.testing.assert_close(compiled(clip), model(clip))


def test_maps_are_those_of_each_frame() -> None:
    model, clip = live(), torch.randn(2, 3, 4, 16, 16)
    (maps,) = attention_maps(model, clip).values()
    assert maps.shape == (2, 4, 5, 4, 4)
    (single,) = attention_maps(model, clip[:, :, 2:3]).values()
    torch.testing.assert_close(maps[:, 2:3], single)


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
        FrameViT(**FRAMES, **kwargs)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 5, 5, 16), (1, 4, 4, 16), (1, 4, 5, 20), (1, 5, 16)])
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[b, t, 5, 16\] with 1 to 4 frames"):
        FrameViT(**FRAMES).forward_tokens(torch.randn(shape))
