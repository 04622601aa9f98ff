"""Quantized models: `quantize(model, "int8")`, and their accuracy, speed and size."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..data.dataset import LabeledDataset
from ..evaluation.accuracy import eval_batch_size, evaluate
from ..evaluation.latency import Timing, time_interleaved
from ..layers.token_fuser import TokenFuser
from ..layers.token_learner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from ..models.hosts import find_host
from ..models.outputs import output_tensor
from ..utils.imports import require_package
from ..utils.modules import stream_dtype
from ..utils.validation import check_choice, check_count, require

PRECISIONS = ("float32", "bfloat16", "int8")

_MIN_WIDTH = 32  # of a linear layer that is worth int8
_KEPT = (  # learners and fusers cost little and decide much; torch's attention reads weights itself
    *(TokenLearner, TokenLearnerModuleV11, TokenLearnerV11, TokenFuser),
    nn.MultiheadAttention,
)


class PlainModel(nn.Module):
    """A model as a file has it, from float32 images to one float32 tensor.

    Args:
        model: Any model of images or clips. Of the outputs of transformers' models the logits are
            taken, without any the features.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)
        self.num_classes = getattr(model, "num_classes", None)
        self._dtype = stream_dtype(model)
        self._num_prefix_tokens = _num_prefix_tokens(model)

    def forward(self, images: Tensor) -> Tensor:
        """Runs the model: `b c h w -> b classes`, of clips `b c t h w -> b classes`."""
        out = self.model(images.to(self._dtype))
        return (
            out if isinstance(out, Tensor) else output_tensor(out, self._num_prefix_tokens)
        ).float()


def quantize(model: nn.Module, precision: str) -> PlainModel:
    """Copies a model into another precision, with float32 images and logits.

    `"bfloat16"` has weights and activations of 16 bits. `"int8"` has the weights of linear layers
    of at least 32 channels in 8 bits, one scale an output channel, and rounds their input to 8 bits
    when it runs; learners, fusers, other layers and torchvision's attention stay as they are. Where
    torch's products of int8 overflow (`int8_products_are_exact`), inputs are not rounded.

    Args:
        model: Any model of images or clips; it is left as it is.
        precision: `"float32"`, `"bfloat16"` or `"int8"`, which needs torchao.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: The precision is unknown, torchao is missing, or no layer is large enough.

    >>> from tokenlearner import create_model
    >>> vit = create_model("vit_mini_patch4_28", num_tokens=4)
    >>> quantize(vit, "bfloat16")(torch.ones(2, 1, 28, 28)).dtype
    torch.float32
    """
    check_choice("precision", precision, PRECISIONS)
    if precision == "int8":
        return PlainModel(_int8(model)).eval()
    return PlainModel(copy.deepcopy(model).to(getattr(torch, precision))).eval()


@dataclass(frozen=True)
class PrecisionRow:
    """A model in one precision; differences and speeds are against the first row's."""

    precision: str
    top1_percent: float | None
    """None where no labeled data was given."""
    largest_difference: float
    """Largest difference of any logit, absolute."""
    latency_ms: Timing
    """Time of the whole batch."""
    speedup: Timing
    size_mib: float
    """Size of the weights, or of the file."""


def compare_precisions(
    model: nn.Module,
    data: LabeledDataset | None,
    images: Tensor,
    precisions: Sequence[str] = PRECISIONS,
    *,
    rounds: int = 10,
) -> list[PrecisionRow]:
    """Measures copies of a model in several precisions, as PyTorch runs them.

    Args:
        model: As in `quantize`.
        data: Labeled images for the accuracy, or None.
        images: One batch for differences and latency, on the model's device.
        precisions: The first is what the others are compared with.
        rounds: Timed runs of each, after two that are not counted.

    Raises:
        ValueError: As in `quantize` or `evaluate`, or there is no precision or no image.
    """
    require(len(precisions) > 0, "precisions is empty, expected one or more of " + str(PRECISIONS))
    for precision in precisions:
        check_choice("precision", precision, PRECISIONS)
    copies: dict[str, nn.Module] = {name: quantize(model, name) for name in precisions}
    sizes = {name: weights_mib(model) for name, model in copies.items()}
    return precision_rows(copies, sizes, data, images, rounds)


