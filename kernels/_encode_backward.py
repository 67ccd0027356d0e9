"""The kernels of the gradients of encode, scaled_l2 and aggregate; ``encode.py`` says how.

Of a tile of positions, in the order of the kernel: the products of x' with c' and with the gradient of the result; from
them the gradients of assignment and logits, ``[M, K]`` in registers; sums of these over positions, for codewords and
scale; the gradient of x. With more than 128 codewords the gradients lie in memory from then on (``spill``), and the
sums over positions take 128 codewords at a time, the products over codewords 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rendseg.reference.encode import _wide

from ._common import launch_tuned
from ._encode_common import (
    AGGREGATE,
    BLOCK,
    IS_AGGREGATE,
    IS_ENCODE,
    IS_SCALED_L2,
    ROWS,
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
def _products(
    source,
    codewords,
    grad,
    k,
    lanes,
    OP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of a tile of positions ``x'.c'`` and ``x'.grad``, both ``[M, K]``, and ``||x'||^2``; zero where the op has none.

    codewords, grad: the matrices of c' and of the gradient of the result of the image. k, lanes: numbers of the
    codewords, and of the channels of a tile.
    """
    ACC: tl.constexpr = source[1].dtype.element_ty
    INDEX: tl.constexpr = source[2].dtype
    channels = source[5]
    BLOCK_K: tl.constexpr = k.shape[0]
    product = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    assigned_grad = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    squared_x = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, channels, lanes.shape[0]):
        d = start + lanes
        values = features(source, d)
        if OP != IS_AGGREGATE:
            c = codes_of(codewords, k, d, ACC, INDEX)
            product = tl.dot(values, tl.trans(c), product, input_precision=PRECISION, out_dtype=ACC)
            squared_x += tl.sum(values * values, axis=1)
        if OP == IS_AGGREGATE or (OP == IS_ENCODE and BLOCK_K <= 256):
            g = codes_of(grad, k, d, ACC, INDEX)
            assigned_grad = tl.dot(values, tl.trans(g), assigned_grad, input_precision=PRECISION, out_dtype=ACC)
    if OP == IS_ENCODE and BLOCK_K > 256:  # registers hold one of c and g
        for start in range(0, channels, lanes.shape[0]):
            d = start + lanes
            values = features(source, d)
            g = codes_of(grad, k, d, ACC, INDEX)
            assigned_grad = tl.dot(values, tl.trans(g), assigned_grad, input_precision=PRECISION, out_dtype=ACC)
    return product, assigned_grad, squared_x


@triton.jit
def _gradients(
    terms, given, given_grad, products_ptr, squares_ptr, scale, sums, k, codes, live, begun, OP: tl.constexpr
):
    """Assignment and gradient of the logits of a tile, ``[M, K]``; their sums over positions are added.

    terms: what :func:`_products` returns. given, given_grad: pointers ``[M, K]``. sums: where those of a, of g and of
    g ||x - c||^2 go.
    """
    product, assigned_grad, squared_x = terms
    ACC: tl.constexpr = product.dtype
    has_code = k < codes
    if OP != IS_ENCODE:  # both names, for whichever it is
        assigned = tl.load(given, mask=live, other=0.0).to(ACC)
        logits_grad = assigned
    if OP != IS_SCALED_L2:
        grad_c = tl.load(products_ptr + k, mask=has_code, other=0.0)
        assigned_grad = tl.where(live, assigned_grad - grad_c[None, :], 0.0)
    if OP == IS_AGGREGATE:
        tl.store(given_grad, assigned_grad.to(given_grad.dtype.element_ty), mask=live)
    else:
        squared_c = tl.load(squares_ptr + k, mask=has_code, other=0.0)
        distance = distances(squared_x, squared_c, product)
        if OP == IS_ENCODE:
            assigned = softmax(scale_of(scale, k, codes, ACC) * distance, has_code, live)
            mean = tl.sum(assigned * assigned_grad, axis=1)
            logits_grad = assigned * (assigned_grad - mean[:, None])
        add_total(sums[1], logits_grad, k, has_code, begun)
        add_total(sums[2], tl.where(live, logits_grad * distance, 0.0), k, has_code, begun)
    if OP != IS_SCALED_L2:
        add_total(sums[0], assigned, k, has_code, begun)
    return assigned, logits_grad


@triton.jit
def _spill(to, logits_grad, assigned, OP: tl.constexpr, BLOCK_MK: tl.constexpr):
    """Written as soon as they are known: no register keeps them through what follows."""
    if OP != IS_AGGREGATE:
        tl.store(to, logits_grad)
    if OP != IS_SCALED_L2:
        tl.store(to + BLOCK_MK, assigned)
    tl.debug_barrier()


