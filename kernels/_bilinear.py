"""Where a point of [0, 1]^2 falls on an H x W grid: ``csrc/math/bilinear.h`` in Triton, operation by operation.

Launch with ``enable_fp_fusion=False`` (:data:`EXACT`): every product is rounded before it is added to.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _last(coord, size):
    """``size - 1`` in the type of ``coord``; ``size`` is an integer, also one that is known when compiling."""
    return (size - 1 + tl.zeros_like(coord)).to(coord.dtype)


@triton.jit
def cell_position(coord, size, ALIGN: tl.constexpr):
    """Position along one axis in cells; the centre of cell i is at i."""
    from_corner = (2.0 * coord - 1.0) + 1.0
    if ALIGN:
        return from_corner * (_last(coord, size) * 0.5)
    else:
        return from_corner * ((_last(coord, size) + 1.0) * 0.5) - 0.5


@triton.jit
def _clip(position, last):
    """Border padding: into [0, last]; NaN goes to 0."""
    low = tl.where(position > 0.0, position, 0.0)
    return tl.where(low < last, low, last)


@triton.jit
def axis_taps(coord, size, BORDER: tl.constexpr, ALIGN: tl.constexpr):
    """The neighbours ``cell`` and ``cell + 1`` of a coordinate along one axis.

    Returns the cell (-2 when neither lies on the map, as for NaN), the two weights, and whether each is on the map.
    """
    position = cell_position(coord, size, ALIGN)
    last = _last(coord, size)
    if BORDER:
        position = _clip(position, last)
    lower = tl.floor(position)
    far = position - lower
    near = 1.0 - far
    has_near = (lower >= 0.0) & (lower <= last)
    has_far = (lower >= -1.0) & (lower < last)
    # The conversion is only made of numbers that fit: a wild coordinate has no neighbour.
    cell = tl.where(has_near | has_far, lower, -2.0).to(tl.int32)
    return cell, near, far, has_near, has_far


@triton.jit
def nearest_cell(coord, size, BORDER: tl.constexpr, ALIGN: tl.constexpr):
    """The nearest cell along one axis, halves to even, and whether it is on the map."""
    position = cell_position(coord, size, ALIGN)
    last = _last(coord, size)
    if BORDER:
        position = _clip(position, last)
    lower = tl.floor(position)
    part = position - lower
    odd = lower - 2.0 * tl.floor(lower * 0.5) == 1.0
    nearest = tl.where((part > 0.5) | ((part == 0.5) & odd), lower + 1.0, lower)
    inside = (nearest >= 0.0) & (nearest <= last)
    return tl.where(inside, nearest, 0.0).to(tl.int32), inside


@triton.jit
def position_slope(coord, size, BORDER: tl.constexpr, ALIGN: tl.constexpr):
    """d position / d coord, zero where border padding clipped."""
    last = _last(coord, size)
    slope = last if ALIGN else last + 1.0
    if BORDER:
        position = cell_position(coord, size, ALIGN)
        slope = tl.where((position > 0.0) & (position < last), slope, 0.0)
    return slope
