"""The order of the training images, and the keys of the points drawn on them: functions of (seed, position) alone.

The training data is one endless stream: epoch after epoch, each in its own permutation, which depends on the seed and
the epoch alone. Position p of the stream is image ``permutation(p // size)[p % size]`` of epoch ``p // size``. Batches
may span two epochs, so no image is ever left out. With W processes of batch B one step takes positions
[s W B, (s + 1) W B).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rendseg.data import DataError


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


class SourceOrder:
    """``order[position] -> (epoch, index)`` of an endless stream whose every ``batch`` positions are of one source.

    ``sizes`` count the images of the sources, which follow each other in the data set. The source of step t is drawn in
    proportion to them, as a function of (seed, t); within a source, images come epoch after epoch as in
    :class:`SampleOrder`. With W processes of B images ``batch`` is W B: all processes of a step have the same source.
    """

    _block = 4096  # steps drawn together

    def __init__(self, sizes: Sequence[int], seed: int, batch: int) -> None:
        self.batch, self.seed = batch, seed
        self._first = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._orders = [SampleOrder(size, seed) if size else None for size in sizes]
        self._shares = np.asarray(sizes, np.float64) / sum(sizes)
        self._before = [np.zeros(len(sizes), np.int64)]  # steps of every source before each block
        self._drawn = (-1, np.empty(0, np.int64), np.empty(0, np.int64))  # block, source and rank of its steps

    def _draw(self, block: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64([self.seed, 1, block]))
        return generator.choice(len(self._shares), self._block, p=self._shares)

    def source(self, step: int) -> tuple[int, int]:
        """The source of a step, and how many steps before it had the same."""
        block, offset = divmod(step, self._block)
        if block != self._drawn[0]:
            while len(self._before) <= block:
                counts = np.bincount(self._draw(len(self._before) - 1), minlength=len(self._shares))
                self._before.append(self._before[-1] + counts)
            sources = self._draw(block)
            ranks = np.empty_like(sources)
            for source, before in enumerate(self._before[block]):
                mine = sources == source
                ranks[mine] = before + np.arange(mine.sum())
            self._drawn = (block, sources, ranks)
        return int(self._drawn[1][offset]), int(self._drawn[2][offset])

    def __getitem__(self, position: int) -> tuple[int, int]:
        step, offset = divmod(position, self.batch)
        source, rank = self.source(step)
        order = self._orders[source]
        assert order is not None  # a source without images is never drawn
        epoch, index = order[rank * self.batch + offset]
        return epoch, self._first[source] + index


def sample_order(dataset: Any, seed: int, batch: int) -> SampleOrder | SourceOrder:
    """The order of the training stream; ``batch`` images of all processes make one step."""
    sizes = getattr(dataset, "source_sizes", None)
    return SourceOrder(sizes, seed, batch) if sizes else SampleOrder(len(dataset), seed)


class BatchPositions(Sampler[list[tuple[int, int]]]):
    """The batches of one process from ``start`` on, each a list of ``(epoch, index)``; there may be infinitely many."""

    def __init__(self, order: Any, start: int, batches: float, batch_size: int, rank: int, world: int) -> None:
        self.order, self.start, self.batches = order, start, batches
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in count():
            if step >= self.batches:
                return
            first = self.start + (step * self.world + self.rank) * self.batch_size
            yield [self.order[position] for position in range(first, first + self.batch_size)]


def image_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Keys ``[count]`` int64 of the images from stream position ``first`` on, for the points drawn on them."""
    start = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 2
    return torch.arange(start + first, start + first + count, device=device)