def precision_rows(
    models: Mapping[str, nn.Module],
    sizes_mib: Mapping[str, float],
    data: LabeledDataset | None,
    images: Tensor,
    rounds: int = 10,
) -> list[PrecisionRow]:
    """Measures models that differ in their precision only.

    Args:
        models: By the name of their precision; the first is what the others are compared with.
        sizes_mib: Of each.
        data: As in `compare_precisions`.
        images: As in `compare_precisions`.
        rounds: As in `compare_precisions`.

    Raises:
        ValueError: There is no image, or fewer than 2 rounds.
    """
    check_count("rounds", rounds, least=2)
    check_count("the count of images", len(images))
    with torch.inference_mode():
        outputs = {name: model(images) for name, model in models.items()}
        runs = {name: partial(model, images) for name, model in models.items()}
        seconds = time_interleaved(runs, rounds)
    first = next(iter(models))
    return [
        PrecisionRow(
            precision=name,
            top1_percent=None if data is None else _top1(model, data),
            largest_difference=largest_difference(outputs[first], outputs[name]),
            latency_ms=seconds[name].latency_ms,
            speedup=seconds[name].speedup_over(seconds[first]),
            size_mib=sizes_mib[name],
        )
        for name, model in models.items()
    ]


def largest_difference(expected: Tensor, output: Tensor) -> float:
    """Returns the largest absolute difference of two outputs; NaN if one has a NaN.

    Raises:
        ValueError: They have different shapes.
    """
    shapes = list(expected.shape), list(output.shape)
    require(shapes[0] == shapes[1], f"the outputs are {shapes[0]} and {shapes[1]}, expected alike")
    return (expected.double() - output.double()).abs().max().item()


def weights_mib(model: nn.Module) -> float:
    """Returns the size of a model's weights as torch saves them, in MiB."""
    buffer = io.BytesIO()  # int8 tensors have no right `element_size`
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes / 2**20


def int8_products_are_exact(device: str | torch.device = "cpu") -> bool:
    """Says whether torch multiplies matrices of int8 on a device without overflow.

    Processors without VNNI add pairs of products in 16 bits, and what does not fit is cut off: a
    ViT is then wrong by a fifth, without an error.
    """
    largest = torch.full((32, 32), 127, dtype=torch.int8, device=device)
    return bool((torch._int_mm(largest, largest) == 32 * 127**2).all())


def _int8(model: nn.Module) -> nn.Module:
    torchao = require_package("torchao.quantization", "export", "precision int8")
    quantized = copy.deepcopy(model)
    kept = {
        id(m) for part in quantized.modules() if isinstance(part, _KEPT) for m in part.modules()
    }
    chosen = {id(m) for m in quantized.modules() if _is_wide(m) and id(m) not in kept}
    require(
        bool(chosen),
        f"{type(model).__name__} has no linear layer of {_MIN_WIDTH} channels or more besides "
        "learners, fusers and torch's own attention; int8 saves nothing here, pass bfloat16",
    )
    exact = int8_products_are_exact(next(model.parameters()).device)
    config = (
        torchao.Int8DynamicActivationInt8WeightConfig() if exact else torchao.Int8WeightOnlyConfig()
    )
    torchao.quantize_(quantized, config, filter_fn=lambda module, _: id(module) in chosen)
    return quantized


def _is_wide(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    return min(module.in_features, module.out_features) >= _MIN_WIDTH


def _num_prefix_tokens(model: nn.Module) -> int:
    """Returns the number of prefix tokens that `output_tensor` needs, for any model."""
    try:
        return find_host(model).num_prefix_tokens
    except ValueError:
        return 1


def _top1(model: nn.Module, data: LabeledDataset) -> float:
    return evaluate(model, data, eval_batch_size(data.shape)).top1_percent
