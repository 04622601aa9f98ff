"""Batches of any data set, read by worker processes, the same whoever reads them.

Every image that is changed at random is changed by a seed of its own, so neither the number of
workers nor that of processes, nor where a run was cut off, changes what a model sees.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..utils.random import derive_seed, fixed_seed
from .dataset import LabeledDataset, UnreadableFile

Transform = Callable[[Any], Tensor]
MAX_TRIES = 100  # files in a row that may be broken before a batch is given up


class SampleKey(NamedTuple):
    """Which image, and what its random changes are drawn from."""

    index: int
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Images that go through a model together.

    Args:
        images: float32 `b c h w`, of clips `b c t h w`, normalized.
        labels: int64 `b`.
        broken: What could not be read, in sentences that name the files.
    """

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The same in memory from which a GPU copies faster."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.broken)


def load_batches(
    data: LabeledDataset,
    keys: Iterable[Sequence[SampleKey]],
    change: Transform | None = None,
    *,
    workers: int = 0,
    refill: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yields one batch for every list of keys.

    Args:
        data: Where the images are.
        keys: The images of each batch.
        change: What `data.read` gives becomes what a model takes; None is `data.plain`.
        workers: Processes that read; 0 reads in this one.
        refill: Put the next image in place of one that is broken; otherwise it is left out.
        pin: Put batches in pinned memory, for a GPU.

    Raises:
        ValueError: With refill, too many files in a row are broken.
    """
    sampler: Any = _Lists(keys)
    return iter(
        DataLoader(
            _Examples(data, change, refill),
            batch_sampler=sampler,
            collate_fn=_same,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # a private one: torch's own is left as it is
        )
    )


def eval_batches(
    data: LabeledDataset, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels of a whole data set in order, without what cannot be read."""
    order = torch.arange(len(data)).split(batch_size)
    keys = [[SampleKey(int(i)) for i in part] for part in order]
    batches = load_batches(data, keys, workers=workers)
    return ((batch.images, batch.labels) for batch in batches if len(batch.labels))


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` images in an epoch, counted from 0: an epoch of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        torch.randperm(n, generator=generator)
    return torch.randperm(n, generator=generator)


def epoch_keys(
    n: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    process: int = 0,
    num_processes: int = 1,
) -> Iterator[list[SampleKey]]:
    """Yields the keys of an epoch's full batches, of each batch the part of one process.

    Args:
        n: Images in the data set.
        batch_size: Images of a batch, over all processes.
        seed: Draws the order, and the seed of every image.
        epoch: Counted from 0.
        start: Batches that are left out, since they were trained on.
        process: Counted from 0.
        num_processes: The parts that a batch is split into, which have to be equal.
    """
    order, share = epoch_order(n, seed, epoch), batch_size // num_processes
    for batch in range(start, n // batch_size):
        first = batch * batch_size + process * share
        yield [
            SampleKey(index, derive_seed(seed, epoch, index))
            for index in order[first : first + share].tolist()
        ]


class _Examples(Dataset[Batch]):
    """What a worker does: a list of keys becomes a batch."""

    def __init__(self, data: LabeledDataset, change: Transform | None, refill: bool):
        self.data, self.change, self.refill = data, change, refill

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        take = getattr(self.data, "take", None)  # a set in memory gives whole batches
        if take and self.change is None and keys:
            return Batch(*take(torch.tensor([key.index for key in keys])))
        images, labels, broken = [], [], []
        for key in keys:
            for index in self._candidates(key.index):
                try:
                    images.append(self._image(SampleKey(index, key.seed)))
                    labels.append(index)
                    break
                except UnreadableFile as error:
                    broken.append(str(error))
            else:
                self._give_up(broken)
        stacked = torch.stack(images) if images else torch.empty(0, *self.data.shape)
        return Batch(stacked, self.data.labels[labels], tuple(broken))

    def _candidates(self, index: int) -> Sequence[int]:
        n = len(self.data)
        return [(index + i) % n for i in range(min(MAX_TRIES, n) if self.refill else 1)]

    def _image(self, key: SampleKey) -> Tensor:
        with fixed_seed(key.seed):  # reading too may draw: the place of a clip in a video
            return (self.change or self.data.plain)(self.data.read(key.index))

    def _give_up(self, broken: Sequence[str]) -> None:
        if self.refill:
            raise ValueError(
                f"{len(broken)} images of {self.data.name} in a row cannot be read, the first: "
                f"{broken[0]}; mend the files"
            )


class _Lists:
    """Lists of keys as a sampler of batches, read once."""

    def __init__(self, keys: Iterable[Sequence[SampleKey]]):
        self.keys = keys

    def __iter__(self) -> Iterator[Sequence[SampleKey]]:
        return iter(self.keys)


def _leave_signals(worker: int) -> None:
    """Lets a worker live on when its whole group is asked to stop: who reads from it sees to it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _same(batch: Any) -> Batch:
    return batch
