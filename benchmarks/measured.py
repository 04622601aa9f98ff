"""What the scripts share: `--device`, forms of a model that can be timed, and how results end.

`add_device` gives a script its option, `closing` the last lines that it prints, and `write_results`
a JSON file with the machine and the command in it.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenlearner.evaluation.hardware import describe_machine
from tokenlearner.evaluation.latency import Seconds
from tokenlearner.utils.io import write_json
from tokenlearner.utils.modules import pick_device

CPU = torch.device("cpu")


def add_device(parser: ArgumentParser) -> None:
    """Gives a script `--device`; one that is not there ends the script before any work is done."""
    parser.add_argument("--device", type=_device, default="cpu", help="such as cuda")


def _device(name: str) -> torch.device:
    try:
        return pick_device(name)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error  # which argparse prints as it is


def machine(
    device: torch.device, threads: int | None = None, packages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Names processors, threads and versions, of other packages too."""
    setup = describe_machine(device) | {package: version(package) for package in packages}
    return setup | ({"threads": threads} if threads else {})


def closing(
    script: str,
    threads: int | None = None,
    *,
    device: torch.device = CPU,
    rounds: int | None = None,
    packages: tuple[str, ...] = (),
) -> str:
    """The machine and the command, as every script of these ends.

    Args:
        script: Its file.
        threads: Of the processes that measured, if not of this one.
        device: What was measured on.
        rounds: Timed runs behind every median and its quartiles.
        packages: Whose versions matter besides torch's.
    """
    setup = machine(device, threads, packages)
    chip = f"{setup['accelerator']} in {setup['cpu']}" if setup["accelerator"] else setup["cpu"]
    parts = [chip, f"{setup['threads']} threads"]
    parts += [f"{name} {setup[name]}" for name in ("torch", *packages)]
    parts += [f"{rounds} rounds interleaved"] if rounds else []
    return f"\n{', '.join(parts)}; command:\n{command(script)}"


def command(script: str) -> str:
    """What runs this script again."""
    return f"python {shlex.join([f'benchmarks/{script}', *sys.argv[1:]])}"


def write_results(path: str | Path | None, script: str, setup: Mapping[str, Any]) -> None:
    """Writes results as JSON, with its command; does nothing without a path."""
    if path:
        write_json(path, {"command": command(script), **setup})


def in_ms(seconds: Seconds) -> dict[str, float]:
    """The median and the quartiles of what was timed, as a program reads them."""
    return asdict(seconds.latency_ms)


def compiled(
    model: nn.Module, *, whole: bool = True, freezing: bool = False
) -> Callable[[Tensor], Tensor]:
    """What torch.compile makes of a model, for images of one shape, apart from other models.

    Args:
        model: What to compile, when it first runs.
        whole: As one graph, or it is an error.
        freezing: Treat weights as constants that may be laid out anew; for inference only.
    """

    def forward(images: Tensor) -> Tensor:
        return model(images)

    forward.__code__ = forward.__code__.replace()  # torch keeps what it compiled by code object
    options: Any = {"freezing": True} if freezing else None
    return torch.compile(forward, fullgraph=whole, dynamic=False, options=options)
