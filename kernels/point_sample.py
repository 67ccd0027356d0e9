"""Gathering at points in Triton. Shapes: N images, C channels, H W grid, P points, T taps of a point (4, nearest 1).

Forward: a program takes one image, a tile of points and a tile of channels; the taps of its points are computed once.
Lanes run along what neighbours in memory: channels (channels_last), else points. A map is read at the taps alone,
``N P T C`` elements through the cache, and ``N P C`` are written; a list of maps takes one launch per map.

Backward into the map, without atomics, so that the bits are the same every run:

    cells     of every tap, the cell as a sort key ``[N, P, T]`` int32 (int64 on maps too large) and the weight
    sort      the taps by cell, stable, with their order (torch.sort; 8 bytes a tap)
    begins    where the taps of each cell begin, ``[N * H * W + 1]``, by bisection
    gather    every cell of the gradient, written once, as the sum of its taps in the order of points

The gradient of the map is dense: ``N C H W`` elements are written for any P. Many points in one cell make one long
sum, which is slow where thousands fall together. Backward into the coordinates: a program takes all channels of its
points, and keeps four sums of each.

Positions are in cells, the centre of cell i at i; products are rounded one by one (``_bilinear.py``). Sums are made in
float32, or in float64 for float64 maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import _checks as check
from ..reference.point_sample import check_point_labels, check_point_sample, gradient_format
from ._bilinear import EXACT, axis_taps, nearest_cell, position_slope
from ._common import launch_tuned, narrow, shape_class

_WIDE = {torch.float64: tl.float64}  # the type that sums are made in; float32 for all others
# Sizes that gain nothing from a compilation of their own where they are 1 or a multiple of 16. `channels` does: only a
# known multiple lets a mask cover a whole vector. Points would too, but then a thread of an NCHW tile would take four
# of them, and its loads, which are scattered anyway, would pass their addresses through shared memory.
_SIZES = ["points", "cells", "height", "width", "total", "entries"]


@triton.jit
def _tile_of(pid, points, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(image, first point, first channel) of a program; neighbours in memory go to neighbouring programs."""
    point_tiles = tl.cdiv(points, BLOCK_P)
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    if CHANNELS_LAST:
        c = pid % channel_tiles
        p = pid // channel_tiles % point_tiles
    else:
        p = pid % point_tiles
        c = pid // point_tiles % channel_tiles
    n = pid // point_tiles // channel_tiles
    return n.to(tl.int64), p * BLOCK_P, c * BLOCK_C


@triton.jit
def _points(value, CHANNELS_LAST: tl.constexpr):
    """What every point has, across a tile ``[P, C]`` (channels_last) or ``[C, P]``: lanes run along the last axis."""
    if CHANNELS_LAST:
        return value[:, None]
    else:
        return value[None, :]


@triton.jit
def _channels(value, CHANNELS_LAST: tl.constexpr):
    """What every channel has, across a tile."""
    if CHANNELS_LAST:
        return value[None, :]
    else:
        return value[:, None]


@triton.jit
def _weighted(source, at, weight, inside, live, CHANNELS_LAST: tl.constexpr):
    """``weight * map[at]``, off the map ``weight * 0`` (which is NaN for a NaN weight)."""
    mask = _points(inside, CHANNELS_LAST) & live
    value = tl.load(source + _points(at, CHANNELS_LAST), mask=mask, other=0.0).to(weight.dtype)
    return value * _points(weight, CHANNELS_LAST)


