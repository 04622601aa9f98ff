"""What `gpu.py` measures: its tables, each made of jobs that give rows.

A row is a dict from the heading of a column to a word, a number or the quartiles of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from statistics import median
from typing import Any

import timm
import torch
from gpu_bench import BF16, TF32, TOKENS, Bench, Contender, Run
from measured import compiled
from models_speed import inference
from modules_memory import FORMS, textbook
from modules_speed import LEARNERS
from streaming import macs as fewer_macs_a_frame
from torch import Tensor, nn

from tokenlearner import TokenFuser, calibrate, create_model, insert
from tokenlearner.evaluation.latency import Seconds
from tokenlearner.models.streaming import TokenStream

Row = dict[str, Any]
Form = Callable[[Tensor], Tensor]
NAMES = {BF16: "bf16", TF32: "TF32"}
BOTH = ("plain", "V1.1")


@dataclass(frozen=True)
class Job:
    """Rows that are measured together, what they are called, and about how long they take."""

    name: str
    rows: Callable[[], Iterator[Row]]
    seconds: float


@dataclass(frozen=True)
class Table:
    """A heading, a share of the time, and the jobs, the most telling ones first."""

    title: str
    share: float
    jobs: Callable[[Bench], Iterator[Job]]


# --- ceilings ------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> Iterator[Job]:
    yield Job("memory", partial(memory_rows, bench), 3)
    for dtype in NAMES:
        yield Job(f"{NAMES[dtype]} product", partial(product_row, bench, dtype), 3)


def memory_rows(bench: Bench) -> Iterator[Row]:
    x, few = bench.randn(bench.sizes.elements), bench.randn(8)
    y = torch.empty_like(x)
    seconds = bench.time({"copy": lambda: y.copy_(x), "sum": x.sum, "few": few.sum})
    terabytes, size = x.nbytes / 1e12, f"{x.nbytes / 2**20:g} MiB"
    yield ceiling(f"copy of {size}, read and written", 2 * terabytes, "TB/s", seconds["copy"])
    yield ceiling(f"sum of {size}, read", terabytes, "TB/s", seconds["sum"])
    yield ceiling("sums of 8 numbers, one by one", 1e-3, "thousand a second", seconds["few"])


def product_row(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    side = bench.sizes.side
    a, b = (bench.randn(side, side, dtype=dtype) for _ in range(2))
    seconds = bench.time({"mm": lambda: torch.mm(a, b)})["mm"]
    yield ceiling(f"{NAMES[dtype]} product, {side} cubed", 2 * side**3 / 1e12, "TFLOP/s", seconds)


def ceiling(name: str, amount: float, unit: str, seconds: Seconds) -> Row:
    return {"ceiling": name, "measured": asdict(seconds.per_second(amount)), "unit": unit}


# --- learners and the fuser ----------------------------------------------------------------------


def modules(bench: Bench) -> Iterator[Job]:
    for dtype, shape, name in product(NAMES, bench.sizes.shapes, [*LEARNERS, "fuser"]):
        rows = partial(module_rows, bench, name, shape, dtype)
        yield Job(f"{name}, {shape}, {NAMES[dtype]}", rows, 1.5)


def compiled_modules(bench: Bench) -> Iterator[Job]:
    for shape, name in product(bench.sizes.shapes, ("V1.1 MLP", "V1", "fuser")):
        rows = partial(module_rows, bench, name, shape, BF16, is_compiled=True)
        yield Job(f"{name}, {shape}, bf16, compiled", rows, 15)


def module_rows(
    bench: Bench, name: str, shape: str, dtype: torch.dtype, is_compiled: bool = False
) -> Iterator[Row]:
    """Our form against the textbook's and one read of the input, or three with gradients."""
    torch.manual_seed(0)
    size = bench.sizes.shapes[shape]
    inputs = [bench.randn(*size, dtype=dtype) for _ in range(bench.copies(math.prod(size)))]
    forms, weights = (fuser_forms if name == "fuser" else learner_forms)(name, inputs[0])
    for passes in ("forward", "forward+backward"):
        backward = passes != "forward"
        kinds = {f"{form}, compiled": compiled(f) for form, f in forms.items()}
        kinds = {**forms, **kinds} if is_compiled else forms
        runs = {k: turns(f, inputs) for k, f in kinds.items()}
        if backward:
            slope = torch.randn_like(forms["ours"](inputs[0]))
            runs = {k: both_ways(f, inputs, weights, slope) for k, f in kinds.items()}
        reads = turns(lambda x, n=3 if backward else 1: [x.sum() for _ in range(n)], inputs)
        seconds = bench.time({**runs, "read": reads})
        ours, other = (f"{form}{', compiled' * is_compiled}" for form in FORMS)
        row = {
            "module": name,
            "input": f"{shape}, {NAMES[dtype]}",
            "passes": passes + ", compiled" * is_compiled,
            "times as fast as the textbook": asdict(seconds[ours].speedup_over(seconds[other])),
            "times the reads": asdict(seconds["read"].speedup_over(seconds[ours])),
            "ms": asdict(seconds[ours].latency_ms),
        }
        if is_compiled:
            speedup = seconds[ours].speedup_over(seconds["ours"])
            row["times as fast as itself, eager"] = asdict(speedup)
        else:
            row["peak MiB"], row["textbook's peak MiB"] = (bench.peak_mib(runs[f]) for f in FORMS)
        yield row


