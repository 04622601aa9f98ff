"""The command `tokenlearner`: names its commands and starts them.

It stands beside the package because importing anything in that loads torch, which takes seconds:
help and a mistyped command are answered without it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {  # what each does; `tokenlearner.cli` has the functions
    "demo": "train a small ViT with and without learned tokens on real pictures, and compare",
    "train": "train a named model on a named data set",
    "eval": "evaluate a checkpoint on a data set",
    "plan": "list where tokens can be learned, and how many, within a budget",
    "bench": "measure models side by side: multiply-adds, memory, speed, training",
    "report": "write one HTML file about a training, a comparison or a benchmark",
    "maps": "draw where learned tokens look on pictures and films, and measure it",
    "app": "serve a web page that shows where learned tokens look on your pictures and clips",
    "export": "write a model to an ONNX file or a torch.export program, and compare the two",
    "models": "list the named models with their size and cost",
    "convert": "turn a checkpoint of scenic's (JAX) into a model, or back",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _parse_command(arguments[:1])
    from tokenlearner.cli import run

    run(name, arguments[1:])


def _parse_command(arguments: Sequence[str]) -> str:
    """Names the command; help and mistakes are answered here."""
    listing = "\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())
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
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tokenlearner {version('tokenlearner')}")
        parser.exit()