@triton.jit
def _spilled_products(
    result,
    spilled,
    codewords,
    grad,
    scale,
    d,
    OP: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_MK: tl.constexpr,
):
    """``result [M, D] - 2 (s g) c' + a grad`` with g and a from memory, 32 codewords at a time."""
    ACC: tl.constexpr = result.dtype
    codes = codewords[3]
    for first in range(0, codes, 32):
        k = first + tl.arange(0, 32)
        if OP != IS_AGGREGATE:
            c = codes_of(codewords, k, d, ACC, INDEX)
            pulled = -2.0 * scale_of(scale, k, codes, ACC) * tl.load(spilled + k[None, :])
            result = tl.dot(pulled, c, result, input_precision=PRECISION, out_dtype=ACC)
        if OP != IS_SCALED_L2:
            g = codes_of(grad, k, d, ACC, INDEX)
            weight = tl.load(spilled + BLOCK_MK + k[None, :])
            result = tl.dot(weight, g, result, input_precision=PRECISION, out_dtype=ACC)
    return result


@triton.jit(do_not_specialize=SIZES)
def _encode_backward_kernel(
    x,
    given,
    grad,
    scale,
    x_grad,
    given_grad,
    center,
    scratch,
    positions,
    channels,
    codes,
    width,
    tiles,
    per_chunk,
    chunks,
    rows,
    OP: tl.constexpr,
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

    x, x_grad: ``[B, D, H, W]`` of any strides (b, d, h, w), float16, bfloat16, float32 or float64; x_grad is written.
    given: ``[B, M, K]`` (b, m, k): the gradient of the result (scaled_l2) or the assignment (aggregate).
    grad: ``[B, K, D]`` (b, k, d), the gradient of the result; not read by scaled_l2.
    scale: ``[K]`` of any stride; not read by aggregate. given_grad: ``[B, M, K]``, written by aggregate.
    center: of float32 or float64, c' ``[K, D]``, r ``[D]``, ``||c'||^2 [K]``, ``grad . c' [B, K]``.
    scratch: of the same type, written: sums of g x' ``[B * chunks, K, D]``, g the gradient of the logits, not by
        aggregate; sums of a, of g, and of g ||x - c||^2 ``[3, B * chunks, K]``; ``[B * chunks, 2, BLOCK_M, BLOCK_K]``
        for g and a where BLOCK_K is over 128, because each warp would hold all of them.
    """
    centered_ptr, shift_ptr, squares_ptr, products_ptr = center
    parts_ptr, sums_ptr, spill_ptr = scratch
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    b = row // chunks
    first = (row % chunks).to(tl.int32) * per_chunk
    k = tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_D)
    codewords = (centered_ptr, channels, 1, codes, channels)
    grads = (grad[0] + b * grad[1], grad[2], grad[3], codes, channels)
    each = rows.to(tl.int64) * codes
    sums = (sums_ptr + row * codes, sums_ptr + row * codes + each, sums_ptr + row * codes + each + each)
    spilled = spill_ptr + row * (2 * BLOCK_M * BLOCK_K) + tl.arange(0, BLOCK_M)[:, None] * BLOCK_K
    for tile in range(first, tl.minimum(first + per_chunk, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        has_position = m < positions
        live = has_position[:, None] & (k < codes)[None, :]
        at = at_positions(m, width, x[3], x[4], FLAT, INDEX)
        source = (x[0] + b * x[1], shift_ptr, at, x[2], has_position, channels)
        terms = _products(source, codewords, grads, k, lanes, OP, PRECISION, BLOCK_M)
        # The sums of the tile before were written by other threads, perhaps.
        tl.debug_barrier()
        known, wanted = given_at(given, b, m, k), given_at(given_grad, b, m, k)
        assigned, logits_grad = _gradients(
            terms, known, wanted, products_ptr + b * codes, squares_ptr, scale, sums, k, codes, live, tile > first, OP
        )
        if BLOCK_K > 128:
            if OP != IS_AGGREGATE:
                total_pull = tl.sum(2.0 * scale_of(scale, k, codes, ACC) * logits_grad, axis=1)
            _spill(spilled + k[None, :], logits_grad, assigned, OP, BLOCK_M * BLOCK_K)
        if OP != IS_AGGREGATE:
            # In loops of their own: with what follows, more operands would have to stay in registers than there are.
            target = parts_ptr + row * codes * channels
            if BLOCK_K > 128:
                for first_k in range(0, codes, 128):
                    some = first_k + tl.arange(0, 128)
                    weight = tl.load(spilled + some[None, :])
                    add_sums(target, weight, source, some, codes, tile > first, PRECISION, BLOCK_S)
            else:
                add_sums(target, logits_grad, source, k, codes, tile > first, PRECISION, BLOCK_S)
        if OP != IS_AGGREGATE and BLOCK_K <= 128:  # not before: registers again
            pull = 2.0 * scale_of(scale, k, codes, ACC) * logits_grad
            total_pull = tl.sum(pull, axis=1)
        target_at = at_positions(m, width, x_grad[3], x_grad[4], GRAD_FLAT, INDEX)
        for start in tl.range(0, channels, BLOCK_D, num_stages=1):
            d = start + lanes
            result = tl.zeros((BLOCK_M, BLOCK_D), ACC)
            if OP != IS_AGGREGATE:
                result = total_pull[:, None] * features(source, d)
            if BLOCK_K > 128:
                result = _spilled_products(
                    result, spilled, codewords, grads, scale, d, OP, PRECISION, INDEX, BLOCK_M * BLOCK_K
                )
            else:
                if OP != IS_AGGREGATE:
                    c = codes_of(codewords, k, d, ACC, INDEX)
                    result = tl.dot(-pull, c, result, input_precision=PRECISION, out_dtype=ACC)
                if OP != IS_SCALED_L2:
                    g = codes_of(grads, k, d, ACC, INDEX)
                    result = tl.dot(assigned, g, result, input_precision=PRECISION, out_dtype=ACC)
            to = x_grad[0] + b * x_grad[1] + target_at[:, None] + (d.to(INDEX) * x_grad[2])[None, :]
            tl.store(to, result.to(x_grad[0].dtype.element_ty), mask=has_position[:, None] & (d < channels)[None, :])


@triton.jit(do_not_specialize=["rows", "chunks"])
def _encode_backward_reduce_kernel(
    parts_ptr,
    sums_ptr,
    grad,
    centered_ptr,
    scale,
    codewords_grad_ptr,
    scale_grad_ptr,
    channels,
    entries,
    chunks,
    rows,
    OP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of codewords and scale from the sums of all chunks; ``entries`` = K*D, ``rows`` = B*chunks.

    parts_ptr, sums_ptr: as :func:`_encode_backward_kernel` wrote them.
    grad: ``[B, K, D]`` of any strides (b, k, d); not read by scaled_l2.
    centered_ptr: ``[K, D]`` float32 or float64; not read by aggregate.
    scale: ``[K]`` of any stride; not read by aggregate.
    codewords_grad_ptr: ``[K, D]`` contiguous, written.
    scale_grad_ptr: ``[K]`` contiguous, written; not by aggregate.
    """
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < entries
    code = i // channels
    codes = entries // channels
    grad_at = grad[0] + (code.to(tl.int64) * grad[2] + (i % channels).to(tl.int64) * grad[3])[None, :]
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
        if OP != IS_SCALED_L2:
            assigned = tl.load(sums_ptr + row * codes + code[None, :], mask=mask, other=0.0)
            carried += assigned * tl.load(grad_at + row // chunks * grad[1], mask=mask, other=0.0).to(ACC)
        if OP != IS_AGGREGATE:
            moment += tl.load(parts_ptr + row * entries + i[None, :], mask=mask, other=0.0)
            weight += tl.load(logits + row * codes + code[None, :], mask=mask, other=0.0)
            slope += tl.load(scales + row * codes + i[None, :], mask=mask & is_scale[None, :], other=0.0)
    value = -tl.sum(carried, axis=0)
    if OP != IS_AGGREGATE:
        factor = tl.load(scale[0] + code * scale[1], mask=live, other=0.0).to(ACC)
        c = tl.load(centered_ptr + i, mask=live, other=0.0)
        value -= 2.0 * factor * (tl.sum(moment, axis=0) - c * tl.sum(weight, axis=0))
        tl.store(scale_grad_ptr + i, tl.sum(slope, axis=0).to(scale_grad_ptr.dtype.element_ty), mask=is_scale)
    tl.store(codewords_grad_ptr + i, value.to(codewords_grad_ptr.dtype.element_ty), mask=live)


def backward(
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
    centered = center(codewords, wide, grad)
    plan = Plan.of(op, x, codes, wide, True)
    rows, tile = images * plan.chunks, plan.tile
    # aggregate needs no sums of g x'
    parts = torch.empty((0 if op == AGGREGATE else rows, codes, channels), dtype=wide, device=x.device)
    sums = torch.empty((3, rows, codes), dtype=wide, device=x.device)
    parts = sums if op == AGGREGATE else parts
    kept = (rows, 2, tile.positions, tile.codes) if tile.codes > 128 else (0,)
    spill = torch.empty(kept, dtype=wide, device=x.device)
    (source, width, flat), (target, _, grad_flat) = map_of(x), map_of(x_grad)
    grads, factors = with_strides(grad, x, 3), with_strides(scale, x, 1)

    def launch(meta: dict[str, int]) -> None:
        _encode_backward_kernel[(rows,)](
            source,
            with_strides(given, x, 3),
            grads,
            factors,
            target,
            with_strides(third if op == AGGREGATE else None, third, 3),
            centered,
            (parts, sums, spill),
            positions,
            channels,
            codes,
            width,
            plan.tiles,
            plan.per_chunk,
            plan.chunks,
            rows,
            OP=op,
            PRECISION=plan.precision,
            FLAT=flat,
            GRAD_FLAT=grad_flat,
            INDEX=index_of(x, x_grad) if grad is None else index_of(x, x_grad, grad),
            **meta,
        )

    launch_tuned("encode_backward", plan.key, tile.meta(), TUNED, x.device, launch)
    _encode_backward_reduce_kernel[(triton.cdiv(codes * channels, BLOCK),)](
        parts,
        sums,
        grads,
        centered[0],
        factors,
        codewords_grad,
        third,
        channels,
        codes * channels,
        plan.chunks,
        rows,
        OP=op,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return codewords_grad, third
