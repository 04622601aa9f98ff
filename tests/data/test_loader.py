"""Batches: every image once an epoch, the same whoever reads them, whatever cannot be read."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from files import Files

from tokenlearner import TrainConfig
from tokenlearner.data.dataset import Batch
from tokenlearner.data.factory import ImageDataset
from tokenlearner.data.loader import (
    MAX_TRIES,
    SampleKey,
    epoch_keys,
    epoch_order,
    eval_batches,
    load_batches,
)
from tokenlearner.data.transforms import train_transform
from tokenlearner.utils.random import derive_seed, fixed_seed


def make_images(n: int = 12) -> ImageDataset:
    """Noise of 8 x 8 pixels; the label of image i is i."""
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    classes = tuple(map(str, range(n)))
    return ImageDataset("noise", "train", images, torch.arange(n), classes, (0.5,) * 3, (0.2,) * 3)


def files(n: int = 12, bad: Iterable[int] = ()) -> Any:
    return Files(make_images(n), bad)


def states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]  # type: ignore[attr-defined]


# --- which images -----------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_but_what_makes_no_full_batch() -> None:
    keys = epoch_keys(14, 4, seed=0, epoch=0)
    batches = [[key.index for key in batch] for batch in keys]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert len({*chain.from_iterable(batches)} & {*range(14)}) == 12


def test_every_epoch_and_seed_has_an_order_of_its_own_whatever_torchs_random_state() -> None:
    orders = {tuple(epoch_order(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert orders == {tuple(epoch_order(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_the_parts_of_processes_make_up_the_batches_but_those_trained_on(
    num_processes: int, start: int
) -> None:
    whole = list(epoch_keys(26, 6, seed=3, epoch=2))
    parts = [
        epoch_keys(26, 6, seed=3, epoch=2, start=start, process=i, num_processes=num_processes)
        for i in range(num_processes)
    ]
    assert [[*chain.from_iterable(part)] for part in zip(*parts, strict=True)] == whole[start:]


def test_every_image_of_every_epoch_has_a_seed_of_its_own() -> None:
    keys = [key for e in range(3) for batch in epoch_keys(20, 5, seed=0, epoch=e) for key in batch]
    assert len({key.seed for key in keys}) == 60
    numbers = [(1, 2, 3), (3, 2, 1), (2, 2, 3), (1, 2, 4), (1, 2, 3)]
    assert len({derive_seed(*several) for several in numbers}) == 4


# --- drawing from a seed ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [False, True])
def test_the_same_seed_draws_the_same_and_random_states_come_back(error: bool) -> None:
    values, before = [], states()
    for seed in (5, 5, 2**40):
        with suppress(KeyError), fixed_seed(seed):
            values.append((random.random(), np.random.rand(), torch.rand(()).item()))
            if error:
                raise KeyError
        assert states() == before
    assert values[0] == values[1]
    assert all(a != b for a, b in zip(values[0], values[2], strict=True))


# --- reading ------------------------------------------------------------------------------------


def read(data: Any, *, workers: int = 0, processes: int = 1) -> Batch:
    """All batches of an epoch on one pile, with random changes."""
    asked = TrainConfig(scale=[0.3, 1.0], hflip=0.5, aa="rand-m9-mstd0.5", reprob=0.5)
    change = train_transform(asked, data)
    keys = [
        epoch_keys(12, 4, seed=1, epoch=1, process=i, num_processes=processes)
        for i in range(processes)
    ]
    parts = [load_batches(data, part, change, workers=workers) for part in keys]
    batches = [batch for step in zip(*parts, strict=True) for batch in step]
    images, labels = (torch.cat([getattr(b, k) for b in batches]) for k in ("images", "labels"))
    return Batch(images, labels)


def test_random_changes_are_the_same_whoever_reads_and_random_states_are_left_alone() -> None:
    alone = read(files())
    torch.manual_seed(99)
    before = states()
    for several in (read(files()), read(files(), workers=2), read(files(), processes=2)):
        assert torch.equal(several.labels, alone.labels)
        assert torch.equal(several.images, alone.images)
    assert states() == before
    plain = make_images().get_batch(alone.labels)[0]
    assert not (alone.images == plain).flatten(1).all(1).any()


class Drawing(Files):
    """Files of which a random part is read, as of videos."""

    def load(self, index: int) -> Any:
        return super().load(int(torch.randint(12, ())))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_read_at_random_is_drawn_from_the_images_seed(workers: int) -> None:
    data: Any = Drawing(make_images())
    first, again, other = (
        next(load_batches(data, [[SampleKey(0, seed), SampleKey(1, 9)]], workers=workers)).images
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])


def test_a_set_in_memory_gives_the_same_as_one_in_files() -> None:
    keys = [[SampleKey(3), SampleKey(1)], [SampleKey(0)]]
    for a, b in zip(load_batches(make_images(), keys), load_batches(files(), keys), strict=True):
        torch.testing.assert_close(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_plain_batches_are_all_images_in_order() -> None:
    batches = list(eval_batches(files(bad=[0, 1, 4]), 2, workers=1))
    assert [labels.tolist() for _, labels in batches] == [[2, 3], [5], [6, 7], [8, 9], [10, 11]]


# --- broken files -------------------------------------------------------------------------------


def test_in_training_the_next_image_takes_the_place_of_a_broken_one() -> None:
    keys = [[SampleKey(3), SampleKey(11), SampleKey(5)]]
    batch = next(load_batches(files(bad=[3, 4, 11]), keys, replace_unreadable=True))
    assert batch.labels.tolist() == [5, 0, 5]
    assert batch.unreadable == ("3.jpg is empty", "4.jpg is empty", "11.jpg is empty")


@pytest.mark.parametrize("workers", [0, 1])
def test_in_judging_a_broken_one_is_left_out(workers: int) -> None:
    keys = [[SampleKey(3), SampleKey(4)], [SampleKey(2), SampleKey(3)], [SampleKey(3)]]
    batches = list(load_batches(files(bad=[3]), keys, workers=workers))
    assert [batch.labels.tolist() for batch in batches] == [[4], [2], []]
    assert [len(batch.images) for batch in batches] == [1, 1, 0]
    assert all(batch.unreadable == ("3.jpg is empty",) for batch in batches)


@pytest.mark.parametrize(("n", "bad"), [(MAX_TRIES + 5, MAX_TRIES), (12, 12)])
def test_as_many_broken_in_a_row_as_are_tried_or_there_are_are_refused(n: int, bad: int) -> None:
    data = files(n, bad=range(bad))
    message = f"{bad} images of noise in a row cannot be read, the first: 0.jpg is empty"
    with pytest.raises(ValueError, match=message):
        next(load_batches(data, [[SampleKey(0)]], replace_unreadable=True))


def test_an_image_that_takes_a_place_is_changed_by_that_places_seed() -> None:
    change, bad = train_transform(TrainConfig(reprob=1.0), files()), files(bad=[3])
    filled = next(load_batches(bad, [[SampleKey(3, 7)]], change, replace_unreadable=True))
    own = next(load_batches(files(), [[SampleKey(4, 7)]], change))
    assert torch.equal(filled.images, own.images)
