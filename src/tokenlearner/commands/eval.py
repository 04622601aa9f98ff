"""`tokenlearner eval`: a checkpoint on a data set, by default as its training evaluated it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..data.config import OLD_NAMES, DataConfig
from ..data.factory import load_data
from ..deploy.formats import SUFFIXES, load_exported
from ..evaluation.accuracy import by_class_names, eval_batch_size, evaluate
from ..models.factory import load_model
from ..models.preprocessing import get_preprocessing
from ..utils.modules import pick_device
from ..utils.validation import check_count

DATASET_OPTIONS = ("root", "num_samples", "num_classes")  # of no use for another data set
TRAINING_ONLY = ("images", "max_broken")  # options of data that are about training


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
    split: Literal["train", "test"] = "test"
    batch_size: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.check_data()
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def at_once(self, shape: Sequence[int]) -> int:
        """Returns how many images or clips, with all their views and crops, go in a batch."""
        return self.batch_size or eval_batch_size(shape, self.views * self.crops)


def run_options(checkpoint: str) -> dict[str, Any]:
    """Returns the options of data with which the run that wrote a checkpoint was evaluated.

    They are in the train.json beside it; a checkpoint without one has none.

    Raises:
        ValueError: train.json cannot be read.
    """
    if (path := run_folder(checkpoint)) is None:
        return {}
    try:
        run: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in DataConfig.__dataclass_fields__ if name not in TRAINING_ONLY]
        options = {"data": run["data"]} | {name: run[name] for name in names if name in run}
        return options | {"data": OLD_NAMES.get(options["data"], options["data"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{path} is not as train wrote it ({error!r}); fix it or move it away"
        raise ValueError(message) from error


def preprocessed(data: Any, model: nn.Module, config: DataConfig, checkpoint: str = "") -> Any:
    """Returns the data as a model takes them, unless options say otherwise.

    A run of version 0.3 did not write to its model how its data set is.

    Args:
        data: From the config.
        model: What is run on them.
        config: Its mean, std, crop_pct and interpolation are taken before the model's.
        checkpoint: File or folder that the model was loaded from, if any.
    """
    run = run_folder(checkpoint)
    of_old_run = run and "mean" not in json.loads(run.read_text(encoding="utf-8"))
    if of_old_run or not (found := get_preprocessing(model, data.shape[0])):
        return data
    return by_class_names(
        model, data.with_preprocessing(**found.to_kwargs() | config.preprocessing)
    )


def run_folder(checkpoint: str) -> Path | None:
    """Returns the train.json beside a checkpoint, None if there is none."""
    path = Path(checkpoint).expanduser()
    path = (path if path.is_dir() else path.parent) / "train.json"
    return path if checkpoint and path.is_file() else None


def eval_command(arguments: Sequence[str]) -> None:
    """Evaluates a checkpoint and prints the metrics."""
    config = EvalConfig(**eval_options(arguments))
    device = pick_device(config.device)
    if Path(config.checkpoint).suffix in SUFFIXES:
        model: Any = load_exported(config.checkpoint, device)
    else:
        model = load_model(config.checkpoint).to(device)
    data = preprocessed(load_data(config, config.split), model, config, config.checkpoint)
    try:
        metrics = asdict(evaluate(model, data, config.at_once(data.shape)))
    except (AssertionError, RuntimeError) as error:  # timm's and torch's, where sizes differ
        raise ValueError(
            f"{config.checkpoint} does not take images of {list(data.shape)} ({error}); pass "
            "img_size and the rest as in its training, or a smaller batch_size"
        ) from error
    for name, value in metrics.items():
        if name != "broken" or value:
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def eval_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the options of the run that wrote the checkpoint, and of the command line."""
    from ._arguments import make_parser, parse

    summary = "file or folder that `train` wrote; its options of data are the defaults"
    parser = make_parser("eval", EvalConfig, TRAINING_ONLY, checkpoint={"help": summary})
    run = run_options(parse(parser, arguments)["checkpoint"])
    parser.set_defaults(run)
    options = parse(parser, arguments)
    if run and OLD_NAMES.get(options["data"], options["data"]) != run["data"]:
        parser.set_defaults(dict.fromkeys(DATASET_OPTIONS))
        options = parse(parser, arguments)
    return options
