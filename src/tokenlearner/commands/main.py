"""The command `tokenlearner`: finds what to run, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..utils.imports import require_package
from ..utils.text import plain_text
from ._streams import CLOSED_PIPE, replace_streams

COMMANDS = {
    "demo": "train a small ViT with and without learned tokens on real images, and compare",
    "train": "train a named model on a named data set",
    "eval": "evaluate a checkpoint on a data set",
    "predict": "label images or videos with a checkpoint",
    "encode": "turn a folder of videos into the tokens of their frames, to train on",
    "reduce": "make a trained ViT cheaper on a folder of images, by tokens or a smaller image",
    "plan": "list where tokens can be learned, and how many, within a budget",
    "bench": "measure models side by side: multiply-adds, memory, speed, training",
    "report": "write one HTML file about a training, a comparison or a benchmark",
    "maps": "draw where learned tokens look on images and videos, and measure it",
    "app": "serve a web page that shows where learned tokens look on your images and clips",
    "export": "write a model to an ONNX file or a torch.export program, and compare the two",
    "models": "list the named models with their size and cost",
    "convert": "turn a checkpoint of scenic's (JAX) into a model, or back",
    "doctor": "print versions, devices and extras, and what is wrong with them",
}
_NEXT = """
  tokenlearner reduce vit_small_patch16_224 --images photos/ --budget 0.5 --out runs/half
      makes a pretrained ViT cheaper, as close to itself on your images as half an hour gets it
  tokenlearner train --data folder --root photos/ --held_out 0.1 \\
      --model vit_tiny_patch16_tl8at6_224 --out runs/mine
      trains a ViT on 8 learned tokens on a folder of images, one subfolder a class
  tokenlearner maps runs/mine photos/ looked/
      draws where its tokens look
"""


def next_commands() -> str:
    """Returns what to do next, and how the command is found where the shell does not find it."""
    activate = Path(sys.executable).with_name("activate")
    if shutil.which("tokenlearner") or not activate.is_file():
        return _NEXT
    path = os.path.relpath(activate)
    return f"\n  source {path}\n      lets this shell find the command tokenlearner{_NEXT}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake gives one line and exit code 2.

    Errors on the way give 1, and a signal 128 more than its number. Output to a closed pipe is
    dropped; the work goes on to its end, and the code is that of SIGPIPE.
    """
    if arguments is not None:
        return _run(list(arguments))
    _let_threads_sleep()
    output = replace_streams()
    _run(sys.argv[1:])
    if output is not None:
        sys.stdout.flush()
        if isinstance(output.error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        if output.error:
            reason = plain_text(output.error)
            print(f"tokenlearner: the output cannot be written: {reason}", file=sys.stderr)
            sys.exit(1)


def _let_threads_sleep() -> None:
    """Lets torch's threads spin only briefly where they wait for each other, before it is imported.

    As they come they spin on, and a command takes many times as long as soon as another program
    wants the same cores. What the user says of it counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _run(arguments: list[str]) -> None:
    if not arguments:
        print(
            f"Begin with one of these; tokenlearner --help lists all commands:\n{next_commands()}",
            end="",
        )
        return
    name = _parse_command(arguments[:1])
    # PIL's about large images, which are read; those twice as large are left out and named
    warnings.filterwarnings("ignore", r"Image size .* exceeds limit")
    try:
        if name != "doctor":  # which says what is missing
            extra = name if name in ("app", "convert", "demo") else "train"
            require_package("jsonargparse", extra, "the command")
        _load(name)(arguments[1:])
    except ValueError as error:
        sys.exit(_complain(name, error, 2))
    except RuntimeError as error:
        signal = getattr(error, "signal", None)  # of `TrainingInterrupted`, which can be resumed
        sys.exit(_complain(name, error, 128 + signal if signal else 1))
    except OSError as error:  # of a disk that is full, a file that went away
        sys.exit(_complain(name, error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _load(name: str) -> Callable[[Sequence[str]], None]:
    """Returns the function of a command, `NAME_command` in the file or package of its name."""
    return getattr(import_module(f".{name}", __package__), f"{name}_command")


def _complain(command: str, error: Exception, code: int) -> int:
    """Prints an error; of several processes that make the same mistake only the first one does."""
    process, message = os.environ.get("RANK", "0"), plain_text(str(error) or repr(error), "\n\t")
    if process == "0":
        print(f"tokenlearner {command}: {message}", file=sys.stderr)
    elif code == 1:  # an error on the way may be this process's alone
        print(f"tokenlearner {command}, process {process}: {message}", file=sys.stderr)
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
