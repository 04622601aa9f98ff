"""The model for live video: every frame alone until it is tokens, then all frames together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, randomized
from torch import nn

from tokenlearner import create_model, load_model, save_model
from tokenlearner.evaluation.maps import attention_maps
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.framevit import FrameViT


def live(**kwargs: Any) -> Any:
    return randomized(FrameViT(**FRAMES | kwargs))


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("t", [1, 3, 4])
@torch.no_grad()
def test_it_is_an_encoder_in_a_loop_over_frames_and_blocks_on_all_tokens(
    t: int, learner: str
) -> None:
    clip, model = torch.randn(2, 3, t, 16, 16), live(learner=learner)
    encoder: Any = model.encoder
    frames = []
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


# --- policies: causal, discrete, of several cameras and conditioned -------------------------------


@torch.no_grad()
def test_a_causal_model_predicts_at_every_frame_from_it_and_those_before() -> None:
    model, clip = live(causal=True, num_bins=3), torch.randn(2, 3, 4, 16, 16)
    every = model.forward_frames(clip)
    assert every.shape == (2, 4, 7, 3)
    torch.testing.assert_close(every[:, -1], model(clip))
    for i in range(4):
        ages = torch.arange(3.0, 2 - i, -1).expand(2, -1)  # slots are those of the whole clip
        torch.testing.assert_close(every[:, i], model(clip[:, :, : i + 1], ages=ages))
    changed = clip.clone()
    changed[:, :, 2:] = 0
    torch.testing.assert_close(model.forward_frames(changed)[:, :2], every[:, :2])
    with pytest.raises(ValueError, match="not causal"):
        live().forward_frames(clip)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_slots_without_a_frame_are_as_if_they_were_not_there(causal: bool) -> None:
    model, clip = live(causal=causal), torch.randn(3, 3, 4, 16, 16)
    ages = torch.arange(3.0, -1, -1).expand(3, -1)
    torch.testing.assert_close(model(clip, ages=ages), model(clip))
    present = torch.tensor([[True, False, True, False]]).expand(3, -1)
    expected = model(clip[:, :, ::2], ages=ages[:, ::2])
    clip[:, :, 1] = float("nan")
    torch.testing.assert_close(model(clip, present=present), expected)
    nothing = model(clip, present=torch.zeros(3, 4, dtype=torch.bool))
    torch.testing.assert_close(nothing, model.head.bias.expand(3, -1))


@torch.no_grad()
def test_between_whole_ages_embeddings_are_interpolated() -> None:
    model, tokens = live(), torch.randn(1, 2, 5, 16)
    shifted = model.forward_tokens(tokens, ages=torch.tensor([[1.25, 0.0]]))
    mixed = 0.75 * model.time_embed[:, 2] + 0.25 * model.time_embed[:, 1] - model.time_embed[:, 2]
    tokens[:, 0] += mixed
    torch.testing.assert_close(shifted, model.forward_tokens(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tokens_of_several_cameras_are_joined_each_with_its_embedding() -> None:
    model, one = live(num_cameras=2), live()
    clips = torch.randn(2, 2, 3, 4, 16, 16)
    one.load_state_dict({k: v for k, v in model.state_dict().items() if k != "camera_embed"})
    tokens = model.encode(clips)
    assert tokens.shape == (2, 4, 10, 16)
    for camera in range(2):
        expected = one.encode(clips[:, camera]) + model.camera_embed[camera]
        part = tokens[:, :, 5 * camera : 5 * camera + 5]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \[b, 2 cameras, c, t, h, w\]"):
        model(clips[:, 0])


def test_a_condition_changes_nothing_at_first_and_is_learned_through_the_learner() -> None:
    torch.manual_seed(0)
    model: Any = FrameViT(**FRAMES, condition_dim=3)
    clip = torch.randn(2, 3, 4, 16, 16)
    nn.init.normal_(model.head.weight)
    goal = torch.randn(2, 3)
    torch.testing.assert_close(model(clip, goal), model(clip, torch.zeros(2, 3)))
    for checkpointed in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointed)
        model(clip, goal).sum().backward()
        assert model.encoder.film.weight.grad.abs().max() > 1e-6
    nn.init.normal_(model.encoder.film.weight)
    frames = goal[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(model(clip, goal), model(clip, frames))
    assert (model(clip, goal) - model(clip, -goal)).abs().max() > 1e-3
    for condition, message in (
        (None, "condition is missing, and the model has condition_dim=3"),
        (torch.ones(2, 4), r"condition is \[2, 4\], expected \[2, 3\] or one a frame, \[2, 4, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(clip, condition)


def test_a_policy_is_saved_and_compiled_whole(tmp_path: Path) -> None:
    options = {"causal": True, "num_bins": 4, "num_cameras": 2, "condition_dim": 3}
    model = randomized(create_model("framevit_mini_patch8_f6_tl4at3_32", num_classes=2, **options))
    save_model(model, tmp_path / "policy")
    clips, goal = torch.randn(2, 2, 3, 6, 32, 32), torch.randn(2, 3)
    present = torch.rand(2, 6) > 0.3
    expected = model(clips, goal, present)
    assert expected.shape == (2, 2, 4)
    loaded = load_model(tmp_path / "policy").eval()
    torch.testing.assert_close(loaded(clips, goal, present), expected)
    model.reset_classifier(3)
    assert model(clips, goal).shape == (2, 3, 4)
    whole = torch.compile(loaded, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(clips, goal, present), expected)
