"""One step of subdivision: PointRend (Kirillov et al. 2020), section 3.1.

Shapes: N images, C classes, h w coarse grid, H W = s*h s*w fine grid. A tile is ``BLOCK_Y x BLOCK_X`` fine cells of one
image, one to an element, with a loop over the channels; where channels are the fastest dimension it is that times
``BLOCK_C`` channels. The value is rounded to the stored dtype before the margin is taken, and the arithmetic does not
depend on what is stored, so the modes agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rendseg.reference.subdivide import check_subdivide, check_subdivide_backward, label_dtype
from rendseg.reference.uncertain_points import check_class_index

from ._bilinear import EXACT
from ._common import (
    INT32_LIMIT,
    channels_inside,
    check_grid,
    check_indices,
    known_class,
    launch_tuned,
    margin_key,
    merge_top2,
    narrow,
    on_device,
    plane_span,
    push_top2,
    shape_class,
    strides,
    upsample_taps,
    wins,
)
from ._select import Selection, count_digit


@triton.jit
def _corners(y, x, in_height, in_width, s_h, s_w, SCALE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Offsets of the four coarse cells around fine cells, row by row, and the weights of rows and columns."""
    top, bottom, top_weight, bottom_weight = upsample_taps(y, in_height, SCALE, ALIGN_CORNERS, ACC)
    left, right, left_weight, right_weight = upsample_taps(x, in_width, SCALE, ALIGN_CORNERS, ACC)
    upper_left, upper_right = top * s_h + left * s_w, top * s_h + right * s_w
    lower_left, lower_right = bottom * s_h + left * s_w, bottom * s_h + right * s_w
    at = (upper_left, upper_right, lower_left, lower_right)
    return at, (top_weight, bottom_weight, left_weight, right_weight)


@triton.jit
def _of_channels(at, weights, offsets):
    """What :func:`_corners` returns, for channels along a second axis."""
    ats = (at[0][:, None] + offsets, at[1][:, None] + offsets, at[2][:, None] + offsets, at[3][:, None] + offsets)
    return ats, (weights[0][:, None], weights[1][:, None], weights[2][:, None], weights[3][:, None])


@triton.jit
def _interpolate(plane, at, weights, mask, ACC: tl.constexpr):
    """Bilinear, along x and then along y, every product and sum rounded; rounded to the dtype of the plane at last."""
    top_weight, bottom_weight, left_weight, right_weight = weights
    value00 = tl.load(plane + at[0], mask=mask, other=0.0).to(ACC)
    value01 = tl.load(plane + at[1], mask=mask, other=0.0).to(ACC)
    value10 = tl.load(plane + at[2], mask=mask, other=0.0).to(ACC)
    value11 = tl.load(plane + at[3], mask=mask, other=0.0).to(ACC)
    upper = value00 * left_weight + value01 * right_weight
    lower = value10 * left_weight + value11 * right_weight
    return narrow(upper * top_weight + lower * bottom_weight, plane.dtype.element_ty)


