"""`tokenlearner bench --advise true`: in which form is a model fastest on this machine?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...deploy.formats import first_line, load_exported, write_program
from ...deploy.quantization import PlainModel
from ...evaluation.flops import count_macs
from ...evaluation.hardware import describe_machine
from ...evaluation.latency import Seconds, Timing, time_interleaved
from ...layers.onednn import use_onednn
from ...utils.imports import require_package
from ...utils.io import write_json
from ...utils.modules import clone_structure, pick_device
from .._tables import filled_table, realized_text
from .config import BenchConfig
from .run import Measurement, load_bench_models, shares_of_time, torch_threads

_SECONDS = 60.0  # for all measurements, where no time is given
_ALIKE = 0.97  # share of the best speed at which a form is as good

Run = Callable[[Tensor], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Form:
    """A way to run a float32 model.

    Args:
        name: Of the form.
        use: What gives a model this form.
        build: Turns a model and images into what runs.
        context: What it runs in.
        trains: Whether there are training steps in it.
        autocast: Whether these are of the float32 model under autocast.
    """

    name: str
    use: str
    build: Callable[[nn.Module, Tensor], Run]
    context: Context = nullcontext
    trains: bool = True
    autocast: torch.dtype | None = None

    def inference(self, model: nn.Module, images: Tensor) -> Run:
        """Returns what maps images to outputs."""
        built = self.build(model, images)

        def run(images: Tensor) -> Tensor:
            with self.context():
                return built(images)

        return run

    def training(self, model: nn.Module, images: Tensor) -> Callable[[Tensor], list[Tensor]]:
        """Returns what makes a step: forward and backward of the mean output, no optimizer."""
        module = clone_structure(model).train()
        built: Any = PlainModel(module) if self.autocast else self.build(module, images)
        parameters = [p for p in built.parameters() if p.requires_grad]

        def run(images: Tensor) -> list[Tensor]:
            kind, on = images.device.type, self.autocast is not None
            with self.context(), torch.autocast(kind, self.autocast, enabled=on):
                loss = built(images).mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [grad for grad in found if grad is not None]

        return run


@dataclass(frozen=True)
class AdviceRow:
    """A model in one form.

    Args:
        model: As it was named.
        form: Its name.
        use: What gives the model this form.
        difference: Largest difference of outputs from float32's on noise, in standard deviations.
        speeds: Time of a batch in ms, by the label of the measurement.
        speedups: Times as fast as the first model in float32.
        realized: Times as fast as the first model in the same form, as a share of the ratio of
            multiply-adds.
    """

    model: str
    form: str
    use: str
    difference: float
    speeds: dict[str, Timing] = field(default_factory=dict)
    speedups: dict[str, Timing] = field(default_factory=dict)
    realized: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """What was measured, and what could not be, with the reason."""

    config: BenchConfig
    machine: dict[str, str | int | None]
    measurements: list[Measurement]
    rows: list[AdviceRow]
    left_out: dict[str, str]

    def best(self, label: str) -> AdviceRow:
        """Returns the last model in its fastest form, or in one before that is as good."""
        rows = [r for r in self.rows if r.model == self.rows[-1].model and label in r.speeds]
        least = min(row.speeds[label].median for row in rows)
        return next(row for row in rows if _ALIKE * row.speeds[label].median <= least)


def advise(config: BenchConfig, report: Callable[[str], object] = lambda line: None) -> Advice:
    """Measures models in every form that runs here, all in turn.

    Args:
        config: The models and how to measure them; a minute if it has no time.
        report: Called with a line on what comes next.

    Raises:
        ValueError: As in `bench`.
    """
    device = pick_device(config.device)
    with torch_threads(config.threads), TemporaryDirectory() as folder:
        report("building")
        models, axes = load_bench_models(
            config.parsed_models, config.img_size, device, torch.float32
        )
        images = torch.randn(config.batch_size, *axes).to(device)
        macs = {name: count_macs(model.eval(), images[:1]) for name, model in models.items()}
        rows, runs, left_out = list[AdviceRow](), dict[Key, tuple[Form, Run]](), dict[str, str]()
        for i, (name, model) in enumerate(models.items()):
            for form in _forms(device, Path(folder) / f"{i}.onnx"):
                report(f"preparing {name} in {form.name}")
                try:
                    run = form.inference(model, images)
                    difference = _difference(run, model, images)
                except Exception as error:  # every library has its own
                    is_ours = type(error) is ValueError
                    left_out[f"{name} in {form.name}"] = (
                        str(error) if is_ours else first_line(error)
                    )
                    continue
                rows.append(AdviceRow(name, form.name, form.use, difference))
                runs[name, form.name] = form, run
        measured = []
        for one, seconds in _measure(config, models, runs, images, report):
            measured.append(one)
            for row in rows:
                if (row.model, row.form) in seconds:
                    _fill(row, one.label, seconds, macs, rows[0])
    return Advice(config, describe_machine(device), measured, rows, left_out)


Key = tuple[str, str]
"""A model and a form."""


def _measure(
    config: BenchConfig,
    models: Mapping[str, nn.Module],
    runs: Mapping[Key, tuple[Form, Run]],
    images: Tensor,
    report: Callable[[str], object],
) -> Iterator[tuple[Measurement, dict[Key, Seconds]]]:
    """Yields the times of all forms of all models with one image, with a batch, and in training."""
    planned = [Measurement("latency", n, "ms", 0) for n in sorted({1, len(images)})]
    planned += [Measurement("training", len(images), "ms", 0)] if config.training else []
    seconds_in_all = config.seconds if config.time else _SECONDS
    for measurement, share in shares_of_time(planned, seconds_in_all):
        report(f"{measurement.label}, in turn")
        part = images[: measurement.batch_size]
        if measurement.name == "training":
            steps = {
                (name, form): asked.training(models[name], part)
                for (name, form), (asked, _) in runs.items()
                if asked.trains
            }
            seconds = time_interleaved(_bound(steps, part), config.rounds, share)
        else:
            passes = _bound({key: run for key, (_, run) in runs.items()}, part)
            with torch.inference_mode():
                seconds = time_interleaved(passes, config.rounds, share)
        yield replace(measurement, rounds=len(next(iter(seconds.values())))), seconds


def _bound(
    runs: Mapping[Key, Callable[[Tensor], Any]], images: Tensor
) -> dict[Key, Callable[[], object]]:
    return {key: partial(run, images) for key, run in runs.items()}


@torch.inference_mode()
def _difference(run: Run, model: nn.Module, images: Tensor) -> float:
    expected = PlainModel(model)(images)
    scale = expected.std().clamp(min=1e-12)
    return ((run(images).float() - expected).abs().max() / scale).item()


def _fill(
    row: AdviceRow,
    label: str,
    seconds: Mapping[Key, Seconds],
    macs: Mapping[str, int],
    first: AdviceRow,
) -> None:
    """Notes a measurement in the row of a model in a form."""
    found, same = seconds[row.model, row.form], seconds.get((first.model, row.form))
    row.speeds[label] = found.latency_ms
    row.speedups[label] = found.speedup_over(seconds[first.model, first.form])
    if row.model != first.model and same:
        ratio = macs[first.model] / macs[row.model]
        row.realized[label] = found.speedup_over(same).median / ratio


def _forms(device: torch.device, file: Path) -> list[Form]:
    """Lists the forms of a device, simple ones first.

    Args:
        device: Where models run.
        file: Where to write the model as ONNX; the first form that needs it does.
    """
    as_it_is = Form("float32", "the model as it is", lambda model, _: PlainModel(model))
    half = [_half_precision(dtype) for dtype in (torch.bfloat16, torch.float16)]
    if device.type != "cpu":
        return [as_it_is, *half]
    plain_attention = replace(
        half[0],
        name="bfloat16, plain attention",
        use="bfloat16 within sdpa_kernel(SDPBackend.MATH); of timm's models TIMM_FUSED_ATTN=0 does",
        context=unfused_attention,
    )
    export = "tokenlearner export MODEL model.onnx"
    return [
        as_it_is,
        Form("float32 by oneDNN", "use_onednn(model), train --onednn true", _onednn),
        half[0],
        plain_attention,
        Form("ONNX Runtime", export, partial(_onnxruntime, file), trains=False),
        Form(
            "OpenVINO",
            f"{export}, openvino.compile_model",
            partial(_openvino, file),
            trains=False,
        ),
    ]


def _half_precision(dtype: torch.dtype) -> Form:
    name = str(dtype).removeprefix("torch.")
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    use = f"model.to(torch.{name}), train --mixed_precision {short}"
    build = lambda model, _: PlainModel(copy.deepcopy(model).to(dtype))  # noqa: E731
    return Form(name, use, build, autocast=dtype)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Has torch compute attention by plain products, which are in half precision too."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # of a CPU too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def _onednn(model: nn.Module, images: Tensor) -> Run:
    return PlainModel(use_onednn(clone_structure(model)))


def _onnxruntime(file: Path, model: nn.Module, images: Tensor) -> Run:
    return load_exported(_written(file, model, images))


def _openvino(file: Path, model: nn.Module, images: Tensor) -> Run:
    if find_spec("openvino") is None:
        raise ValueError("pip install openvino has it measured too")
    openvino = import_module("openvino")
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(str(_written(file, model, images)), "CPU", threads)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _written(file: Path, model: nn.Module, images: Tensor) -> Path:
    if not file.exists():
        write_program(PlainModel(model).eval(), images.new_zeros(2, *images.shape[1:]), file)
    return file


def advice_table(advice: Advice, measurement: Measurement, model: str) -> Any:
    """Makes a table for rich of all forms of a model in one measurement."""
    label = measurement.label
    columns: dict[str, Callable[[AdviceRow], str]] = {
        "": lambda row: row.form,
        "ms": lambda row: f"{row.speeds[label]:.1f}",
        "times as fast": lambda row: f"{row.speedups[label]:.2f}",
        "realized": lambda row: realized_text(row.realized[label]) if row.realized else "",
        "differs": lambda row: f"{row.difference:.1g}",
    }
    table = filled_table(
        columns, [r for r in advice.rows if r.model == model and label in r.speeds]
    )
    table.title, table.title_justify = f"{label}: {model}", "left"
    return table


def advice_lines(advice: Advice) -> list[str]:
    """Says which form to take, and what was left out."""
    lines = []
    for one in advice.measurements:
        best = advice.best(one.label)
        gained = f"{best.speedups[one.label].median:.2f} times as fast as {advice.rows[0].model}"
        lines.append(f"{one.label}: take {best.form}, {gained} in float32 ({best.use}).")
    lines += [f"Not measured: {name} ({reason})." for name, reason in advice.left_out.items()]
    return lines


def advice_parts(
    config: BenchConfig, report: Callable[[str], object] = lambda line: None
) -> Iterator[Any]:
    """Measures, writes the given file, and yields what to print: tables for rich, and lines.

    Raises:
        ValueError: As in `advise`, or rich is missing.
    """
    require_package("rich", "train", "bench")
    advice = advise(config, report)
    if config.json:
        write_json(config.json, advice_json(advice))
    for one in advice.measurements:
        for model in dict.fromkeys(row.model for row in advice.rows):
            yield advice_table(advice, one, model)
    yield from advice_lines(advice)


def advice_json(advice: Advice) -> dict[str, Any]:
    """Returns all of it as plain values, with the command."""
    return {"command": advice.config.command, **asdict(advice)}