@triton.jit(do_not_specialize=_SIZES)
def _point_sample_kernel(
    map_ptr,
    coords_ptr,
    out_ptr,
    points,
    channels,
    height,
    width,
    map_n,
    map_c,
    map_h,
    map_w,
    coords_n,
    coords_p,
    coords_xy,
    out_n,
    ACC: tl.constexpr,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out[n, c, p]`` is the map at ``coords[n, p]``.

    map_ptr: ``[N, C, H, W]`` of any strides, float16, bfloat16, float32 or float64.
    coords_ptr: ``[N, P, 2]`` of any strides, float32 or float64.
    out_ptr: ``[N, C, P]``, a slice of the channels of a contiguous tensor, in the dtype of the map.
    """
    n, first_p, first_c = _tile_of(tl.program_id(0), points, channels, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    p = first_p + tl.arange(0, BLOCK_P)
    c = (first_c + tl.arange(0, BLOCK_C)).to(tl.int64)
    has_point = p < points
    p = p.to(tl.int64)
    coord = coords_ptr + n * coords_n + p * coords_p
    x = tl.load(coord, mask=has_point, other=0.0).to(ACC)
    y = tl.load(coord + coords_xy, mask=has_point, other=0.0).to(ACC)
    live = _points(has_point, CHANNELS_LAST) & _channels(c < channels, CHANNELS_LAST)
    source = map_ptr + n * map_n + _channels(c * map_c, CHANNELS_LAST)
    if NEAREST:
        col, in_x = nearest_cell(x, width, BORDER, ALIGN)
        row, in_y = nearest_cell(y, height, BORDER, ALIGN)
        at = row.to(tl.int64) * map_h + col.to(tl.int64) * map_w
        mask = _points(in_x & in_y, CHANNELS_LAST) & live
        value = tl.load(source + _points(at, CHANNELS_LAST), mask=mask, other=0.0).to(ACC)
    else:
        col, near_x, far_x, has_near_x, has_far_x = axis_taps(x, width, BORDER, ALIGN)
        row, near_y, far_y, has_near_y, has_far_y = axis_taps(y, height, BORDER, ALIGN)
        at = row.to(tl.int64) * map_h + col.to(tl.int64) * map_w
        value = _weighted(source, at, near_x * near_y, has_near_x & has_near_y, live, CHANNELS_LAST)
        value += _weighted(source, at + map_w, far_x * near_y, has_far_x & has_near_y, live, CHANNELS_LAST)
        value += _weighted(source, at + map_h, near_x * far_y, has_near_x & has_far_y, live, CHANNELS_LAST)
        value += _weighted(source, at + map_h + map_w, far_x * far_y, has_far_x & has_far_y, live, CHANNELS_LAST)
    target = out_ptr + n * out_n + _channels(c * points, CHANNELS_LAST) + _points(p, CHANNELS_LAST)
    tl.store(target, narrow(value, out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _point_sample_cells_kernel(
    coords_ptr,
    keys_ptr,
    weights_ptr,
    total,
    points,
    height,
    width,
    coords_n,
    coords_p,
    coords_xy,
    off_map,
    ACC: tl.constexpr,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cell and weight of every tap of ``total`` = N*P points.

    coords_ptr: ``[N, P, 2]`` of any strides, float32 or float64.
    keys_ptr: ``[N, P, T]`` int32 or int64, written: ``n * H * W + cell``, or ``off_map`` = N*H*W.
    weights_ptr: ``[N, P, T]`` float32 or float64, written; nothing for nearest.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    n = i // points
    coord = coords_ptr + n * coords_n + (i - n * points) * coords_p
    x = tl.load(coord, mask=live, other=0.0).to(ACC)
    y = tl.load(coord + coords_xy, mask=live, other=0.0).to(ACC)
    key_type: tl.constexpr = keys_ptr.dtype.element_ty
    if NEAREST:
        col, in_x = nearest_cell(x, width, BORDER, ALIGN)
        row, in_y = nearest_cell(y, height, BORDER, ALIGN)
        key = (n * height + row) * width + col
        tl.store(keys_ptr + i, tl.where(in_x & in_y, key, off_map).to(key_type), mask=live)
    else:
        col, near_x, far_x, has_near_x, has_far_x = axis_taps(x, width, BORDER, ALIGN)
        row, near_y, far_y, has_near_y, has_far_y = axis_taps(y, height, BORDER, ALIGN)
        key = (n * height + row) * width + col
        keys = keys_ptr + i * 4
        weights = weights_ptr + i * 4
        tl.store(keys, tl.where(has_near_x & has_near_y, key, off_map).to(key_type), mask=live)
        tl.store(keys + 1, tl.where(has_far_x & has_near_y, key + 1, off_map).to(key_type), mask=live)
        tl.store(keys + 2, tl.where(has_near_x & has_far_y, key + width, off_map).to(key_type), mask=live)
        tl.store(keys + 3, tl.where(has_far_x & has_far_y, key + width + 1, off_map).to(key_type), mask=live)
        tl.store(weights, near_x * near_y, mask=live)
        tl.store(weights + 1, far_x * near_y, mask=live)
        tl.store(weights + 2, near_x * far_y, mask=live)
        tl.store(weights + 3, far_x * far_y, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _point_sample_begins_kernel(keys_ptr, begins_ptr, cells, entries, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """``begins[i]``: how many of the ascending keys are below i, for i in [0, cells].

    keys_ptr: ``[entries]`` int32 or int64, ascending.
    begins_ptr: ``[cells + 1]`` int32 or int64, written.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + entries
    for _ in range(STEPS):  # 2 ** STEPS > entries; a finished search only repeats itself
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(keys_ptr + middle, mask=open_, other=0) < i
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    tl.store(begins_ptr + i, low.to(begins_ptr.dtype.element_ty), mask=i <= cells)


@triton.jit(do_not_specialize=_SIZES)
def _point_sample_gather_kernel(
    grad_ptr,
    begins_ptr,
    order_ptr,
    weights_ptr,
    out_ptr,
    cells,
    points,
    channels,
    grad_n,
    grad_c,
    grad_p,
    ACC: tl.constexpr,
    NEAREST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of the map: every cell is the sum of its taps, in the order of points; ``cells`` = H*W.

    grad_ptr: ``[N, C, P]`` of any strides, in the dtype of the map.
    begins_ptr: ``[N * H * W + 1]`` int32 or int64: where the taps of a cell begin in ``order``.
    order_ptr: ``[N * P * T]`` int64: the taps, as ``(n * P + p) * T + t``, by cell.
    weights_ptr: ``[N * P * T]`` float32 or float64: the weight of each tap; not read for nearest.
    out_ptr: ``[N, C, H, W]``, contiguous or channels_last, written.
    """
    n, first, first_c = _tile_of(tl.program_id(0), cells, channels, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    cell = first + tl.arange(0, BLOCK_P)
    c = (first_c + tl.arange(0, BLOCK_C)).to(tl.int64)
    on_map = cell < cells
    cell = cell.to(tl.int64)
    begin = tl.load(begins_ptr + n * cells + cell, mask=on_map, other=0).to(tl.int64)
    end = tl.load(begins_ptr + n * cells + cell + 1, mask=on_map, other=0).to(tl.int64)
    has_channel = _channels(c < channels, CHANNELS_LAST)
    source = grad_ptr + n * grad_n + _channels(c * grad_c, CHANNELS_LAST)
    if CHANNELS_LAST:
        total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    else:
        total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    longest = tl.max(end - begin, axis=0)
    at = begin
    for _ in range(longest):
        live = at < end
        tap = tl.load(order_ptr + at, mask=live, other=0)
        if NEAREST:
            p = tap - n * points
            weight = tl.where(live, 1.0, 0.0).to(ACC)
        else:
            p = tap // 4 - n * points
            weight = tl.load(weights_ptr + tap, mask=live, other=0.0)
        taken = _points(live, CHANNELS_LAST) & has_channel
        value = tl.load(source + _points(p * grad_p, CHANNELS_LAST), mask=taken, other=0.0).to(ACC)
        total += tl.where(taken, value * _points(weight, CHANNELS_LAST), 0.0)
        at += 1
    target = out_ptr + n * cells * channels
    if CHANNELS_LAST:
        target += (cell * channels)[:, None] + c[None, :]
    else:
        target += (c * cells)[:, None] + cell[None, :]
    tl.store(target, narrow(total, out_ptr.dtype.element_ty), mask=_points(on_map, CHANNELS_LAST) & has_channel)


@triton.jit
def _dot(source, at, inside, live, grad, CHANNELS_LAST: tl.constexpr):
    """``grad * map[at]``, off the map ``grad * 0``."""
    mask = _points(inside, CHANNELS_LAST) & live
    return tl.load(source + _points(at, CHANNELS_LAST), mask=mask, other=0.0).to(grad.dtype) * grad


@triton.jit(do_not_specialize=_SIZES)
def _point_sample_coords_kernel(
    map_ptr,
    grad_ptr,
    coords_ptr,
    out_ptr,
    points,
    channels,
    height,
    width,
    map_n,
    map_c,
    map_h,
    map_w,
    grad_n,
    grad_c,
    grad_p,
    coords_n,
    coords_p,
    coords_xy,
    ACC: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of the coordinates, bilinear; with FIRST written, else added to (one map of a list after another).

    map_ptr: ``[N, C, H, W]`` of any strides, float16, bfloat16, float32 or float64.
    grad_ptr: ``[N, C, P]`` of any strides, in the dtype of the map.
    coords_ptr: ``[N, P, 2]`` of any strides, float32 or float64.
    out_ptr: ``[N, P, 2]`` contiguous, float32 or float64.
    """
    n, first_p, _ = _tile_of(tl.program_id(0), points, 1, BLOCK_P, 1, False)
    p = first_p + tl.arange(0, BLOCK_P)
    has_point = p < points
    p = p.to(tl.int64)
    coord = coords_ptr + n * coords_n + p * coords_p
    x = tl.load(coord, mask=has_point, other=0.0).to(ACC)
    y = tl.load(coord + coords_xy, mask=has_point, other=0.0).to(ACC)
    col, near_x, far_x, has_near_x, has_far_x = axis_taps(x, width, BORDER, ALIGN)
    row, near_y, far_y, has_near_y, has_far_y = axis_taps(y, height, BORDER, ALIGN)
    at = row.to(tl.int64) * map_h + col.to(tl.int64) * map_w
    if CHANNELS_LAST:
        nothing = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    else:
        nothing = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    channel_axis: tl.constexpr = 1 if CHANNELS_LAST else 0
    north_west = nothing
    north_east = nothing
    south_west = nothing
    south_east = nothing
    for first_c in range(0, channels, BLOCK_C):
        c = (first_c + tl.arange(0, BLOCK_C)).to(tl.int64)
        live = _points(has_point, CHANNELS_LAST) & _channels(c < channels, CHANNELS_LAST)
        source = map_ptr + n * map_n + _channels(c * map_c, CHANNELS_LAST)
        grad = grad_ptr + n * grad_n + _channels(c * grad_c, CHANNELS_LAST) + _points(p * grad_p, CHANNELS_LAST)
        grad = tl.load(grad, mask=live, other=0.0).to(ACC)
        north_west += _dot(source, at, has_near_x & has_near_y, live, grad, CHANNELS_LAST)
        north_east += _dot(source, at + map_w, has_far_x & has_near_y, live, grad, CHANNELS_LAST)
        south_west += _dot(source, at + map_h, has_near_x & has_far_y, live, grad, CHANNELS_LAST)
        south_east += _dot(source, at + map_h + map_w, has_far_x & has_far_y, live, grad, CHANNELS_LAST)
    nw = tl.sum(north_west, axis=channel_axis)
    ne = tl.sum(north_east, axis=channel_axis)
    sw = tl.sum(south_west, axis=channel_axis)
    se = tl.sum(south_east, axis=channel_axis)
    scale_x = position_slope(x, width, BORDER, ALIGN)
    scale_y = position_slope(y, height, BORDER, ALIGN)
    slope_x = (ne * scale_x) * near_y - (nw * scale_x) * near_y + ((se * scale_x) * far_y - (sw * scale_x) * far_y)
    slope_y = (sw * scale_y) * near_x - (nw * scale_y) * near_x + ((se * scale_y) * far_x - (ne * scale_y) * far_x)
    target = out_ptr + (n * points + p) * 2
    if not FIRST:
        slope_x += tl.load(target, mask=has_point, other=0.0)
        slope_y += tl.load(target + 1, mask=has_point, other=0.0)
    tl.store(target, slope_x, mask=has_point)
    tl.store(target + 1, slope_y, mask=has_point)


@triton.jit
def _holding_cell(coord, size):
    """The cell along one axis that holds a coordinate, and whether there is one; the product is exact in float64."""
    inside = (coord >= 0.0) & (coord <= 1.0)
    cell = (tl.where(inside, coord, 0.0).to(tl.float64) * size.to(tl.float64)).to(tl.int64)
    return tl.minimum(cell, size.to(tl.int64) - 1), inside


@triton.jit(do_not_specialize=["ignore_index", *_SIZES])
def _point_labels_kernel(
    labels_ptr,
    coords_ptr,
    out_ptr,
    total,
    points,
    height,
    width,
    ignore_index,
    labels_n,
    labels_h,
    labels_w,
    coords_n,
    coords_p,
    coords_xy,
    BLOCK: tl.constexpr,
):
    """The label of the cell that holds each of ``total`` = N*P points.

    labels_ptr: ``[N, H, W]`` of any strides, uint8, int8, int16, int32 or int64.
    coords_ptr: ``[N, P, 2]`` of any strides, float32 or float64.
    out_ptr: ``[N, P]`` contiguous, int64.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    n = i // points
    coord = coords_ptr + n * coords_n + (i - n * points) * coords_p
    col, in_x = _holding_cell(tl.load(coord, mask=live, other=0.0), width)
    row, in_y = _holding_cell(tl.load(coord + coords_xy, mask=live, other=0.0), height)
    inside = in_x & in_y
    label = tl.load(labels_ptr + n * labels_n + row * labels_h + col * labels_w, mask=inside & live, other=0)
    tl.store(out_ptr + i, tl.where(inside, label.to(tl.int64), ignore_index.to(tl.int64)), mask=live)


_FLAT = {"BLOCK": 256, "num_warps": 4}  # points of a program where no channels are read


def _is_channels_last(stride_c: int, channels: int) -> bool:
    return stride_c == 1 and channels > 1


def _sample_tile(channels: int, channels_last: bool) -> dict[str, int]:
    """Points and channels of a tile of the forward: 16 values a thread, neighbours in memory in one warp."""
    if channels_last:
        block_c = min(64, triton.next_power_of_2(channels))
        values = 2048 if channels % 8 == 0 else 1024  # without vector loads every value takes registers of its own
        return {"BLOCK_P": max(16, min(128, values // block_c)), "BLOCK_C": block_c, "num_warps": 4}
    block_c = min(8, triton.next_power_of_2(channels))
    return {"BLOCK_P": min(256, 1024 // block_c), "BLOCK_C": block_c, "num_warps": 4}


def _coords_tile(channels: int, channels_last: bool) -> dict[str, int]:
    """Points and channels of a tile of the gradient of the coordinates, which keeps four sums of each."""
    if channels_last:
        return {"BLOCK_P": 16, "BLOCK_C": min(64, triton.next_power_of_2(channels)), "num_warps": 4}
    block_c = min(8, triton.next_power_of_2(channels))
    return {"BLOCK_P": 512 // block_c if block_c > 2 else 128, "BLOCK_C": block_c, "num_warps": 4}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_TUNED = ("BLOCK_P",)


def _key(feature: Tensor, points: int, channels_last: bool) -> tuple[Any, ...]:
    """The shape class of a launch, for the tuning."""
    return channels_last, *shape_class(feature.shape[0], feature.shape[1], points)


def _launch(
    kernel: Any,
    images: int,
    points: int,
    channels: int,
    arguments: tuple[Any, ...],
    tile: dict[str, int],
    **options: Any,
) -> None:
    """A program for every tile of points (or cells) and channels of every image."""
    grid = images * triton.cdiv(points, tile["BLOCK_P"]) * triton.cdiv(channels, tile["BLOCK_C"])
    kernel[(grid,)](*arguments, **options, **tile, **EXACT)


def point_sample_triton(
    input: Sequence[Tensor],
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """``rendseg::point_sample``: one launch per map, each into its slice of the channels."""
    check_point_sample(input, coords, mode, padding_mode)
    images, shape = coords.shape[0], coords.shape[1:-1]
    at = coords.flatten(1, -2)
    points = at.shape[1]
    out = torch.empty((images, sum(m.shape[1] for m in input), points), dtype=input[0].dtype, device=input[0].device)
    first = 0
    for feature in input if out.numel() else ():
        channels, height, width = feature.shape[1:]
        channels_last = _is_channels_last(feature.stride(1), channels)
        launch = functools.partial(
            _launch,
            _point_sample_kernel,
            images,
            points,
            channels,
            (
                feature,
                at,
                out[:, first : first + channels],
                points,
                channels,
                height,
                width,
                *feature.stride(),
                *at.stride(),
                out.stride(0),
            ),
            ACC=_WIDE.get(feature.dtype, tl.float32),
            NEAREST=mode == "nearest",
            BORDER=padding_mode == "border",
            ALIGN=align_corners,
            CHANNELS_LAST=channels_last,
        )
        key = (feature.dtype, mode, *_key(feature, points, channels_last))
        launch_tuned("point_sample", key, _sample_tile(channels, channels_last), _TUNED, feature.device, launch)
        first += channels
    return out.view(images, out.shape[1], *shape)


def point_sample_backward_triton(
    grad: Tensor,
    input: Sequence[Tensor],
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    input_grad: bool,
    coords_grad: bool,
) -> list[Tensor]:
    """``rendseg::_point_sample_backward``: one gradient per map, then that of ``coords``; empty where not asked for."""
    check_point_sample(input, coords, mode, padding_mode)
    shape = (coords.shape[0], sum(m.shape[1] for m in input), *coords.shape[1:-1])
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have shape {list(shape)} as the output, got {check.shape_of(grad)}")
    if grad.dtype != input[0].dtype:
        raise TypeError(f"grad must have the dtype of input ({input[0].dtype}), got {grad.dtype}")
    at, flat = coords.flatten(1, -2), grad.flatten(2)
    nearest, border = mode == "nearest", padding_mode == "border"
    results, first = [], 0
    slopes = torch.empty(at.shape, dtype=_wide(grad.dtype), device=coords.device) if coords_grad else None
    if slopes is not None and nearest:
        slopes.zero_()
    for i, feature in enumerate(input):
        part, first = flat[:, first : first + feature.shape[1]], first + feature.shape[1]
        if input_grad:
            results.append(_map_gradient(part, feature, at, nearest, border, align_corners))
        else:
            results.append(feature.new_empty(0))
        if slopes is not None and slopes.numel() and not nearest:
            _coords_gradient(part, feature, at, slopes, border, align_corners, first=i == 0)
    results.append(coords.new_empty(0) if slopes is None else slopes.view(coords.shape).to(coords.dtype))
    return results


def _map_gradient(
    grad: Tensor, feature: Tensor, coords: Tensor, nearest: bool, border: bool, align_corners: bool
) -> Tensor:
    """The dense gradient of ``feature``, in its layout."""
    images, channels, height, width = feature.shape
    points, cells, taps = coords.shape[1], height * width, 1 if nearest else 4
    entries = images * points * taps
    layout = gradient_format(feature)
    if not entries:
        return torch.zeros_like(feature, memory_format=layout)
    wide = _wide(feature.dtype)
    acc = _WIDE.get(feature.dtype, tl.float32)
    # Half the bits to sort where they suffice, as they nearly always do.
    narrow = torch.int32 if max(images * cells, entries) < 2**31 - 1 else torch.int64
    keys = torch.empty(entries, dtype=narrow, device=feature.device)
    weights = torch.empty(0 if nearest else entries, dtype=wide, device=feature.device)
    _point_sample_cells_kernel[(triton.cdiv(images * points, _FLAT["BLOCK"]),)](
        coords,
        keys,
        keys if nearest else weights,
        images * points,
        points,
        height,
        width,
        *coords.stride(),
        images * cells,
        ACC=acc,
        NEAREST=nearest,
        BORDER=border,
        ALIGN=align_corners,
        **_FLAT,
        **EXACT,
    )
    keys, order = torch.sort(keys, stable=True)
    begins = torch.empty(images * cells + 1, dtype=narrow, device=feature.device)
    _point_sample_begins_kernel[(triton.cdiv(images * cells + 1, _FLAT["BLOCK"]),)](
        keys, begins, images * cells, entries, STEPS=entries.bit_length(), **_FLAT, **EXACT
    )
    out = torch.empty_like(feature, memory_format=layout)
    channels_last = layout == torch.channels_last
    if channels_last:  # the channels of a point side by side, as they will be written
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    launch = functools.partial(
        _launch,
        _point_sample_gather_kernel,
        images,
        cells,
        channels,
        (grad, begins, order, keys if nearest else weights, out, cells, points, channels, *grad.stride()),
        ACC=acc,
        NEAREST=nearest,
        CHANNELS_LAST=channels_last,
    )
    key = (feature.dtype, nearest, *_key(feature, points, channels_last), *shape_class(cells))
    launch_tuned("point_sample_gather", key, _sample_tile(channels, channels_last), _TUNED, feature.device, launch)
    return out


def _coords_gradient(
    grad: Tensor, feature: Tensor, coords: Tensor, out: Tensor, border: bool, align_corners: bool, first: bool
) -> None:
    """Write or add to ``out [N, P, 2]`` what one map gives."""
    images, channels, height, width = feature.shape
    points = coords.shape[1]
    channels_last = _is_channels_last(feature.stride(1), channels)
    launch = functools.partial(
        _launch,
        _point_sample_coords_kernel,
        images,
        points,
        1,  # a program takes all channels of its points
        (
            feature,
            grad,
            coords,
            out,
            points,
            channels,
            height,
            width,
            *feature.stride(),
            *grad.stride(),
            *coords.stride(),
        ),
        ACC=_WIDE.get(feature.dtype, tl.float32),
        BORDER=border,
        ALIGN=align_corners,
        FIRST=first,
        CHANNELS_LAST=channels_last,
    )
    tile = _coords_tile(channels, channels_last)
    key = (feature.dtype, *_key(feature, points, channels_last))
    launch_tuned("point_sample_coords", key, tile, _TUNED, feature.device, launch, changed=() if first else (out,))


def point_labels_triton(labels: Tensor, coords: Tensor, ignore_index: int) -> Tensor:
    """``rendseg::point_labels``: integers are moved, never computed with."""
    check_point_labels(labels, coords)
    images, height, width = labels.shape
    points = coords.shape[1]
    out = torch.empty((images, points), dtype=torch.int64, device=labels.device)
    if out.numel():
        _point_labels_kernel[(triton.cdiv(images * points, _FLAT["BLOCK"]),)](
            labels,
            coords,
            out,
            images * points,
            points,
            height,
            width,
            ignore_index,
            *labels.stride(),
            *coords.stride(),
            **_FLAT,
            **EXACT,
        )
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "point_sample": point_sample_triton,
    "_point_sample_backward": point_sample_backward_triton,
    "point_labels": point_labels_triton,
}
