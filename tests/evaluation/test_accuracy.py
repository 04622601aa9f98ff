"""`evaluate`: the numbers that a model and a data set give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from files import Files
from torch import Tensor, nn

from tokenlearner import create_model, evaluate, load_data
from tokenlearner.data.dataset import Batch, IterableDataset
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.accuracy import mean_metrics, sum_metrics


class Brightness(nn.Module):
    """Predicts the brightness of an image's first pixel as its class."""

    def __init__(self, num_classes: int = 6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images[:, 0, 0, 0] * 255).round().long()
        return 9.0 * self.scale * nn.functional.one_hot(pixels, self.num_classes)


def make_images(pixels: list[int], labels: list[int]) -> ImageDataset:
    images = torch.zeros(len(pixels), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(pixels)
    return ImageDataset("pixels", "test", images, torch.tensor(labels), tuple("abcdef"), (0,), (1,))


def test_the_numbers_are_the_share_of_images_that_are_right_and_the_mean_cross_entropy() -> None:
    right = math.log(math.exp(9) + 5) - 9
    wrong = math.log(math.exp(9) + 5)
    result = evaluate(Brightness(), make_images([0, 1, 2], [0, 1, 3]))
    assert result.loss == pytest.approx((2 * right + wrong) / 3, rel=1e-5)
    assert result.top1_percent == pytest.approx(200 / 3)
    result = evaluate(Brightness(), make_images([5, 5], [5, 0]))
    assert (result.top1_percent, result.top5_percent) == (50, 100)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 500])
def test_the_batch_size_changes_nothing(batch_size: int, device: torch.device) -> None:
    data = make_images([0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 0, 1])
    result = evaluate(Brightness().to(device), data, batch_size)
    assert (result.images, result.top1_percent) == (7, pytest.approx(500 / 7))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_keeps_its_own(training: bool) -> None:
    modes = []
    model = Brightness().train(training)
    model.register_forward_hook(lambda module, args, out: modes.append(module.training))
    evaluate(model, make_images([0], [0]))
    assert (modes, model.training) == ([False], training)


def test_too_few_classes_and_a_batch_size_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(Brightness(), make_images([0], [0]), batch_size=0)
    with pytest.raises(ValueError, match="3 classes"):
        evaluate(Brightness(num_classes=3), make_images([0], [0]))


# --- views, unreadable files, several processes ------------------------------------------------


def files(pixels: list[int], labels: list[int], bad: Iterable[int] = (), views: int = 1) -> Any:
    return Files(make_images(pixels, labels), bad, views)


def test_the_logits_of_views_are_averaged() -> None:
    """Two views say 2 and 3, with 9 / 2 each: both are above the rest, and as likely."""
    result = evaluate(Brightness(), files([2, 2], [2, 3], views=2), batch_size=2)
    expected = math.log(2 * math.exp(4.5) + 4) - 4.5
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.images, result.top1_percent) == (2, 50)


def test_files_that_cannot_be_read_are_left_out_and_counted() -> None:
    result = evaluate(
        Brightness(), files([0, 1, 2, 3, 4], [0, 0, 2, 3, 0], bad=[1, 4]), batch_size=2
    )
    assert (result.images, result.broken, result.top1_percent) == (3, 2, 100)


def test_a_set_without_a_readable_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels has no file .*: 0\.jpg"):
        evaluate(Brightness(), files([0, 1], [0, 1], bad=[0, 1]))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("bad", [[], [0, 6]])
def test_the_parts_of_processes_add_up_to_the_whole(num_processes: int, bad: list[int]) -> None:
    data = files([0, 1, 2, 3, 4, 5, 0], [0, 1, 0, 3, 4, 0, 1], bad)
    parts = [
        sum_metrics(Brightness(), data, 2, process, num_processes)
        for process in range(num_processes)
    ]
    whole = sum_metrics(Brightness(), data, 2)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    assert mean_metrics(whole, data).images == 7 - len(bad)


@pytest.mark.parametrize(("n", "num_processes"), [(7, 2), (9, 2), (3, 4), (8, 3)])
def test_every_process_runs_the_model_as_often(n: int, num_processes: int) -> None:
    """Models that are shared out among processes hang otherwise."""
    runs = []
    for process in range(num_processes):
        model, calls = Brightness(), list[int]()
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sum_metrics(model, files([0] * n, [0] * n, bad=[0]), 2, process, num_processes)
        runs.append(len(calls))
    assert len(set(runs)) == 1


class Stream(IterableDataset):
    """Images without an order, which no process has a part of."""

    name, classes, shape = "stream", ("a", "b", "c"), (1, 2, 2)

    def __len__(self) -> int:
        return 3

    def train_batches(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def eval_batches(self, batch_size: int, process: int = 0, num_processes: int = 1) -> Any:
        batches = make_images([0, 1, 2], [0, 1, 0]).batches(batch_size)
        return (Batch(*pair) for pair in batches)


def test_all_processes_see_the_whole_of_a_stream() -> None:
    data = Stream()
    for process in range(2):
        assert mean_metrics(sum_metrics(Brightness(3), data, 2, process, 2), data).images == 3


def test_features_of_a_backbone_are_not_taken_for_classes() -> None:
    data = load_data("fashion-mnist-small", "test").sample(20)
    bare = create_model("vit_mini_patch4_28", num_classes=0, depth=1, embed_dim=20, num_heads=2)
    with pytest.raises(ValueError, match="TokenLearnerViT has no classifier"):
        evaluate(bare, data)
