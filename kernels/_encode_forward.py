"""The kernels over positions of encode, scaled_l2 and aggregate; ``encode.py`` says how."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rendseg.reference.encode import _result_dtype, _wide

from ._common import launch_tuned
from ._encode_common import (
    BLOCK,
    IS_AGGREGATE,
    IS_ENCODE,
    IS_SCALED_L2,
    ROWS,
    SCALED_L2,
    SIZES,
    TUNED,
    Plan,
    add_sums,
    add_total,
    at_positions,
    center,
    codes_of,
    distances,
    features,
    given_at,
    index_of,
    map_of,
    scale_of,
    softmax,
    with_strides,
)


@triton.jit
def _logits(
    source,
    codewords,
    squares_ptr,
    scale,
    k,
    lanes,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``scale[k] * ||x - c||^2`` of a tile of positions, ``[M, K]``; ``codewords`` is the matrix of c'.

    k, lanes: numbers of the codewords, and of the channels of a tile.
    """
    codes, channels = codewords[3], codewords[4]
    ACC: tl.constexpr = squares_ptr.dtype.element_ty
    product = tl.zeros((BLOCK_M, k.shape[0]), ACC)
    squared_x = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, channels, lanes.shape[0]):
        d = start + lanes
        values = features(source, d)
        c = codes_of(codewords, k, d, ACC, source[2].dtype)
        product = tl.dot(values, tl.trans(c), product, input_precision=PRECISION, out_dtype=ACC)
        squared_x += tl.sum(values * values, axis=1)
    factor = scale_of(scale, k, codes, ACC)
    squared_c = tl.load(squares_ptr + k, mask=k < codes, other=0.0)
    return factor * distances(squared_x, squared_c, product)


