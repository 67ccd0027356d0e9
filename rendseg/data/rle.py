"""COCO's forms of a mask: polygons, and run lengths as numbers or as text. H, W the image.

Run lengths count pixels of 0 and of 1 in turns, 0 first, down the columns from left to right. As text each number is a
group of six-bit characters, lowest bits first, of five bits and a mark that more follow; from the third number on it is
the difference from the last but one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def polygons_to_mask(polygons: Iterable[Sequence[float]], height: int, width: int) -> np.ndarray:
    """uint8 [H, W]: the pixels whose centre lies within a polygon ``[x0, y0, x1, y1, ...]``, by the even-odd rule.

    The sides of the pixel in row r and column c are at c, c + 1, r and r + 1.
    """
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon has a corner that is not finite")
        x0, y0 = points.T
        x1, y1 = np.roll(points, -1, 0).T
        top = max(0, math.floor(points[:, 1].min() - 0.5))
        bottom = min(height, math.ceil(points[:, 1].max() + 0.5))
        if top >= bottom:
            continue
        at = np.arange(top, bottom)[:, None] + 0.5
        row, side = np.nonzero((y0 <= at) != (y1 <= at))  # the sides that cross each row of centres
        y = row + top + 0.5
        x = x0[side] + (y - y0[side]) * (x1 - x0)[side] / (y1 - y0)[side]
        first = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # the first centre at its right
        turns = np.zeros((bottom - top, width + 1), np.int64)
        np.add.at(turns, (row, first), 1)
        mask[top:bottom] |= (turns.cumsum(1)[:, :width] & 1).astype(np.uint8)
    return mask


def decode(counts: str | bytes | Sequence[int], height: int, width: int) -> np.ndarray:
    """uint8 [H, W] of run lengths. ``ValueError`` says what is wrong with them."""
    numbers = _numbers(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ValueError("run lengths must be whole numbers that are not negative")
    total = sum(numbers.tolist())  # of Python: int64 can overflow
    if total != height * width:
        raise ValueError(f"run lengths are of {total} pixels, the image has {height} x {width}")
    values = np.arange(len(numbers), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, numbers).reshape(width, height).T)


def _numbers(text: str | bytes) -> np.ndarray:
    numbers: list[int] = []
    value = shift = 0
    for byte in text.encode() if isinstance(text, str) else text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the text of run lengths is damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            numbers.append(value + numbers[-2] if len(numbers) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("the text of run lengths ends within a number")
    return np.array(numbers, np.int64)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """``{"size": [H, W], "counts": text}`` of a mask [H, W] of 0 and 1."""
    flat = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False)) if flat.size else np.zeros(0, np.int64)
    numbers = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    text = []
    for i, number in enumerate(numbers):
        rest = number - numbers[i - 2] if i > 2 else number
        while True:
            bits, rest = rest & 31, rest >> 5
            last = rest == (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + (0 if last else 32)))
            if last:
                break
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": "".join(text)}
