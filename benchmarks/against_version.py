"""Is this version as fast as another one? Give the folder `src` of the other checkout.

Two versions cannot live in one process, so each has a process of its own that waits for its turn:
every round runs one piece of work in both, the order changing from round to round.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parents[1] / "src"
LEARNERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "V1": ("TokenLearner", ()),
    "V1.1 grouped": ("TokenLearnerModuleV11", (8,)),
    "V1.1 MLP": ("TokenLearnerV11", ()),
}
SHAPES = ((64, 32, 32, 128), (8, 14, 14, 768))
Work = dict[str, Callable[[], object]]


def learners(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The learners alone, without gradients and with them."""
    import tokenlearner

    for name, (cls, arguments) in LEARNERS.items():
        for shape in SHAPES:
            x = torch.randn(*shape, device=device)
            learner = getattr(tokenlearner, cls)(shape[-1], 8, *arguments).to(device)
            yield from passes(f"{name}, {' x '.join(map(str, shape))}", learner, x)


def models(name: str, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """A whole model at batch 1 and 8, without gradients and with them."""
    from tokenlearner import create_model

    model = create_model(name).to(device)
    for batch in (1, 8):
        x = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device)
        yield from passes(f"{name}, batch {batch}", model, x)


def passes(name: str, model: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    def forward() -> None:
        with torch.inference_mode():
            model(x)

    def step() -> None:
        torch.autograd.grad(model(x).square().mean(), [*model.parameters()], allow_unused=True)

    yield f"{name}, inference", forward
    yield f"{name}, forward and backward", step


def whole_runs(folder: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """An epoch of `train`, distilling too, and importing, each from its start to its end."""
    from tokenlearner import TrainConfig, create_model, save_model, train

    host = folder / "host"
    save_model(create_model("vit_mini_patch4_28", num_classes=10), host)
    runs = iter(range(10**6))

    def epoch(**options: Any) -> float:
        out = folder / str(next(runs))
        config = TrainConfig(out=str(out), epochs=1, images=2048, warmup_epochs=0.1, **options)
        return train(config).history[0]["train_seconds"]

    plain = {"num_tokens": 8, "device": str(device)}
    distilled = {"model": str(host), "insert": 8, "calibrate": 64, "teacher": "host"}
    yield "the steps of an epoch of train, 32 steps", lambda: epoch(**plain)
    yield "the same, distilling", lambda: epoch(device=str(device), **distilled)
    for code in ("import tokenlearner", "import tokenlearner; tokenlearner.TokenLearner"):
        yield code, lambda code=code: subprocess.check_call([sys.executable, "-c", code])
    command = [sys.executable, "-m", "tokenlearner", "--help"]
    yield "tokenlearner --help", lambda: subprocess.check_output(command)


def serve(options: Namespace) -> None:
    """Does one piece of work for each line of stdin, and answers with its seconds."""
    torch.manual_seed(0)
    work: Work = dict(learners(options.device))
    for name in options.models:
        work |= dict(models(name, options.device))
    with TemporaryDirectory() as folder:
        work |= dict(whole_runs(Path(folder), options.device))
        print(json.dumps(list(work)), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            with redirect_stdout(sys.stderr):
                result = work[json.loads(line)]()
            seconds = time.perf_counter() - start
            print(json.dumps(result if isinstance(result, float) else seconds), flush=True)


class Version:
    """A process with one version of the package."""

    def __init__(self, source: Path):
        command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
        self.process: Any = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.work: list[str] = json.loads(self.process.stdout.readline())

    def seconds(self, name: str) -> float:
        self.process.stdin.write(json.dumps(name) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    if "--serve" in sys.argv:
        return serve(parse())
    from measured import add_device, closing  # of this version of the package

    options = parse(add_device)
    if not (Path(options.other) / "tokenlearner" / "__init__.py").is_file():
        raise SystemExit(f"{options.other} has no tokenlearner/__init__.py; pass a checkout's src")
    other, ours = Version(Path(options.other)), Version(HERE)
    print("| work | the other, ms | ours, ms | times as fast (quartiles) |")
    print("| --- | --: | --: | --: |")
    for name in fnmatch.filter(ours.work, options.work):
        rounds = (
            max(3, options.rounds // 3) if "epoch" in name or "same" in name else options.rounds
        )
        pairs = list(timed(other, ours, name, rounds))
        low, middle, high = quantiles([a / b for a, b in pairs], n=4, method="inclusive")
        a, b = (1000 * median(side) for side in zip(*pairs, strict=True))
        print(f"| {name} | {a:.1f} | {b:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) |", flush=True)
    print(closing("against_version.py", device=options.device, rounds=options.rounds))


def timed(other: Version, ours: Version, name: str, rounds: int) -> Iterator[tuple[float, float]]:
    """The seconds of both, round by round, after one round that is not counted."""
    for i in range(rounds + 1):
        order = (other, ours) if i % 2 else (ours, other)
        first, second = (version.seconds(name) for version in order)
        if i:
            yield (first, second) if i % 2 else (second, first)


def parse(add_device: Callable[[ArgumentParser], None] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("other", help="the folder src of another version")
    parser.add_argument("--models", nargs="*", default=["vit_base_patch16_tl8at6_224"])
    parser.add_argument("--work", default="*", help="rows to measure, such as 'V1*'")
    parser.add_argument("--rounds", type=int, default=15)
    if add_device:
        add_device(parser)
    else:  # the script itself adds --serve for the processes that it starts
        parser.add_argument("--serve", action="store_true")
        parser.add_argument("--device", type=torch.device, default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
