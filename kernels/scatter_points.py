"""Writing refined points back in Triton. Shapes: N images, C classes, H W grid, P points.

Values are moved as integers of their width, never computed with, so that one kernel serves every dtype of a width. An
index outside the map stops the kernel on a device assert, and is never written to; on the CPU (in the interpreter) it
raises ``IndexError`` before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import _checks as check
from ..reference.scatter_points import _check_range, check_indices, check_scatter_points, refuse_overlap
from ._common import launch_tuned, shape_class

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The assert is live in every launch; without the checks of integer overflow that Triton would add for it.
_OPTIONS: dict[str, Any] = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": False}
_SIZES = ["points", "cells", "width"]  # not worth a compilation per value
_TUNED = ("BLOCK_P",)


@triton.jit
def _tile(
    indices_ptr, points, channels, cells, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """(image, points and channels of this program, their cells, which of them exist); neighbours in memory last."""
    point_tiles = tl.cdiv(points, BLOCK_P)
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    p = pid % point_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // point_tiles % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (pid // point_tiles // channel_tiles).to(tl.int64)
    has_point = p < points
    p = p.to(tl.int64)
    index = tl.load(indices_ptr + n * points + p, mask=has_point, other=0)
    inside = (index >= 0) & (index < cells)
    tl.device_assert(inside, "scatter_points: indices must lie in [0, H*W)")
    has_point = has_point & inside
    has_channel = c < channels
    c = c.to(tl.int64)
    if CHANNELS_LAST:
        return n, p[:, None], c[None, :], index[:, None], has_point[:, None] & has_channel[None, :]
    else:
        return n, p[None, :], c[:, None], index[None, :], has_point[None, :] & has_channel[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _scatter_points_kernel(
    map_ptr,
    indices_ptr,
    values_ptr,
    points,
    channels,
    cells,
    width,
    map_n,
    map_c,
    map_h,
    map_w,
    values_n,
    values_c,
    values_p,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``map[n, c, indices[n, p]] = values[n, c, p]``.

    map_ptr: ``[N, C, H, W]`` of any strides without overlap, int16, int32 or int64 (bits), written.
    indices_ptr: ``[N, P]`` contiguous, int64.
    values_ptr: ``[N, C, P]`` of any strides, of the type of the map.
    """
    n, p, c, index, live = _tile(indices_ptr, points, channels, cells, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    value = tl.load(values_ptr + n * values_n + c * values_c + p * values_p, mask=live, other=0)
    target = map_ptr + n * map_n + c * map_c + (index // width) * map_h + (index % width) * map_w
    tl.store(target, value, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _scatter_points_backward_kernel(
    grad_ptr,
    indices_ptr,
    rest_ptr,
    values_ptr,
    points,
    channels,
    cells,
    width,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    rest_n,
    rest_c,
    rest_h,
    rest_w,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``values[n, c, p] = grad[n, c, indices[n, p]]``, and zero there in ``rest``, which holds a copy of ``grad``.

    grad_ptr: ``[N, C, H, W]`` of any strides, int16, int32 or int64 (bits).
    indices_ptr: ``[N, P]`` contiguous, int64.
    rest_ptr: ``[N, C, H, W]`` of any strides without overlap, of the type of ``grad``, written.
    values_ptr: ``[N, C, P]`` contiguous, of the type of ``grad``, written.
    """
    n, p, c, index, live = _tile(indices_ptr, points, channels, cells, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    row, col = index // width, index % width
    value = tl.load(grad_ptr + n * grad_n + c * grad_c + row * grad_h + col * grad_w, mask=live, other=0)
    tl.store(values_ptr + n * channels * points + c * points + p, value, mask=live)
    # All bits zero is 0.0 in every dtype.
    tl.store(rest_ptr + n * rest_n + c * rest_c + row * rest_h + col * rest_w, tl.zeros_like(value), mask=live)


def _blocks(channels: int, channels_last: bool, element_bytes: int) -> dict[str, int]:
    """Configuration by shape class, on every architecture: points and channels of a tile, and warps.

    Elements of 8 bytes take half the points: with 1024 of them Triton 3.6 spills for sm_80.
    """
    block_c = min(64 if channels_last else 8, triton.next_power_of_2(channels))
    elements = 512 if element_bytes == 8 else 1024
    return {"BLOCK_P": min(256, elements // block_c), "BLOCK_C": block_c, "num_warps": 4}


def _grid(points: int, channels: int, images: int, tile: dict[str, int]) -> tuple[int]:
    return (images * triton.cdiv(points, tile["BLOCK_P"]) * triton.cdiv(channels, tile["BLOCK_C"]),)


def _key(tensor: Tensor, points: int, channels_last: bool) -> tuple[Any, ...]:
    """The shape class of a launch, for the tuning."""
    return tensor.element_size(), channels_last, *shape_class(tensor.shape[0], tensor.shape[1], points)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_BITS[tensor.element_size()])


def _check_on_cpu(indices: Tensor, cells: int) -> None:
    if indices.device.type == "cpu":  # a GPU asserts, without a wait for it
        _check_range(indices, cells)


def _scatter(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    images, channels, height, width = logits.shape
    points = indices.shape[1]
    if not values.numel():
        return
    channels_last = channels > 1 and logits.stride(1) == 1
    indices = indices.contiguous()

    def launch(tile: dict[str, int]) -> None:
        _scatter_points_kernel[_grid(points, channels, images, tile)](
            _bits(logits),
            indices,
            _bits(values),
            points,
            channels,
            height * width,
            width,
            *logits.stride(),
            *values.stride(),
            CHANNELS_LAST=channels_last,
            **tile,
            **_OPTIONS,
        )

    key = _key(logits, points, channels_last)
    tile = _blocks(channels, channels_last, logits.element_size())
    launch_tuned("scatter_points", key, tile, _TUNED, logits.device, launch)


def scatter_points_inplace_triton(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    """``rendseg::scatter_points_``: writes into ``logits``."""
    check_scatter_points(logits, indices, values)
    refuse_overlap(logits, values, indices)
    _check_on_cpu(indices, logits.shape[2] * logits.shape[3])
    _scatter(logits, indices, values)


def scatter_points_triton(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``rendseg::scatter_points``: a copy in the layout of ``logits``, written to."""
    check_scatter_points(logits, indices, values)
    _check_on_cpu(indices, logits.shape[2] * logits.shape[3])
    out = torch.empty_like(logits).copy_(logits)
    _scatter(out, indices, values)
    return out


def scatter_points_backward_triton(grad: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``rendseg::_scatter_points_backward``: the gradients of ``logits`` and of ``values``."""
    check.logits(grad, "grad")
    check_indices(indices, grad, "grad")
    images, channels, height, width = grad.shape
    _check_on_cpu(indices, height * width)
    points = indices.shape[1]
    rest = torch.empty_like(grad).copy_(grad)
    values = torch.empty((images, channels, points), dtype=grad.dtype, device=grad.device)
    if values.numel():
        channels_last = channels > 1 and grad.stride(1) == 1
        indices = indices.contiguous()

        def launch(tile: dict[str, int]) -> None:
            _scatter_points_backward_kernel[_grid(points, channels, images, tile)](
                _bits(grad),
                indices,
                _bits(rest),
                _bits(values),
                points,
                channels,
                height * width,
                width,
                *grad.stride(),
                *rest.stride(),
                CHANNELS_LAST=channels_last,
                **tile,
                **_OPTIONS,
            )

        key = _key(grad, points, channels_last)
        tile = _blocks(channels, channels_last, grad.element_size())
        launch_tuned("scatter_points_backward", key, tile, _TUNED, grad.device, launch)
    return rest, values


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "scatter_points": scatter_points_triton,
    "scatter_points_": scatter_points_inplace_triton,
    "_scatter_points_backward": scatter_points_backward_triton,
}
