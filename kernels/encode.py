"""Encoding layer in Triton. Shapes: B images, M positions, D channels, K codewords.

With r, the mean codeword, taken off both sides, which changes no residual (x' = x - r, c' = c - r):

    ||x - c||^2         = ||x'||^2 - 2 x'.c' + ||c'||^2
    sum_m a (x - c)     = sum_m a x' - c' sum_m a
    dl/dx summed over k = a^T grad + 2 (sum_k s g) x' - 2 (s g)^T c',  g the gradient of the logits

so that all work on D is matrix products, and an offset common to features and codewords costs no digits. What is left
to cancel is the distance of a codeword from the mean: a residual is good to float32 of that distance, not of itself.

A program takes one image and a chunk of its positions, a tile at a time: channels once for the products with the
codewords, then, from the L2 cache, once more for the sums over positions. Each chunk sums into a row ``[K, D]`` of its
own, and a second kernel adds the rows in their order: no atomics, the same bits every run. How positions are cut into
chunks depends on the shape alone. Masked codewords (K is padded to a power of two) have logits of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.encode import _check_aggregate, _check_encode, _check_scaled_l2, _result_dtype, _wide
from ._common import VERSION, arch_of, before_sm_90, has_tf32, is_amd, launch_tuned, shape_class
from ._compile import CompileCase

# Which op a kernel works for.
ENCODE, SCALED_L2, AGGREGATE = 0, 1, 2
_ENCODE = tl.constexpr(ENCODE)
_SCALED_L2 = tl.constexpr(SCALED_L2)
_AGGREGATE = tl.constexpr(AGGREGATE)

# Sizes that gain nothing from a compilation of their own where they are 1 or a multiple of 16.
_SIZES = ["codes", "width", "tiles", "per_chunk", "chunks", "rows"]


@triton.jit
def _finite(value):
    """False for infinities and NaN, of which the difference to themselves is NaN."""
    return value - value == 0.0


@triton.jit(do_not_specialize=["codes"])
def _encode_center_kernel(
    codewords_ptr,
    grad_ptr,
    centered_ptr,
    shift_ptr,
    squares_ptr,
    products_ptr,
    codes,
    channels,
    codewords_k,
    codewords_d,
    grad_b,
    grad_k,
    grad_d,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean codeword and what the codewords are beside it; a codeword that is not finite keeps that to itself.

    One program, or with GRAD one for each image, of which the first writes what all share.

    codewords_ptr: ``[K, D]`` of any strides, float16, bfloat16, float32 or float64.
    grad_ptr: ``[B, K, D]`` of any strides, the gradient of the result; read with GRAD only.
    centered_ptr: ``[K, D]`` contiguous, float32 or float64, written: c'.
    shift_ptr: ``[D]`` float32 or float64, written: r.
    squares_ptr: ``[K]`` float32 or float64, written: ``||c'||^2``.
    products_ptr: ``[B, K]`` float32 or float64, written with GRAD: ``grad . c'``.
    """
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    has_code = k < codes
    wide_k = k.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_K,), ACC)
    products = tl.zeros((BLOCK_K,), ACC)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        has_channel = d < channels
        live = has_code[:, None] & has_channel[None, :]
        wide_d = d.to(tl.int64)[None, :]
        at = wide_k * codewords_k + wide_d * codewords_d
        value = tl.load(codewords_ptr + at, mask=live, other=0.0).to(ACC)
        shift = tl.sum(tl.where(_finite(value), value, 0.0), axis=0) / codes
        shift = tl.where(_finite(shift), shift, 0.0)
        centered = tl.where(live, value - shift[None, :], 0.0)
        squares += tl.sum(centered * centered, axis=1)
        if GRAD:
            at = b * grad_b + wide_k * grad_k + wide_d * grad_d
            products += tl.sum(tl.load(grad_ptr + at, mask=live, other=0.0).to(ACC) * centered, axis=1)
        tl.store(shift_ptr + d, shift, mask=has_channel & (d * 0 + b == 0))
        tl.store(centered_ptr + k[:, None] * channels + d[None, :], centered, mask=live & (k * 0 + b == 0)[:, None])
    tl.store(squares_ptr + k, squares, mask=has_code & (k * 0 + b == 0))
    if GRAD:
        tl.store(products_ptr + b * codes + k, products, mask=has_code)


