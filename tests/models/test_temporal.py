"""The transformer over tokens that were kept: what a FrameViT computes behind its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, check_compiled, check_trained, randomized

from tokenlearner import create_model, load_model, save_model
from tokenlearner.evaluation import count_macs
from tokenlearner.models import FrameViT, TemporalTransformer, TokenStream
from tokenlearner.models.preprocessing import get_input_size

TINY: dict[str, Any] = {"num_frames": 4, "tokens_per_frame": 5, "token_dim": 8}
TINY |= {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7}


def temporal(**options: Any) -> Any:
    return randomized(create_model("temporal_mini", **TINY | options))


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_half_of_a_framevit_behind_its_encoder(causal: bool) -> None:
    framevit = randomized(FrameViT(**FRAMES | {"at": 2, "causal": causal}))
    half = TemporalTransformer(**TINY | {"token_dim": 16, "causal": causal}).eval()
    own = {name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1"): value
           for name, value in framevit.state_dict().items()}  # fmt: skip
    missing, _ = half.load_state_dict(own, strict=False)
    assert missing == ["embed.0.weight", "embed.0.bias", "embed.1.weight", "embed.1.bias"]
    tokens = torch.randn(2, 3, 5, 16)
    half.embed = torch.nn.Identity()
    torch.testing.assert_close(half(tokens), framevit.forward_tokens(tokens))
    present = torch.tensor([[True, False, True], [False, True, True]])
    ages = torch.tensor([[4.0, 1.5, 0.0], [3.0, 1.0, 0.0]])
    expected = framevit.forward_tokens(tokens, present, ages)
    torch.testing.assert_close(half(tokens, None, present, ages), expected)


def test_a_model_is_saved_and_loaded_with_what_its_tokens_are_made_by(tmp_path: Path) -> None:
    source = {"model": "vit", "weights": "0" * 64, "stride": 2}
    model, x = temporal(token_source=source), torch.randn(2, 4, 5, 8)
    loaded: Any = load_model(save_model(model, tmp_path))
    assert loaded.token_source == source
    assert torch.equal(loaded(x), model(x))
    loaded.reset_classifier(3)
    assert loaded(x).shape == (2, 3)
    assert get_input_size(loaded) == [4, 5, 8]


def test_every_parameter_is_trained_and_it_compiles() -> None:
    x = torch.randn(2, 4, 5, 8)
    check_compiled(temporal(), {"clips": x})
    check_trained(temporal(), x)


def test_causal_models_predict_at_every_frame() -> None:
    model, x = temporal(causal=True, num_bins=3), torch.randn(2, 4, 5, 8)
    frames = model.forward_frames(x)
    assert frames.shape == (2, 4, 7, 3)
    torch.testing.assert_close(frames[:, -1], model(x))
    torch.testing.assert_close(model.forward_frames(x[:, :4])[:, 1], frames[:, 1])


def test_blocks_cost_what_their_tokens_cost() -> None:
    x = torch.zeros(1, 4, 5, 8)
    assert count_macs(temporal(), x) == (
        20 * 8 * 16 + 2 * 20 * 12 * 16 * 16 + 2 * 2 * 20 * 20 * 16 + 16 * 7
    )


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 5, 5, 8), r"\[2, 5, 5, 8\], expected \[b, t, 5, 8\] with 1 to 4"),
        ({}, (2, 4, 6, 8), "expected"),
        ({}, (2, 3, 4, 16, 16), "expected"),
        ({"num_heads": 3}, None, "3 heads"),
        ({"depth": 0}, None, "depth is 0"),
        ({"tokens_per_frame": 0}, None, "tokens_per_frame is 0"),
        ({"token_source": {"x": torch.ones(1)}}, None, "token_source"),
        ({"token_source": {"x": "y" * 10_000}}, None, "token_source"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal(**options)(torch.zeros(*shape))


def test_a_stream_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="no encoder"):
        TokenStream(temporal())
