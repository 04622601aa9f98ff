"""Live video from files: the halves of a stream in both formats, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, randomized
from torch import nn

from tokenlearner.deploy.streams import export_stream, load_stream
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.preprocessing import set_preprocessing
from tokenlearner.models.streaming import TokenStream
from tokenlearner.utils.preprocessing import Preprocessing

POLICY = {"causal": True, "num_bins": 3, "num_cameras": 2, "condition_dim": 3}
TUBELETS = {"tubelet_size": 2, "input_format": "btchw"}


def live(**kwargs: Any) -> Any:
    return randomized(FrameViT(**FRAMES | kwargs))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@torch.no_grad()
def test_files_give_what_the_model_gives_frame_by_frame(suffix: str, tmp_path: Path) -> None:
    model = live(**POLICY)
    how = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1.0)
    set_preprocessing(model, how)
    folder = export_stream(model.train(), tmp_path / "live", suffix)
    assert model.training
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"encoder{suffix}", f"step{suffix}", "stream.json"]
    )
    stream, expected = load_stream(folder), TokenStream(model.eval())
    assert stream.preprocessing == how
    for i in range(7):
        frame, goal = torch.randint(0, 256, (3, 2, 20, 24, 3), dtype=torch.uint8), torch.randn(3, 3)
        arrived = torch.tensor([True, i % 2 == 0, i != 3])
        if i == 4:
            stream.reset([0])
            expected.reset([0])
        found = stream.push(frame, goal, arrived=arrived, elapsed=1 + i / 4)
        right = expected.push(frame, goal, arrived=arrived, elapsed=1 + i / 4)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
        for name in ("tokens", "features", "present"):
            left, right = getattr(stream, name), getattr(expected, name)
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="condition"):
        TokenStream(model).push(frame)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("options", [{}, TUBELETS], ids=str)
@torch.no_grad()
def test_other_streams_are_exported_too(
    options: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    model = live(**options)
    stream, expected = load_stream(export_stream(model, tmp_path, suffix)), TokenStream(model)
    shape = (5, 2, 3, 16, 16) if options else (5, 3, 16, 16)
    for _ in range(6):
        frame = torch.randn(shape)
        right = expected.push(frame)
        torch.testing.assert_close(stream.push(frame), right, rtol=1e-5, atol=1e-5)


class OfTraining(nn.Module):
    """A head that gives something else where it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :7] * (2 if torch.compiler.is_exporting() else 1)


def test_a_model_that_comes_out_otherwise_leaves_no_file(tmp_path: Path) -> None:
    model = live()
    model.head = OfTraining()
    with pytest.raises(RuntimeError, match=r"at 3 videos, frame 0 the file differs"):
        export_stream(model, tmp_path / "live", ".pt2")
    assert list((tmp_path / "live").iterdir()) == []


def test_what_is_no_stream_is_refused(tmp_path: Path) -> None:
    model = live()
    for call, message in (
        (lambda: export_stream(nn.Linear(2, 2), tmp_path), "expected a FrameViT"),  # type: ignore[arg-type]
        (lambda: export_stream(model, tmp_path, ".h5"), "suffix"),
        (lambda: export_stream(live().bfloat16(), tmp_path), "expected float32"),
        (lambda: load_stream(tmp_path / "none"), "there is no .*stream.json"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    said = {"suffix": ".pt2", "num_frames": 4, "tokens_per_frame": 5, "embed_dim": 16}
    said |= {"input_size": [3, 16, 16], "preprocessing": None}
    for change, message in (
        ({"num_frames": -1}, "num_frames"),
        ({"input_size": [3]}, "input_size|not enough|is not of a stream"),
        ({"suffix": "/etc/passwd"}, "suffix"),
        ({"preprocessing": {"mean": [1]}}, "is not of a stream"),
        ({}, "there is no .*encoder.pt2"),
    ):
        (tmp_path / "stream.json").write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=message):
            load_stream(tmp_path)
