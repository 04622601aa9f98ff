"""Batches of any data set, read by worker processes, the same whoever reads them.

Every image is augmented by a seed of its own, so neither the number of workers nor that of
processes, nor where a run was cut off, changes what a model is trained on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..utils.random import derive_seed, fixed_seed
from ..utils.validation import check_count
from .dataset import Batch, MapDataset, UnreadableFile

Transform = Callable[[Any], Tensor]
MAX_TRIES = 100  # files in a row that may be unreadable


class SampleKey(NamedTuple):
    """An image, and the seed that its augmentation is drawn from."""

    index: int
    seed: int = 0


def load_batches(
    data: MapDataset,
    keys: Iterable[Sequence[SampleKey]],
    transform: Transform | None = None,
    *,
    workers: int = 0,
    replace_unreadable: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yields one batch for every list of keys.

    Args:
        data: Where the images are.
        keys: The images of each batch.
        transform: Makes of what `data.load` returns the input of a model; None is
            `data.eval_transform`.
        workers: Processes that read; 0 reads in this one.
        replace_unreadable: Put the next image in place of an unreadable one; otherwise it is left
            out.
        pin: Put batches in pinned memory, for a GPU.

    Raises:
        ValueError: With replace_unreadable, too many files in a row are unreadable.
    """
    sampler: Any = _Lists(keys)
    with torch.device("cpu"):  # whatever default device is set, seeds are drawn here
        return iter(
            DataLoader(
                _Examples(data, transform, replace_unreadable),
                batch_sampler=sampler,
                collate_fn=as_it_is,
                num_workers=workers,
                pin_memory=pin,
                worker_init_fn=ignore_signals,
                generator=torch.Generator(),  # a private one: torch's global one is left as it is
            )
        )


def eval_batches(
    data: MapDataset, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels of a whole data set in order, without unreadable ones.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    check_count("batch_size", batch_size)
    order = torch.arange(len(data), device="cpu").split(batch_size)
    keys = [[SampleKey(int(i)) for i in part] for part in order]
    batches = load_batches(data, keys, workers=workers)
    return ((batch.images, batch.labels) for batch in batches if len(batch.labels))


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of `n` images in an epoch, counted from 0, of a seed."""
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
    """Makes a batch of a list of keys, in a worker."""

    def __init__(self, data: MapDataset, transform: Transform | None, replace_unreadable: bool):
        self.data, self.transform = data, transform or data.eval_transform
        self.replace_unreadable = replace_unreadable
        self.whole = data.in_memory and transform is None

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        if self.whole and keys:
            return Batch(*self.data.get_batch([key.index for key in keys]))
        images, labels, unreadable = [], [], []
        for key in keys:
            for index in self._candidates(key.index):
                try:
                    with fixed_seed(key.seed):  # reading draws too: where a clip starts in a video
                        images.append(self.transform(self.data.load(index)))
                    labels.append(index)
                    break
                except UnreadableFile as error:
                    unreadable.append(str(error))
            else:
                self._give_up(unreadable)
        stacked = torch.stack(images) if images else torch.empty(0, *self.data.shape, device="cpu")
        return Batch(stacked, self.data.labels[labels], tuple(unreadable))

    def _candidates(self, index: int) -> Sequence[int]:
        n = len(self.data)
        return [(index + i) % n for i in range(min(MAX_TRIES, n) if self.replace_unreadable else 1)]

    def _give_up(self, unreadable: Sequence[str]) -> None:
        if self.replace_unreadable:
            raise ValueError(
                f"{len(unreadable)} images of {self.data.name} in a row cannot be read, the first: "
                f"{unreadable[0]}; replace the files"
            )


class _Lists:
    """Lists of keys as a sampler of batches, read once."""

    def __init__(self, keys: Iterable[Sequence[SampleKey]]):
        self.keys = keys

    def __iter__(self) -> Iterator[Sequence[SampleKey]]:
        return iter(self.keys)


def ignore_signals(worker: int) -> None:
    """Lets a worker live on when its process group gets a signal: its reader ends it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """Returns what a worker read, which is a batch already."""
    return batch
