"""Labeled images that arrive in a stream, one after the other.

timm's readers of streams hide unreadable files, and WebDataset's shuffles differently in every
worker process that is started. These report such files, and the same seed gives the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import data as torch_data
from torch.utils.data import DataLoader, get_worker_info

from ..utils.random import derive_seed, fixed_seed
from ..utils.validation import check_count, require
from .dataset import Batch, IterableDataset, UnreadableFile
from .image_folder import ImageFiles, decoded, first_read
from .loader import Transform

if TYPE_CHECKING:
    from PIL import Image

SHUFFLE_BUFFER = 1000  # images, not decoded, of which a worker draws the next


class Record(NamedTuple):
    """One image of a stream, not decoded yet."""

    where: str
    open: Callable[[], Image.Image]
    label: int


class RecordSource(Protocol):
    """The source of a stream."""

    def readers(self, process: int, num_processes: int) -> int:
        """Returns how many workers can share this process's part."""
        ...

    def records(
        self, process: int, num_processes: int, seed: int | None
    ) -> Iterator[Record | UnreadableFile]:
        """Reads this process's part, in a worker the worker's; in order, or shuffled by a seed."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamDataset(ImageFiles, IterableDataset):
    """One split of labeled images that come one after the other.

    Args:
        source: Where they come from.
        num_samples: How many there are; None is unknown.
    """

    source: RecordSource = field(repr=False)
    num_samples: int | None = None

    def __len__(self) -> int:
        if self.num_samples is None:
            raise ValueError(f"{self.name} has an unknown length; pass num_samples")
        return self.num_samples

    def eval_batches(
        self, batch_size: int, process: int = 0, num_processes: int = 1
    ) -> Iterator[Batch]:
        """Yields every image once, and what is unreadable; every process reads all of them."""
        check_count("batch_size", batch_size)
        return _of_size(_Chunks(self, batch_size).load(self.workers), batch_size)

    def train_batches(
        self,
        transform: Transform | None,
        batch_size: int,
        *,
        epoch: int,
        seed: int,
        workers: int,
        process: int = 0,
        num_processes: int = 1,
    ) -> Iterator[Batch]:
        """Yields an epoch's full batches for training, shuffled, the same for the same arguments.

        Every process yields as many. One whose part is too small for that, because files are
        unreadable or the parts are unequal, begins it again.

        Args:
            transform: Makes of an image the input of a model; None is `eval_transform`.
            batch_size: Images of a batch of this process.
            epoch: Counted from 0; each has another order.
            seed: Draws the orders, and every image's changes.
            workers: Processes that read; no more are started than there are shards for.
            process: Number of this process, from 0.
            num_processes: Processes that share the images.

        Raises:
            ValueError: The length is not known, there are fewer shards than processes, or nothing
                of a part can be read.
        """
        check_count("batch_size", batch_size)
        require(
            self.source.readers(num_processes - 1, num_processes) > 0,
            f"{self.name} has too few shards for {num_processes} processes; write more and "
            "smaller ones, or start fewer processes",
        )
        number = len(self) // (batch_size * num_processes)
        chunks = _Chunks(self, batch_size, transform, (seed, epoch), process, num_processes)
        return islice(_of_size(chunks.load_for_ever(workers), batch_size), number)

    def image(self, record: Record | UnreadableFile) -> Image.Image:
        """Decodes one image, as `ImageFileDataset.load` does.

        Raises:
            UnreadableFile: It cannot be read, or its label is out of range.
        """
        if isinstance(record, UnreadableFile):
            raise record
        if not 0 <= record.label < len(self.classes):
            top = len(self.classes) - 1
            raise UnreadableFile(
                f"{record.where} has label {record.label}, expected 0 to {top}; pass num_classes"
            )
        return decoded(record.open, record.where, self.shape[0])


def check_stream(data: StreamDataset) -> StreamDataset:
    """Returns the stream, of which an image could be read.

    Raises:
        ValueError: None of the first few can.
    """
    records = data.source.records(0, 1, None)
    first_read((partial(data.image, record) for record in records), f"{data.name} {data.split}")
    return data


@dataclass(frozen=True, eq=False)
class _Chunks(torch_data.IterableDataset[Batch]):
    """Makes batches of a worker's part of the stream, the last of what is left."""

    data: StreamDataset
    batch_size: int
    transform: Transform | None = None
    seeds: tuple[int, ...] = ()
    process: int = 0
    num_processes: int = 1

    def load(self, workers: int) -> Iterator[Batch]:
        """Yields the batches of all workers, interleaved."""
        most = self.data.source.readers(self.process, self.num_processes)
        private = torch.Generator()  # torch's global one is left as it is
        return iter(
            DataLoader(self, batch_size=None, num_workers=min(workers, most), generator=private)
        )

    def load_for_ever(self, workers: int) -> Iterator[Batch]:
        """Yields the batches of pass after pass, each shuffled anew."""
        for turn in itertools.count():
            count = 0
            for chunk in replace(self, seeds=(*self.seeds, turn)).load(workers):
                count += len(chunk.labels)
                yield chunk
            what = f"{self.data.name} {self.data.split}"
            require(count > 0, f"nothing in {what} can be read; replace the files")

    def __iter__(self) -> Iterator[Batch]:
        seed = derive_seed(*self.seeds) if self.seeds else None
        records = self.data.source.records(self.process, self.num_processes, seed)
        images, labels, unreadable = [], [], []
        for number, record in enumerate(records):
            try:
                image, label = self._example(record, number)
                images.append(image)
                labels.append(label)
            except UnreadableFile as error:
                unreadable.append(str(error))
            if len(labels) == self.batch_size:
                yield self._batch(images, labels, unreadable)
                images, labels, unreadable = [], [], []
        if labels or unreadable:
            yield self._batch(images, labels, unreadable)

    def _example(self, record: Record | UnreadableFile, number: int) -> tuple[Tensor, int]:
        if isinstance(record, UnreadableFile):
            raise record
        image, worker = self.data.image(record), get_worker_info()
        if self.transform is None:
            return self.data.eval_transform(image), record.label
        part = (self.process, worker.id if worker else 0, number)
        with fixed_seed(derive_seed(*self.seeds, *part)):
            return self.transform(image), record.label

    def _batch(
        self, images: Sequence[Tensor], labels: Sequence[int], unreadable: Sequence[str]
    ) -> Batch:
        stacked = torch.stack(list(images)) if images else torch.empty(0, *self.data.shape)
        return Batch(stacked, torch.tensor(labels, dtype=torch.int64), tuple(unreadable))


def _of_size(chunks: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yields the images in batches of one size, at the end one of what is left."""
    left = None
    for chunk in chunks:
        left = chunk if left is None else _joined(left, chunk)
        if len(left.labels) >= batch_size:
            yield Batch(left.images[:batch_size], left.labels[:batch_size], left.unreadable)
            left = Batch(left.images[batch_size:], left.labels[batch_size:])
    if left is not None and (len(left.labels) or left.unreadable):
        yield left


def _joined(first: Batch, second: Batch) -> Batch:
    unreadable = first.unreadable + second.unreadable
    if not len(first.labels):
        return replace(second, unreadable=unreadable)
    images = torch.cat([first.images, second.images])
    return Batch(images, torch.cat([first.labels, second.labels]), unreadable)
