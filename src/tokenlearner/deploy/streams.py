"""Live video without a model's code: both halves of a `TokenStream` as files.

A folder has `encoder`, which runs once a frame, `step`, which runs on the tokens of the last frames
and takes and returns what is kept of them, and `stream.json`. All take any number of videos.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.framevit import FrameViT
from ..models.streaming import FrameStream, StreamEncoder, StreamShape, StreamStep, TokenStream
from ..utils.files import read_json
from ..utils.io import atomic_write, check_output_folder, write_json
from ..utils.modules import clone_structure
from ..utils.preprocessing import Preprocessing
from ..utils.validation import check_above_zero, check_choice, check_count, require
from .exporting import check_output, export_errors
from .formats import (
    SUFFIXES,
    check_target,
    check_weights,
    open_program,
    open_session,
    write_program,
)

DESCRIPTION = "stream.json"
_STEP_OUTPUTS = ("prediction", "features", "next_tokens", "next_present", "next_ages")
_TRACED = 2  # videos; one would be taken for a constant


def export_stream(
    model: FrameViT, folder: str | Path, suffix: str = ".onnx", *, tolerance: float = 1e-4
) -> Path:
    """Writes both halves of a stream, and compares them with the model frame by frame.

    `encoder` makes tokens, `new`, of a `frame` (and a `condition`); `step` has the arguments of
    `StreamStep`, and returns `prediction`, `features` and the next state.

    Args:
        model: In float32; it is left as it is.
        folder: Files of an earlier export in it are replaced.
        suffix: `".onnx"` or `".pt2"`.
        tolerance: Largest difference to the model, as a share of its largest output, or absolute
            if that is below 1.

    Returns:
        The folder.

    Raises:
        ValueError: The model is no `FrameViT` in float32, or a package is missing.
        RuntimeError: It cannot be exported, or the difference is too large. No file is left.

    >>> import tempfile
    >>> model = FrameViT(img_size=32, embed_dim=32, num_heads=2, depth=2, num_frames=3).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stream = load_stream(export_stream(model, folder, ".pt2"))
    >>> stream.push(torch.ones(2, 3, 32, 32)).shape
    torch.Size([2, 400])
    """
    live = TokenStream(model)
    check_choice("suffix", suffix, SUFFIXES)
    check_above_zero("tolerance", tolerance)
    dtypes = {p.dtype for p in model.parameters()}
    require(dtypes == {torch.float32}, f"the model is {dtypes}, expected float32; call .float()")
    folder = check_output_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("encoder", "step"):
        check_weights(model, check_target(folder / f"{name}{suffix}", "float32"))
    copy: Any = clone_structure(model).eval()
    encoded = _blank_frame(model, _TRACED)
    step: dict[str, Tensor] = {
        "new": torch.zeros(_TRACED, model.tokens_per_frame, model.embed_dim),
        "arrived": torch.ones(_TRACED, dtype=torch.bool),
        "elapsed": torch.ones(_TRACED),
        **live.empty_state(_TRACED),
    }
    how = live.preprocessing
    described = {"suffix": suffix, **asdict(live.shape)}
    described["preprocessing"] = how.to_kwargs() if how else None
    with ExitStack() as written:
        paths = [
            written.enter_context(atomic_write(folder / f"{name}{suffix}"))
            for name in ("encoder", "step")
        ]
        device = model.time_embed.device
        for path, half, inputs, outputs in (
            (paths[0], StreamEncoder(copy).eval(), encoded, ("new",)),
            (paths[1], StreamStep(copy).eval(), step, _STEP_OUTPUTS),
        ):
            placed = {name: value.to(device) for name, value in inputs.items()}
            with export_errors(suffix):
                write_program(half, placed, path, outputs=outputs)
        encoder, stepper = (_open_half(path, device) for path in paths)
        _compare(model, FrameStream(live.shape, encoder, stepper), tolerance)
    write_json(folder / DESCRIPTION, described)
    return folder


def load_stream(folder: str | Path, device: str | torch.device = "cpu") -> FrameStream:
    """Reads what `export_stream` wrote, to push frames to as to a `TokenStream`.

    Args:
        folder: Of both files and their description.
        device: Of the frames; a program runs where its model was.

    Raises:
        ValueError: There is no such folder, a file cannot be read, or a package is missing.
    """
    folder = Path(folder).expanduser()
    path = folder / DESCRIPTION
    require(path.is_file(), f"there is no {path}; tokenlearner.deploy.export_stream makes one")
    try:
        said = read_json(path)
        names = ("num_frames", "tokens_per_frame", "embed_dim")
        frames, tokens, dim = (check_count(name, said[name]) for name in names)
        c, h, w = (check_count("input_size", side) for side in said["input_size"])
        shape = StreamShape(frames, tokens, dim, (c, h, w))
        suffix = check_choice("suffix", said["suffix"], SUFFIXES)
        how = said["preprocessing"]
        how = Preprocessing(**{k: _frozen(v) for k, v in how.items()}) if how else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not of a stream ({error!r}); export it anew") from error
    paths = [folder / f"{name}{suffix}" for name in ("encoder", "step")]
    for half in paths:
        require(half.is_file(), f"there is no {half}, which {path} names; export it anew")
    encoder, step = (_open_half(half, torch.device(device)) for half in paths)
    return FrameStream(shape, encoder, step, how)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _open_half(path: Path, device: torch.device) -> Callable[..., Any]:
    """Returns one of the files as a function of tensors in their order."""
    if path.suffix == ".pt2":
        run = open_program(path, device)[0].module()
        return lambda *tensors: run(*(t for t in tensors if t is not None))
    session = open_session(path, device)
    names = [value.name for value in session.get_inputs()]

    def run_session(*tensors: Tensor | None) -> Any:
        given = [t.detach().cpu().numpy() for t in tensors if t is not None]
        require(
            len(given) == len(names),
            f"got {len(given)} inputs, expected {', '.join(names)}",
        )
        found = session.run(None, dict(zip(names, given, strict=True)))
        outputs = [torch.from_numpy(value).to(device) for value in found]
        return outputs if len(outputs) > 1 else outputs[0]

    return run_session


def _blank_frame(model: FrameViT, b: int) -> dict[str, Tensor]:
    """Returns the encoder's inputs for so many videos, of noise."""
    embed: Any = model.encoder.patch_embed
    channels = embed.proj.in_channels
    axes = {"b": b, "c": channels, "t": model.tubelet_size}
    axes |= dict(zip("hw", embed.img_size, strict=True))
    names = [name for name in model.input_format if name != "t" or model.tubelet_size > 1]
    size = [axes[name] for name in names]
    if model.num_cameras > 1:
        size.insert(1, model.num_cameras)
    inputs = {"frame": torch.randn(size)}
    if model.condition_dim:
        inputs["condition"] = torch.randn(b, model.condition_dim)
    return inputs


def _compare(model: FrameViT, stream: FrameStream, tolerance: float) -> None:
    """Pushes frames to the model and to its files, some of them lost, and a batch of other size."""
    device = model.time_embed.device
    for b in (3, 1):
        live = TokenStream(model)
        was_training = model.training
        model.eval()
        stream.reset()
        try:
            for i in range(model.num_frames + 2):
                inputs = [value.to(device) for value in _blank_frame(model, b).values()]
                arrived = torch.arange(b) % 3 != i % 3 if b > 1 else None
                expected = live.push(*inputs, arrived=arrived, elapsed=1 + i / 8)
                found = stream.push(*inputs, arrived=arrived, elapsed=1 + i / 8)
                check_output(expected, found, tolerance, f"{b} videos, frame {i}")
        finally:
            model.train(was_training)
