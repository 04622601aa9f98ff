"""What the command `tokenlearner` runs: arguments to one function call, nothing else."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


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
    """Runs the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _parse_command(arguments[:1])
    run(name, arguments[1:])


@dataclass(frozen=True)
class ModelsConfig:
    """Lists the named models with their size and cost.

    Args:
        pattern: Names to list, such as "*base*".
        markdown: Print the table as Markdown.
    """

    pattern: str = "*"
    markdown: bool = False


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs a command; a user's mistake gives one line and exit code 2.

    What goes wrong on the way gives 1, and a signal 128 more than its number.
    """
    try:
        _RUN[name](arguments)
    except ValueError as error:
        sys.exit(_complain(name, error, 2))
    except RuntimeError as error:
        signal = getattr(error, "signal", None)  # of `resume.Stopped`, at which a run can go on
        sys.exit(_complain(name, error, 128 + signal if signal else 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _config(
    command: str, config_class: type[Any], arguments: Sequence[str], **positional: str
) -> Any:
    """Reads a dataclass's fields from the command line; its docstring is the help.

    `positional` has the fields that go without an option's name, and their help.
    """
    return config_class(**_read(_parser(command, config_class, **positional), arguments))


def _parser(
    command: str, config_class: type[Any], skip: Sequence[str] = (), **positional: str
) -> ArgumentParser:
    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ImportError as error:
        message = "the command needs jsonargparse; run pip install 'tokenlearner[train]'"
        raise ValueError(message) from error

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of what is printed in front of the options and behind them."""

    parser = ArgumentParser(
        prog=f"tokenlearner {command}",
        description=COMMANDS[command],
        formatter_class=Formatter,
        exit_on_error=False,
    )
    known = {field.name: field for field in fields(config_class)}
    for name, help_text in positional.items():
        told: dict[str, Any] = {}
        if known[name].type == "Sequence[str]":
            told = {"nargs": "*", "default": known[name].default}
        elif known[name].default is not MISSING:
            told = {"nargs": "?", "default": known[name].default}
        elif known[name].type == "list[str]":
            told = {"nargs": "+"}
        parser.add_argument(name, type=str, help=help_text, **told)
    parser.add_class_arguments(config_class, skip={*positional, *skip})
    return parser


