"""The command `tokenlearner`: finds what to run, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..utils.imports import require_package

COMMANDS = {
    "demo": "train a small ViT with and without learned tokens on real images, and compare",
    "train": "train a named model on a named data set",
    "eval": "evaluate a checkpoint on a data set",
    "plan": "list where tokens can be learned, and how many, within a budget",
    "bench": "measure models side by side: multiply-adds, memory, speed, training",
    "report": "write one HTML file about a training, a comparison or a benchmark",
    "maps": "draw where learned tokens look on images and videos, and measure it",
    "app": "serve a web page that shows where learned tokens look on your images and clips",
    "export": "write a model to an ONNX file or a torch.export program, and compare the two",
    "models": "list the named models with their size and cost",
    "convert": "turn a checkpoint of scenic's (JAX) into a model, or back",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake gives one line and exit code 2.

    Errors on the way give 1, and a signal 128 more than its number.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _parse_command(arguments[:1])
    try:
        require_package("jsonargparse", "train", "the command")
        _load(name)(arguments[1:])
    except ValueError as error:
        sys.exit(_complain(name, error, 2))
    except RuntimeError as error:
        signal = getattr(error, "signal", None)  # of `TrainingInterrupted`, which can be resumed
        sys.exit(_complain(name, error, 128 + signal if signal else 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _load(name: str) -> Callable[[Sequence[str]], None]:
    """Returns the function of a command, which is in this file or in one of the command's name."""
    own = globals().get(f"_{name}")
    return own or getattr(import_module(f".{name}", __package__), f"{name}_command")


def _complain(command: str, error: Exception, code: int) -> int:
    """Prints an error; of several processes that make the same mistake only the first one does."""
    process = os.environ.get("RANK", "0")
    if process == "0":
        print(f"tokenlearner {command}: {error}", file=sys.stderr)
    elif code == 1:  # an error on the way may be this process's alone
        print(f"tokenlearner {command}, process {process}: {error}", file=sys.stderr)
    return code


def _parse_command(arguments: Sequence[str]) -> str:
    """Returns the command's name; help and mistakes are answered before anything is imported."""
    listing = "\n".join(f"  {name:<9}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tokenlearner",
        description="Image and video transformers on a few learned tokens (arXiv 2106.11297).",
        epilog=f"commands:\n{listing}\n\n`tokenlearner COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser.parse_args(arguments).command


class _Version(argparse.Action):
    """Looks the version up when it is needed."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tokenlearner {version('tokenlearner')}")
        parser.exit()


def _print(parts: Sequence[Any]) -> None:
    from ._console import console

    console().print(*parts, sep="\n")


def _plan(arguments: Sequence[str]) -> None:
    from ._arguments import read_config
    from .plan import PlanConfig, plan_table

    _print(plan_table(read_config("plan", PlanConfig, arguments)))


def _bench(arguments: Sequence[str]) -> None:
    from ._arguments import read_config
    from ._console import console
    from .bench.config import BenchConfig
    from .bench.table import bench_table

    summary = "a model's name, or a checkpoint; +insert(8,6) learns 8 tokens before block 6"
    models = {"type": str, "nargs": "+", "help": summary}
    config = read_config("bench", BenchConfig, arguments, models=models)
    _print(bench_table(config, console(stderr=True).print))


def _report(arguments: Sequence[str]) -> None:
    from ._arguments import read_config
    from .report.render import ReportConfig, write_report

    old = re.compile("^--pictures(?==|$)")  # of version 0.3
    arguments = [old.sub("--images", argument) for argument in arguments]
    config = read_config("report", ReportConfig, arguments)
    print(f"The report is {write_report(**vars(config))}")


def _app(arguments: Sequence[str]) -> None:
    from ._arguments import read_config
    from .app import server

    summary = "checkpoints, folders of `tokenlearner demo`, or names; none takes the demos here"
    checkpoints = {"type": str, "nargs": "*", "default": (), "help": summary}
    server.app(read_config("app", server.AppConfig, arguments, checkpoints=checkpoints))


def _export(arguments: Sequence[str]) -> None:
    from ._arguments import read_config
    from .export import ExportConfig, export_table

    _print(export_table(read_config("export", ExportConfig, arguments)))