@triton.jit(do_not_specialize=SIZES)
def _encode_kernel(
    x_ptr,
    given_ptr,
    centered_ptr,
    shift_ptr,
    squares_ptr,
    scale_ptr,
    out_ptr,
    sums_ptr,
    positions,
    channels,
    codes,
    width,
    tiles,
    per_chunk,
    chunks,
    x_strides,
    given_strides,
    scale_k,
    OP: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """encode, scaled_l2 or aggregate over the ``per_chunk`` tiles of one chunk of one image.

    x_ptr: ``[B, D, H, W]`` of any strides (b, d, h, w), float16, bfloat16, float32 or float64.
    given_ptr: ``[B, M, K]`` of any strides (b, m, k), the assignment; aggregate only.
    scale_ptr: ``[K]`` of any stride; not read by aggregate.
    centered_ptr: ``[K, D]`` contiguous, float32 or float64: c'.
    shift_ptr: ``[D]`` float32 or float64: r.
    squares_ptr: ``[K]`` float32 or float64: ``||c'||^2``; not read by aggregate.
    out_ptr: ``[B, M, K]`` contiguous (scaled_l2), else ``[B, chunks, K, D]`` of float32 or float64: sums of a x'.
    sums_ptr: ``[B, chunks, K]`` float32 or float64, written: sums of a; not by scaled_l2.
    """
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    b = row // chunks
    first = (row % chunks).to(tl.int32) * per_chunk
    k = tl.arange(0, BLOCK_K)
    has_code = k < codes
    image = x_ptr + b * x_strides[0]
    lanes = tl.arange(0, BLOCK_D)
    given = (given_ptr, given_strides[0], given_strides[1], given_strides[2])
    scale = (scale_ptr, scale_k)
    codewords = (centered_ptr, channels, 1, codes, channels)

    for tile in range(first, tl.minimum(first + per_chunk, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        has_position = m < positions
        live = has_position[:, None] & has_code[None, :]
        at = at_positions(m, width, x_strides[2], x_strides[3], FLAT, INDEX)
        source = (image, shift_ptr, at, x_strides[1], has_position, channels)
        if OP == IS_AGGREGATE:
            weight = tl.load(given_at(given, b, m, k), mask=live, other=0.0).to(ACC)
        else:
            weight = _logits(source, codewords, squares_ptr, scale, k, lanes, PRECISION, BLOCK_M)
        if OP == IS_SCALED_L2:
            where = (b * positions + m)[:, None] * codes + k[None, :]
            tl.store(out_ptr + where, weight.to(out_ptr.dtype.element_ty), mask=live)
        else:
            if OP == IS_ENCODE:
                weight = softmax(weight, has_code, live)
            # The sums of the tile before were written by other threads, perhaps.
            tl.debug_barrier()
            add_total(sums_ptr + row * codes, weight, k, has_code, tile > first)
            target = out_ptr + row * codes * channels
            add_sums(target, weight, source, k, codes, tile > first, PRECISION, BLOCK_S)


@triton.jit(do_not_specialize=["chunks"])
def _encode_reduce_kernel(
    parts_ptr,
    sums_ptr,
    centered_ptr,
    out_ptr,
    channels,
    entries,
    chunks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum_m a x' - c' sum_m a`` from the sums of the chunks; ``entries`` = K*D.

    parts_ptr: ``[B, chunks, K, D]`` float32 or float64.
    sums_ptr: ``[B, chunks, K]`` float32 or float64.
    centered_ptr: ``[K, D]`` float32 or float64.
    out_ptr: ``[B, K, D]`` contiguous, written.
    """
    ACC: tl.constexpr = parts_ptr.dtype.element_ty
    blocks = tl.cdiv(entries, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = i < entries
    code = i // channels
    codes = entries // channels
    moment = tl.zeros((ROWS, BLOCK), ACC)
    weight = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & live[None, :]
        row = (b * chunks + chunk)[:, None]
        moment += tl.load(parts_ptr + row * entries + i[None, :], mask=mask, other=0.0)
        weight += tl.load(sums_ptr + row * codes + code[None, :], mask=mask, other=0.0)
    c = tl.load(centered_ptr + i, mask=live, other=0.0)
    value = tl.sum(moment, axis=0) - c * tl.sum(weight, axis=0)
    tl.store(out_ptr + b * entries + i, value.to(out_ptr.dtype.element_ty), mask=live)


def forward(op: int, x: Tensor, codewords: Tensor, scale: Tensor | None, given: Tensor | None) -> Tensor:
    """encode, scaled_l2 or aggregate of ``x [B, D, H, W]`` or ``[B, D, M]``."""
    inputs = [t for t in (x, codewords, scale, given) if t is not None]
    dtype, wide = _result_dtype(*inputs), _wide(*inputs)
    images, channels = x.shape[:2]
    codes, positions = codewords.shape[0], x.shape[2:].numel()
    shape = (images, positions, codes) if op == SCALED_L2 else (images, codes, channels)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    if not positions or not channels:
        return out.zero_()
    centered, shift, squares, _ = center(codewords, wide, None)
    plan = Plan.of(op, x, codes, wide, False)
    per_chunk, chunks = (1, plan.tiles) if op == SCALED_L2 else (plan.per_chunk, plan.chunks)
    parts = sums = out
    if op != SCALED_L2:
        parts = torch.empty((images, chunks, codes, channels), dtype=wide, device=x.device)
        sums = torch.empty((images, chunks, codes), dtype=wide, device=x.device)
    source, width, flat = map_of(x)

    def launch(meta: dict[str, int]) -> None:
        _encode_kernel[(images * chunks,)](
            x,
            x if given is None else given,
            centered,
            shift,
            squares,
            x if scale is None else scale,
            parts,
            sums,
            positions,
            channels,
            codes,
            width,
            plan.tiles,
            per_chunk,
            chunks,
            source[1:],
            with_strides(given, x, 3)[1:],
            0 if scale is None else scale.stride(0),
            OP=op,
            PRECISION=plan.precision,
            FLAT=flat,
            INDEX=index_of(x),
            **meta,
        )

    launch_tuned("encode", plan.key, plan.tile.meta(), TUNED, x.device, launch)
    if op == SCALED_L2:
        return out
    entries = codes * channels
    _encode_reduce_kernel[(images * triton.cdiv(entries, BLOCK),)](
        parts, sums, centered, out, channels, entries, chunks, ROWS=ROWS, BLOCK=BLOCK, num_warps=4
    )
    return out
