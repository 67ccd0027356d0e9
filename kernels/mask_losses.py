"""Losses and matching costs of masks at points in Triton. B images, Q queries, T targets, N pairs, P points.

Targets of an image have a dtype and a size of their own, so every launch is of one image: B launches, in each of which
the programs of pairs of other images end at once.

Losses: a program takes a pair, and walks over its points; nothing is stored but the two results. Costs: a program takes
a tile of queries and a tile of targets, samples both at its points, and adds up the two products with ``tl.dot`` in
float32 proper (the first form of the cross-entropy cancels, so no TF32).

Backward, without atomics, so that the bits are the same every run: the slopes of all points ``[N, P]``; the taps sorted
by mask and cell, as in ``point_sample.py``; then every cell of a mask that has a pair is written once, over zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.mask_losses import _arithmetic, check_loss_grads, check_mask_costs, check_mask_losses, check_pairs
from ..reference.point_sample import gradient_format
from ._bilinear import EXACT, axis_taps, nearest_cell
from ._common import check_grid, check_indices, divide, narrow, on_device
from .point_sample import _FLAT, _point_sample_begins_kernel, _point_sample_cells_kernel

_SIZES = ["points", "height", "width", "canvas_height", "canvas_width", "count", "image", "images"]


@triton.jit
def _tap(source, at, weight, inside):
    """``weight * map[at]``, off the map ``weight * 0`` (which is NaN for a NaN weight)."""
    return tl.load(source + at, mask=inside, other=0.0).to(weight.dtype) * weight


@triton.jit
def _bilinear(source, x, y, live, height, width, rows, columns, s_h, s_w, BORDER: tl.constexpr):
    """Values at (x, y) of a grid of ``rows`` x ``columns`` cells, of which those past height and width are zero.

    ``source`` may be a column of maps, with x, y and live as rows.
    """
    col, near_x, far_x, has_near_x, has_far_x = axis_taps(x, columns, BORDER, False)
    row, near_y, far_y, has_near_y, has_far_y = axis_taps(y, rows, BORDER, False)
    near_col, far_col = has_near_x & (col < width) & live, has_far_x & (col + 1 < width) & live
    near_row, far_row = has_near_y & (row < height), has_far_y & (row + 1 < height)
    at = row.to(tl.int64) * s_h + col.to(tl.int64) * s_w
    value = _tap(source, at, near_x * near_y, near_col & near_row)
    value += _tap(source, at + s_w, far_x * near_y, far_col & near_row)
    value += _tap(source, at + s_h, near_x * far_y, near_col & far_row)
    value += _tap(source, at + s_h + s_w, far_x * far_y, far_col & far_row)
    return value


@triton.jit
def _target(source, x, y, live, height, width, rows, columns, s_h, s_w, NEAREST: tl.constexpr, BORDER: tl.constexpr):
    """Targets at (x, y), as :func:`_bilinear`, or the nearest cell."""
    if NEAREST:
        col, in_x = nearest_cell(x, columns, BORDER, False)
        row, in_y = nearest_cell(y, rows, BORDER, False)
        inside = in_x & in_y & (col < width) & (row < height) & live
        at = row.to(tl.int64) * s_h + col.to(tl.int64) * s_w
        return tl.load(source + at, mask=inside, other=0.0).to(x.dtype)
    else:
        return _bilinear(source, x, y, live, height, width, rows, columns, s_h, s_w, BORDER)


@triton.jit
def _logistic(x):
    """``(sigmoid(x), softplus(x))`` without overflow."""
    small = tl.exp(-tl.abs(x))
    one = tl.full([], 1.0, x.dtype)
    sigmoid = divide(tl.where(x < 0.0, small, tl.zeros_like(small) + one), one + small)
    return sigmoid, tl.where(x < 0.0, 0.0, x) + tl.log(one + small)


@triton.jit
def _pair_at(logits_ptr, target_ptr, coord, coords_p, coords_xy, p, live, sizes, map_steps, target_steps,
             NEAREST: tl.constexpr, BORDER: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """``(x, y)`` of a pair at a block of its points."""
    height, width, target_height, target_width, canvas_height, canvas_width = sizes
    at_x = tl.load(coord + p * coords_p, mask=live, other=0.0).to(ACC)
    at_y = tl.load(coord + p * coords_p + coords_xy, mask=live, other=0.0).to(ACC)
    x = _bilinear(logits_ptr, at_x, at_y, live, height, width, height, width, map_steps[2], map_steps[3], BORDER)
    y = _target(
        target_ptr, at_x, at_y, live, target_height, target_width, canvas_height, canvas_width,
        target_steps[1], target_steps[2], NEAREST, BORDER,
    )  # fmt: skip
    return x, y


@triton.jit(do_not_specialize=["points", "image"])
def _mask_losses_kernel(
    logits_ptr,
    target_ptr,
    coords_ptr,
    image_ptr,
    query_ptr,
    chosen_ptr,
    first_ptr,
    second_ptr,
    slopes_ptr,
    points,
    image,
    queries,
    count,
    sizes,
    map_steps,
    target_steps,
    coords_steps,
    index_steps,
    grad_steps,
    BACKWARD: tl.constexpr,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of the pairs of one image; BACKWARD: the slope of the loss at every point.

    logits_ptr: ``[B, Q, H, W]`` floating, any strides. target_ptr: ``[T, h, w]`` of the image, any dtype and strides.
    coords_ptr: ``[N, P, 2]`` float32 or float64. image_ptr, query_ptr, chosen_ptr: ``[N]`` int64.
    first_ptr, second_ptr: ``[N]`` cross-entropy and dice, written; BACKWARD: their gradients, read.
    slopes_ptr: ``[N, P]``, written if BACKWARD.
    """
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64)
    if tl.load(image_ptr + n * index_steps[0]) != image:
        return
    query = tl.load(query_ptr + n * index_steps[1])
    chosen = tl.load(chosen_ptr + n * index_steps[2])
    tl.device_assert((query >= 0) & (query < queries), "query_index must lie in [0, Q)")
    tl.device_assert((chosen >= 0) & (chosen < count), "target_index must lie in [0, T)")
    query = tl.minimum(tl.maximum(query, 0), queries - 1)
    chosen = tl.minimum(tl.maximum(chosen, 0), count - 1)
    logits_ptr += image.to(tl.int64) * map_steps[0] + query * map_steps[1]
    target_ptr += chosen * target_steps[0]
    coord = coords_ptr + n * coords_steps[0]
    entropy = tl.zeros([BLOCK], ACC)
    overlap = tl.zeros([BLOCK], ACC)
    area = tl.zeros([BLOCK], ACC)
    for start in tl.range(0, points, BLOCK):
        p = start + tl.arange(0, BLOCK).to(tl.int64)
        live = p < points
        x, y = _pair_at(logits_ptr, target_ptr, coord, coords_steps[1], coords_steps[2], p, live, sizes, map_steps,
                        target_steps, NEAREST, BORDER, ACC)  # fmt: skip
        sigmoid, softplus = _logistic(x)
        entropy += tl.where(live, softplus - x * y, 0.0)
        overlap += tl.where(live, sigmoid * y, 0.0)
        area += tl.where(live, sigmoid + y, 0.0)
    one = tl.full([], 1.0, ACC)
    size = tl.sum(area, 0) + one
    ratio = divide(2.0 * tl.sum(overlap, 0) + one, size)
    number = tl.maximum(points, 1).to(ACC)
    if BACKWARD:
        sure = divide(tl.load(first_ptr + n * grad_steps[0]), number)
        steep = divide(2.0 * tl.load(second_ptr + n * grad_steps[1]), size)
        flat = steep * ratio * 0.5
        for start in tl.range(0, points, BLOCK):
            p = start + tl.arange(0, BLOCK).to(tl.int64)
            live = p < points
            x, y = _pair_at(logits_ptr, target_ptr, coord, coords_steps[1], coords_steps[2], p, live, sizes, map_steps,
                            target_steps, NEAREST, BORDER, ACC)  # fmt: skip
            sigmoid, _ = _logistic(x)
            slope = sure * (sigmoid - y) + sigmoid * (one - sigmoid) * (flat - steep * y)
            tl.store(slopes_ptr + n * points + p, slope, mask=live)
    else:
        tl.store(first_ptr + n, divide(tl.sum(entropy, 0), number))
        tl.store(second_ptr + n, one - ratio)


