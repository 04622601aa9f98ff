"""Live video: frame by frame equals the whole clip, for every length, and costs one frame."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import FRAMES, randomized
from torch import Tensor, nn

from tokenlearner import create_model, save_model
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.preprocessing import get_preprocessing, set_preprocessing
from tokenlearner.models.streaming import TokenStream, prepare_frames
from tokenlearner.models.vivit import ViViT
from tokenlearner.utils.preprocessing import INTERPOLATIONS, Preprocessing


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
    model: Any = ViViT(img_size=16, patch_size=4, num_frames=4, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(ValueError, match="model is a ViViT, expected a FrameViT"):
        TokenStream(model)
    with pytest.raises(ValueError, match="model is compiled"):
        TokenStream(torch.compile(FrameViT(**FRAMES)))  # type: ignore[arg-type]


# --- robots: several, of which some miss frames or start anew -----------------------------------

OPTIONS = [
    {},
    {"causal": True, "num_bins": 3},
    {"num_cameras": 2},
    {"condition_dim": 3},
    {"causal": True, "num_cameras": 2, "condition_dim": 3, "learner": "v1"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_streams_of_robots_equal_their_clips_with_frames_lost_late_and_from_before_a_reset(
    options: dict[str, Any], device: torch.device
) -> None:
    model = live(**options).double().to(device)
    cameras, generator = options.get("num_cameras", 1), torch.Generator().manual_seed(0)
    b, steps, t = 3, 11, model.num_frames
    shape = (b, steps, *([cameras] if cameras > 1 else []), 3, 16, 16)
    frames = torch.randn(shape, generator=generator).double().to(device)
    conditions = torch.randn(b, steps, 3, generator=generator).double().to(device)
    arrived = torch.rand(b, steps, generator=generator) > 0.3
    elapsed = torch.tensor([1.0, 1.0, 0.5, 1.5, 1.0, 2.0, 0.25, 1.0, 1.0, 3.0, 1.0])
    takes = bool(options.get("condition_dim"))
    stream, started = TokenStream(model), torch.zeros(b, dtype=torch.long)
    for i in range(steps):
        if i == 6:
            stream.reset([1])
            started[1] = i
        lost = frames[:, i].clone()
        lost[~arrived[:, i]] = float("nan")  # whatever is there
        condition = conditions[:, i] if takes else None
        out = stream.push(lost, condition, arrived=arrived[:, i], elapsed=elapsed[i].item())
        first = max(0, i + 1 - t)
        times = elapsed.cumsum(0)
        ages = (times[i] - times[first : i + 1]).expand(b, -1)
        present = arrived[:, first : i + 1] & (torch.arange(first, i + 1) >= started[:, None])
        present = (present & (ages < t - 0.5)).to(device)
        clip = frames[:, first : i + 1].movedim(1, 3 if cameras > 1 else 2)
        given = conditions[:, first : i + 1] if takes else None
        expected = model(clip, given, present, ages.to(device))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        slots = stream.tokens.shape[1]
        assert slots == min(i + 1, t)
        assert stream.features.shape == (b, slots, cameras * model.num_tokens, 16)


@torch.no_grad()
def test_a_lost_frame_is_as_if_it_were_not_there() -> None:
    model, video = live(), torch.randn(1, 3, 4, 16, 16)
    stream = TokenStream(model)
    for i in range(4):
        out = stream.push(video[:, :, i], arrived=torch.tensor([i != 1]))
    expected = model(video[:, :, [0, 2, 3]], ages=torch.tensor([[3.0, 1.0, 0.0]]))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert stream.present.tolist() == [[True, False, True, True]]


@torch.no_grad()
def test_a_state_goes_on_in_another_stream_and_is_plain_tensors() -> None:
    model, frames = live(), torch.randn(7, 2, 3, 16, 16)
    stream, other = TokenStream(model), TokenStream(model)
    for frame in frames[:6]:
        stream.push(frame)
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(stream.push(frames[6]), other.push(frames[6]))
    with pytest.raises(ValueError, match=r"state is .*expected .*'tokens': \[2, 4, 5, 16\]"):
        other.load_state_dict({"tokens": torch.zeros(2, 4, 5, 8)})
    other.load_state_dict({})
    with pytest.raises(ValueError, match="no tokens"):
        _ = other.tokens


@pytest.mark.slow
@torch.no_grad()
def test_a_state_goes_on_in_another_process(tmp_path: Path) -> None:
    model: Any = create_model("framevit_mini_patch8_f6_tl4at3_32").eval()
    save_model(model, tmp_path / "model")
    frames, stream = torch.randn(8, 2, 3, 32, 32), TokenStream(model)
    for frame in frames[:7]:
        stream.push(frame)
    torch.save({"state": stream.state_dict(), "frame": frames[7]}, tmp_path / "state.pt")
    code = (
        "import torch, tokenlearner\n"
        "from tokenlearner.models import TokenStream\n"
        "kept = torch.load('state.pt')\n"
        "stream = TokenStream(tokenlearner.load_model('model').eval())\n"
        "stream.load_state_dict(kept['state'])\n"
        "torch.save(stream.push(kept['frame']), 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(
        torch.load(tmp_path / "out.pt"), stream.push(frames[7]), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_stream_follows_its_model_and_leaves_inference_mode() -> None:
    model, frames = live(), torch.randn(4, 1, 3, 16, 16)
    stream = TokenStream(model)
    with torch.inference_mode():
        stream.push(frames[0])
    stream.push(frames[1])
    model.to(torch.bfloat16)
    assert stream.push(frames[2]).dtype == torch.bfloat16
    assert stream.tokens.dtype == torch.bfloat16
    model.float()
    assert stream.push(frames[3]).dtype == torch.float32


def test_each_half_compiles_once_whatever_arrives() -> None:
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model, frames = live(), torch.randn(9, 2, 3, 16, 16)
    plain, stream = TokenStream(model), TokenStream(model, "default", backend=backend)
    for i, frame in enumerate(frames):
        arrived = torch.tensor([True, i % 3 > 0])
        if i == 5:
            plain.reset([0])
            stream.reset([0])
        expected = plain.push(frame, arrived=arrived, elapsed=1 + i / 8)
        out = stream.push(frame, arrived=arrived, elapsed=1 + i / 8)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arrived": torch.ones(2)}, r"arrived is torch.float32 \[2\], expected bool of 2"),
        ({"arrived": torch.tensor([True])}, r"arrived is torch.bool \[1\], expected bool of 2"),
        (
            {"elapsed": torch.ones(3)},
            r"elapsed is \[3\], expected one number or one a video, \[2\]",
        ),
        ({"condition": torch.ones(2, 3)}, r"condition is \[2, 3\], and the model has none"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_lost(
    arguments: dict[str, Any], message: str
) -> None:
    stream, frame = TokenStream(live()), torch.randn(2, 3, 16, 16)
    stream.push(frame)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        stream.push(frame, **arguments)
    assert all(torch.equal(before[name], value) for name, value in stream.state_dict().items())
    with pytest.raises(ValueError, match="expected numbers below 2, or 2 bool"):
        stream.reset([2])


@pytest.mark.slow
def test_ten_thousand_frames_leave_nothing_behind() -> None:
    stream, frame = TokenStream(live()), torch.randn(1, 3, 16, 16)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(held, Tensor) for held in gc.get_objects())

    for _ in range(20):
        stream.push(frame)
    before = tensors()
    for _ in range(10_000):
        stream.push(frame)
    assert tensors() == before
    assert all(value.shape[1] == 4 for value in stream.state_dict().values())


# --- frames as cameras give them -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(30, 40), (16, 16)])
@torch.no_grad()
def test_pixels_are_prepared_as_for_evaluation(mode: str, size: tuple[int, int]) -> None:
    model, (h, w) = live(), size
    ramp = torch.linspace(0, 255, h)[:, None, None] * torch.linspace(0.2, 1, w)[:, None]
    pixels = (ramp * torch.tensor([1.0, 0.5, 0.8])).to(torch.uint8)  # h w c
    with pytest.raises(ValueError, match="does not say how images are normalized"):
        TokenStream(model).push(pixels[None])
    how = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 0.8, "bicubic", mode)
    set_preprocessing(model, how)
    assert get_preprocessing(model) == how
    expected = how.eval_transform((3, 16, 16))(Image.fromarray(pixels.numpy()))[None]
    found = prepare_frames(pixels[None], (3, 16, 16), how)
    assert (found - expected).abs().max() < 1.5 / 255 / 0.2
    out = TokenStream(model).push(pixels[None])
    assert torch.equal(out, TokenStream(model).push(pixels.movedim(-1, 0)[None]))
    torch.testing.assert_close(out, TokenStream(model).push(found))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(30, 40), (7, 11)])
def test_pixels_are_resized_as_the_model_says(interpolation: str, size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    how = Preprocessing((0.0,) * 3, (1.0,) * 3, 1.0, interpolation, "squash")
    expected = how.eval_transform((3, 16, 16))(Image.fromarray(pixels.numpy()))[None]
    found = prepare_frames(pixels[None], (3, 16, 16), how)
    assert (found - expected).abs().max() < 1.5 / 255


def test_frames_that_are_no_pixels_of_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[1, 4, 16, 16\], expected uint8 of 3 channels"):
        TokenStream(live()).push(torch.zeros(1, 4, 16, 16, dtype=torch.uint8))
