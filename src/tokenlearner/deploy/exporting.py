"""Files that run without a model's code: `export(model, "model.onnx", images)`.

A file is read again and run beside the model before it takes its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..evaluation.latency import Timing, time_interleaved
from ..utils.io import atomic_write, check_output_file
from ..utils.modules import clone_structure
from ..utils.validation import check_above_zero, check_count, require
from .formats import (
    Axes,
    LoadedFile,
    check_target,
    check_weights,
    describe_input,
    first_line,
    load_exported,
    quantize_onnx,
    write_metadata,
    write_program,
)
from .quantization import PlainModel, largest_difference, quantize


@dataclass(frozen=True)
class BatchCheck:
    """One batch through the file and through the model, interleaved."""

    batch_size: int
    largest_difference: float
    """Largest difference of any output to the model's, absolute."""
    largest_output: float
    """Largest output of the model, absolute. Where it is 0, as of an untrained head, nothing was
    compared."""
    model_latency_ms: Timing
    """Time of the model as it was given, in PyTorch without `torch.compile`."""
    latency_ms: Timing
    """Time of the file."""
    speedup: Timing
    """Times as fast as the model, round by round."""


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote, and how it compares with the model."""

    path: Path
    precision: str
    size_mib: float
    inputs: dict[str, Axes]
    """Names and shapes; an axis with a name takes any size."""
    outputs: dict[str, Axes]
    checks: tuple[BatchCheck, ...]
    """For each batch size."""

    @property
    def largest_difference(self) -> float:
        """Returns the largest difference of any output to the model's, over all batches."""
        return max(check.largest_difference for check in self.checks)


def export(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    precision: str = "float32",
    tolerance: float = 1e-4,
    rounds: int = 10,
) -> Exported:
    """Writes a model to an ONNX file or a torch.export program, and compares it with the model.

    The file takes float32 images of the size of `images`, any number of them, and gives one
    float32 tensor: the model's output, of transformers' models the logits or, without any, the
    features. It is run on `images` and on a batch of another size. The model is left as it is.

    Args:
        model: Any model of images or clips.
        path: Ends in `.onnx`, or in `.pt2` for `torch.export.load`; its folder has to be there.
        images: One batch as the model takes it, on its device; nothing of it is written.
        precision: `"float32"`; `"int8"`, in `.pt2` as by `quantize`, in `.onnx` by onnxruntime,
            for all products with weights; or, in `.pt2` only, `"bfloat16"`.
        tolerance: Largest difference to the model, as a share of its largest output, or absolute
            if that is below 1. Other precisions differ by more, so there it holds for the program
            against the model of `quantize`, and for the ONNX file before int8.
        rounds: Timed runs of file and model at each batch size, after two that are not counted.

    Raises:
        ValueError: An argument does not fit, or a package is missing.
        RuntimeError: The model cannot be exported, or the difference is too large. No file is left.

    >>> import tempfile
    >>> from tokenlearner import create_model
    >>> vit = create_model("vit_mini_patch4_28", num_tokens=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     exported = export(vit, f"{folder}/vit.pt2", torch.ones(4, 1, 28, 28), rounds=2)
    >>> exported.inputs, [check.batch_size for check in exported.checks]
    ({'images': ('batch', 1, 28, 28)}, [4, 1])
    """
    path = check_target(path, precision)
    check_count("rounds", rounds, least=2)
    check_above_zero("tolerance", tolerance)
    check_weights(model, path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_output_file(path, "the file", size if precision == "float32" else 0)
    plain, described = _plain(model, images), describe_input(model)
    batches = [images, images[:1] if len(images) > 1 else torch.cat([images, images])]
    is_program = path.suffix == ".pt2" and precision != "float32"
    exact = quantize(model, precision) if is_program else plain
    with atomic_write(path) as temporary:
        if path.suffix == ".onnx" and precision == "int8":
            with TemporaryDirectory() as folder:
                whole = Path(folder) / path.name
                _write(exact, batches, tolerance, whole)
                quantize_onnx(whole, temporary)
            write_metadata(temporary, described)
            loaded = load_exported(temporary, images.device)
        else:
            loaded = _write(exact, batches, tolerance, temporary, described)
        checks = tuple(_compare(plain, loaded, batch, rounds) for batch in batches)
        size = temporary.stat().st_size / 2**20
    return Exported(path, precision, size, loaded.inputs, loaded.outputs, checks)


def _plain(model: nn.Module, images: Tensor) -> PlainModel:
    """Copies the structure of a model as a file has it, and checks that it runs."""
    require(
        isinstance(images, Tensor) and images.ndim in (4, 5) and len(images) > 0,
        f"images are {list(getattr(images, 'shape', []))}, expected a batch of images, "
        "b c h w, or of clips, b c t h w",
    )
    require(
        images.dtype == torch.float32,
        f"images are {images.dtype}, expected torch.float32, normalized as the model takes them",
    )
    plain = PlainModel(clone_structure(model)).eval()
    try:
        with torch.inference_mode():
            plain(images[:1])
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        shape, reason = list(images.shape), first_line(error)
        raise ValueError(
            f"the model does not run on images of {shape} ({reason}); pass them as it takes them, "
            "or change its size first, as with set_input_size"
        ) from error
    return plain


def _write(
    exact: nn.Module,
    batches: Sequence[Tensor],
    tolerance: float,
    path: Path,
    described: str = "{}",
) -> LoadedFile:
    """Writes a file, reads it, and checks that it gives the same as the model."""
    images = batches[0]
    sizes = {len(batch) for batch in batches}
    traced = next(n for n in (2, 3, 4) if n not in sizes)  # 1 would be taken for a constant
    with export_errors(path.suffix):
        write_program(exact, images.new_zeros(traced, *images.shape[1:]), path, described)
        if path.suffix == ".onnx":
            write_metadata(path, described)
    loaded = load_exported(path, images.device)
    with torch.inference_mode():
        for batch in batches:
            check_output(exact(batch), loaded(batch), tolerance, f"batch size {len(batch)}")
    return loaded


def check_output(expected: Tensor, found: Tensor, tolerance: float, where: str) -> None:
    """Compares what a file gives with what its model gives.

    Raises:
        RuntimeError: They differ by more than the tolerance, as a share of the largest output, or
            absolute where that is below 1.
    """
    difference = largest_difference(expected, found)
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # NaN is not either
        raise RuntimeError(
            f"at {where} the file differs from the model by {difference:.2g}, expected "
            f"{allowed:.2g} at most; nothing was kept; pass a larger tolerance to keep it"
        )


@contextmanager
def export_errors(suffix: str) -> Iterator[None]:
    """Shortens an exporter's error, which fills pages, to a line."""
    try:
        yield
    except OSError:  # of the disk, not of the model
        raise
    except Exception as error:
        other = ".pt2" if suffix == ".onnx" else ".onnx"
        raise RuntimeError(
            f"this model cannot be exported to {suffix} ({first_line(error)}); {other} may do"
        ) from error


def _compare(plain: nn.Module, loaded: nn.Module, batch: Tensor, rounds: int) -> BatchCheck:
    with torch.inference_mode():
        expected, output = plain(batch), loaded(batch)
        runs = {"model": partial(plain, batch), "file": partial(loaded, batch)}
        seconds = time_interleaved(runs, rounds)
    return BatchCheck(
        batch_size=len(batch),
        largest_difference=largest_difference(expected, output),
        largest_output=expected.abs().max().item(),
        model_latency_ms=seconds["model"].latency_ms,
        latency_ms=seconds["file"].latency_ms,
        speedup=seconds["file"].speedup_over(seconds["model"]),
    )
