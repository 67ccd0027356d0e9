"""Batches in an order that is a function of (seed, position), so that a run can be continued at any position.

The training data is one endless stream: epoch after epoch, each in its own permutation, which depends on the seed and
the epoch alone. Position p of the stream is image ``permutation(p // size)[p % size]`` of epoch ``p // size``; its
augmentation depends on (seed, epoch, image). Batches may span two epochs, so no image is ever left out. Nothing
depends on the number of workers, and with W processes of batch B one step takes positions [s W B, (s + 1) W B).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rendseg.data import DataError

Sample = dict[str, Any]
Labels = Tensor | dict[str, Tensor]  # of one task, or by task


class SampleOrder:
    """``order[position] -> (epoch, index)`` of an endless stream over ``size`` images."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DataError("the training split holds no images")
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.size)
        return epoch, int(self._permutation[offset])


class BatchPositions(Sampler[list[tuple[int, int]]]):
    """The batches of one process from ``start`` on, each a list of ``(epoch, index)``."""

    def __init__(self, order: Any, start: int, batches: int, batch_size: int, rank: int, world: int) -> None:
        self.order, self.start, self.batches = order, start, batches
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.batches):
            first = self.start + (step * self.world + self.rank) * self.batch_size
            yield [self.order[position] for position in range(first, first + self.batch_size)]


class _Problem:
    """A DataError on its way from a worker, without the traceback that a DataLoader would add to its message."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Samples(Dataset[Any]):
    """A data set read by ``(epoch, index)``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> Sample | _Problem:
        epoch, index = item
        try:
            return self.dataset.sample(index, epoch)
        except DataError as error:
            return _Problem(str(error))


def _stack(samples: Sequence[Sample | _Problem]) -> tuple[Tensor, Labels] | _Problem:
    for sample in samples:
        if isinstance(sample, _Problem):
            return sample
    images = [sample["image"] for sample in samples]  # type: ignore[index]
    labels = [sample["label"] for sample in samples]  # type: ignore[index]
    if len({image.shape for image in images}) > 1:
        names = ", ".join(f"{s['name']} {list(s['image'].shape[1:])}" for s in samples)  # type: ignore[index]
        return _Problem(f"the images of a training batch differ in size; set data.crop_size ({names})")
    if "labels" in samples[0]:  # type: ignore[operator]
        tasks = [sample["labels"] for sample in samples]  # type: ignore[index]
        return torch.stack(images), {task: torch.stack([of[task] for of in tasks]) for task in tasks[0]}
    return torch.stack(images), torch.stack(labels)


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and a job's SIGTERM reach the whole process group; workers must live until the parent has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
        generator=torch.Generator().manual_seed(0),  # so that the global generator is left alone
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def training_batches(
    dataset: Any, seed: int, start: int, batches: int, batch_size: int, workers: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Labels]]:
    """``batches`` pairs of images [B, 3, H, W] and labels [B, H, W] (or a dictionary of them, by task) from stream
    position ``start`` on."""
    from rendseg.engine.tasks import sample_order

    order = sample_order(dataset, seed, batch_size * world)
    positions = BatchPositions(order, start, batches, batch_size, rank, world)
    for batch in _loader(_Samples(dataset), workers, batch_sampler=positions, collate_fn=_stack):
        if isinstance(batch, _Problem):
            raise DataError(batch.message)
        yield batch


def evaluation_samples(dataset: Any, workers: int, indices: Sequence[int]) -> Iterator[Sample]:
    """The samples of ``indices`` one by one, in order."""
    items = [(0, index) for index in indices]
    for sample in _loader(_Samples(dataset), workers, sampler=items, batch_size=None, collate_fn=None):
        if isinstance(sample, _Problem):
            raise DataError(sample.message)
        yield sample
