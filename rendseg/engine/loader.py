"""Batches of images and labels in the order of ``order.py``, so that a run can be continued at any position.

The augmentation of an image depends on (seed, epoch, image), and nothing on the number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rendseg.data import DataError
from rendseg.engine.order import BatchPositions, sample_order

Sample = dict[str, Any]
Labels = Tensor | dict[str, Tensor]  # of one task, or by task


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