def learner_forms(name: str, x: Tensor) -> tuple[dict[str, Form], list[Tensor]]:
    learner = LEARNERS[name](x.shape[-1]).to(x)
    forms = {"textbook": lambda x: textbook(learner, x), "ours": learner}
    return forms, [*learner.parameters()]


def fuser_forms(_: str, x: Tensor) -> tuple[dict[str, Form], list[Tensor]]:
    fuser = TokenFuser(x.shape[-1], TOKENS).to(x)
    nn.init.normal_(fuser.mix.weight)
    tokens = torch.randn(len(x), TOKENS, x.shape[-1]).to(x).requires_grad_()
    forms = {"textbook": lambda x: textbook_fuser(fuser, tokens, x)}
    return forms | {"ours": lambda x: fuser(tokens, x)}, [tokens, *fuser.parameters()]


def textbook_fuser(fuser: TokenFuser, tokens: Tensor, x: Tensor) -> Tensor:
    """`b k c, b h w c -> b h w c`, with everything in memory that the equation names."""
    mixed = fuser.mix_norm2(fuser.mix(fuser.mix_norm1(tokens).mT).mT)
    gates = fuser.gates(fuser.norm(x)).sigmoid()
    return (gates[..., None] * mixed[:, None, None]).sum(-2)


def turns(function: Callable[[Tensor], object], inputs: list[Tensor]) -> Run:
    """Calls a function on one input after the other, so that none is in a cache."""
    turn = cycle(inputs)

    @torch.inference_mode()
    def run() -> None:
        function(next(turn))

    return run


def both_ways(function: Form, inputs: list[Tensor], weights: list[Tensor], slope: Tensor) -> Run:
    """A forward pass, and the gradients of the input and of the weights."""
    turn = cycle([x.detach().requires_grad_() for x in inputs])

    def run() -> None:
        x = next(turn)
        torch.autograd.grad(function(x), [x, *weights], slope)

    return run


# --- models --------------------------------------------------------------------------------------


def models(bench: Bench) -> Iterator[Job]:
    for host, batch in product(bench.sizes.hosts, bench.sizes.batches):
        yield model_job(bench, host, bench.sizes.image, batch, BF16)


def models_in_tf32(bench: Bench) -> Iterator[Job]:
    for batch in bench.sizes.batches:
        yield model_job(bench, bench.sizes.host, bench.sizes.image, batch, TF32)


def larger_images(bench: Bench) -> Iterator[Job]:
    for size, batch in product(bench.sizes.larger, bench.sizes.batches):
        if batch * size**2 <= bench.sizes.most_pixels:
            yield model_job(bench, bench.sizes.host, size, batch, BF16)


def model_job(bench: Bench, host: str, size: int, batch: int, dtype: torch.dtype) -> Job:
    rows = partial(model_rows, bench, host, size, batch, dtype)
    seconds = 2.5 + guess(bench, host, size, batch)
    return Job(f"{host} at {size}, {NAMES[dtype]}, batch {batch}", rows, seconds)


