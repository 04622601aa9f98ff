"""`tokenlearner eval`: a checkpoint on a data set, by default as its training evaluated it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..data.config import DataConfig
from ..data.factory import load_data
from ..evaluation.accuracy import eval_batch_size, evaluate, with_model_size
from ..models.compilation import CompileMode, compile_model
from ..models.outputs import check_classifier
from ..models.preprocessing import size_errors
from ..utils.validation import check_count, check_literals
from ._arguments import make_parser
from ._console import say, show_progress
from ._models import load_checkpoint
from ._runs import TRAINING_ONLY, parse_with_run, preprocessed


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DataConfig):
    """Evaluates a checkpoint on a data set.

    Args:
        checkpoint: File or folder that `tokenlearner train` wrote.
        split: train, val, on which the training evaluated, or test; the two are the same where a
            data set has one of them.
        batch_size: Images at a time, changes the speed only; None is up to 500, fewer of
            large ones.
        compile: Compile blocks (default), or the whole model as a CUDA graph (reduce-overhead,
            max-autotune); pays for many images.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or there is no such split.
    """

    checkpoint: str
    split: Literal["train", "val", "test"] = "val"
    batch_size: int | None = None
    compile: CompileMode = "no"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_literals(self)
        self.check_data()
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def at_once(self, shape: Sequence[int]) -> int:
        """Returns how many images or clips, with all their views and crops, go in a batch."""
        return self.batch_size or eval_batch_size(shape, self.views * self.crops)


def eval_command(arguments: Sequence[str]) -> None:
    """Evaluates a checkpoint and prints the metrics."""
    config = EvalConfig(**eval_options(arguments))
    model = load_checkpoint(config.checkpoint, config.device)
    check_classifier(model)
    config = with_model_size(config, model)
    if config.compile != "no":
        compile_model(model, config.compile)
    data = preprocessed(load_data(config, config.split), model, config, config.checkpoint)
    with (
        size_errors(config.checkpoint, model, data.shape),
        show_progress(f"evaluating {config.checkpoint} on {config.data}"),
    ):
        metrics = asdict(evaluate(model, data, config.at_once(data.shape)))
    for file in metrics.pop("broken_files"):
        say(f"left out: {file}", file=sys.stderr)
    for name, value in metrics.items():
        if name != "broken" or value:
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def eval_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the options of the run that wrote the checkpoint, and of the command line."""
    summary = "file or folder that `train` wrote; its options of data are the defaults"
    parser = make_parser("eval", EvalConfig, TRAINING_ONLY, checkpoint={"help": summary})
    return parse_with_run(parser, arguments, "checkpoint")
