"""`evaluate`: the numbers that a model and a data set give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tokenlearner import evaluate
from tokenlearner.data import ImageDataset


class Told(nn.Module):
    """Predicts the brightness of a picture's first pixel as its class."""

    def __init__(self, num_classes: int = 6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        told = (images[:, 0, 0, 0] * 255).round().long()
        return 9.0 * self.scale * nn.functional.one_hot(told, self.num_classes)


def pictures(told: list[int], labels: list[int]) -> ImageDataset:
    images = torch.zeros(len(told), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(told)
    return ImageDataset("told", "test", images, torch.tensor(labels), tuple("abcdef"), (0,), (1,))


def test_top1_is_the_share_of_pictures_whose_best_class_is_right() -> None:
    assert evaluate(Told(), pictures([0, 1, 2, 3], [0, 1, 2, 5])).top1_percent == 75


def test_top5_is_right_when_the_label_is_among_the_five_best() -> None:
    result = evaluate(Told(), pictures([5, 5], [5, 0]))
    assert (result.top1_percent, result.top5_percent) == (50, 100)


def test_loss_is_the_mean_cross_entropy() -> None:
    right = math.log(math.exp(9) + 5) - 9
    wrong = math.log(math.exp(9) + 5)
    result = evaluate(Told(), pictures([0, 1, 2], [0, 1, 3]))
    assert result.loss == pytest.approx((2 * right + wrong) / 3, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 500])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    data = pictures([0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 0, 1])
    result = evaluate(Told(), data, batch_size)
    assert (result.images, result.top1_percent) == (7, pytest.approx(500 / 7))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_keeps_its_own(training: bool) -> None:
    seen = []
    model = Told().train(training)
    model.register_forward_hook(lambda module, args, out: seen.append(module.training))
    evaluate(model, pictures([0], [0]))
    assert (seen, model.training) == ([False], training)


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has 3 classes, told has 6; build it with"):
        evaluate(Told(num_classes=3), pictures([0], [0]))


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0, expected an integer of 1 or more"):
        evaluate(Told(), pictures([0], [0]), batch_size=0)
