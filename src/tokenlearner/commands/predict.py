"""`tokenlearner predict`: a checkpoint labels files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ..data.unlabeled import list_files
from ..evaluation.prediction import Prediction, predict
from ..models.preprocessing import get_input_size
from ..utils.imports import require_package
from ..utils.io import atomic_write, check_output_file
from ..utils.validation import check_count, counted, plain_text, require
from ._arguments import read_config
from ._console import console, say, show_progress
from ._inputs import input_pipeline
from ._models import load_checkpoint
from ._runs import run_options, show_used
from ._tables import filled_table

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # starts of cells that a spreadsheet may compute


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Labels images, or for a model of clips videos, with a trained model.

    Args:
        checkpoint: File or folder that train, save_model or export wrote.
        sources: Files, and folders that are searched with all that is in them.
        follow_links: Take files out of a folder too, where links in it lead there.
        out: CSV file to write; without it a table is printed, or CSV where that is no terminal.
        top: Classes of each file, the most probable first.
        img_size: Height and width of the images; None is the model's.
        stride: Frames of a video from one frame of a clip to the next, 0 spreads a clip over it;
            None is as in the training, or 4.
        batch_size: Files at a time, changes the speed only; None is up to 64, fewer of large ones.
        workers: Processes that read files; None is one a processor that may be used.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or out cannot be written.
    """

    checkpoint: str
    sources: list[str]
    follow_links: bool = False
    out: str | None = None
    top: int = 1
    img_size: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in {"top": 1, "img_size": 1, "stride": 0, "batch_size": 1}.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        if self.out is not None:
            check_output_file(self.out)


def predict_command(arguments: Sequence[str]) -> None:
    """Labels files, and writes or prints the labels."""
    config = read_predict_config(arguments)
    rows = list(_predict(config))
    unreadable = [row for row in rows if row.error]
    for row in unreadable:
        say(f"left out: {row.error}", file=sys.stderr)
    require(len(unreadable) < len(rows), f"{counted(len(rows), 'file')}, and none can be read")
    if config.out is not None:
        with (
            atomic_write(config.out) as path,
            path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            _write_csv(file, rows, config.top)
        say(f"The labels of {counted(len(rows) - len(unreadable), 'file')} are in {config.out}")
    elif console().is_terminal:
        console().print(filled_table(_columns(config.top), rows))
    else:
        _write_csv(sys.stdout, rows, config.top, plain_text)
    if unreadable:
        print(f"{counted(len(unreadable), 'file')} cannot be read", file=sys.stderr)


def read_predict_config(arguments: Sequence[str]) -> PredictConfig:
    """Returns the config that is given on the command line."""
    sources = {"nargs": "+", "help": "files, and folders of any depth"}
    checkpoint = {"help": "file or folder that train, save_model or export wrote"}
    return read_config("predict", PredictConfig, arguments, checkpoint=checkpoint, sources=sources)


def _predict(config: PredictConfig) -> Iterator[Prediction]:
    model = load_checkpoint(config.checkpoint, config.device)
    size = get_input_size(model)
    run = run_options(config.checkpoint)
    clips = len(size) == 4
    if clips:
        require_package("av", "video", "reading videos")
    files = list_files(config.sources, videos=clips, follow_links=config.follow_links)
    taken = input_pipeline(model, size, config.checkpoint, stride=config.stride)
    options: dict[str, Any] = taken.preprocessing.to_kwargs() | {"stride": taken.stride}
    names = ("img_size", *(("views", "crops", "stride") if clips else ()))
    used = {k: run[k] for k in names if run.get(k) and getattr(config, k, None) is None}
    show_used(config.checkpoint, used)
    options |= {k: value for k, value in used.items() if k != "stride"}
    if config.img_size:
        options["img_size"] = config.img_size
    if config.workers is not None:
        options["workers"] = config.workers
    with show_progress("labeling", len(files)) as advance:
        options |= {"top": config.top, "batch_size": config.batch_size}
        for prediction in predict(model, files, **options):
            advance()
            yield prediction


def _columns(top: int) -> dict[str, Callable[[Prediction], str]]:
    """Returns the columns of a table of the most probable classes."""
    columns: dict[str, Callable[[Prediction], str]] = {"file": lambda row: row.file}
    for i in range(top):
        number = f"_{i + 1}" if i else ""
        columns |= {
            f"label{number}": lambda row, i=i: (*row.labels, *[""] * top)[i],
            f"probability{number}": lambda row, i=i: "".join(
                f"{share:.4f}" for share in row.probabilities[i : i + 1]
            ),
        }
    return columns


def _write_csv(
    file: TextIO, rows: Sequence[Prediction], top: int, shown: Callable[[str], str] = str
) -> None:
    """Writes a row for each file; no name of a file or a class begins a formula."""
    columns = _columns(top) | {"error": lambda row: row.error}
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        name, *cells = (shown(cell(row)) for cell in columns.values())
        writer.writerow([_plain_cell(name, "./"), *(_plain_cell(cell, "'") for cell in cells)])


def _plain_cell(text: str, mark: str) -> str:
    """Returns a cell with a mark in front if a spreadsheet may compute it; numbers stay."""
    try:
        float(text)
    except ValueError:
        return mark + text if text.startswith(_FORMULA) else text
    return text
