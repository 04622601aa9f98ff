"""What a report looks up again in a saved model: what it confuses, and where its tokens look."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.dataset import LabeledDataset, require_order
from ...evaluation.accuracy import eval_batch_size
from ...models.insertion import wrapped_blocks
from ...models.serialization import weights_file
from ...utils.modules import pick_device, training_mode
from ...utils.validation import require
from .._comparison import held_out_images, one_of_each
from ..eval import EvalConfig, run_options
from .parts import Matrix, MatrixCell, ReportTable, cividis
from .reader import RECIPE, FoundRun

_FETCHED = ("hfds/", "hfids/", "wds/")  # sets that may ask the network, or have no order
SHOWN_CLASSES = 20  # of a matrix; of more classes those that are mistaken most often
_WORST = 5  # confusions that are listed


@dataclass(frozen=True)
class Confusions:
    """How often each class was taken for each.

    Args:
        counts: int64 `[true, predicted]`.
        classes: Their names.
        data: The data set, and which part of it.
        whole: Images that the part has.
    """

    counts: Tensor
    classes: tuple[str, ...]
    data: str
    whole: int


@dataclass(frozen=True)
class Reevaluation:
    """What a saved model did once more; what is missing says why.

    Args:
        name: Of the model.
        confusions: None where it could not be judged.
        sheet: A PNG of its maps on held-out images, if it was asked for and can be drawn.
        problems: Why something is missing, in sentences.
    """

    name: str
    confusions: Confusions | None
    sheet: bytes | None
    problems: list[str]


def reevaluate(
    run: FoundRun, images: int, device: str, draw: bool, host: Path | None = None
) -> Reevaluation:
    """Judges a run's model on held-out images, as the run did, and draws its maps.

    Nothing is fetched, and nothing that goes wrong stops it.

    Args:
        run: The training.
        images: How many to judge at most, drawn by a seed.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        draw: Whether to draw maps, if the model learns tokens.
        host: Look at this one's weights in place of the run's, on the run's images.
    """
    problems: list[str] = []
    try:
        model, data = _load(run, host or run.folder, device)
        whole = len(data)
        part: LabeledDataset = data
        if whole > images:
            part = require_order(data, f"draw {images} images").sample(images, 0)
        counts = _confusion_counts(model, part)
        found = Confusions(counts, tuple(data.classes), f"{data.name}, {data.split}", whole)
    except Exception as error:  # whatever a damaged checkpoint or data set makes torch raise
        return Reevaluation(run.name, None, None, [f"{run.name}: {_line(error)}"])
    sheet = None
    if draw and wrapped_blocks(model):
        try:
            sheet = _sheet(model, data)
        except Exception as error:
            problems.append(f"{run.name}: its maps cannot be drawn: {_line(error)}")
    return Reevaluation(run.name, found, sheet, problems)


def confusion_matrix(name: str, found: Confusions) -> Matrix:
    """A matrix of shares of each true class, and the most frequent confusions."""
    counts = found.counts
    shown = _most_mistaken(counts)
    n, right = int(counts.sum()), int(counts.diagonal().sum())
    some = f" of {found.whole:,}, drawn by a seed" if n < found.whole else ""
    remark = f"{n:,} images{some} ({found.data}); {100 * right / max(n, 1):.1f} % are right."
    if len(shown) < len(found.classes):
        remark += f" Shown are the {len(shown)} of {len(found.classes)} classes mistaken most."
    rows = [[_cell(found, true, other) for other in shown] for true in shown]
    names = [found.classes[index] for index in shown]
    return Matrix(name, names, rows, _worst(found), remark)


def _load(run: FoundRun, place: Path, device: str) -> tuple[nn.Module, LabeledDataset]:
    """The model of a folder or a file, and the images that the run was judged by.

    Raises:
        ValueError: One of both is not at hand.
    """
    from ...data.factory import load_data
    from ...models.factory import load_model

    weights = weights_file(place)
    require(weights.is_file(), f"there is no {weights} to judge")
    told: dict[str, Any] = run_options(str(run.folder)) | {"download": False}
    require("data" in told, f"there is no {RECIPE} in {run.folder} that tells the data set")
    config = EvalConfig(checkpoint=str(weights), device=device, **told)
    require(
        not config.data.startswith(_FETCHED),
        f"{config.data} may have to be fetched, which a report does not do",
    )
    data = load_data(config, config.split)
    return load_model(weights).to(pick_device(device)).eval(), data


@torch.inference_mode()
def _confusion_counts(model: nn.Module, data: LabeledDataset) -> Tensor:
    classes, device = len(data.classes), next(model.parameters()).device
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with training_mode(model, training=False):
        for images, labels in _batches(data):
            views = images.shape[1] if images.ndim > len(data.shape) + 1 else 0
            logits = model((images.flatten(0, 1) if views else images).to(device)).float().cpu()
            logits = logits.unflatten(0, (-1, views)).mean(1) if views else logits
            taken = logits[:, :classes].argmax(1)
            counts += (labels * classes + taken).bincount(minlength=classes**2).view_as(counts)
    require(bool(counts.sum()), f"none of the files of {data.name} can be read")
    return counts


def _batches(data: LabeledDataset) -> Iterator[tuple[Tensor, Tensor]]:
    return data.batches(min(100, eval_batch_size(data.shape)))


def _sheet(model: nn.Module, data: LabeledDataset) -> bytes:
    """Draws the maps on an image of each of some classes."""
    require(len(data.shape) == 3, "these are clips; `tokenlearner maps` draws them")
    data = require_order(data, "list its labels")
    title = "Where the learned tokens look: held-out images"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.png"
        return held_out_images(path, model, data, one_of_each(data), title).read_bytes()


def _most_mistaken(counts: Tensor) -> list[int]:
    """All classes, or the ones with the most mistakes, in their order."""
    if len(counts) <= SHOWN_CLASSES:
        return list(range(len(counts)))
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    order = mistakes.sort(descending=True, stable=True).indices
    return sorted(order[:SHOWN_CLASSES].tolist())


def _cell(found: Confusions, true: int, other: int) -> MatrixCell:
    count, of_class = int(found.counts[true, other]), int(found.counts[true].sum())
    share = count / max(of_class, 1)
    ground, ink = cividis(share)
    taken, own = found.classes[other], found.classes[true]
    told = f"{count} of {of_class} of {own} taken for {taken}"
    return MatrixCell(f"{100 * share:.0f}" if count else "", ground, ink, told)


def _worst(found: Confusions) -> ReportTable:
    """The confusions that happened most often."""
    wrong = found.counts - found.counts.diagonal().diag()
    order = wrong.flatten().sort(descending=True, stable=True).indices[:_WORST].tolist()
    rows: list[list[str]] = []
    for true, other in (divmod(index, len(wrong)) for index in order):
        count, of_class = int(wrong[true, other]), int(found.counts[true].sum())
        if count:
            share = f"{100 * count / of_class:.0f}"
            rows.append(
                [f"{found.classes[true]} taken for {found.classes[other]}", f"{count:,}", share]
            )
    head = ("", "images", "% of the class")
    return ReportTable(head, rows, "The most frequent confusions")


def _line(error: Any) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
