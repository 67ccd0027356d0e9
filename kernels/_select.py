"""Selection of the k smallest sort keys of each image: exact, ascending, ties to the smallest index, deterministic.

Maps of at most ``SMALL`` keys take one launch, a program per image that holds all keys in registers and finds the
threshold bit by bit. Larger ones take a radix selection over digits of 8, 8, 8 and 7 bits: a histogram per digit, a
count per block, and the ordered write. What all programs need (the threshold so far) each finds for itself from the
histogram of the launch before, so nothing is reset, waited for, or read by the host. Counts are integers, so the order
of atomic additions does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import arch_of, check_grid, check_indices, divide, is_amd, launch_tuned, shape_class

SMALL = 8192
DIGITS = 4
MAX_BLOCKS = 512  # programs for one image, whose counts each of them adds up

# What a selected index becomes.
CELLS = 0  # the index and the centre of the cell
POINTS = 1  # the coordinate given for it
DRAWS = 2  # the coordinate drawn for it


@triton.jit
def _shift(DIGIT: tl.constexpr):
    """Lowest bit of a digit: 23, 15, 7, 0."""
    return 23 - 8 * DIGIT if DIGIT < 3 else 0


@triton.jit
def count_digit(histogram, key, inside, DIGIT: tl.constexpr):
    """Adds one digit of the keys ``inside`` to ``histogram [256]`` int32 (a pointer to the row of the image).

    For one-dimensional tiles with at least a key per thread: tl.histogram counts copies of a key in several threads.
    """
    mask: tl.constexpr = 255 if DIGIT < 3 else 127
    counts = tl.histogram((key >> _shift(DIGIT)) & mask, 256, mask=inside)
    tl.atomic_add(histogram + tl.arange(0, 256), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _cut(histogram, rank):
    """The digit of the key that is ``rank``-th smallest (from 1), and its rank among those with the same digit."""
    running = tl.cumsum(tl.load(histogram + tl.arange(0, 256)), 0)
    before = running < rank
    return tl.sum(before.to(tl.int32), 0), rank - tl.max(tl.where(before, running, 0), 0)


@triton.jit
def _threshold(histogram, state, n, images, k, DIGITS_KNOWN: tl.constexpr):
    """Upper digits of the k-th smallest key and its rank among the keys that share them.

    ``histogram [4, N, 256]`` and ``state [4, N, 2]`` are complete up to the digit before the last known one.
    """
    if DIGITS_KNOWN == 1:
        prefix = 0
        rank = k
    else:
        row = state + ((DIGITS_KNOWN - 2) * images + n) * 2
        prefix = tl.load(row)
        rank = tl.load(row + 1)
    digit, rank = _cut(histogram + ((DIGITS_KNOWN - 1) * images + n) * 256, rank)
    if DIGITS_KNOWN < 4:
        return prefix * 256 + digit, rank
    else:
        return prefix * 128 + digit, rank


@triton.jit
def _digit_kernel(keys, histogram, state, size, images, blocks, tiles, k, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of one digit of the keys whose upper digits are those of the threshold.

    keys: [N, size] int32, below 2^31.
    histogram: [4, N, 256] int32, zero for this digit; the digits before are complete.
    state: [4, N, 2] int32, row d the upper d + 1 digits of the threshold and the rank within; row DIGIT - 1 is written.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    block = program % blocks
    if DIGIT > 0:
        prefix, rank = _threshold(histogram, state, n, images, k, DIGIT)
        if block == 0:
            row = state + ((DIGIT - 1) * images + n) * 2
            tl.store(row, prefix)
            tl.store(row + 1, rank)
    histogram += (DIGIT * images + n) * 256
    keys += n * size
    first = block.to(tl.int64) * tiles * BLOCK
    for tile in range(tiles):
        at = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        key = tl.load(keys + at, mask=inside, other=0x7FFFFFFF)
        if DIGIT > 0:
            inside &= (key >> _shift(DIGIT - 1)) == prefix
        if tl.max(inside.to(tl.int32), 0) > 0:
            count_digit(histogram, key, inside, DIGIT)


@triton.jit
def _count_kernel(keys, histogram, state, counts, size, images, blocks, tiles, k, BLOCK: tl.constexpr):
    """How many keys of each block lie below the threshold, and how many equal it.

    keys: [N, size] int32. histogram: [4, N, 256] int32, complete.
    state: [4, N, 2] int32; the last row becomes the threshold and how many of those equal to it are selected.
    counts: [N, blocks, 2] int32, written.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    block = program % blocks
    threshold, rank = _threshold(histogram, state, n, images, k, 4)
    if block == 0:
        row = state + (3 * images + n) * 2
        tl.store(row, threshold)
        tl.store(row + 1, rank)
    keys += n * size
    first = block.to(tl.int64) * tiles * BLOCK
    below = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for tile in range(tiles):
        at = first + tile * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < size, other=0x7FFFFFFF)
        below += (key < threshold).to(tl.int32)
        equal += (key == threshold).to(tl.int32)
    row = counts + (n * blocks + block) * 2
    tl.store(row, tl.sum(below, 0))
    tl.store(row + 1, tl.sum(equal, 0))


