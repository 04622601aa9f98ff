"""Statistics of maps: made-up maps whose numbers are known, and a slow reference for the rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenlearner.evaluation.map_stats import COLLAPSED, map_stats


def maps(*tokens: list[float]) -> Tensor:
    """One image with these maps on a grid of two rows: `1 k 2 w`."""
    return torch.tensor([tokens]).unflatten(-1, (2, -1))


LEFT, RIGHT = [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]
EVEN, POINT = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]


def random_clips() -> Tensor:
    return torch.rand(3, 4, 5, 2, 6).double()  # b t k h w


def overlap_of(p: Tensor, q: Tensor) -> float:
    p, q = p / p.sum(), q / q.sum()
    return sum(
        math.sqrt(float(a) * float(b)) for a, b in zip(p.flatten(), q.flatten(), strict=True)
    )


def mean(values: list[float]) -> float:
    assert values
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [(LEFT, RIGHT, 0), (LEFT, LEFT, 1), (EVEN, POINT, 0.5), (LEFT, EVEN, math.sqrt(0.5))],
)
def test_the_overlap_of_two_maps_is_bhattacharyyas(
    one: list[float], other: list[float], overlap: float
) -> None:
    assert map_stats(maps(one, other)).overlap == pytest.approx(overlap)


@pytest.mark.parametrize(("one", "bits", "share"), [(EVEN, 2, 1), (LEFT, 1, 0.5), (POINT, 0, 0.25)])
def test_entropy_is_in_bits_and_the_share_is_of_the_image(
    one: list[float], bits: float, share: float
) -> None:
    stats = map_stats(maps(one))
    assert stats.entropy_bits == pytest.approx([bits])
    assert stats.effective_share == pytest.approx([share])


def test_all_numbers_are_those_of_loops_over_images_frames_and_tokens() -> None:
    x = random_clips()
    b, t, k, h, w = x.shape
    stats = map_stats(x)
    assert (stats.images, stats.frames, stats.grid) == (b, t, (h, w))
    for i in range(k):
        pairs = [
            mean([overlap_of(x[n, f, i], x[n, f, j]) for n in range(b) for f in range(t)])
            for j in range(k)
        ]
        assert stats.pairs[i] == pytest.approx(pairs)
        own = [overlap_of(x[n, f, i], x[n, f + 1, i]) for n in range(b) for f in range(t - 1)]
        other = [
            overlap_of(x[n, f, i], x[m, f, i])
            for n in range(b)
            for m in range(b)
            for f in range(t)
            if n != m
        ]
        assert stats.over_frames
        assert stats.over_frames[i] == pytest.approx(mean(own))
        assert stats.across_images
        assert stats.across_images[i] == pytest.approx(mean(other))


def test_gates_are_measured_by_their_form_and_a_map_of_0_counts_as_even() -> None:
    gates, heights = torch.rand(2, 3, 4, 4), torch.tensor([1.0, 0.1, 0.01])[:, None, None]
    assert map_stats(gates).pairs[0] == pytest.approx(map_stats(gates * heights).pairs[0])
    assert map_stats(maps([0.0] * 4)).effective_share == pytest.approx([1])
    stats = map_stats(maps(LEFT))  # what needs two of something
    assert stats.overlap is stats.over_frames is stats.across_images is stats.alike is None


def test_the_most_alike_tokens_are_named_from_1() -> None:
    value, pair = map_stats(maps(LEFT, EVEN, [0.3, 0.3, 0.2, 0.2])).alike or (0, ())
    assert pair == (2, 3)
    assert value == pytest.approx(
        overlap_of(torch.tensor(EVEN), torch.tensor([0.3, 0.3, 0.2, 0.2]))
    )


def test_tokens_that_look_at_the_same_thing_have_collapsed() -> None:
    stats = map_stats(maps(LEFT, RIGHT, LEFT, POINT, RIGHT))
    assert stats.collapsed == [[1, 3], [2, 5]]
    assert "tokens 1, 3 have collapsed" in stats.warnings()[0]
    assert len(stats.warnings()) == 2


def test_a_chain_of_collapsed_tokens_is_one_group() -> None:
    chain = [[0.5 + d, 0.5 - d, 0.0, 0.0] for d in (0.16, -0.03, 0.06)]
    stats = map_stats(maps(*chain))
    assert stats.pairs[0][1] < COLLAPSED < min(stats.pairs[0][2], stats.pairs[1][2])
    assert stats.collapsed == [[1, 2, 3]]


def test_even_maps_are_warned_of_and_different_ones_are_not() -> None:
    assert "almost even (2)" in map_stats(maps(LEFT, EVEN)).warnings()[0]
    assert map_stats(maps(LEFT, RIGHT)).warnings() == []


@pytest.mark.parametrize("axes", [(2, 3, 4), (2, 3, 4, 4, 4, 4), (0, 3, 4, 4)])
def test_other_axes_are_refused(axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="maps are"):
        map_stats(torch.ones(axes))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_what_no_weight_can_be_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="maps hold"):
        map_stats(torch.full((1, 2, 2, 2), value))