def guess(bench: Bench, host: str, size: int, batch: int) -> float:
    """About how long all contenders take, at half the speed of an H100."""
    gmacs = bench.sizes.hosts[host][1] * (size / bench.sizes.image) ** 2
    return 4 * (bench.sizes.rounds + 5) * 2e9 * gmacs * batch / 2e14


def model_rows(bench: Bench, host: str, size: int, batch: int, dtype: torch.dtype) -> Iterator[Row]:
    contenders = bench.contenders(host, size, dtype)
    runs = {k: inference(c.model, c.images(batch)) for k, c in contenders.items()}
    labels = {"model": f"{host} at {size}, {NAMES[dtype]}", "batch": batch}
    yield from compared(labels, contenders, bench.time(runs), batch)


def compared(
    labels: Row, contenders: Mapping[str, Contender], seconds: Mapping[str, Seconds], batch: int
) -> Iterator[Row]:
    """Every contender against the plain model, by time and multiply-adds."""
    for label, own in seconds.items():
        macs = contenders[label].macs
        speedup, of_macs = own.speedup_over(seconds["plain"]), contenders["plain"].macs / macs
        yield {
            **labels,
            "tokens": label,
            "MACs ratio": of_macs,
            "times as fast": asdict(speedup),
            "of the MACs ratio": speedup.median / of_macs,
            "ms": asdict(own.latency_ms),
            "TFLOP/s": 2 * macs * batch / median(own) / 1e12,
        }


def compiled_models(bench: Bench) -> Iterator[Job]:
    sizes = bench.sizes
    main = [(sizes.host, batch) for batch in sizes.batches[:3]]
    rest = [(host, batch) for host in sizes.hosts for batch in sizes.batches]
    rest = [pair for pair in rest if pair not in main]
    for (host, batch), labels in [
        *product(main, [BOTH]),
        *product(main, [("plain", "V1")]),
        *product(rest, [BOTH]),
    ]:
        name = f"{host} at {sizes.image}, bf16, batch {batch}, compiled: {', '.join(labels)}"
        rows = partial(compiled_rows, bench, host, batch, labels)
        yield Job(name, rows, 30 if "V1.1" in labels else 20)


def compiled_rows(bench: Bench, host: str, batch: int, labels: tuple[str, ...]) -> Iterator[Row]:
    """Eager, compiled, and the same captured as CUDA graphs and replayed."""
    size = bench.sizes.image
    contenders = bench.contenders(host, size, BF16)
    eager, made, compile_seconds = {}, {}, {}
    for label in labels:
        model, images = contenders[label].model, contenders[label].images(batch)
        eager[label] = inference(model, images)
        forward, compile_seconds[label] = bench.compiled(
            (host, batch, label), model, partial(inference, model, images)
        )
        made[label] = inference(model, images, forward)
    forms: dict[str, Callable[[], dict[str, Run]]] = {"compiled": lambda: made}
    if bench.device.type == "cuda":
        forms["eager, CUDA graph"] = lambda: {k: graphed(run) for k, run in eager.items()}
        forms["compiled, CUDA graph"] = lambda: {k: graphed(run) for k, run in made.items()}
    for form, make in forms.items():
        runs = {(form, label): run for label, run in make().items()}
        seconds = bench.time({**{("eager", k): run for k, run in eager.items()}, **runs})
        model = {"model": f"{host} at {size}, bf16, {form}", "batch": batch}
        own = {label: seconds[form, label] for label in labels}
        for row in compared(model, contenders, own, batch):
            label = row["tokens"]
            against = own[label].speedup_over(seconds["eager", label])
            row["times as fast as itself, eager"] = asdict(against)
            if form == "compiled":
                row["seconds to compile"] = compile_seconds[label]
            yield row


