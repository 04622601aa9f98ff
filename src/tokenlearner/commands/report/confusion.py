"""Evaluates saved models once more for a report: their confusions, and maps of their tokens."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.dataset import LabeledDataset, MapDataset, require_order
from ...evaluation.accuracy import eval_batch_size, with_model_size
from ...models.insertion import wrapped_blocks
from ...models.serialization import weights_file
from ...utils.modules import pick_device, training_mode
from ...utils.validation import require
from .._comparison import held_out_images, one_of_each
from .._runs import check_root, preprocessed, run_options
from ..eval import EvalConfig
from .figures import matrix_svg, percent
from .reader import RECIPE, Run
from .tables import ReportTable

_FETCHED = ("hfds/", "hfids/", "wds/")  # sets that may need the network, or have no order
MAX_CLASSES = 20  # of a matrix; of more classes those with the most mistakes
_MOST_FREQUENT = 5  # confusions that are listed


@dataclass(frozen=True)
class Confusions:
    """Counts of the images of each class that were taken for each class.

    Args:
        name: Of the model.
        counts: int64 `[true, predicted]`.
        classes: Their names.
        data: The data set, and its split.
        size: Images of the split, of which some may have been drawn.
    """

    name: str
    counts: Tensor
    classes: tuple[str, ...]
    data: str
    size: int

    @property
    def selected(self) -> list[int]:
        """The classes of the matrix: all, or those with the most mistakes, in their order."""
        if len(self.counts) <= MAX_CLASSES:
            return list(range(len(self.counts)))
        mistakes = self.counts.sum(0) + self.counts.sum(1) - 2 * self.counts.diagonal()
        order = mistakes.sort(descending=True, stable=True).indices
        return sorted(order[:MAX_CLASSES].tolist())

    @property
    def shares(self) -> Tensor:
        """The counts of the selected classes, as shares of each true class."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        return shares[self.selected][:, self.selected]

    @property
    def remark(self) -> str:
        """The number of images and the accuracy, in a sentence."""
        n, right = int(self.counts.sum()), int(self.counts.diagonal().sum())
        some = f" of {self.size:,}, drawn by a seed" if n < self.size else ""
        remark = f"{n:,} images{some} ({self.data}); {100 * right / max(n, 1):.1f} % are right."
        if len(self.selected) < len(self.classes):
            most = f"the {len(self.selected)} of {len(self.classes)} classes with the most mistakes"
            remark += f" The matrix has {most}."
        return remark

    @property
    def description(self) -> str:
        """The diagonal of the matrix in words, for those who cannot see it."""
        classes = [self.classes[index] for index in self.selected]
        shares = zip(classes, self.shares.diagonal().tolist(), strict=True)
        right = ", ".join(f"{name} {percent(share)} %" for name, share in shares)
        return f"Confusion matrix of {self.name}. Right of each class: {right}."

    @property
    def most_frequent(self) -> ReportTable:
        """The confusions that happened most often."""
        wrong = self.counts - self.counts.diagonal().diag()
        order = wrong.flatten().sort(descending=True, stable=True).indices[:_MOST_FREQUENT]
        rows = []
        for true, other in (divmod(index, len(wrong)) for index in order.tolist()):
            if count := int(wrong[true, other]):
                label = f"{self.classes[true]} taken for {self.classes[other]}"
                share = percent(count / int(self.counts[true].sum()))
                rows.append([label, f"{count:,}", share])
        head = ("", "images", "% of the class")
        return ReportTable(head, rows, f"The most frequent confusions of {self.name}")

    def svg(self, salt: str) -> str:
        """Draws the matrix; `salt` keeps its ids apart from those of other figures."""
        return matrix_svg([self.classes[i] for i in self.selected], self.shares.numpy(), salt)


@dataclass(frozen=True)
class Reevaluation:
    """A saved model's results on held-out images; what is missing says why.

    Args:
        name: Of the model.
        confusions: None where it could not be evaluated.
        maps: A PNG of its maps on held-out images, if it was requested and can be drawn.
        problems: Why something is missing, in sentences.
    """

    name: str
    confusions: Confusions | None
    maps: bytes | None
    problems: list[str]


def reevaluate(
    run: Run, images: int, device: str, draw: bool, host: Path | None = None
) -> Reevaluation:
    """Evaluates a run's model on held-out images, as the run did, and draws its maps.

    Nothing is fetched, and no error stops it.

    Args:
        run: The training.
        images: How many to evaluate at most, drawn by a seed.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        draw: Whether to draw maps, if the model learns tokens.
        host: Evaluate this checkpoint in place of the run's, on the run's images.
    """
    try:
        model, data = _load(run, host or run.folder, device)
        size = len(data)
        counts = confusion_counts(model, data.sample(images, 0) if size > images else data)
    except Exception as error:  # a damaged checkpoint or data set makes torch raise anything
        return Reevaluation(run.name, None, None, [f"{run.name}: {_one_line(error)}"])
    source = f"{data.name}, {data.split}"
    confusions = Confusions(run.name, counts, tuple(data.classes), source, size)
    if not draw or not wrapped_blocks(model):
        return Reevaluation(run.name, confusions, None, [])
    try:
        return Reevaluation(run.name, confusions, _draw_maps(model, data), [])
    except Exception as error:
        problem = f"{run.name}: its maps cannot be drawn: {_one_line(error)}"
        return Reevaluation(run.name, confusions, None, [problem])


def _load(run: Run, checkpoint: Path, device: str) -> tuple[nn.Module, MapDataset]:
    """Loads the model of a folder or a file, and the images that the run was evaluated on.

    Raises:
        ValueError: One of both is missing.
    """
    from ...data.factory import load_data
    from ...models.factory import load_model

    weights = weights_file(checkpoint)
    require(weights.is_file(), f"there is no {weights}")
    options: dict[str, Any] = run_options(str(run.folder))
    require("data" in options, f"there is no {RECIPE} in {run.folder} that names the data set")
    config = EvalConfig(checkpoint=str(weights), device=device, **options)
    check_root(options, str(run.folder))
    require(
        not config.data.startswith(_FETCHED),
        f"{config.data} may have to be fetched, which a report does not do",
    )
    model = load_model(checkpoint).to(pick_device(device)).eval()
    config = with_model_size(config, model)
    data = preprocessed(load_data(config, config.split), model, config, config.checkpoint)
    return model, require_order(data, "evaluate some of its images")


@torch.inference_mode()
def confusion_counts(model: nn.Module, data: LabeledDataset) -> Tensor:
    """Counts what images of each class are taken for, `[true, predicted]`; views are averaged.

    Raises:
        ValueError: None of the images can be read.
    """
    classes, device = len(data.classes), next(model.parameters()).device
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with training_mode(model, training=False):
        for images, labels in data.batches(min(100, eval_batch_size(data.shape))):
            views = images.shape[1] if images.ndim > len(data.shape) + 1 else 0
            logits = model((images.flatten(0, 1) if views else images).to(device)).float().cpu()
            logits = logits.unflatten(0, (-1, views)).mean(1) if views else logits
            predicted = logits[:, :classes].argmax(1)
            counts += (labels * classes + predicted).bincount(minlength=classes**2).view_as(counts)
    require(bool(counts.sum()), f"none of the files of {data.name} can be read")
    return counts


def _draw_maps(model: nn.Module, data: MapDataset) -> bytes:
    """Draws the maps on an image of each of some classes."""
    require(len(data.shape) == 3, "these are clips; `tokenlearner maps` draws them")
    title = "Where the learned tokens look: held-out images"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.png"
        return held_out_images(path, model, data, one_of_each(data), title).read_bytes()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
