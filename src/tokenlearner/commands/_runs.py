"""Runs that `train` wrote: their options of data are the defaults of commands on their models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from ..data.config import OLD_NAMES, DataConfig
from ..evaluation.accuracy import preprocess_for
from ..training.checkpointing import CHECKPOINT
from ..training.paths import candidate_paths, found_paths
from ..utils.files import read_json
from ..utils.processors import is_main_process
from ..utils.validation import is_integer, require
from ._arguments import parse
from ._console import say

DATASET_OPTIONS = ("root", "num_samples", "num_classes")  # of no use for another data set
TRAINING_ONLY = ("images", "max_broken")  # options of data that are about training
NOT_OF_RUNS = (*TRAINING_ONLY, "workers", "download", "follow_links")  # that only a user says
_MOST = {  # that a train.json may say
    "img_size": 8192,
    "frames": 1024,
    "stride": 10_000,
    "views": 100,
    "num_samples": 10**12,
    "num_classes": 10**6,
}
_MOST_PIXELS = 2**28  # of all views and crops of an image or a clip
_MOST_LETTERS = 4096  # of a name or a path


def run_options(checkpoint: str) -> dict[str, Any]:
    """Returns the options of data with which the run that wrote a checkpoint was evaluated.

    They are in the train.json beside it, which may be of a stranger: it says which data these are
    and how they are read, within bounds, and neither how many processes read them nor that they are
    fetched. `root` is where the data are now, if they are found. A checkpoint without a train.json
    has no options.

    Raises:
        ValueError: train.json cannot be read, or is out of bounds.
    """
    if (path := _run_file(checkpoint)) is None:
        return {}
    run = _read(path)
    try:
        names = [name for name in DataConfig.__dataclass_fields__ if name not in NOT_OF_RUNS]
        options = {"data": run["data"]} | {name: run[name] for name in names if name in run}
        _check_bounds(options)
        found = found_paths(run, path.parent)
        options |= {"root": found["root"]} if "root" in found else {}
        return options | {"data": OLD_NAMES.get(options["data"], options["data"])}
    except (TypeError, KeyError, ValueError) as error:
        raise _not_as_written(path, error) from error


def _check_bounds(options: Mapping[str, Any]) -> None:
    for name, most in _MOST.items():
        value = options.get(name)
        require(
            value is None or (is_integer(value) and value <= most),
            f"{name} is {value!r:.80}, expected an integer up to {most}",
        )
    for name in ("data", "root"):
        value = options.get(name)
        is_name = isinstance(value, str) and len(value) <= _MOST_LETTERS
        require(is_name or (value is None and name == "root"), f"{name} is {value!r:.80}")
    config = DataConfig(**options)
    views = config.clip_frames * config.views * config.crops if config.unit == "clips" else 1
    require(
        config.image_shape[1] ** 2 * views <= _MOST_PIXELS,
        f"img_size is {config.image_shape[1]} of {views} frames, more than {_MOST_PIXELS} pixels",
    )


def show_used(checkpoint: str, used: Mapping[str, Any]) -> None:
    """Prints in a line what is taken of the train.json beside a checkpoint, on stderr."""
    said = [
        f"{k} {v!r}" for k, v in used.items() if v != DataConfig.__dataclass_fields__[k].default
    ]
    if said and is_main_process():
        say(f"{_run_file(checkpoint)} says: {', '.join(said)}", file=sys.stderr)


def check_not_fetched(checkpoint: str, data: str) -> None:
    """Checks that reading the data which a train.json names asks nothing of another computer.

    Raises:
        ValueError: They are of Hugging Face datasets: of the Hub, or a folder, which may list
            files of other computers.
    """
    require(
        not data.startswith(("hfds/", "hfids/")),
        f"{_run_file(checkpoint)} names data of Hugging Face datasets, {data}, which the Hub or "
        f"another computer is asked for only where you say so; pass --data {data}",
    )


def preprocessed(data: Any, model: nn.Module, config: DataConfig, checkpoint: str = "") -> Any:
    """Returns the data as a model takes them, unless options say otherwise.

    A run of version 0.3 did not write to its model how its data set is.

    Args:
        data: From the config.
        model: What is run on them.
        config: Its mean, std, crop_pct, interpolation and crop_mode are taken before the model's.
        checkpoint: File or folder that the model was loaded from, if any.
    """
    run = _run_file(checkpoint)
    if run and "mean" not in _read(run):
        return data
    return preprocess_for(model, data, config.preprocessing)


def _run_file(checkpoint: str) -> Path | None:
    """Returns the train.json beside a checkpoint, None if there is none."""
    path = Path(checkpoint).expanduser()
    path = (path if path.is_dir() else path.parent) / "train.json"
    return path if checkpoint and path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    """Reads the options of a run."""
    try:
        run = read_json(path)
        require(isinstance(run, dict), f"it is a {type(run).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise _not_as_written(path, error) from error
    return run


def _not_as_written(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not as train wrote it ({error!r}); fix it or move it away")


def parse_with_run(
    parser: ArgumentParser, arguments: Sequence[str], checkpoint: str
) -> dict[str, Any]:
    """Returns the options of the run that wrote a checkpoint, and of the command line.

    Args:
        parser: Of the command.
        arguments: Those behind the command.
        checkpoint: The option that has the checkpoint.

    Raises:
        ValueError: An argument is unknown, or no value of its type.
    """
    options = parse(parser, arguments)
    named = options[checkpoint]
    require(isinstance(named, str), f"{checkpoint} is {named!r}, expected a name or a file")
    if not (run := run_options(named)):
        return options
    parser.set_defaults(run)
    options = parse(parser, arguments)
    if OLD_NAMES.get(options["data"], options["data"]) != run["data"]:
        parser.set_defaults(dict.fromkeys(DATASET_OPTIONS))
        options = parse(parser, arguments)
    elif "data" not in _given(parser, arguments):
        check_not_fetched(options[checkpoint], run["data"])
    check_root(options, options[checkpoint])
    given = _given(parser, arguments)
    used = {k: v for k, v in run.items() if k not in given and options[k] == v}
    show_used(options[checkpoint], used)
    return options


def _given(parser: ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Returns the options that the command line, or a recipe that it names, has."""
    return {*vars(parser.parse_args(arguments, defaults=False))}


def check_root(options: Mapping[str, Any], checkpoint: str) -> None:
    """Checks that the data of the run that wrote a checkpoint are there, if options take those.

    Raises:
        ValueError: They are not; the places are named.
    """
    path = _run_file(checkpoint)
    if path is None or options.get("root") is None or options.get("download"):
        return
    run = _read(path)
    places = candidate_paths(run, "root", path.parent)
    if options["root"] == run.get("root") and not any(map(os.path.exists, places)):
        looked = " or ".join(str(place.absolute()) for place in places)
        raise ValueError(
            f"{path} says that the data are in {run['root']!r}, but there is no {looked}; pass "
            "--root, or correct it in that file"
        )


def moved_options(recipe: Path) -> list[str]:
    """Returns arguments for the paths of a recipe, if it is the train.json in a run's folder.

    The run is the one in that folder, and what it read is where it is now.
    """
    if recipe.name != "train.json" or not (recipe.parent / CHECKPOINT).exists():
        return []
    paths = found_paths(_read(recipe), recipe.parent) | {"out": str(recipe.parent)}
    return [f"--{name}={path}" for name, path in paths.items()]