def graphed(run: Run) -> Run:
    """The kernels of a run as one CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- training, streams, calibrating --------------------------------------------------------------


def training(bench: Bench) -> Iterator[Job]:
    for host, batch in bench.sizes.training:
        rows = partial(training_rows, bench, host, batch)
        seconds = 4 + 3 * guess(bench, host, bench.sizes.image, batch)
        yield Job(f"{host} at {bench.sizes.image}, batch {batch}", rows, seconds)


def compiled_training(bench: Bench) -> Iterator[Job]:
    for host, batch in bench.sizes.training[:1]:
        rows = partial(training_rows, bench, host, batch, is_compiled=True)
        yield Job(f"{host} at {bench.sizes.image}, batch {batch}, compiled", rows, 70)


def training_rows(bench: Bench, host: str, batch: int, is_compiled: bool = False) -> Iterator[Row]:
    """Steps of AdamW on float32 weights, bf16 autocast; the peak is beyond weights and moments."""
    contenders = bench.contenders(host, bench.sizes.image, TF32)
    used = {k: contenders[k] for k in (BOTH if is_compiled else contenders)}
    runs = {
        k: training_step(c, batch, compiled(c.model) if is_compiled else c.model)
        for k, c in used.items()
    }
    seconds = bench.time(runs)
    name = f"{host} at {bench.sizes.image}" + ", compiled" * is_compiled
    rows = list(compared({"model": name, "batch": batch}, used, seconds, batch))
    for row in rows:
        del row["TFLOP/s"]
        if not is_compiled or bench.device.type == "cuda":
            row["peak MiB"] = bench.peak_mib(runs[row["tokens"]])
            row["of plain's"] = row["peak MiB"] / rows[0]["peak MiB"]
    yield from rows


def training_step(one: Contender, batch: int, forward: Form) -> Run:
    model, images = one.model.train(), one.images(batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = forward(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def streams(bench: Bench) -> Iterator[Job]:
    for name in bench.sizes.streams:
        yield Job(name, partial(stream_row, bench, name), 4)


def stream_row(bench: Bench, name: str) -> Iterator[Row]:
    """A new frame against the whole clip."""
    torch.manual_seed(0)
    model: Any = create_model(name).eval().to(bench.device, BF16)
    channels, height, width = model.pretrained_cfg["input_size"]
    clip = bench.randn(1, channels, model.num_frames, height, width)
    stream = TokenStream(model)
    for frame in clip.unbind(2):
        stream.push(frame)
    runs: dict[str, Run] = {"clip": inference(model, clip)}
    seconds = bench.time({**runs, "frame": lambda: stream.push(clip[:, :, 0])})
    speedup = seconds["frame"].speedup_over(seconds["clip"])
    of_macs = fewer_macs_a_frame(model, clip)
    yield {
        "model": f"{name}, bf16",
        "MACs ratio": of_macs,
        "times as fast": asdict(speedup),
        "of the MACs ratio": speedup.median / of_macs,
        "ms a new frame": asdict(seconds["frame"].latency_ms),
    }


def calibrating(bench: Bench) -> Iterator[Job]:
    for learner in ("v11", "v1-mean"):
        yield Job(learner, partial(calibration_row, bench, learner), 15)


def calibration_row(bench: Bench, learner: str) -> Iterator[Row]:
    """The seconds that `calibrate` counts itself, on noise and a host with random weights."""
    host, count, steps = bench.sizes.calibration
    name, _ = bench.sizes.hosts[host]
    size = bench.sizes.image
    with bench.device:
        model = timm.create_model(name, img_size=size, **bench.sizes.host_options).eval()
    images = bench.randn(count, 3, size, size, dtype=TF32)
    calibrate(insert(copy.deepcopy(model), TOKENS, learner=learner), images[:128], steps=2)
    done = calibrate(insert(model, TOKENS, learner=learner), images, steps=steps)
    labels = {"model": f"{host} at {size}, TF32", "learner": learner}
    yield {**labels, "images": done.images, "steps": done.steps, "seconds": done.seconds}


TABLES = {
    "ceilings": Table("What the device does at best", 0.03, ceilings),
    "modules": Table("Learners and the fuser", 0.11, modules),
    "models": Table("Models, eager", 0.19, models),
    "training": Table("Training steps", 0.12, training),
    "tf32": Table("Models in TF32", 0.05, models_in_tf32),
    "larger": Table("Larger images", 0.08, larger_images),
    "stream": Table("TokenStream", 0.03, streams),
    "calibrate": Table("Calibrating", 0.06, calibrating),
    "compiled": Table("Models, compiled and as CUDA graphs", 0.27, compiled_models),
    "compiled-modules": Table("Learners and the fuser, compiled", 0.06, compiled_modules),
    "compiled-training": Table("Training steps, compiled", 0.0, compiled_training),
}