@triton.jit(do_not_specialize=["cells"])
def _mask_gather_kernel(
    slopes_ptr, begins_ptr, order_ptr, weights_ptr, masks_ptr, out_ptr, cells, queries, s_n, s_c, s_x, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every cell of a mask that has a pair: the sum of its taps, in the order of pairs and points.

    slopes_ptr: ``[N, P]``. begins_ptr: ``[N * H * W + 1]``: where the taps of a cell begin in ``order``.
    order_ptr: ``[N * P * 4]`` int64, the taps by cell; weights_ptr: the weight of each.
    masks_ptr: ``[N]`` int64, the masks that have pairs as ``image * Q + query``, then -1.
    out_ptr: ``[B, Q, H, W]`` of zeros, contiguous or channels_last, written.
    """
    ACC: tl.constexpr = slopes_ptr.dtype.element_ty
    r = (tl.program_id(0) // tiles).to(tl.int64)
    mask = tl.load(masks_ptr + r)
    if mask < 0:
        return
    cell = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    on_map = cell < cells
    at = tl.load(begins_ptr + r * cells + cell, mask=on_map, other=0).to(tl.int64)
    end = tl.load(begins_ptr + r * cells + cell + 1, mask=on_map, other=0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    for _ in range(tl.max(end - at, axis=0)):
        live = at < end
        tap = tl.load(order_ptr + at, mask=live, other=0)
        slope = tl.load(slopes_ptr + tap // 4, mask=live, other=0.0)
        total += tl.where(live, slope * tl.load(weights_ptr + tap, mask=live, other=0.0), 0.0)
        at += 1
    target = out_ptr + mask // queries * s_n + mask % queries * s_c + cell * s_x
    tl.store(target, narrow(total, out_ptr.dtype.element_ty), mask=on_map)


@triton.jit(do_not_specialize=["points", "image"])
def _mask_costs_kernel(
    logits_ptr,
    target_ptr,
    coords_ptr,
    entropy_ptr,
    dice_ptr,
    points,
    image,
    queries,
    count,
    most,
    sizes,
    map_steps,
    target_steps,
    coords_steps,
    query_tiles,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Both losses of a tile of queries with a tile of targets of one image.

    logits_ptr: ``[B, Q, H, W]`` floating, any strides. target_ptr: ``[T, h, w]`` of the image, any dtype and strides.
    coords_ptr: ``[B, P, 2]`` float32 or float64. entropy_ptr, dice_ptr: ``[B, Q, most]``, written where targets are.
    """
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    height, width, target_height, target_width, canvas_height, canvas_width = sizes
    q = (tl.program_id(0) % query_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    t = (tl.program_id(0) // query_tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    image = image.to(tl.int64)
    has_q, has_t = q < queries, t < count
    planes = logits_ptr + image * map_steps[0] + (q * map_steps[1])[:, None]
    masks = target_ptr + (t * target_steps[0])[:, None]
    coord = coords_ptr + image * coords_steps[0]
    with_x = tl.zeros([BLOCK_Q, BLOCK_T], ACC)
    with_s = tl.zeros([BLOCK_Q, BLOCK_T], ACC)
    sum_softplus = tl.zeros([BLOCK_Q, BLOCK], ACC)
    sum_sigmoid = tl.zeros([BLOCK_Q, BLOCK], ACC)
    sum_y = tl.zeros([BLOCK_T, BLOCK], ACC)
    for start in tl.range(0, points, BLOCK):
        p = start + tl.arange(0, BLOCK).to(tl.int64)
        live = p < points
        at_x = tl.load(coord + p * coords_steps[1], mask=live, other=0.0).to(ACC)[None, :]
        at_y = tl.load(coord + p * coords_steps[1] + coords_steps[2], mask=live, other=0.0).to(ACC)[None, :]
        known = live[None, :] & has_q[:, None]
        x = _bilinear(planes, at_x, at_y, known, height, width, height, width, map_steps[2], map_steps[3], BORDER)
        wanted = live[None, :] & has_t[:, None]
        y = _target(masks, at_x, at_y, wanted, target_height, target_width, canvas_height, canvas_width,
                    target_steps[1], target_steps[2], NEAREST, BORDER)  # fmt: skip
        sigmoid, softplus = _logistic(x)
        x, y = tl.where(known, x, 0.0), tl.where(wanted, y, 0.0)
        sigmoid = tl.where(known, sigmoid, 0.0)
        sum_softplus += tl.where(known, softplus, 0.0)
        sum_sigmoid += sigmoid
        sum_y += y
        if ACC == tl.float64:  # tl.dot of float64 does not compile
            with_x += tl.sum(x[:, None, :] * y[None, :, :], 2)
            with_s += tl.sum(sigmoid[:, None, :] * y[None, :, :], 2)
        else:
            across = tl.trans(y)
            with_x = tl.dot(x, across, with_x, input_precision="ieee")
            with_s = tl.dot(sigmoid, across, with_s, input_precision="ieee")
    one = tl.full([], 1.0, ACC)
    number = tl.zeros([BLOCK_Q, BLOCK_T], ACC) + tl.maximum(points, 1).to(ACC)
    entropy = divide(tl.sum(sum_softplus, 1)[:, None] - with_x, number)
    size = tl.sum(sum_sigmoid, 1)[:, None] + tl.sum(sum_y, 1)[None, :] + one
    at = (image * queries + q)[:, None] * most + t[None, :]
    inside = has_q[:, None] & has_t[None, :]
    tl.store(entropy_ptr + at, entropy, mask=inside)
    tl.store(dice_ptr + at, one - divide(2.0 * with_s + one, size), mask=inside)


_LOSSES: dict[str, Any] = {"BLOCK": 512, "num_warps": 4, "debug": True, "sanitize_overflow": False}
_COSTS: dict[str, Any] = {"BLOCK": 32, "BLOCK_Q": 16, "BLOCK_T": 16, "num_warps": 4}
_COSTS_FLOAT64: dict[str, Any] = {"BLOCK": 16, "BLOCK_Q": 8, "BLOCK_T": 8, "num_warps": 4}
_GATHER: dict[str, Any] = {"BLOCK": 256, "num_warps": 4}


def _readable(target: Tensor) -> Tensor:
    """Bytes of a bool target."""
    return target.detach().view(torch.uint8) if target.dtype == torch.bool else target.detach()


def _sizes_of(logits: Tensor, target: Tensor, canvas: Sequence[int] | None) -> tuple[int, ...]:
    return (*logits.shape[2:], *target.shape[1:], *(target.shape[1:] if canvas is None else canvas))


def _launch_losses(
    logits: Tensor, targets: Sequence[Tensor], coords: Tensor, indices: Sequence[Tensor], first: Tensor, second: Tensor,
    slopes: Tensor | None, label_mode: str, padding_mode: str, canvas: Sequence[int] | None,
) -> None:  # fmt: skip
    check_indices(coords.shape[1], "points")
    for b, target in enumerate(targets):
        if target.shape[0] == 0 or coords.shape[0] == 0:
            continue
        _mask_losses_kernel[(check_grid(coords.shape[0]),)](
            logits,
            _readable(target),
            coords,
            *indices,
            first,
            second,
            first if slopes is None else slopes,
            coords.shape[1],
            b,
            logits.shape[1],
            target.shape[0],
            _sizes_of(logits, target, canvas),
            tuple(logits.stride()),
            tuple(target.stride()),
            tuple(coords.stride()),
            tuple(index.stride(0) for index in indices),
            (first.stride(0), second.stride(0)),
            BACKWARD=slopes is not None,
            NEAREST=label_mode == "nearest",
            BORDER=padding_mode == "border",
            **_LOSSES,
            **EXACT,
        )


def mask_losses_triton(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    *,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``(cross_entropy [N], dice [N])``. On a GPU a pair of an image that does not exist is NaN in both."""
    options = label_mode, padding_mode, canvas
    indices = image_index, query_index, target_index
    check_mask_losses(logits, targets, coords, *indices, *options)
    check_pairs(logits, targets, *indices)
    logits = logits.detach()
    results = [logits.new_full(image_index.shape, float("nan"), dtype=_arithmetic(logits)) for _ in range(2)]
    with on_device(logits):
        _launch_losses(logits, targets, coords.detach(), indices, *results, None, *options)
    return results[0], results[1]


def mask_losses_backward_triton(
    cross_entropy_grad: Tensor,
    dice_grad: Tensor,
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> Tensor:
    """The dense gradient of ``logits``, in their layout."""
    options = label_mode, padding_mode, canvas
    indices = image_index, query_index, target_index
    check_mask_losses(logits, targets, coords, *indices, *options)
    check_loss_grads(cross_entropy_grad, dice_grad, logits, image_index)
    check_pairs(logits, targets, *indices)
    out = torch.zeros_like(logits, memory_format=gradient_format(logits))
    pairs, points = coords.shape[:2]
    height, width = logits.shape[2:]
    cells, entries = height * width, pairs * points * 4
    if entries == 0:
        return out
    wide, device = _arithmetic(logits), logits.device
    with on_device(logits):
        slopes = torch.empty((pairs, points), dtype=wide, device=device)
        _launch_losses(logits, targets, coords, indices, cross_entropy_grad, dice_grad, slopes, *options)
        # The masks that have pairs, in ascending order, and which of them each pair has.
        mask, by_mask = torch.sort(image_index * logits.shape[1] + query_index, stable=True)
        rank = torch.cat((mask.new_zeros(1), (mask[1:] != mask[:-1]).long())).cumsum(0)
        masks = torch.full_like(mask, -1).scatter_(0, rank, mask)
        rank = torch.empty_like(rank).scatter_(0, by_mask, rank)
        narrow_type = torch.int32 if max(pairs * cells, entries) < 2**31 - 1 else torch.int64
        keys = torch.empty((pairs, points * 4), dtype=narrow_type, device=device)
        weights = torch.empty(entries, dtype=wide, device=device)
        _point_sample_cells_kernel[(triton.cdiv(pairs * points, _FLAT["BLOCK"]),)](
            coords, keys, weights, pairs * points, points, height, width, *coords.stride(), pairs * cells,
            ACC=tl.float64 if wide == torch.float64 else tl.float32, NEAREST=False, BORDER=padding_mode == "border",
            ALIGN=False, **_FLAT, **EXACT,
        )  # fmt: skip
        moved = keys + ((rank - torch.arange(pairs, device=device)) * cells).to(narrow_type).unsqueeze(1)
        keys, order = torch.sort(torch.where(keys < pairs * cells, moved, keys).flatten(), stable=True)
        begins = torch.empty(pairs * cells + 1, dtype=narrow_type, device=device)
        _point_sample_begins_kernel[(triton.cdiv(pairs * cells + 1, _FLAT["BLOCK"]),)](
            keys, begins, pairs * cells, entries, STEPS=entries.bit_length(), **_FLAT, **EXACT
        )
        tiles = triton.cdiv(cells, _GATHER["BLOCK"])
        _mask_gather_kernel[(check_grid(pairs * tiles),)](
            slopes, begins, order, weights, masks, out, cells, logits.shape[1], out.stride(0), out.stride(1),
            out.stride(3) if width > 1 else out.stride(2), tiles, **_GATHER, **EXACT,
        )  # fmt: skip
    return out


def mask_costs_triton(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    *,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``(cross_entropy [B, Q, T], dice [B, Q, T])``, zero beyond the targets of an image."""
    check_mask_costs(logits, targets, coords, label_mode, padding_mode, canvas)
    check_indices(coords.shape[1], "points")
    images, queries = logits.shape[:2]
    most = max((target.shape[0] for target in targets), default=0)
    logits, coords = logits.detach(), coords.detach()
    tile = _COSTS_FLOAT64 if logits.dtype == torch.float64 else _COSTS
    results = [logits.new_zeros((images, queries, most), dtype=_arithmetic(logits)) for _ in range(2)]
    with on_device(logits):
        for b, target in enumerate(targets):
            if target.shape[0] == 0:
                continue
            query_tiles = triton.cdiv(queries, tile["BLOCK_Q"])
            _mask_costs_kernel[(check_grid(query_tiles * triton.cdiv(target.shape[0], tile["BLOCK_T"])),)](
                logits,
                _readable(target),
                coords,
                *results,
                coords.shape[1],
                b,
                queries,
                target.shape[0],
                most,
                _sizes_of(logits, target, canvas),
                tuple(logits.stride()),
                tuple(target.stride()),
                tuple(coords.stride()),
                query_tiles,
                NEAREST=label_mode == "nearest",
                BORDER=padding_mode == "border",
                **tile,
                **EXACT,
            )
    return results[0], results[1]


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mask_losses": mask_losses_triton,
    "_mask_losses_backward": mask_losses_backward_triton,
    "mask_costs": mask_costs_triton,
}
