"""The files that `export` writes: ONNX and torch.export programs, and both of them as a module."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.preprocessing import check_input_size, take_config
from ..utils.imports import require_package
from ..utils.io import check_output_file
from ..utils.preprocessing import NAMES
from ..utils.validation import check_choice, require
from .programs import read_program
from .quantization import PRECISIONS, int8_products_are_exact

SUFFIXES = (".onnx", ".pt2")

_OF_THIS_MACHINE = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")
_METADATA = "tokenlearner_input.json"
_DESCRIBED = ("input_size", *NAMES, "label_names")
_INPUT, _OUTPUT, _BATCH = "images", "logits", "batch"
_ONNX_BYTES = 2**31  # that one file can hold
Axes = tuple[int | str, ...]


class LoadedFile(nn.Module):
    """An exported file as a module, for whatever runs a model: `b c h w -> b classes`.

    Args:
        run: The program or the session.
        inputs: Names and shapes; an axis with a name takes any size.
        outputs: Names and shapes.
        device: Of the images.
        pretrained_cfg: How images are made the model's input, and the names of its classes, as
            timm has them; `get_preprocessing` and `evaluate` read it.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        inputs: dict[str, Axes],
        outputs: dict[str, Axes],
        device: torch.device,
        pretrained_cfg: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._run = (run,)  # no part of this module: torch's programs refuse to be put in a mode
        self.inputs, self.outputs = inputs, outputs
        self.pretrained_cfg = pretrained_cfg
        self.device_marker = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Runs the file; no gradient comes back."""
        with torch.no_grad():
            return self._run[0](images)


def load_exported(path: str | Path, device: str | torch.device = "cpu") -> LoadedFile:
    """Reads a file that `export` wrote, to be run or evaluated like a model.

    ONNX files run in onnxruntime with as many threads as torch has, on a GPU where it can.

    Args:
        path: Ends in `.onnx` or `.pt2`.
        device: Of the images; a program runs where its model was.

    Raises:
        ValueError: The name ends otherwise, there is no such file, it cannot be read, or a package
            is missing.
    """
    path, device = Path(path).expanduser(), torch.device(device)
    check_suffix(path)
    require(path.is_file(), f"there is no file {path}; tokenlearner.export makes one")
    if path.suffix == ".onnx":
        require_package("onnxruntime", "export", "running .onnx")
    try:
        return (_load_onnx if path.suffix == ".onnx" else _load_pt2)(path, device)
    except Exception as error:  # each library has its own
        ours = path.suffix == ".onnx" or isinstance(error, ValueError)
        hint = "" if ours else "; an int8 one needs torchao where it is read"
        raise ValueError(f"{path} cannot be read ({first_line(error)}){hint}") from error


def check_suffix(path: Path) -> None:
    """Checks that a file's name ends in `.onnx` or `.pt2`.

    Raises:
        ValueError: It ends otherwise.
    """
    require(
        path.suffix in SUFFIXES,
        f"{path} ends in {path.suffix!r}, expected .onnx for onnxruntime or .pt2 for torch",
    )


def check_target(path: str | Path, precision: str) -> Path:
    """Checks early that a path and a precision can be written.

    Raises:
        ValueError: They do not fit, or a package is missing.
    """
    path = Path(path).expanduser()
    check_choice("precision", precision, PRECISIONS)
    check_suffix(path)
    require(path.parent.exists(), f"there is no folder {path.parent} for {path.name}; make it")
    check_output_file(path, "the file")
    if path.suffix == ".onnx":
        require(
            precision != "bfloat16",
            "onnxruntime has no bfloat16 convolution for a CPU; export to .pt2, or take int8",
        )
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require_package(name, "export", "export to .onnx")
    elif precision == "int8":
        require_package("torchao.quantization", "export", "precision int8 in .pt2")
    return path


def check_weights(model: nn.Module, path: Path) -> None:
    """Checks that a file can hold a model's weights.

    Raises:
        ValueError: It is an ONNX file, and they are not float32, or too large.
    """
    if path.suffix != ".onnx":
        return
    weights = [*model.parameters(), *model.buffers()]
    for dtype in {p.dtype for p in weights if p.is_floating_point()} - {torch.float32}:
        raise ValueError(f"the model has weights of {dtype}, expected float32; call .float() first")
    size = sum(p.numel() * p.element_size() for p in weights)
    require(
        size < _ONNX_BYTES,
        f"the model has {size / 2**30:.2f} GiB of weights, and one ONNX file holds "
        f"{_ONNX_BYTES / 2**30:.2f}; export to .pt2",
    )


def describe_input(model: nn.Module) -> str:
    """Returns what a file says of its input and its classes, as JSON, in the words of timm."""
    config = getattr(model, "pretrained_cfg", None) or {}
    said = {key: config[key] for key in _DESCRIBED if config.get(key) is not None}
    return json.dumps(said)


def write_metadata(path: Path, described: str) -> None:
    """Writes what `describe_input` returns into an ONNX file."""
    onnx = require_package("onnx", "export", "export to .onnx")
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {_METADATA: described})
    onnx.save(graph, path)


def write_program(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    path: Path,
    described: str = "{}",
    outputs: Sequence[str] = (_OUTPUT,),
) -> None:
    """Traces a model on blank inputs and writes ONNX or a program, by the path's ending.

    Args:
        model: Takes the inputs in their order; the first axis of all is the batch, of any size.
        inputs: Images, or inputs by name.
        path: Of the file.
        described: What `describe_input` returned.
        outputs: Names of what it returns.
    """
    named = {_INPUT: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    batch, blanks = torch.export.Dim(_BATCH, min=1), tuple(named.values())
    axes = tuple({0: batch} for _ in blanks)
    with torch.no_grad():
        if path.suffix == ".pt2":
            program = torch.export.export(model, blanks, dynamic_shapes=axes, strict=False)
            program.example_inputs = None  # they would be in the file
            program._guards_code = []  # of batches that differ; torch would execute their text
            for node in _all_nodes(program.graph_module):
                node.meta = {k: v for k, v in node.meta.items() if k not in _OF_THIS_MACHINE}
            packed = io.BytesIO()  # torch's own file ends the process where a disk is full
            torch.export.save(program, packed, extra_files={_METADATA: described})
            path.write_bytes(packed.getbuffer())
            return
        with warnings.catch_warnings():  # that one name of an axis is enough for all inputs
            warnings.filterwarnings("ignore", r".*shares the same shape constraints")
            written: Any = torch.onnx.export(
                model,
                blanks,
                dynamo=True,
                dynamic_shapes=axes,
                input_names=list(named),
                output_names=list(outputs),
                verbose=False,
            )
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # files and lines of the program that exported
    written.save(path, external_data=False)


def _all_nodes(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """Yields the nodes of a graph and of those inside it."""
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes


def quantize_onnx(source: Path, target: Path) -> None:
    """Rounds the weights of matrix products of an ONNX file to 8 bits, and their input as it runs.

    Each output channel has its own scale. Products of two activations, as in attention, stay.
    The weights are unsigned: processors without VNNI add products of unsigned and signed numbers in
    16 bits, which overflow.
    """
    quantization = require_package("onnxruntime.quantization", "export", "int8 in .onnx")
    tools = require_package("onnxruntime.quantization.shape_inference", "export", "int8 in .onnx")
    onnx = require_package("onnx", "export", "int8 in .onnx")
    with tempfile.TemporaryDirectory() as folder:
        bare, shaped = Path(folder) / "bare.onnx", Path(folder) / "shaped.onnx"
        graph = onnx.load(source)
        del graph.graph.value_info[:]  # shapes that onnxruntime 1.23 infers otherwise
        onnx.save(graph, bare)
        tools.quant_pre_process(bare, shaped, skip_symbolic_shape=True)
        quantization.quantize_dynamic(
            shaped,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QUInt8,
        )


def open_program(path: Path, device: torch.device) -> tuple[Any, str]:
    """Reads a program; returns it and what `describe_input` wrote into the file.

    Raises:
        ValueError: It is no program, or would be wrong on this processor.
    """
    files = {_METADATA: ""}
    program = read_program(path, files)
    _check_products(program.graph_module, device)
    return program, files[_METADATA]


def open_session(path: Path, device: torch.device) -> Any:
    """Returns an ONNX file in onnxruntime, with as many threads as torch has, on a GPU if it can.

    Raises:
        ValueError: onnxruntime is missing.
    """
    onnxruntime = require_package("onnxruntime", "export", "running .onnx")
    str(path).encode()  # onnxruntime takes names in UTF-8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    available = onnxruntime.get_available_providers()
    gpu = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in [*gpu, "CPUExecutionProvider"] if name in available]
    options.log_severity_level = 4  # it would print names of the file as they are
    return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _load_pt2(path: Path, device: torch.device) -> LoadedFile:
    program, text = open_program(path, device)
    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    [input_], [output] = signature.user_inputs, signature.user_outputs
    inputs = {str(input_): _axes(nodes[input_].meta["val"].shape)}
    outputs = {_OUTPUT: _axes(nodes[output].meta["val"].shape)}
    described = _described(path, text, inputs)
    return LoadedFile(program.module(), inputs, outputs, device, described)


def _check_products(program: torch.fx.GraphModule, device: torch.device) -> None:
    """Checks that products of int8, if a program has any, come out right on this processor."""
    has_products = any(n.target is torch.ops.aten._int_mm.default for n in _all_nodes(program))
    require(
        not has_products or int8_products_are_exact(device),
        "it multiplies int8, and torch's products of int8 overflow on this processor, which has no "
        "VNNI; export it here anew, or to .onnx",
    )


def _load_onnx(path: Path, device: torch.device) -> LoadedFile:
    session = open_session(path, device)

    def run(images: Tensor) -> Tensor:
        [out] = session.run(None, {_INPUT: images.cpu().numpy()})
        return torch.from_numpy(out).to(device)

    inputs, outputs = (
        {value.name: _axes(value.shape) for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    text = session.get_modelmeta().custom_metadata_map.get(_METADATA, "")
    described = _described(path, text, inputs)
    return LoadedFile(run, inputs, outputs, device, described)


def _described(path: Path, text: str, inputs: dict[str, Axes]) -> dict[str, Any]:
    """Returns what `describe_input` wrote into a file, checked, and checks the sizes it takes."""
    for _, *size in inputs.values():
        if all(isinstance(axis, int) for axis in size):
            check_input_size(size)
    return take_config(json.loads(text or "{}"), path.name)


def first_line(error: Exception) -> str:
    """Returns the first line of an error; exporters' fill pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), 'no message')}"


def _axes(shape: Sequence[Any]) -> Axes:
    """Returns sizes, and a name for an axis that takes any."""
    return tuple(size if isinstance(size, int) else _BATCH for size in shape)
