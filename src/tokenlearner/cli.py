"""The command `tokenlearner`: arguments to one function call, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from typing import Any

COMMANDS = {  # what each does; `_RUN` below has the functions
    "demo": "train a small ViT with and without learned tokens on real pictures, and compare",
    "train": "train a named model on a named data set",
    "eval": "evaluate a checkpoint on a data set",
    "plan": "list where tokens can be learned, and how many, within a budget",
    "models": "list the named models with their size and cost",
    "convert": "turn a checkpoint of scenic's (JAX) into a model, or back",
}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a checkpoint on a data set.

    Args:
        checkpoint: File or folder that `tokenlearner train` wrote.
        data: A name that `load_data` knows.
        split: train or test.
        root: Folder in which the data set is looked for.
        batch_size: Pictures at a time; changes the speed only.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
    """

    checkpoint: str
    data: str = "fashion-mnist-small"
    split: str = "test"
    root: str | None = None
    batch_size: int = 500
    device: str = "auto"


@dataclass(frozen=True)
class ModelsConfig:
    """Lists the named models with their size and cost.

    Args:
        pattern: Names to list, such as "*base*".
        markdown: Print the table as Markdown.
    """

    pattern: str = "*"
    markdown: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake gives one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _parse_command(arguments[:1])
    try:
        _RUN[name](arguments[1:])
    except ValueError as error:
        sys.exit(_complain(name, error, 2))
    except RuntimeError as error:
        sys.exit(_complain(name, error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _parse_command(arguments: Sequence[str]) -> str:
    """Names the command; help and mistakes are answered here, before anything heavy is loaded."""
    from . import __version__

    listing = "\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tokenlearner",
        description="Image and video transformers on a few learned tokens (arXiv 2106.11297).",
        epilog=f"commands:\n{listing}\n\n`tokenlearner COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokenlearner {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser.parse_args(arguments).command


def _config(
    command: str, config_class: type[Any], arguments: Sequence[str], **positional: str
) -> Any:
    """Reads a dataclass's fields from the command line; its docstring is the help.

    `positional` has the fields that go without an option's name, and their help.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        message = "the command needs jsonargparse; run pip install 'tokenlearner[train]'"
        raise ValueError(message) from error
    parser = ArgumentParser(prog=f"tokenlearner {command}", description=COMMANDS[command])
    defaults = {field.name: field.default for field in fields(config_class)}
    for name, help_text in positional.items():
        told = {} if defaults[name] is MISSING else {"nargs": "?", "default": defaults[name]}
        parser.add_argument(name, type=str, help=help_text, **told)
    parser.add_class_arguments(config_class, skip=set(positional))
    return config_class(**vars(parser.parse_args(arguments)))


def _demo(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.demo")
    out = module.demo(_config("demo", module.DemoConfig, arguments))
    print(f"Everything is in {out}")


def _train(arguments: Sequence[str]) -> None:
    from .contest import against_host, check_drawing
    from .progress import training_progress
    from .recipe import TrainConfig

    module = import_module("tokenlearner.train")
    config = _config("train", TrainConfig, arguments)
    if config.insert:
        check_drawing()
    with training_progress(f"training {config.model}") as report:
        result = module.train(config, report)
    if config.insert:
        against_host(config, result)
    print(f"The checkpoint is {result.checkpoint}")


def _eval(arguments: Sequence[str]) -> None:
    from .data import load_data
    from .engine import pick_device
    from .evaluate import evaluate
    from .zoo import load_model

    help_text = "file or folder that `train` wrote"
    config = _config("eval", EvalConfig, arguments, checkpoint=help_text)
    data = load_data(config.data, config.split, root=config.root)
    model = load_model(config.checkpoint).to(pick_device(config.device))
    for name, value in asdict(evaluate(model, data, config.batch_size)).items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _models(arguments: Sequence[str]) -> None:
    from .catalog import catalog, markdown, plain_text

    config = _config("models", ModelsConfig, arguments, pattern="names to list, such as '*base*'")
    print((markdown if config.markdown else plain_text)(catalog(config.pattern)))


def _plan(arguments: Sequence[str]) -> None:
    from .progress import console

    module, out = import_module("tokenlearner.plan_table"), console()
    config = _config("plan", module.PlanConfig, arguments, model="a model's name, or a checkpoint")
    out.print(*module.plan_table(config), sep="\n")


def _convert(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.transfer")
    config = _config(
        "convert",
        module.ConvertConfig,
        arguments,
        checkpoint="scenic's checkpoint; to go back, a saved model",
        out="file that ends in .safetensors; to go back, any other file",
    )
    print(f"The checkpoint is {module.convert_checkpoint(config)}")


def _complain(command: str, error: Exception, code: int) -> int:
    print(f"tokenlearner {command}: {error}", file=sys.stderr)
    return code


_RUN = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "plan": _plan,
    "models": _models,
    "convert": _convert,
}