@triton.jit
def _subdivide_kernel(
    source,
    fine,
    labels,
    keys,
    histogram,
    class_index,
    channels,
    in_height,
    in_width,
    source_strides,
    fine_strides,
    index_step,
    tiles,
    tiles_x,
    SCALE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    STORE: tl.constexpr,
    LABEL: tl.constexpr,
    COUNT: tl.constexpr,
    SINGLE: tl.constexpr,
    INDEXED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Upsamples a tile, and writes its values, labels and sort keys.

    source: [N, C, h, w] floating, any strides. fine: [N, C, H, W] of the same dtype, written if STORE.
    labels: [N, H, W] uint8 or int16, written if LABEL. keys: [N, H*W] int32, written.
    histogram: [N, 256] int32, to which the first digit of the keys is added if COUNT.
    class_index: [N] int64, read if INDEXED.
    """
    T: tl.constexpr = source.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    BLOCK: tl.constexpr = BLOCK_Y * BLOCK_X
    s_n, s_c, s_h, s_w = source_strides
    f_n, f_c, f_h, f_w = fine_strides
    height, width = in_height * SCALE, in_width * SCALE
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    tile = program % tiles
    i = tl.arange(0, BLOCK)
    y = (tile // tiles_x) * BLOCK_Y + i // BLOCK_X
    x = (tile % tiles_x) * BLOCK_X + i % BLOCK_X
    inside = (y < height) & (x < width)
    cell = y * width + x
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    at, weights = _corners(y, x, in_height, in_width, s_h, s_w, SCALE, ALIGN_CORNERS, ACC)
    out = y * f_h + x * f_w
    begin, end, chosen = 0, channels, 0
    if INDEXED:
        chosen = tl.load(class_index + n * index_step)
        if not STORE:  # only one channel matters
            begin = tl.minimum(tl.maximum(chosen, 0), channels - 1)
            end = begin + 1
    if BLOCK_C == 1:
        first = tl.full([BLOCK], float("-inf"), ACC)
        label = tl.zeros([BLOCK], tl.int32)
        lane = 0
        mask = inside
    else:
        lane = tl.arange(0, BLOCK_C)[None, :]
        first = tl.full([BLOCK, BLOCK_C], float("-inf"), ACC)
        label = tl.zeros([BLOCK, BLOCK_C], tl.int32) + lane
        at, weights = _of_channels(at, weights, lane * s_c)
        out = out[:, None] + lane * f_c
    second = first
    source_step = tl.full([], s_c, tl.int64)
    fine_step = tl.full([], f_c, tl.int64)
    source += n * s_n
    fine += n * f_n
    for c in tl.range(begin, end, BLOCK_C, loop_unroll_factor=1 if STORE or BLOCK_C > 1 else 2):
        if BLOCK_C > 1:
            mask = inside[:, None] & (lane < channels - c)
        stored = _interpolate(source + c * source_step, at, weights, mask, ACC)
        if STORE:
            tl.store(fine + c * fine_step + out, stored, mask=mask)
        value = stored.to(ACC)
        if INDEXED:
            value = tl.where(c + lane == chosen, value, float("-inf"))
        elif BLOCK_C > 1:
            value = tl.where(mask, value, float("-inf"))
        if LABEL:
            label = tl.where(wins(value, first), c + lane, label)
        first, second = push_top2(first, second, value)
    if BLOCK_C > 1:
        first, second, label = merge_top2(first, second, label)
    margin = (tl.abs(first) if SINGLE else first - second).to(tl.float32)
    if INDEXED:
        margin = known_class(margin, chosen, channels)
    key = margin_key(margin)
    tl.store(keys + n * height * width + cell, key, mask=inside)
    if LABEL:
        tl.store(labels + n * height * width + cell, label.to(labels.dtype.element_ty), mask=inside)
    if COUNT:
        count_digit(histogram + n * 256, key, inside, 0)


@triton.jit
def _upsample_cells_kernel(
    source,
    indices,
    out,
    channels,
    in_height,
    in_width,
    count,
    source_strides,
    out_strides,
    tiles,
    groups,
    SCALE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Cells of the upsampled map, with the bits that ``_subdivide_kernel`` stores.

    source: [N, C, h, w] float32, float16 or bfloat16, any strides.
    indices: [N, P] int64 contiguous, cells of the upsampled map. out: [N, C, P] of the dtype of source, any strides,
    written.
    """
    s_n, s_c, s_h, s_w = source_strides
    o_n, o_c, o_p = out_strides
    program = tl.program_id(0)
    n = (program // (tiles * groups)).to(tl.int64)
    p = program // groups % tiles * BLOCK + tl.arange(0, BLOCK)
    c = program % groups * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    cell = tl.load(indices + n * count + p, mask=p < count, other=0)
    y = cell // (in_width * SCALE)
    x = cell - y * (in_width * SCALE)
    at, weights = _corners(y[:, None], x[:, None], in_height, in_width, s_h, s_w, SCALE, ALIGN_CORNERS, tl.float32)
    mask = (p < count)[:, None] & (c < channels)
    c = c.to(tl.int64)
    value = _interpolate(source + n * s_n + c * s_c, at, weights, mask, tl.float32)
    tl.store(out + n * o_n + c * o_c + p.to(tl.int64)[:, None] * o_p, value, mask=mask)


@triton.jit
def _subdivide_backward_kernel(
    grad,
    out,
    channels,
    height,
    width,
    g_n,
    g_c,
    g_h,
    g_w,
    o_n,
    o_c,
    o_h,
    o_w,
    tiles,
    groups,
    span_y,
    span_x,
    SCALE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of the upsampling: each coarse cell gathers ``weight * grad`` from the fine cells that it reached.

    grad: [N, C, s*h, s*w] floating, any strides. out: [N, C, h, w] of the same dtype, written.
    """
    T: tl.constexpr = grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    program = tl.program_id(0)
    n = (program // (tiles * groups)).to(tl.int64)
    group = program // tiles % groups
    i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < height * width
    if WIDE:
        i = i.to(tl.int64)
    y = i // width
    x = i - y * width
    fine_height = height * SCALE
    fine_width = width * SCALE
    # The first fine cell that can reach this one, and weights of zero up to the span of the widest.
    if ALIGN_CORNERS:
        first_y = tl.maximum(y - 1, 0) * (fine_height - 1) // tl.maximum(height - 1 + tl.zeros_like(y), 1)
        first_x = tl.maximum(x - 1, 0) * (fine_width - 1) // tl.maximum(width - 1 + tl.zeros_like(x), 1)
    else:
        first_y = tl.maximum(y * SCALE - SCALE // 2, 0)
        first_x = tl.maximum(x * SCALE - SCALE // 2, 0)
    grad += n * g_n + group.to(tl.int64) * BLOCK_C * g_c
    out += n * o_n + group.to(tl.int64) * BLOCK_C * o_c
    at = y * o_h + x * o_w
    mask = inside
    if BLOCK_C == 1:
        total = tl.zeros([BLOCK], ACC)
    else:
        lane = tl.arange(0, BLOCK_C)[None, :]
        mask = inside[:, None] & (lane < channels - group * BLOCK_C)
        at = at[:, None] + lane * o_c
        total = tl.zeros([BLOCK, BLOCK_C], ACC)
    for step_y in range(span_y):
        from_y = first_y + step_y
        top, bottom, top_weight, bottom_weight = upsample_taps(from_y, height, SCALE, ALIGN_CORNERS, ACC)
        weight_y = tl.where(top == y, top_weight, 0.0) + tl.where(bottom == y, bottom_weight, 0.0)
        weight_y = tl.where(from_y < fine_height, weight_y, 0.0)
        for step_x in range(span_x):
            from_x = first_x + step_x
            left, right, left_weight, right_weight = upsample_taps(from_x, width, SCALE, ALIGN_CORNERS, ACC)
            weight_x = tl.where(left == x, left_weight, 0.0) + tl.where(right == x, right_weight, 0.0)
            weight_x = tl.where(from_x < fine_width, weight_x, 0.0)
            weight = weight_y * weight_x
            here = from_y * g_h + from_x * g_w
            if BLOCK_C > 1:
                weight = weight[:, None]
                here = here[:, None] + lane * g_c
            # After the shapes are set: Triton 3.7 cannot compile a comparison that gets its second dimension later.
            value = tl.load(grad + here, mask=mask & (weight != 0.0), other=0.0).to(ACC)
            total += value * weight
    tl.store(out + at, narrow(total, T), mask=mask)


def _tile(channels: int, width: int, inside: bool) -> dict[str, Any]:
    """Configuration by shape class: fine cells and channels of a tile, and warps."""
    if inside:
        block_c = 16 if channels <= 16 else 32
        return {"BLOCK_Y": 2, "BLOCK_X": 512 // block_c, "BLOCK_C": block_c, "num_warps": 4}
    if width >= 128:
        return {"BLOCK_Y": 4, "BLOCK_X": 128, "BLOCK_C": 1, "num_warps": 4}
    return {"BLOCK_Y": 16, "BLOCK_X": 32, "BLOCK_C": 1, "num_warps": 4}


def _run(
    logits: Tensor,
    num_points: int,
    scale_factor: int,
    align_corners: bool,
    class_index: Tensor | None,
    fine: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launches the upsampling into what is wanted, and the selection: ``(indices, coords)``."""
    n, channels, in_height, in_width = logits.shape
    height, width = in_height * scale_factor, in_width * scale_factor
    check_indices(height * width, "cells")
    if fine is None:  # any layout will do; one channel alone is read plane by plane
        inside = channels_inside(logits) and class_index is None
    else:
        inside = channels_inside(logits) and channels_inside(fine)
    tile = _tile(channels, width, inside)
    selection = Selection(n, height * width, min(num_points, height * width), logits.device, not inside)
    if n == 0:
        return selection.cells(height, width)
    spans = [plane_span(logits), scale_factor * (max(height, width) + 1024)]
    if fine is not None:
        spans.append(plane_span(fine))
    if align_corners:  # positions are multiplied with sizes
        spans.append((max(height, width) + 1024) * max(in_height, in_width))

    def launch(tile: dict[str, Any]) -> None:
        tiles_x = triton.cdiv(width, tile["BLOCK_X"])
        tiles = triton.cdiv(height, tile["BLOCK_Y"]) * tiles_x
        _subdivide_kernel[(check_grid(n * tiles),)](
            logits,
            logits if fine is None else fine,
            selection.keys if labels is None else labels,
            selection.keys,
            selection.histogram,
            logits if class_index is None else class_index,
            channels,
            in_height,
            in_width,
            tuple(strides(logits)),
            tuple(strides(logits if fine is None else fine)),
            0 if class_index is None else class_index.stride(0),
            tiles,
            tiles_x,
            SCALE=scale_factor,
            ALIGN_CORNERS=align_corners,
            STORE=fine is not None,
            LABEL=labels is not None,
            COUNT=selection.counting,
            SINGLE=class_index is not None or channels == 1,
            INDEXED=class_index is not None,
            WIDE=max(spans) + tile["BLOCK_C"] >= INT32_LIMIT,
            **tile,
            **EXACT,
        )

    modes = (fine is None, labels is None, class_index is None, tile["BLOCK_C"])
    key = (logits.dtype, scale_factor, *modes, *shape_class(n, channels, height, width))
    changed = (selection.histogram,) if selection.counting else ()
    launch_tuned("subdivide", key, tile, ("BLOCK_Y",), logits.device, launch, changed)
    return selection.cells(height, width)


def subdivide_triton(
    logits: Tensor,
    num_points: int,
    scale_factor: int,
    align_corners: bool,
    class_index: Tensor | None,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(fine [N, C, s*h, s*w], indices [N, k], coords [N, k, 2])``; ``fine`` is empty without ``return_logits``.

    On a GPU a class outside ``[0, C)`` makes its image uncertain everywhere; nothing outside the map is read.
    """
    check_subdivide(logits, num_points, class_index, scale_factor)
    check_class_index(class_index, logits)
    logits = logits.detach()
    fine = None
    if return_logits:
        n, channels, height, width = logits.shape
        size = (n, channels, height * scale_factor, width * scale_factor)
        layout = torch._prims_common.suggest_memory_format(logits)
        fine = torch.empty(size, dtype=logits.dtype, device=logits.device, memory_format=layout)
    with on_device(logits):
        indices, coords = _run(logits, num_points, scale_factor, align_corners, class_index, fine, None)
    return (logits.new_empty(0) if fine is None else fine), indices, coords


def subdivide_labels_triton(
    logits: Tensor, num_points: int, scale_factor: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`subdivide_triton` with labels for logits: ``(labels [N, s*h, s*w] uint8 or int16, indices, coords)``."""
    check_subdivide(logits, num_points, None, scale_factor)
    logits = logits.detach()
    n, channels, height, width = logits.shape
    size = (n, height * scale_factor, width * scale_factor)
    labels = torch.empty(size, dtype=label_dtype(channels), device=logits.device)
    with on_device(logits):
        indices, coords = _run(logits, num_points, scale_factor, align_corners, None, None, labels)
    return labels, indices, coords


def _cells_tile(inside: bool) -> dict[str, Any]:
    """Configuration of :func:`upsample_cells_triton`: cells and channels of a tile, and warps."""
    return {"BLOCK": 32, "BLOCK_C": 16, "num_warps": 4} if inside else {"BLOCK": 128, "BLOCK_C": 1, "num_warps": 4}


def upsample_cells_triton(logits: Tensor, indices: Tensor, scale_factor: int, align_corners: bool) -> Tensor:
    """Cells ``indices [N, P]`` of the upsampled map, ``[N, C, P]``, with the bits of :func:`subdivide_triton`."""
    n, channels, height, width = logits.shape
    count, inside = indices.shape[1], channels_inside(logits)
    indices = indices.contiguous()
    shape = (n, count, channels) if inside else (n, channels, count)
    out = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    if inside:
        out = out.transpose(1, 2)
    if out.numel() == 0:
        return out
    tile = _cells_tile(inside)
    tiles, groups = triton.cdiv(count, tile["BLOCK"]), triton.cdiv(channels, tile["BLOCK_C"])
    _upsample_cells_kernel[(check_grid(n * tiles * groups),)](
        logits,
        indices,
        out,
        channels,
        height,
        width,
        count,
        tuple(strides(logits)),
        out.stride(),
        tiles,
        groups,
        SCALE=scale_factor,
        ALIGN_CORNERS=align_corners,
        **tile,
        **EXACT,
    )
    return out


def _backward_span(size: int, scale_factor: int, align_corners: bool) -> int:
    """How many fine cells along one axis can reach one of ``size`` coarse cells, from the first on."""
    if not align_corners:
        return min(2 * scale_factor, size * scale_factor)
    if size == 1:
        return scale_factor
    fine = size * scale_factor
    return min(triton.cdiv(2 * (fine - 1), size - 1) + 1, fine)


def _backward_tile(channels: int, inside: bool) -> dict[str, Any]:
    """Configuration of the gradient: coarse cells and channels of a tile, and warps."""
    if not inside:
        return {"BLOCK": 256, "BLOCK_C": 1, "num_warps": 4}
    block_c = 16 if channels <= 16 else 32
    return {"BLOCK": 1024 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def subdivide_backward_triton(grad: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """Gradient of the upsampling to ``[N, C, height, width]``, in the layout of ``grad``; deterministic."""
    scale = check_subdivide_backward(grad, height, width)
    n, channels, fine_height, fine_width = grad.shape
    check_indices(fine_height * fine_width, "cells")
    layout = torch._prims_common.suggest_memory_format(grad)
    out = torch.empty((n, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=layout)
    if out.numel() == 0:
        return out
    inside = channels_inside(grad) and channels_inside(out)
    tile = _backward_tile(channels, inside)
    block_c = tile["BLOCK_C"]
    groups = triton.cdiv(channels, block_c)
    spans = [plane_span(grad), plane_span(out), 4 * scale * (max(height, width) + 1024)]
    if align_corners:
        spans.append((max(fine_height, fine_width) + 4 * scale) * max(height, width))

    def launch(tile: dict[str, Any]) -> None:
        tiles = triton.cdiv(height * width, tile["BLOCK"])
        _subdivide_backward_kernel[(check_grid(n * tiles * groups),)](
            grad,
            out,
            channels,
            height,
            width,
            *strides(grad),
            *strides(out),
            tiles,
            groups,
            _backward_span(height, scale, align_corners),
            _backward_span(width, scale, align_corners),
            SCALE=scale,
            ALIGN_CORNERS=align_corners,
            WIDE=max(spans) + block_c >= INT32_LIMIT,
            **tile,
            **EXACT,
        )

    key = (grad.dtype, scale, block_c, *shape_class(n, channels, height * width))
    with on_device(grad):
        launch_tuned("subdivide_backward", key, tile, ("BLOCK",), grad.device, launch)
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "subdivide": subdivide_triton,
    "_subdivide_labels": subdivide_labels_triton,
    "_subdivide_backward": subdivide_backward_triton,
}
