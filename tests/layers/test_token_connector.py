"""Learned tokens that start as means of neighboring positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import drawn
from torch import nn

from tokenlearner.layers import NeighborPooling, NeighborTokenLearner, TokenConnector
from tokenlearner.layers.token_connector import pooled_grid


@pytest.mark.parametrize(
    ("grid", "tokens", "cells"),
    [
        ((12, 12), 16, (4, 4)),
        ((12, 12), 8, (2, 4)),
        ((27, 27), 64, (8, 8)),
        ((8, 16), 32, (4, 8)),
        ((16, 8), 32, (8, 4)),
        ((14, 14), 7, (1, 7)),
        ((4, 4), 16, (4, 4)),
    ],
)
def test_cells_have_about_the_shape_of_the_grid(
    grid: tuple[int, int], tokens: int, cells: tuple[int, int]
) -> None:
    assert pooled_grid(grid, tokens) == cells


@pytest.mark.parametrize(("tokens", "nearest"), [(17, 16), (5, 4), (11, 12)])
def test_a_number_without_sides_in_the_grid_is_refused_with_the_nearest(
    tokens: int, nearest: int
) -> None:
    with pytest.raises(ValueError, match=f"num_tokens is {tokens}.*pass {nearest}"):
        NeighborTokenLearner(8, tokens, (4, 4))


@pytest.mark.parametrize(("grid", "tokens"), [((12, 12), 16), ((5, 7), 6), ((27, 27), 64)])
def test_pooling_is_torchs_adaptive_average(grid: tuple[int, int], tokens: int) -> None:
    x = torch.randn(2, 1 + grid[0] * grid[1], 8)
    pooling = NeighborPooling(tokens, grid, num_prefix_tokens=1)
    image = x[:, 1:].transpose(1, 2).unflatten(2, grid)
    expected = F.adaptive_avg_pool2d(image, pooling.cells).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooling(x), expected)


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_learner_starts_as_that_average_but_for_its_leak(prefix: int) -> None:
    x = torch.randn(2, prefix + 144, 8)
    learner = NeighborTokenLearner(8, 16, (12, 12), prefix, leak=0.1)
    average = NeighborPooling(16, (12, 12), prefix)(x)
    expected = 0.9 * average + 0.1 * x.mean(1, keepdim=True)
    torch.testing.assert_close(learner(x), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(learner.attention(x).sum(-1), torch.ones(2, 16))


def test_without_a_leak_it_starts_as_that_average() -> None:
    x = torch.randn(2, 36, 8)
    learner = NeighborTokenLearner(8, 4, (6, 6), leak=0.0)
    torch.testing.assert_close(learner(x), NeighborPooling(4, (6, 6))(x), rtol=1e-3, atol=1e-3)


def test_every_parameter_of_a_learner_moves_once_its_mlp_is_not_0() -> None:
    learner = drawn(NeighborTokenLearner(8, 4, (6, 6)), 0.3)
    (learner(torch.randn(2, 36, 8)) * torch.randn(2, 4, 8)).sum().backward()
    moved = {n: p.grad.abs().max().item() for n, p in learner.named_parameters()}
    assert min(v for n, v in moved.items() if n != "attention_maps.3.bias") > 1e-6


def test_another_number_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="25 positions, expected 36"):
        NeighborTokenLearner(8, 4, (6, 6))(torch.ones(1, 25, 8))


def test_a_connector_projects_and_pools() -> None:
    connector = TokenConnector(nn.Linear(6, 8), NeighborTokenLearner(8, 4, (6, 6)))
    x = torch.randn(3, 36, 6)
    torch.testing.assert_close(connector(x), connector.learner(connector.projector(x)))


def test_a_learner_is_built_on_the_meta_device_and_in_bfloat16() -> None:
    with torch.device("meta"):
        assert NeighborTokenLearner(8, 4, (6, 6)).places.is_meta
    learner = NeighborTokenLearner(8, 4, (6, 6)).bfloat16()
    assert learner(torch.randn(1, 36, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
