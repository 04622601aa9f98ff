"""`tokenlearner train`: options of a recipe and of the command line; what is printed at the end."""

from __future__ import annotations

import time
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter

from ..training.config import TrainConfig
from ..training.recipes import check_recipe, find_recipe, list_recipes
from ..utils.imports import require_package
from ..utils.processors import is_main_process
from ._arguments import complain, make_parser
from ._runs import check_root, moved_options, parse_with_run


def train_command(arguments: Sequence[str]) -> None:
    """Trains a model, and compares it with its host where tokens are inserted."""
    config, start = TrainConfig(**train_options(arguments)), time.perf_counter()
    if config.insert:
        require_package("matplotlib", "train", "drawing maps")
    from ..training.run import train
    from ..training.setup import with_sizes
    from ._comparison import compare_with_host
    from ._console import console, say, summary_table, training_progress
    from .report.render import write_report

    is_resized = config.lacks_size and config.img_size is None
    config = with_sizes(config)
    if is_resized and config.img_size and is_main_process():
        side = config.img_size
        say(f"{config.model} takes images of {side} x {side} pixels, which yours are resized to")
    with training_progress(f"training {config.model}", unit=config.unit) as report:
        result = train(config, report)
    if not is_main_process():
        return
    if config.insert:
        compare_with_host(config, result)
    else:
        seconds = time.perf_counter() - start
        console().print(summary_table(result.history, seconds, config.unit))
    say(f"The report is {write_report(config.out, device=config.device)}")
    say(f"The checkpoint is {result.checkpoint}")


def train_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the options of a recipe, if the first argument names one, and of the command line."""
    parser = make_parser("train", TrainConfig, formatter=_RecipesFormatter)
    parser.usage = "tokenlearner train [RECIPE] [--key value ...]"
    listing = "\n".join(f"  {name:<24}{summary}" for name, summary in list_recipes().items())
    parser.epilog = (
        "RECIPE is one of those below, or a YAML file with options; train.json of a run is one too."
        f"\n\nrecipes:\n{listing}"
    )
    parser.add_argument("--config", action="config", help=SUPPRESS)
    recipe = None
    if arguments and not arguments[0].startswith("-"):
        recipe = path = find_recipe(arguments[0])
        check_recipe(path)
        complain(parser, lambda: parser.parse_path(path), f"{path}: ")
        given = {argument.partition("=")[0] for argument in arguments}
        lengths = ("steps", "epochs"), ("epochs", "steps")
        other = [f"--{other}=null" for name, other in lengths if f"--{name}" in given]
        arguments = [f"--config={path}", *moved_options(path), *other, *arguments[1:]]
    for option, value in pairwise([*arguments, ""]):
        if option.partition("=")[0] == "--config":
            check_recipe(Path(option.partition("=")[2] or value))
    options = parse_with_run(parser, arguments, "model")
    if recipe:
        check_root(options, str(recipe))
    del options["config"]
    return options


class _RecipesFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the list of recipes."""