@triton.jit
def _at_positions(m, width, stride_h, stride_w, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of positions within an image; FLAT: one stride walks through rows and columns."""
    if FLAT:
        return m.to(INDEX) * stride_w
    else:
        return (m // width).to(INDEX) * stride_h + (m % width).to(INDEX) * stride_w


@triton.jit
def _codes(base, k, d, stride_k, stride_d, codes, channels, ACC: tl.constexpr, INDEX: tl.constexpr):
    """A tile ``[K, D]`` of a matrix of codewords, zero beyond its ends."""
    live = (k < codes)[:, None] & (d < channels)[None, :]
    at = (k.to(INDEX) * stride_k)[:, None] + (d.to(INDEX) * stride_d)[None, :]
    return tl.load(base + at, mask=live, other=0.0).to(ACC)


@triton.jit
def _given(base, m, k, stride_m, stride_k, live, ACC: tl.constexpr):
    """A tile ``[M, K]`` of what is given for each position and codeword, zero where not live."""
    at = m.to(tl.int64)[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k
    return tl.load(base + at, mask=live, other=0.0).to(ACC)


@triton.jit
def _features(base, shift_ptr, at, d, stride_d, has_position, channels, ACC: tl.constexpr, INDEX: tl.constexpr):
    """A tile ``[M, D]`` of features without the mean codeword; zero beyond the channels, finite beyond positions."""
    has_channel = d < channels
    live = has_position[:, None] & has_channel[None, :]
    value = tl.load(base + at[:, None] + (d.to(INDEX) * stride_d)[None, :], mask=live, other=0.0).to(ACC)
    return value - tl.load(shift_ptr + d, mask=has_channel, other=0.0)[None, :]


@triton.jit
def _distance(squared_x, squared_c, product):
    """``||x'||^2 - 2 x'.c' + ||c'||^2``: never below zero, and what infinities and NaN make of a sum of squares."""
    base = squared_x[:, None] + squared_c[None, :]
    return tl.where(_finite(base), tl.maximum(base - 2.0 * product, 0.0), base)


@triton.jit
def _add_sums(
    target,
    weight,
    x,
    shift_ptr,
    at,
    stride_d,
    has_position,
    k,
    channels,
    codes,
    begun,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Adds the sums over a tile of ``weight [M, K]`` times x' to a matrix ``[K, D]``, or begins them there.

    Transposed, so that 64 channels are the rows of a product, as tensor cores of sm_90 want them, and the weights its
    other operand, which lies in shared memory. One stage: features are turned on their way through registers, which
    keeps loads whole in either layout.
    """
    for start in tl.range(0, channels, BLOCK_S, num_stages=1):
        d = start + tl.arange(0, BLOCK_S)
        values = _features(x, shift_ptr, at, d, stride_d, has_position, channels, ACC, INDEX)
        part = tl.dot(tl.trans(values), weight, input_precision=PRECISION, out_dtype=ACC)
        live = (d < channels)[:, None] & (k < codes)[None, :]
        here = target + k[None, :] * channels + d[:, None]
        before = tl.load(here, mask=live & (k * 0 + begun > 0)[None, :], other=0.0)
        tl.store(here, before + part, mask=live)


@triton.jit
def _add_total(target, weight, k, has_code, begun):
    """Adds the sums over a tile of ``weight [M, K]`` to ``[K]``, or begins them there; registers are scarcer."""
    before = tl.load(target + k, mask=has_code & (k * 0 + begun > 0), other=0.0)
    tl.store(target + k, before + tl.sum(weight, axis=0), mask=has_code)


@triton.jit
def _softmax(logits, has_code, live):
    """Over codewords; zero where not live."""
    logits = tl.where(has_code[None, :], logits, -float("inf"))
    weight = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.where(live, weight / tl.sum(weight, axis=1)[:, None], 0.0)


@triton.jit(do_not_specialize=_SIZES)
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
    x_b,
    x_d,
    x_h,
    x_w,
    given_b,
    given_m,
    given_k,
    scale_k,
    OP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """encode, scaled_l2 or aggregate over the ``per_chunk`` tiles of one chunk of one image.

    x_ptr: ``[B, D, H, W]`` of any strides, float16, bfloat16, float32 or float64.
    given_ptr: ``[B, M, K]`` of any strides, the assignment; aggregate only.
    centered_ptr: ``[K, D]`` contiguous, float32 or float64: c'.
    shift_ptr: ``[D]`` float32 or float64: r.
    squares_ptr: ``[K]`` float32 or float64: ``||c'||^2``; not read by aggregate.
    scale_ptr: ``[K]`` of any stride; not read by aggregate.
    out_ptr: ``[B, M, K]`` contiguous (scaled_l2), else ``[B, chunks, K, D]`` of float32 or float64: sums of a x'.
    sums_ptr: ``[B, chunks, K]`` float32 or float64, written: sums of a; not by scaled_l2.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // chunks
    first = (row % chunks).to(tl.int32) * per_chunk
    k = tl.arange(0, BLOCK_K)
    has_code = k < codes
    x = x_ptr + b * x_b
    lanes = tl.arange(0, BLOCK_D)

    for tile in range(first, tl.minimum(first + per_chunk, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        has_position = m < positions
        live = has_position[:, None] & has_code[None, :]
        at = _at_positions(m, width, x_h, x_w, FLAT, INDEX)
        if OP == _AGGREGATE:
            weight = _given(given_ptr + b * given_b, m, k, given_m, given_k, live, ACC)
        else:
            product = tl.zeros((BLOCK_M, BLOCK_K), ACC)
            squared_x = tl.zeros((BLOCK_M,), ACC)
            for start in range(0, channels, BLOCK_D):
                d = start + lanes
                values = _features(x, shift_ptr, at, d, x_d, has_position, channels, ACC, INDEX)
                c = _codes(centered_ptr, k, d, channels, 1, codes, channels, ACC, INDEX)
                product = tl.dot(values, tl.trans(c), product, input_precision=PRECISION, out_dtype=ACC)
                squared_x += tl.sum(values * values, axis=1)
            scale = tl.load(scale_ptr + k * scale_k, mask=has_code, other=0.0).to(ACC)
            squared_c = tl.load(squares_ptr + k, mask=has_code, other=0.0)
            weight = scale[None, :] * _distance(squared_x, squared_c, product)
        if OP == _SCALED_L2:
            where = (b * positions + m)[:, None] * codes + k[None, :]
            tl.store(out_ptr + where, weight.to(out_ptr.dtype.element_ty), mask=live)
        else:
            if OP == _ENCODE:
                weight = _softmax(weight, has_code, live)
            # The sums of the tile before were written by other threads, perhaps.
            tl.debug_barrier()
            _add_total(sums_ptr + row * codes, weight, k, has_code, tile > first)
            _add_sums(
                out_ptr + row * codes * channels,
                weight,
                x,
                shift_ptr,
                at,
                x_d,
                has_position,
                k,
                channels,
                codes,
                tile > first,
                ACC,
                PRECISION,
                INDEX,
                BLOCK_S,
            )


@triton.jit(do_not_specialize=["chunks"])
def _encode_reduce_kernel(
    parts_ptr,
    sums_ptr,
    centered_ptr,
    out_ptr,
    channels,
    entries,
    chunks,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum_m a x' - c' sum_m a`` from the sums of the chunks; ``entries`` = K*D.

    parts_ptr: ``[B, chunks, K, D]`` float32 or float64.
    sums_ptr: ``[B, chunks, K]`` float32 or float64.
    centered_ptr: ``[K, D]`` float32 or float64.
    out_ptr: ``[B, K, D]`` contiguous, written.
    """
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


@triton.jit(do_not_specialize=_SIZES)
def _encode_backward_kernel(
    x_ptr,
    given_ptr,
    grad_ptr,
    centered_ptr,
    shift_ptr,
    squares_ptr,
    products_ptr,
    scale_ptr,
    x_grad_ptr,
    given_grad_ptr,
    parts_ptr,
    sums_ptr,
    spill_ptr,
    positions,
    channels,
    codes,
    width,
    tiles,
    per_chunk,
    chunks,
    rows,
    x_b,
    x_d,
    x_h,
    x_w,
    given_b,
    given_m,
    given_k,
    grad_b,
    grad_k,
    grad_d,
    x_grad_b,
    x_grad_d,
    x_grad_h,
    x_grad_w,
    given_grad_b,
    given_grad_m,
    given_grad_k,
    scale_k,
    OP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of positions, and sums for those of codewords and scale, over one chunk of one image.

    x_ptr: ``[B, D, H, W]`` of any strides, float16, bfloat16, float32 or float64.
    given_ptr: ``[B, M, K]`` of any strides: the gradient of the result (scaled_l2) or the assignment (aggregate).
    grad_ptr: ``[B, K, D]`` of any strides, the gradient of the result; not read by scaled_l2.
    centered_ptr: ``[K, D]`` contiguous, float32 or float64: c'.
    shift_ptr: ``[D]`` float32 or float64: r.
    squares_ptr: ``[K]`` float32 or float64: ``||c'||^2``; not read by aggregate.
    products_ptr: ``[B, K]`` float32 or float64: ``grad . c'``; not read by scaled_l2.
    scale_ptr: ``[K]`` of any stride; not read by aggregate.
    x_grad_ptr: ``[B, D, H, W]`` of any strides, written.
    given_grad_ptr: ``[B, M, K]`` of any strides, written: the gradient of the assignment; aggregate only.
    parts_ptr: ``[B * chunks, K, D]`` float32 or float64, written: sums of g x', g the gradient of the logits; not by
        aggregate.
    sums_ptr: ``[3, B * chunks, K]`` float32 or float64, written: sums of a, of g, and of g ||x - c||^2.
    spill_ptr: ``[B * chunks, 2, BLOCK_M, BLOCK_K]`` float32 or float64, where BLOCK_K is over 128: what the sums over
        positions and the products over codewords take a part at a time, because each warp would hold all of it.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // chunks
    first = (row % chunks).to(tl.int32) * per_chunk
    k = tl.arange(0, BLOCK_K)
    has_code = k < codes
    x = x_ptr + b * x_b
    grad = grad_ptr + b * grad_b
    x_grad = x_grad_ptr + b * x_grad_b
    lanes = tl.arange(0, BLOCK_D)

    sums_a = sums_ptr + row * codes
    sums_g = sums_a + rows.to(tl.int64) * codes
    sums_s = sums_g + rows.to(tl.int64) * codes

    for tile in range(first, tl.minimum(first + per_chunk, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        has_position = m < positions
        live = has_position[:, None] & has_code[None, :]
        at = _at_positions(m, width, x_h, x_w, FLAT, INDEX)
        product = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        assigned_grad = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        squared_x = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, channels, BLOCK_D):
            d = start + lanes
            values = _features(x, shift_ptr, at, d, x_d, has_position, channels, ACC, INDEX)
            if OP != _AGGREGATE:
                c = _codes(centered_ptr, k, d, channels, 1, codes, channels, ACC, INDEX)
                product = tl.dot(values, tl.trans(c), product, input_precision=PRECISION, out_dtype=ACC)
                squared_x += tl.sum(values * values, axis=1)
            if OP == _AGGREGATE or (OP == _ENCODE and BLOCK_K <= 256):
                g = _codes(grad, k, d, grad_k, grad_d, codes, channels, ACC, INDEX)
                assigned_grad = tl.dot(values, tl.trans(g), assigned_grad, input_precision=PRECISION, out_dtype=ACC)
        if OP == _ENCODE and BLOCK_K > 256:  # registers hold one of c and g
            for start in range(0, channels, BLOCK_D):
                d = start + lanes
                values = _features(x, shift_ptr, at, d, x_d, has_position, channels, ACC, INDEX)
                g = _codes(grad, k, d, grad_k, grad_d, codes, channels, ACC, INDEX)
                assigned_grad = tl.dot(values, tl.trans(g), assigned_grad, input_precision=PRECISION, out_dtype=ACC)
        # The sums of the tile before were written by other threads, perhaps.
        tl.debug_barrier()

        if OP != _ENCODE:  # both names, for whichever it is
            assigned = _given(given_ptr + b * given_b, m, k, given_m, given_k, live, ACC)
            logits_grad = assigned
        if OP != _SCALED_L2:
            grad_c = tl.load(products_ptr + b * codes + k, mask=has_code, other=0.0)
            assigned_grad = tl.where(live, assigned_grad - grad_c[None, :], 0.0)
        if OP == _AGGREGATE:
            where = m.to(tl.int64)[:, None] * given_grad_m + k.to(tl.int64)[None, :] * given_grad_k
            given_grad = given_grad_ptr + b * given_grad_b + where
            tl.store(given_grad, assigned_grad.to(given_grad_ptr.dtype.element_ty), mask=live)
        else:
            squared_c = tl.load(squares_ptr + k, mask=has_code, other=0.0)
            distance = _distance(squared_x, squared_c, product)
            if OP == _ENCODE:
                scale = tl.load(scale_ptr + k * scale_k, mask=has_code, other=0.0).to(ACC)
                assigned = _softmax(scale[None, :] * distance, has_code, live)
                mean = tl.sum(assigned * assigned_grad, axis=1)
                logits_grad = assigned * (assigned_grad - mean[:, None])
            _add_total(sums_g, logits_grad, k, has_code, tile > first)
            _add_total(sums_s, tl.where(live, logits_grad * distance, 0.0), k, has_code, tile > first)
        if OP != _SCALED_L2:
            _add_total(sums_a, assigned, k, has_code, tile > first)

        if BLOCK_K > 128:
            # Written as soon as they are known: no register keeps them through what follows.
            spilled = spill_ptr + row * (2 * BLOCK_M * BLOCK_K) + tl.arange(0, BLOCK_M)[:, None] * BLOCK_K
            if OP != _AGGREGATE:
                scale = tl.load(scale_ptr + k * scale_k, mask=has_code, other=0.0).to(ACC)
                tl.store(spilled + k[None, :], logits_grad)
                total_pull = tl.sum(2.0 * scale[None, :] * logits_grad, axis=1)
            if OP != _SCALED_L2:
                tl.store(spilled + BLOCK_M * BLOCK_K + k[None, :], assigned)
            tl.debug_barrier()

        if OP != _AGGREGATE:
            # In loops of their own: with what follows, more operands would have to stay in registers than there are.
            sums = parts_ptr + row * codes * channels
            if BLOCK_K > 128:
                for first_k in range(0, codes, 128):
                    some = first_k + tl.arange(0, 128)
                    _add_sums(
                        sums,
                        tl.load(spilled + some[None, :]),
                        x,
                        shift_ptr,
                        at,
                        x_d,
                        has_position,
                        some,
                        channels,
                        codes,
                        tile > first,
                        ACC,
                        PRECISION,
                        INDEX,
                        BLOCK_S,
                    )
            else:
                _add_sums(
                    sums,
                    logits_grad,
                    x,
                    shift_ptr,
                    at,
                    x_d,
                    has_position,
                    k,
                    channels,
                    codes,
                    tile > first,
                    ACC,
                    PRECISION,
                    INDEX,
                    BLOCK_S,
                )
        target_at = _at_positions(m, width, x_grad_h, x_grad_w, GRAD_FLAT, INDEX)
        if OP != _AGGREGATE and BLOCK_K <= 128:
            scale = tl.load(scale_ptr + k * scale_k, mask=has_code, other=0.0).to(ACC)
            pull = 2.0 * scale[None, :] * logits_grad
            total_pull = tl.sum(pull, axis=1)
        for start in tl.range(0, channels, BLOCK_D, num_stages=1):  # registers again
            d = start + lanes
            has_channel = d < channels
            result = tl.zeros((BLOCK_M, BLOCK_D), ACC)
            if OP != _AGGREGATE:
                values = _features(x, shift_ptr, at, d, x_d, has_position, channels, ACC, INDEX)
                result = total_pull[:, None] * values
            if BLOCK_K > 128:
                for first_k in range(0, codes, 32):
                    part = first_k + tl.arange(0, 32)
                    if OP != _AGGREGATE:
                        c = _codes(centered_ptr, part, d, channels, 1, codes, channels, ACC, INDEX)
                        factor = tl.load(scale_ptr + part * scale_k, mask=part < codes, other=0.0).to(ACC)
                        pulled = -2.0 * factor[None, :] * tl.load(spilled + part[None, :])
                        result = tl.dot(pulled, c, result, input_precision=PRECISION, out_dtype=ACC)
                    if OP != _SCALED_L2:
                        g = _codes(grad, part, d, grad_k, grad_d, codes, channels, ACC, INDEX)
                        weight = tl.load(spilled + BLOCK_M * BLOCK_K + part[None, :])
                        result = tl.dot(weight, g, result, input_precision=PRECISION, out_dtype=ACC)
            else:
                if OP != _AGGREGATE:
                    c = _codes(centered_ptr, k, d, channels, 1, codes, channels, ACC, INDEX)
                    result = tl.dot(-pull, c, result, input_precision=PRECISION, out_dtype=ACC)
                if OP != _SCALED_L2:
                    g = _codes(grad, k, d, grad_k, grad_d, codes, channels, ACC, INDEX)
                    result = tl.dot(assigned, g, result, input_precision=PRECISION, out_dtype=ACC)
            target = x_grad + target_at[:, None] + (d.to(INDEX) * x_grad_d)[None, :]
            mask = has_position[:, None] & has_channel[None, :]
            tl.store(target, result.to(x_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _encode_backward_reduce_kernel(
    parts_ptr,
    sums_ptr,
    grad_ptr,
    centered_ptr,
    scale_ptr,
    codewords_grad_ptr,
    scale_grad_ptr,
    channels,
    entries,
    chunks,
    rows,
    grad_b,
    grad_k,
    grad_d,
    scale_k,
    OP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of codewords and scale from the sums of all chunks; ``entries`` = K*D, ``rows`` = B*chunks.

    parts_ptr, sums_ptr: as :func:`_encode_backward_kernel` wrote them.
    grad_ptr: ``[B, K, D]`` of any strides; not read by scaled_l2.
    centered_ptr: ``[K, D]`` float32 or float64; not read by aggregate.
    scale_ptr: ``[K]`` of any stride; not read by aggregate.
    codewords_grad_ptr: ``[K, D]`` contiguous, written.
    scale_grad_ptr: ``[K]`` contiguous, written; not by aggregate.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < entries
    code = i // channels
    codes = entries // channels
    grad = grad_ptr + (code.to(tl.int64) * grad_k + (i % channels).to(tl.int64) * grad_d)[None, :]
    is_scale = i < codes
    logits = sums_ptr + rows.to(tl.int64) * codes
    scales = logits + rows.to(tl.int64) * codes
    moment = tl.zeros((ROWS, BLOCK), ACC)
    weight = tl.zeros((ROWS, BLOCK), ACC)
    carried = tl.zeros((ROWS, BLOCK), ACC)
    slope = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        mask = (row < rows) & live[None, :]
        if OP != _SCALED_L2:
            assigned = tl.load(sums_ptr + row * codes + code[None, :], mask=mask, other=0.0)
            carried += assigned * tl.load(grad + row // chunks * grad_b, mask=mask, other=0.0).to(ACC)
        if OP != _AGGREGATE:
            moment += tl.load(parts_ptr + row * entries + i[None, :], mask=mask, other=0.0)
            weight += tl.load(logits + row * codes + code[None, :], mask=mask, other=0.0)
            slope += tl.load(scales + row * codes + i[None, :], mask=mask & is_scale[None, :], other=0.0)
    value = -tl.sum(carried, axis=0)
    if OP != _AGGREGATE:
        scale = tl.load(scale_ptr + code * scale_k, mask=live, other=0.0).to(ACC)
        c = tl.load(centered_ptr + i, mask=live, other=0.0)
        value -= 2.0 * scale * (tl.sum(moment, axis=0) - c * tl.sum(weight, axis=0))
        tl.store(scale_grad_ptr + i, tl.sum(slope, axis=0).to(scale_grad_ptr.dtype.element_ty), mask=is_scale)
    tl.store(codewords_grad_ptr + i, value.to(codewords_grad_ptr.dtype.element_ty), mask=live)


# ---- Launchers

_ROWS, _BLOCK = 16, 64  # chunks and entries that a program of a reduction takes at a time
_PROGRAMS = 264  # chunks of all images together, at least: two on each multiprocessor of the largest GPUs
_SCRATCH = 1 << 26  # bytes of sums of chunks, at most, where one chunk per image allows it


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _precision(arch: str, wide: bool) -> str:
    """Three TF32 products for one of float32, where there is TF32; one alone would move logits by as much as 0.1."""
    return "tf32x3" if has_tf32(arch) and not wide else "ieee"


@dataclass(frozen=True)
class _Tile:
    """A tile: positions, channels (of the sums over positions: sum_channels), codewords (all of them, padded)."""

    positions: int
    channels: int
    sum_channels: int
    codes: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.positions,
            "BLOCK_D": self.channels,
            "BLOCK_S": self.sum_channels,
            "BLOCK_K": self.codes,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _tile(channels: int, codes: int, wide: bool, backward: bool, arch: str) -> _Tile:
    """Tile of a shape; arrays of positions x codewords stay in registers, one in forward and three in backward."""
    padded = max(16, triton.next_power_of_2(codes))
    old = VERSION < (3, 9)  # whose code takes more registers
    early = before_sm_90(arch)
    if wide:
        m, d, s, warps, stages = 32, 16, 16, 8 if old else 4, 1
    elif padded <= 32:
        m, d, s, warps, stages = 64, 32, 64, 4, 1 if backward else 2
        if old and backward:
            d, s, warps = (32, 32, 4) if is_amd(arch) else (16, 16, 8)
        elif old and early:
            d = 16
        elif backward and padded == 16 and not is_amd(arch):
            s = 32
    elif padded <= 64:
        m, d, s, warps, stages = (32, 16, 64, 8, 1) if backward else (64, 32, 64, 8, 2)
        if (old and is_amd(arch)) if backward else (old or early):
            m //= 2
        if old and backward and not is_amd(arch):
            s = 32
    elif padded <= 128:
        m, d, s, warps, stages = (16, 32, 32, 8, 1) if backward else (32, 32, 32, 8, 2)
        if old and not backward and not is_amd(arch):
            d = 16
    else:
        m, d, s, warps, stages = 16, 16, 16, 8, 1
        if early and padded > 256 and not backward:
            s = 8
        if early and padded <= 256 and backward and VERSION != (3, 8):
            d = 32  # with 16, Triton 3.7 and 3.9 spill in aggregate, at half the registers; with 32, 3.8 in encode
    if is_amd(arch):  # each of 4 warps may have 512 registers, of 8 half as many
        warps = 4
    most = max(16, triton.next_power_of_2(channels))
    return _Tile(m, min(d, most), min(s, most), padded, warps, stages)


def _chunks(images: int, positions: int, codes: int, channels: int, tile: _Tile, wide: bool) -> tuple[int, int, int]:
    """(tiles of an image, tiles of a chunk, chunks of an image), of the shape alone."""
    tiles = triton.cdiv(positions, tile.positions)
    wanted = triton.cdiv(_PROGRAMS, images)
    wanted = min(wanted, _SCRATCH // (images * codes * max(channels, 1) * (8 if wide else 4)))
    per_chunk = triton.cdiv(tiles, max(1, min(wanted, tiles)))
    return tiles, per_chunk, triton.cdiv(tiles, per_chunk)


def _map_strides(x: Tensor) -> tuple[tuple[int, int, int, int], int, bool]:
    """Strides (b, d, h, w), the width, and whether one stride walks through all positions."""
    if x.dim() == 3:
        return (x.stride(0), x.stride(1), 0, x.stride(2)), max(x.shape[2], 1), True
    height, width = x.shape[2:]
    b, d, h, w = x.stride()
    if width == 1:
        return (b, d, 0, h), height, True
    return (b, d, h, w), width, height == 1 or h == width * w


def _index(*tensors: Tensor) -> Any:
    """The integers that count through one image."""
    reach = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    # A tile may reach beyond the last position and channel, where nothing is read.
    return tl.int32 if reach < 2**30 else tl.int64


_TUNED = ("BLOCK_D", "BLOCK_S")  # not the positions, which the chunks are made of


def _layout(x: Tensor) -> tuple[bool, bool]:
    """Which neighbours in memory a tile has: channels, positions."""
    return x.stride(1) == 1, x.stride(-1) == 1


def _center(codewords: Tensor, wide: torch.dtype, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c', r, ||c'||^2, grad . c') of :func:`_encode_center_kernel`."""
    codes, channels = codewords.shape
    images = 1 if grad is None else grad.shape[0]
    centered, shift, squares, products = (
        torch.empty(shape, dtype=wide, device=codewords.device)
        for shape in ((codes, channels), (channels,), (codes,), (images, codes))
    )
    block_k, block_d = _center_tile(codes, channels)
    _encode_center_kernel[(images,)](
        codewords,
        codewords if grad is None else grad,
        centered,
        shift,
        squares,
        products,
        codes,
        channels,
        *codewords.stride(),
        *((0, 0, 0) if grad is None else grad.stride()),
        GRAD=grad is not None,
        ACC=_acc(wide),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return centered, shift, squares, products


def _center_tile(codes: int, channels: int) -> tuple[int, int]:
    block_k = triton.next_power_of_2(codes)
    return block_k, max(1, min(triton.next_power_of_2(channels), 4096 // block_k))


def _forward(op: int, x: Tensor, codewords: Tensor, scale: Tensor | None, given: Tensor | None) -> Tensor:
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
    centered, shift, squares, _ = _center(codewords, wide, None)
    tile = _tile(channels, codes, wide == torch.float64, False, arch_of(x.device))
    tiles, per_chunk, chunks = _chunks(images, positions, codes, channels, tile, wide == torch.float64)
    if op == SCALED_L2:
        per_chunk, chunks, parts, sums = 1, tiles, out, out
    else:
        parts = torch.empty((images, chunks, codes, channels), dtype=wide, device=x.device)
        sums = torch.empty((images, chunks, codes), dtype=wide, device=x.device)
    strides, width, flat = _map_strides(x)
    given_strides = (0, 0, 0) if given is None else given.stride()
    arch = arch_of(x.device)

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
            tiles,
            per_chunk,
            chunks,
            *strides,
            *given_strides,
            0 if scale is None else scale.stride(0),
            OP=op,
            ACC=_acc(wide),
            PRECISION=_precision(arch, wide == torch.float64),
            FLAT=flat,
            INDEX=_index(x),
            **meta,
        )

    key = (op, x.dtype, *_layout(x), flat, *shape_class(images, positions, channels, codes))
    launch_tuned("encode", key, tile.meta(), _TUNED, x.device, launch)
    if op == SCALED_L2:
        return out
    entries = codes * channels
    _encode_reduce_kernel[(images * triton.cdiv(entries, _BLOCK),)](
        parts, sums, centered, out, channels, entries, chunks, ACC=_acc(wide), ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4
    )
    return out


Grads = tuple[Tensor, Tensor, Tensor]


def _backward(
    op: int,
    grad: Tensor | None,
    x: Tensor,
    x_grad: Tensor,
    codewords: Tensor,
    scale: Tensor | None,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of codewords, and of scale or else of the assignment.

    That of ``x [B, D, H, W]`` or ``[B, D, M]`` goes to ``x_grad``; ``given`` is the assignment, or for scaled_l2 the
    gradient of the result.
    """
    wide = _wide(*(t for t in (grad, x, codewords, scale, given) if t is not None))
    images, channels = x.shape[:2]
    codes, positions = codewords.shape[0], x.shape[2:].numel()
    codewords_grad = torch.empty((codes, channels), dtype=codewords.dtype, device=x.device)
    third = torch.empty_like(given if scale is None else scale)
    if not images or not positions or not channels:
        x_grad.zero_()
        return codewords_grad.zero_(), third.zero_()
    centered, shift, squares, products = _center(codewords, wide, grad)
    tile = _tile(channels, codes, wide == torch.float64, True, arch_of(x.device))
    tiles, per_chunk, chunks = _chunks(images, positions, codes, channels, tile, wide == torch.float64)
    rows = images * chunks
    # aggregate needs no sums of g x'
    parts = torch.empty((0 if op == AGGREGATE else rows, codes, channels), dtype=wide, device=x.device)
    sums = torch.empty((3, rows, codes), dtype=wide, device=x.device)
    kept = (rows, 2, tile.positions, tile.codes) if tile.codes > 128 else (0,)
    spill = torch.empty(kept, dtype=wide, device=x.device)
    strides, width, flat = _map_strides(x)
    grad_strides, _, grad_flat = _map_strides(x_grad)
    given_strides = (0, 0, 0) if given is None else given.stride()
    grad_e = x if grad is None else grad
    grad_e_strides = (0, 0, 0) if grad is None else grad.stride()
    scale_ = x if scale is None else scale
    scale_stride = 0 if scale is None else scale.stride(0)
    arch = arch_of(x.device)

    def launch(meta: dict[str, int]) -> None:
        _encode_backward_kernel[(rows,)](
            x,
            x if given is None else given,
            grad_e,
            centered,
            shift,
            squares,
            products,
            scale_,
            x_grad,
            third,
            sums if op == AGGREGATE else parts,
            sums,
            spill,
            positions,
            channels,
            codes,
            width,
            tiles,
            per_chunk,
            chunks,
            rows,
            *strides,
            *given_strides,
            *grad_e_strides,
            *grad_strides,
            *(third.stride() if op == AGGREGATE else (0, 0, 0)),
            scale_stride,
            OP=op,
            ACC=_acc(wide),
            PRECISION=_precision(arch, wide == torch.float64),
            FLAT=flat,
            GRAD_FLAT=grad_flat,
            INDEX=_index(x, x_grad) if grad is None else _index(x, x_grad, grad),
            **meta,
        )

    key = (op, x.dtype, *_layout(x), flat, *shape_class(images, positions, channels, codes))
    launch_tuned("encode_backward", key, tile.meta(), _TUNED, x.device, launch)
    _encode_backward_reduce_kernel[(triton.cdiv(codes * channels, _BLOCK),)](
        sums if op == AGGREGATE else parts,
        sums,
        grad_e,
        centered,
        scale_,
        codewords_grad,
        third,
        channels,
        codes * channels,
        chunks,
        rows,
        *grad_e_strides,
        scale_stride,
        OP=op,
        ACC=_acc(wide),
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return codewords_grad, third


def encode_triton(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``rendseg::encode``."""
    _check_encode(x, codewords, scale)
    return _forward(ENCODE, x, codewords, scale, None)


def scaled_l2_triton(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``rendseg::scaled_l2``."""
    _check_scaled_l2(x, codewords, scale)
    return _forward(SCALED_L2, x.transpose(1, 2), codewords, scale, None)


def aggregate_triton(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    """``rendseg::aggregate``."""
    _check_aggregate(assignment, x, codewords)
    return _forward(AGGREGATE, x.transpose(1, 2), codewords, None, assignment)


def encode_backward_triton(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """``rendseg::_encode_backward``: of x, codewords and scale; the assignment is computed anew."""
    _check_encode(x, codewords, scale, grad)
    x_grad = torch.empty_like(x)
    return x_grad, *_backward(ENCODE, grad, x, x_grad, codewords, scale, None)


def scaled_l2_backward_triton(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """``rendseg::_scaled_l2_backward``: of x, codewords and scale."""
    _check_scaled_l2(x, codewords, scale, grad)
    x_grad = torch.empty_like(x)
    return x_grad, *_backward(SCALED_L2, None, x.transpose(1, 2), x_grad.transpose(1, 2), codewords, scale, grad)


def aggregate_backward_triton(grad: Tensor, assignment: Tensor, x: Tensor, codewords: Tensor) -> Grads:
    """``rendseg::_aggregate_backward``: of assignment, x and codewords."""
    _check_aggregate(assignment, x, codewords, grad)
    x_grad = torch.empty_like(x)
    positions, target = x.transpose(1, 2), x_grad.transpose(1, 2)
    codewords_grad, assignment_grad = _backward(AGGREGATE, grad, positions, target, codewords, None, assignment)
    return assignment_grad, x_grad, codewords_grad


def compile_cases(arch: str) -> list[CompileCase]:
    """Every kernel as it is launched by default for 512 channels and 32 codewords, and with other numbers of them."""
    cases = []
    for op in (ENCODE, SCALED_L2, AGGREGATE):
        for backward in (False, True):
            cases.append(_main_case(op, "fp32", False, 512, 32, backward, arch))
            if op == ENCODE:
                cases.append(_main_case(op, "fp32", True, 512, 32, backward, arch))
                cases.append(_main_case(op, "bf16", True, 512, 32, backward, arch))
    for dtype, channels, codes in (
        ("fp32", 512, 64),
        ("fp32", 512, 128),
        ("fp32", 512, 256),
        ("fp32", 512, 512),
        ("fp64", 512, 32),
        ("fp32", 19, 5),
    ):
        cases += [_main_case(ENCODE, dtype, False, channels, codes, backward, arch) for backward in (False, True)]
    cases += [_main_case(ENCODE, "bf16", True, 512, 32, True, arch, flat=False)]
    cases += [
        _main_case(op, "fp32", False, 512, codes, True, arch) for op in (SCALED_L2, AGGREGATE) for codes in (5, 64, 256)
    ]
    block_k, block_d = _center_tile(32, 512)
    scratch = ("centered_ptr", "shift_ptr", "squares_ptr", "products_ptr")
    for grad in (False, True):
        cases.append(
            CompileCase(
                f"encode center{' backward' if grad else ''}",
                _encode_center_kernel,
                {
                    **dict.fromkeys(("codewords_ptr", "grad_ptr"), "*fp32"),
                    **dict.fromkeys(scratch, "*fp32"),
                    **dict.fromkeys(("codes", "channels", "codewords_k", "grad_b", "grad_k"), "i32"),
                },
                dict(codewords_d=1, grad_d=1, GRAD=grad, ACC=tl.float32, BLOCK_K=block_k, BLOCK_D=block_d),
                num_warps=8,
                options=_FUSED,
                divisible=("channels", "codewords_k", "grad_b", "grad_k"),
            )
        )
    pointers = {"parts_ptr": "*fp32", "sums_ptr": "*fp32", "centered_ptr": "*fp32"}
    cases.append(
        CompileCase(
            "encode reduce",
            _encode_reduce_kernel,
            {**pointers, "out_ptr": "*fp32", **dict.fromkeys(("channels", "entries", "chunks"), "i32")},
            dict(ACC=tl.float32, ROWS=_ROWS, BLOCK=_BLOCK),
            options=_FUSED,
            divisible=("channels", "entries"),
        )
    )
    others = dict.fromkeys(("grad_ptr", "scale_ptr", "codewords_grad_ptr", "scale_grad_ptr"), "*fp32")
    sizes = dict.fromkeys(("channels", "entries", "chunks", "rows", "grad_b", "grad_k"), "i32")
    for op in (ENCODE, SCALED_L2, AGGREGATE):
        cases.append(
            CompileCase(
                f"{_NAMES[op]} backward reduce",
                _encode_backward_reduce_kernel,
                {**pointers, **others, **sizes},
                dict(grad_d=1, scale_k=1, OP=op, ACC=tl.float32, ROWS=_ROWS, BLOCK=_BLOCK),
                options=_FUSED,
                divisible=("channels", "entries", "grad_k"),
            )
        )
    return cases


_NAMES = {ENCODE: "encode", SCALED_L2: "scaled_l2", AGGREGATE: "aggregate"}
_FUSED = {"enable_fp_fusion": True}


def _main_case(
    op: int,
    dtype: str,
    channels_last: bool,
    channels: int,
    codes: int,
    backward: bool,
    arch: str,
    flat: bool = True,
) -> CompileCase:
    wide = "fp64" if dtype == "fp64" else "fp32"
    tile = _tile(channels, codes, dtype == "fp64", backward, arch)
    kernel = _encode_backward_kernel if backward else _encode_kernel
    wides = {"centered_ptr", "shift_ptr", "squares_ptr", "products_ptr", "parts_ptr", "sums_ptr", "spill_ptr"}
    if op != SCALED_L2:
        wides.add("out_ptr")
    # One stride of each tensor is 1: that of channels in channels_last, that of positions in NCHW.
    ones = {"given_k": 1, "given_grad_k": 1, "grad_d": 1, "scale_k": 1}
    ones |= {"x_d": 1, "x_grad_d": 1} if channels_last else {"x_w": 1, "x_grad_w": 1}
    options = dict(OP=op, ACC=tl.float64 if dtype == "fp64" else tl.float32, FLAT=flat, INDEX=tl.int32)
    options |= dict(PRECISION=_precision(arch, dtype == "fp64"))
    options |= {name: value for name, value in tile.meta().items() if name.startswith("BLOCK")}
    if backward:
        options["GRAD_FLAT"] = flat
    constants = options | {name: value for name, value in ones.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name not in constants:
            signature[name] = "i32" if not name.endswith("_ptr") else f"*{wide if name in wides else dtype}"
    strides = [name for name in signature if name.startswith(("x_", "given_", "grad_"))]
    strides = [name for name in strides if not name.endswith("_ptr")]
    return CompileCase(
        f"{_NAMES[op]}{' backward' if backward else ''} {dtype} {'channels_last' if channels_last else 'nchw'}"
        f" D={channels} K={codes}{'' if flat else ' rows and columns'}",
        kernel,
        signature,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=_FUSED,
        divisible=("channels", "positions", *strides) if channels % 16 == 0 else (),
    )


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "encode": encode_triton,
    "scaled_l2": scaled_l2_triton,
    "aggregate": aggregate_triton,
    "_encode_backward": encode_backward_triton,
    "_scaled_l2_backward": scaled_l2_backward_triton,
    "_aggregate_backward": aggregate_backward_triton,
}