@triton.jit
def point_at(points, n, i, inside, total, p_n, p_p, p_c, MODE: tl.constexpr):
    """Coordinates ``x, y`` of points ``i`` of image ``n``.

    points: [N, total, 2] float32 with the strides p_n, p_p, p_c; or (DRAWS) [1] int64, the seed of the draws.
    """
    if MODE == 2:
        x, y, _, _ = tl.rand4x(tl.load(points), n * total + i)
    else:
        here = points + n * p_n + i * p_p
        x = tl.load(here, mask=inside, other=0.0)
        y = tl.load(here + p_c, mask=inside, other=0.0)
    return x, y


@triton.jit
def _emit(chosen, rank, i, n, indices, out, points, k, height, width, total, rows, p_n, p_p, p_c, MODE: tl.constexpr):
    """Writes what the chosen indices ``i`` become at place ``rank`` of image ``n``; see the kernels."""
    if MODE == 0:
        tl.store(indices + n * k + rank, i.to(tl.int64), mask=chosen)
        row = i // width
        column = i - row * width
        x = divide(column.to(tl.float32) + 0.5, (tl.zeros_like(column) + width).to(tl.float32))
        y = divide(row.to(tl.float32) + 0.5, (tl.zeros_like(row) + height).to(tl.float32))
    else:
        x, y = point_at(points, n, i, chosen, total, p_n, p_p, p_c, MODE)
    here = out + (n * rows + rank) * 2
    tl.store(here, x, mask=chosen)
    tl.store(here + 1, y, mask=chosen)


@triton.jit
def _write_kernel(
    keys,
    state,
    counts,
    indices,
    out,
    points,
    size,
    images,
    blocks,
    tiles,
    k,
    height,
    width,
    total,
    rows,
    p_n,
    p_p,
    p_c,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes the selected in ascending order: those below the threshold, and the first of those equal to it.

    keys: [N, size] int32. state: [4, N, 2] int32, the last row as _count_kernel leaves it.
    counts: [N, blocks, 2] int32. indices: [N, k] int64, written (CELLS).
    out: [N, rows, 2] float32, of which the first k rows are written.
    points: [N, total, 2] float32 (POINTS), or [1] int64 seed (DRAWS).
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    block = program % blocks
    threshold = tl.load(state + (3 * images + n) * 2)
    ties = tl.load(state + (3 * images + n) * 2 + 1)
    other = tl.arange(0, BLOCKS)
    row = counts + (n * blocks + other) * 2
    ahead = tl.sum(tl.load(row, mask=other < block, other=0), 0)
    equal_ahead = tl.sum(tl.load(row + 1, mask=other < block, other=0), 0)
    keys += n * size
    first = block.to(tl.int64) * tiles * BLOCK
    for tile in range(tiles):
        i = first + tile * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + i, mask=i < size, other=0x7FFFFFFF)
        if tl.min(key, 0) <= threshold:
            equal = (key == threshold).to(tl.int32)
            equal_rank = equal_ahead + tl.cumsum(equal, 0)  # from 1, where equal
            chosen = (key < threshold) | ((equal > 0) & (equal_rank <= ties))
            rank = ahead + tl.minimum(equal_ahead, ties) + tl.cumsum(chosen.to(tl.int32), 0) - 1
            _emit(chosen, rank, i, n, indices, out, points, k, height, width, total, rows, p_n, p_p, p_c, MODE)
            ahead += tl.sum((key < threshold).to(tl.int32), 0)
            equal_ahead += tl.sum(equal, 0)


