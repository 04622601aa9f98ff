"""Live video: frame by frame equals the whole clip, for every length, and costs one frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FRAMES, randomized
from torch import Tensor, nn

from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.streaming import TokenStream
from tokenlearner.models.vivit import ViViT


def live(**kwargs: Any) -> FrameViT:
    return randomized(FrameViT(**FRAMES | kwargs))


@pytest.mark.parametrize("learner", ["v1", "v11", "grouped"])
@torch.no_grad()
def test_streaming_equals_the_whole_clip_at_every_frame(learner: str, device: torch.device) -> None:
    model = live(learner=learner).double().to(device)
    video = torch.randn(2, 3, 6, 16, 16).double().to(device)
    stream = TokenStream(model)
    for i in range(6):
        out = stream.push(video[:, :, i])
        clip = video[:, :, max(0, i - 3) : i + 1]
        torch.testing.assert_close(stream.tokens, model.encode(clip), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, model(clip), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_format", ["bcthw", "btchw"])
@torch.no_grad()
def test_tubelets_are_pushed_whole(input_format: str) -> None:
    model = live(tubelet_size=2, input_format=input_format)
    axis = input_format.index("t")
    video = torch.randn(2, 3, 12, 16, 16) if axis == 2 else torch.randn(2, 12, 3, 16, 16)
    stream = TokenStream(model)
    for i in range(0, 12, 2):
        out = stream.push(video.narrow(axis, i, 2))
    torch.testing.assert_close(out, model(video.narrow(axis, 4, 8)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tokens_that_were_kept_are_not_changed_by_later_frames() -> None:
    stream, frames = TokenStream(live()), torch.randn(6, 1, 3, 16, 16)
    stream.push(frames[0])
    kept = stream.tokens
    before = kept.clone()
    for frame in frames[1:]:
        stream.push(frame)
    assert torch.equal(kept, before)


def test_a_frame_is_encoded_once() -> None:
    model, batches = live(), []
    model.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    stream = TokenStream(model)
    for _ in range(6):
        stream.push(torch.randn(2, 3, 16, 16))
    assert batches == [2] * 6


class _OneStep(nn.Module):
    """The model that a stream runs for one frame, for the counter of multiply-adds."""

    def __init__(self, model: FrameViT):
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor) -> Tensor:
        tokens = self.model.encode(frame)
        return self.model.forward_tokens(tokens.expand(-1, 4, -1, -1))


def test_a_new_frame_costs_one_encoding_in_place_of_four() -> None:
    model = live()
    frame, clip = torch.randn(1, 3, 1, 16, 16), torch.randn(1, 3, 4, 16, 16)
    encoding = count_macs(model.encoder, frame)
    whole, step = count_macs(model, clip), count_macs(_OneStep(model), frame)
    assert whole - step == 3 * encoding
    assert step < 0.35 * whole


@torch.no_grad()
def test_another_video_starts_after_a_reset() -> None:
    model = live()
    stream, video = TokenStream(model), torch.randn(2, 3, 16, 16)
    stream.push(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="batch of 2 videos, expected 1"):
        stream.push(video)
    stream.reset()
    torch.testing.assert_close(stream.push(video), model(video.unsqueeze(2)))


def test_nothing_is_differentiated_or_kept_on_the_model() -> None:
    model = live()
    before, stream = set(model.__dict__), TokenStream(model)
    with pytest.raises(ValueError, match="no tokens"):
        _ = stream.tokens  # before the first frame
    assert not stream.push(torch.randn(1, 3, 16, 16)).requires_grad
    assert set(model.__dict__) == before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 2, 16, 16), "expected 1 images"),
        ((3, 16, 16), r"clips are \[3, 16, 16\], expected \[b, c, t, h, w\]"),
        ((1, 3, 16, 18), "expected"),
    ],
)
def test_frames_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenStream(live()).push(torch.randn(shape))


def test_a_model_whose_frames_attend_to_each_other_early_or_that_is_compiled_is_refused() -> None:
    model = ViViT(img_size=16, patch_size=4, num_frames=4, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(ValueError, match="model is a ViViT, expected a FrameViT"):
        TokenStream(model)
    with pytest.raises(ValueError, match="model is compiled"):
        TokenStream(torch.compile(FrameViT(**FRAMES)))  # type: ignore[arg-type]