def _read(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The options as they are given, and the rest of them as they are by default."""
    return vars(_told(lambda: parser.parse_args(arguments), "", parser.prog))


def _told(read: Callable[[], Any], where: str, program: str) -> Any:
    """What jsonargparse reads; its complaints in one line that says where they belong."""
    try:
        return read()
    except argparse.ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}{reason}; see `{program} --help`") from error


def _demo(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.commands.demo")
    out = module.demo(_config("demo", module.DemoConfig, arguments))
    print(f"Everything is in {out}")
    print(f"The report is {out / 'report.html'}")


def _train(arguments: Sequence[str]) -> None:
    from ..training.config import TrainConfig
    from ._comparison import check_drawing, compare_with_host
    from ._console import console, is_seen, summary_table, training_progress

    config, start = TrainConfig(**train_options(arguments)), time.perf_counter()
    if config.insert:
        check_drawing()
    train = import_module("tokenlearner.training.run").train
    with training_progress(f"training {config.model}") as report:
        result = train(config, report)
    if not is_seen():
        return
    if config.insert:
        compare_with_host(config, result)
    else:
        console().print(summary_table(result.history, time.perf_counter() - start))
    report_file = import_module("tokenlearner.commands.report.render").write_report(
        config.out, device=config.device
    )
    print(f"The report is {report_file}")
    print(f"The checkpoint is {result.checkpoint}")


def train_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Those of a recipe, if the first argument names one, then those of the command line."""
    from ..training.config import TrainConfig
    from ..training.recipes import find_recipe, list_recipes

    parser = _parser("train", TrainConfig)
    parser.usage = "tokenlearner train [RECIPE] [--key value ...]"
    listing = "\n".join(f"  {name:<24}{what}" for name, what in list_recipes().items())
    parser.epilog = (
        "RECIPE is one of those below, or a YAML file with options; train.json of a run is one too."
        f"\n\nrecipes:\n{listing}"
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    if arguments and not arguments[0].startswith("-"):
        path = find_recipe(arguments[0])
        _told(lambda: parser.parse_path(path), f"{path}: ", parser.prog)
        arguments = [f"--config={path}", *arguments[1:]]
    options = _read(parser, arguments)
    del options["config"]
    return options


def _eval(arguments: Sequence[str]) -> None:
    from ..data.factory import load_data
    from ..evaluation.accuracy import evaluate
    from ..models.factory import load_model
    from ..training.recipes import EvalConfig
    from ..utils.modules import pick_device

    config = EvalConfig(**eval_options(arguments))
    model = load_model(config.checkpoint).to(pick_device(config.device))
    data = load_data(config, config.split)
    try:
        found = evaluate(model, data, config.at_once(data.shape))
    except (AssertionError, RuntimeError) as error:  # timm's and torch's, where sizes differ
        raise ValueError(
            f"{config.checkpoint} cannot be judged by images of {list(data.shape)} ({error}); "
            "pass img_size and the rest as it was trained, or a smaller batch_size"
        ) from error
    shown = {name: value for name, value in asdict(found).items() if name != "broken" or value}
    for name, value in shown.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def eval_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Those of the run that left the checkpoint, then those of the command line."""
    from ..training.recipes import DATASET_OPTIONS, TRAINING_ONLY, EvalConfig, run_options

    help_text = "file or folder that `train` wrote; how it was judged there is the default"
    parser = _parser("eval", EvalConfig, skip=TRAINING_ONLY, checkpoint=help_text)
    run = run_options(_read(parser, arguments)["checkpoint"])
    parser.set_defaults(run)
    options = _read(parser, arguments)
    if run and options["data"] != run["data"]:
        parser.set_defaults(dict.fromkeys(DATASET_OPTIONS))
        options = _read(parser, arguments)
    return options


def _models(arguments: Sequence[str]) -> None:
    from ..evaluation.catalog import catalog, catalog_markdown, catalog_text

    config = _config("models", ModelsConfig, arguments, pattern="names to list, such as '*base*'")
    print((catalog_markdown if config.markdown else catalog_text)(catalog(config.pattern)))


def _plan(arguments: Sequence[str]) -> None:
    from ._console import console

    module, out = import_module("tokenlearner.commands.plan"), console()
    config = _config("plan", module.PlanConfig, arguments, model="a model's name, or a checkpoint")
    out.print(*module.plan_table(config), sep="\n")


def _bench(arguments: Sequence[str]) -> None:
    from ._console import console
    from .bench.config import BenchConfig
    from .bench.table import bench_table

    help_text = "a model's name, or a checkpoint, with '+insert(8,6)' behind it on 8 learned tokens"
    config = _config("bench", BenchConfig, arguments, models=help_text)
    report = console(stderr=True).print
    console().print(*bench_table(config, report), sep="\n")


def _report(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.commands.report.render")
    help_text = "folder that train, demo or a benchmark wrote, or a JSON file of numbers"
    arguments = [re.sub("^--pictures(?==|$)", "--images", argument) for argument in arguments]
    config = _config("report", module.ReportConfig, arguments, source=help_text)
    print(f"The report is {module.write_report(**vars(config))}")


def _app(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.commands.app.server")
    help_text = "checkpoints, folders of `tokenlearner demo`, or names; none takes the demos here"
    module.app(_config("app", module.AppConfig, arguments, checkpoints=help_text))


def _export(arguments: Sequence[str]) -> None:
    from ._console import console

    module, out = import_module("tokenlearner.commands.export"), console()
    config = _config(
        "export",
        module.ExportConfig,
        arguments,
        model="a model's name, or a checkpoint",
        out="file to write, such as model.onnx or model.pt2",
    )
    out.print(*module.export_table(config), sep="\n")


def _maps(arguments: Sequence[str]) -> None:
    from ._console import console

    module, out = import_module("tokenlearner.commands.maps"), console()
    config = _config(
        "maps",
        module.MapsConfig,
        arguments,
        model="checkpoint that `train` or `save_model` wrote, or a model's name",
        source="image (png, jpg), video, or folder of them",
        out="folder for sheets, animations and maps.json",
    )
    out.print(*module.run_maps(config), sep="\n")


def _convert(arguments: Sequence[str]) -> None:
    module = import_module("tokenlearner.checkpoints.convert")
    config = _config(
        "convert",
        module.ConvertConfig,
        arguments,
        checkpoint="scenic's checkpoint; to go back, a saved model",
        out="file that ends in .safetensors; to go back, any other file",
    )
    print(f"The checkpoint is {module.convert_checkpoint(config)}")


def _complain(command: str, error: Exception, code: int) -> int:
    """Prints the error, of several processes that make the same mistake once."""
    process = os.environ.get("RANK", "0")
    if process == "0":
        print(f"tokenlearner {command}: {error}", file=sys.stderr)
    elif code == 1:  # what went wrong on the way may have gone wrong here alone
        print(f"tokenlearner {command}, process {process}: {error}", file=sys.stderr)
    return code


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


_RUN = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "plan": _plan,
    "bench": _bench,
    "report": _report,
    "maps": _maps,
    "app": _app,
    "export": _export,
    "models": _models,
    "convert": _convert,
}
