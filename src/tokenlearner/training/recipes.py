"""Recipes that come with the package, by name, and the options of a run that is over.

A recipe is a YAML file with options of `tokenlearner train`. Its first lines are comments: a title,
source, command, hardware, time and results.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..data.config import OLD_NAMES, DataConfig
from ..data.factory import SPLITS
from ..evaluation.accuracy import eval_batch_size
from ..utils.validation import check_choice, check_count, require

DATASET_OPTIONS = ("root", "num_samples", "num_classes")  # of no use for another data set
TRAINING_ONLY = ("images", "max_broken")  # options of data that are about training


def list_recipes() -> dict[str, str]:
    """Returns the recipes that come with the package, with their titles."""
    return {path.stem: next(header_lines(path)) for path in _shipped()}


def find_recipe(name: str) -> Path:
    """Returns the path of a recipe of the package, or of the file with that name.

    Raises:
        ValueError: There is neither.
    """
    shipped = {path.stem: path for path in _shipped()}
    path = shipped.get(name) or Path(name).expanduser()
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    require(
        path.is_file(),
        f"there is no recipe {name!r}, expected a YAML file or one of: {', '.join(shipped)}{hint}",
    )
    return path


def header_lines(path: Path) -> Iterator[str]:
    """Yields the lines of the comment that a recipe starts with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return (line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DataConfig):
    """Evaluates a checkpoint on a data set.

    Args:
        checkpoint: File or folder that `tokenlearner train` wrote.
        split: train or test.
        batch_size: Images at a time, changes the speed only; None is up to 500, fewer of
            large ones.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or there is no such split.
    """

    checkpoint: str
    split: str = "test"
    batch_size: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.check_data()
        check_choice("split", self.split, SPLITS)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def at_once(self, shape: Sequence[int]) -> int:
        """Returns how many images or clips, with their views and crops, are evaluated at a time."""
        return self.batch_size or eval_batch_size(shape, self.views * self.crops)


def run_options(checkpoint: str) -> dict[str, Any]:
    """Returns the options of the data that a run was evaluated on, from train.json beside it.

    Without that file there are none.

    Raises:
        ValueError: train.json cannot be read.
    """
    path = Path(checkpoint).expanduser()
    path = (path if path.is_dir() else path.parent) / "train.json"
    if not path.is_file():
        return {}
    try:
        run: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in DataConfig.__dataclass_fields__ if name not in TRAINING_ONLY]
        options = {"data": run["data"]} | {name: run[name] for name in names if name in run}
        return options | {"data": OLD_NAMES.get(options["data"], options["data"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{path} is not as train wrote it ({error!r}); fix it or move it away"
        raise ValueError(message) from error


def _shipped() -> list[Path]:
    folder = Path(str(files("tokenlearner") / "assets" / "recipes"))
    return sorted(folder.glob("*.yaml"))