@triton.jit
def _select_kernel(
    keys,
    indices,
    out,
    points,
    size,
    k,
    height,
    width,
    total,
    rows,
    p_n,
    p_p,
    p_c,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole selection of one image by one program, for size <= BLOCK.

    keys: [N, size] int32. indices: [N, k] int64, written (CELLS).
    out: [N, rows, 2] float32, of which the first k rows are written.
    points: [N, total, 2] float32 (POINTS), or [1] int64 seed (DRAWS).
    """
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    key = tl.load(keys + n * size + i, mask=inside, other=0x7FFFFFFF)
    # The k-th smallest key, from its highest bit: a bit is set if fewer than k keys lie below the number so far.
    threshold = 0
    below = 0
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        count = tl.sum((key < trial).to(tl.int32), 0)
        below = tl.where(count < k, count, below)
        threshold = tl.where(count < k, trial, threshold)
    equal = inside & (key == threshold)
    chosen = (key < threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= k - below))
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    _emit(chosen, rank, i, n, indices, out, points, k, height, width, total, rows, p_n, p_p, p_c, MODE)


def _tile() -> dict[str, int]:
    """Configuration of the launches over blocks, whatever the size: keys looked at together, and warps."""
    return {"BLOCK": 2048, "num_warps": 8}


def _small_tile(size: int, arch: str) -> dict[str, int]:
    """Configuration of _select_kernel: 16 keys to a thread (32 spill), of which AMD has twice as many to a warp."""
    block = max(128, triton.next_power_of_2(size))
    return {"BLOCK": block, "num_warps": min(8 if is_amd(arch) else 16, max(1, block // 512))}


class Selection:
    """Selection of the ``k`` smallest of ``size`` keys in each of ``images``; allocates what lies between the launches.

    The producer writes ``keys [N, size]`` int32. Where ``counting`` is true it also adds their first digit to
    ``histogram [N, 256]`` int32 with :func:`count_digit`; it says so beforehand by ``counts_first_digit``.
    """

    def __init__(self, images: int, size: int, k: int, device: torch.device, counts_first_digit: bool = False) -> None:
        check_indices(size, "cells or points")
        self.images, self.size, self.k = images, size, k
        self.keys = torch.empty((images, size), dtype=torch.int32, device=device)
        self.table = None if size <= SMALL else torch.zeros((DIGITS, images, 256), dtype=torch.int32, device=device)
        self.counting = counts_first_digit and self.table is not None
        # A pointer of the right type in any case; the first digit comes first in the table.
        self.histogram = self.keys if self.table is None else self.table

    def cells(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Ascending ``indices [N, k]`` int64 and ``coords [N, k, 2]`` float32, the cell centres."""
        indices = torch.empty((self.images, self.k), dtype=torch.int64, device=self.keys.device)
        coords = torch.empty((self.images, self.k, 2), dtype=torch.float32, device=self.keys.device)
        self._run(indices, coords, coords, height, width, 0, self.k, (0, 0, 0), CELLS)
        return indices, coords

    def points(self, points: Tensor, total: int, out: Tensor, mode: int) -> None:
        """Writes the coordinates of the selected points into the first k rows of ``out [N, rows, 2]``.

        ``points`` is ``[N, total, 2]`` float32 (``POINTS``) or the seed of the draws (``DRAWS``).
        """
        steps = points.stride() if mode == POINTS else (0, 0, 0)
        self._run(self.keys, out, points, 1, 1, total, out.shape[1], steps, mode)

    def _run(
        self,
        indices: Tensor,
        out: Tensor,
        points: Tensor,
        height: int,
        width: int,
        total: int,
        rows: int,
        steps: tuple[int, ...],
        mode: int,
    ) -> None:
        images, size, k = self.images, self.size, self.k
        if images == 0:
            return
        tail: tuple[Any, ...] = (k, height, width, total, rows, *steps)
        device = self.keys.device
        key = (mode, *shape_class(images, size, k))
        if self.table is None:

            def launch(tile: dict[str, int]) -> None:
                _select_kernel[(images,)](self.keys, indices, out, points, size, *tail, MODE=mode, **tile)

            launch_tuned("select", key, _small_tile(size, arch_of(device)), (), device, launch)
            return
        table = self.table

        def launch_all(tile: dict[str, int]) -> None:
            tiles = triton.cdiv(size, tile["BLOCK"])
            per_program = triton.cdiv(tiles, MAX_BLOCKS)
            blocks = triton.cdiv(tiles, per_program)
            grid = (check_grid(images * blocks),)
            state = torch.empty((DIGITS, images, 2), dtype=torch.int32, device=device)
            counts = torch.empty((images, blocks, 2), dtype=torch.int32, device=device)
            sizes = (size, images, blocks, per_program, k)
            for digit in range(1 if self.counting else 0, DIGITS):
                _digit_kernel[grid](self.keys, table, state, *sizes, DIGIT=digit, **tile)
            _count_kernel[grid](self.keys, table, state, counts, *sizes, **tile)
            _write_kernel[grid](
                self.keys,
                state,
                counts,
                indices,
                out,
                points,
                size,
                images,
                blocks,
                per_program,
                *tail,
                MODE=mode,
                BLOCKS=triton.next_power_of_2(blocks),
                **tile,
            )

        launch_tuned("select_large", key, _tile(), ("BLOCK",), device, launch_all, changed=(table,))
