"""uncertainty, uncertain_points and sample_uncertain_points: PointRend (Kirillov et al. 2020), sections 3.1 and 3.2.

Shapes: N images (or masks), C classes, H W grid, P points. A tile is ``BLOCK`` cells (or points) of one image, one to
an element, with a loop over the channels; for ``channels_last`` it is ``BLOCK`` cells times ``BLOCK_C`` channels, so
that loads run along the channels, and the channels of a cell are brought together once, after the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rendseg.reference import _checks as check
from rendseg.reference.point_sample import PADDING_MODES
from rendseg.reference.uncertain_points import check_class_index, check_draws, draw_counts

from ._bilinear import EXACT, axis_taps
from ._common import (
    INT32_LIMIT,
    arch_of,
    before_sm_90,
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
)
from ._select import DRAWS, POINTS, Selection, count_digit, point_at


@triton.jit
def _finish_margin(first, second, SINGLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Margin in float32 of a tile after its loop over the channels; NaN if any logit was."""
    if BLOCK_C > 1:
        lane = tl.zeros_like(first).to(tl.int32) + tl.arange(0, BLOCK_C)[None, :]
        first, second, _ = merge_top2(first, second, lane)
    return (tl.abs(first) if SINGLE else first - second).to(tl.float32)


@triton.jit
def _margin_kernel(
    logits,
    class_index,
    out,
    histogram,
    channels,
    cells,
    width,
    s_n,
    s_c,
    s_h,
    s_w,
    index_step,
    tiles,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    SINGLE: tl.constexpr,
    INDEXED: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Margins of a tile of cells, as sort keys or as uncertainties.

    logits: [N, C, H, W] floating, any strides. class_index: [N] int64, read if INDEXED.
    out: [N, H*W], int32 keys if KEYS, else float32.
    histogram: [N, 256] int32, to which the first digit of the keys is added if COUNT.
    """
    T: tl.constexpr = logits.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < cells
    at = i
    if WIDE:
        at = i.to(tl.int64)
    if FLAT:  # cells equally spaced in row order
        at = at * s_w
    else:
        row = at // width
        at = row * s_h + (at - row * width) * s_w
    begin = 0
    end = channels
    chosen = 0
    if INDEXED:
        chosen = tl.load(class_index + n * index_step)
        begin = tl.minimum(tl.maximum(chosen, 0), channels - 1)
        end = begin + 1
    if BLOCK_C == 1:
        first = tl.full([BLOCK], float("-inf"), ACC)
    else:
        lane = tl.arange(0, BLOCK_C)
        at = at[:, None] + lane[None, :] * s_c
        first = tl.full([BLOCK, BLOCK_C], float("-inf"), ACC)
    second = first
    channel_step = tl.full([], s_c, tl.int64)
    logits += n * s_n
    for c in tl.range(begin, end, BLOCK_C, loop_unroll_factor=1 if BLOCK_C > 1 else 4):
        plane = logits + c * channel_step
        if BLOCK_C == 1:
            value = tl.load(plane + at, mask=inside, other=0.0).to(ACC)
        else:
            known = (lane < channels - c)[None, :] & inside[:, None]
            value = tl.load(plane + at, mask=known, other=float("-inf")).to(ACC)
        first, second = push_top2(first, second, value)
    margin = _finish_margin(first, second, SINGLE, BLOCK_C)
    if INDEXED:
        margin = known_class(margin, chosen, channels)
    out += n * cells + i
    if KEYS:
        key = margin_key(margin)
        tl.store(out, key, mask=inside)
        if COUNT:
            count_digit(histogram + n * 256, key, inside, 0)
    else:
        tl.store(out, 0.0 - margin, mask=inside)


@triton.jit
def _or_zero(found, four):
    """Four tiles, zero where not found."""
    return (
        tl.where(found, four[0], 0.0),
        tl.where(found, four[1], 0.0),
        tl.where(found, four[2], 0.0),
        tl.where(found, four[3], 0.0),
    )


@triton.jit
def _columns(four):
    """Four tiles as columns."""
    return four[0][:, None], four[1][:, None], four[2][:, None], four[3][:, None]


@triton.jit
def _sample_kernel(
    logits,
    class_index,
    image_index,
    points,
    keys,
    histogram,
    out,
    channels,
    height,
    width,
    strides,
    index_step,
    image_step,
    images,
    point_strides,
    candidates,
    total,
    kept,
    rows,
    start,
    tiles,
    COUNT: tl.constexpr,
    SINGLE: tl.constexpr,
    INDEXED: tl.constexpr,
    IMAGES: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sort keys of the candidates, from the logits sampled there; the uniform points behind them are copied.

    logits: [B, C, H, W] floating, any strides. class_index: [N] int64, read if INDEXED.
    image_index: [N] int64, read if IMAGES; else mask n is in image n.
    points: [N, total, 2] float32 (POINTS) or [1] int64 seed (DRAWS).
    keys: [N, candidates] int32, written. histogram: [N, 256] int32, added to if COUNT.
    out: [N, rows, 2] float32, of which the rows from ``kept`` are written.
    """
    s_n, s_c, s_h, s_w = strides
    T: tl.constexpr = logits.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    i = start + (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    x, y = point_at(points, n, i, i < total, total, point_strides[0], point_strides[1], point_strides[2], MODE)
    uniform = (i >= candidates) & (i < total)
    here = out + (n * rows + kept + (i - candidates)) * 2
    tl.store(here, x, mask=uniform)
    tl.store(here + 1, y, mask=uniform)

    inside = i < candidates
    x_cell, x_near, x_far, x_has_near, x_has_far = axis_taps(x.to(ACC), width, BORDER, ALIGN_CORNERS)
    y_cell, y_near, y_far, y_has_near, y_has_far = axis_taps(y.to(ACC), height, BORDER, ALIGN_CORNERS)
    # A point without a neighbour along one axis (NaN among them) samples zeros, not NaN.
    found = inside & (x_has_near | x_has_far) & (y_has_near | y_has_far)
    weights = (x_near * y_near, x_far * y_near, x_near * y_far, x_far * y_far)
    weights = _or_zero(found, weights)
    if WIDE:
        x_cell, y_cell = x_cell.to(tl.int64), y_cell.to(tl.int64)
    at = y_cell * s_h + x_cell * s_w
    begin, end, chosen = 0, channels, 0
    if INDEXED:
        chosen = tl.load(class_index + n * index_step)
        begin = tl.minimum(tl.maximum(chosen, 0), channels - 1)
        end = begin + 1
    has = (x_has_near & y_has_near, x_has_far & y_has_near, x_has_near & y_has_far, x_has_far & y_has_far)
    has = (found & has[0], found & has[1], found & has[2], found & has[3])
    if BLOCK_C == 1:
        first = tl.full([BLOCK], float("-inf"), ACC)
    else:
        lane = tl.arange(0, BLOCK_C)
        at = at[:, None] + lane[None, :] * s_c
        first = tl.full([BLOCK, BLOCK_C], float("-inf"), ACC)
        weights, has = _columns(weights), _columns(has)
    second = first
    channel_step = tl.full([], s_c, tl.int64)
    image = n
    if IMAGES:
        wanted = tl.load(image_index + n * image_step)
        image = tl.minimum(tl.maximum(wanted, 0), images - 1)
    logits += image * s_n
    for c in tl.range(begin, end, BLOCK_C):
        plane = logits + c * channel_step + at
        if BLOCK_C == 1:
            known = True
        else:
            known = (lane < channels - c)[None, :]
        value = tl.load(plane, mask=has[0] & known, other=0.0).to(ACC) * weights[0]
        value += tl.load(plane + s_w, mask=has[1] & known, other=0.0).to(ACC) * weights[1]
        value += tl.load(plane + s_h, mask=has[2] & known, other=0.0).to(ACC) * weights[2]
        value += tl.load(plane + s_h + s_w, mask=has[3] & known, other=0.0).to(ACC) * weights[3]
        value = narrow(value, T).to(ACC)
        if BLOCK_C > 1:
            value = tl.where(known, value, float("-inf"))
        first, second = push_top2(first, second, value)
    margin = _finish_margin(first, second, SINGLE, BLOCK_C)
    if INDEXED:
        margin = known_class(margin, chosen, channels)
    if IMAGES:
        margin = known_class(margin, wanted, images)
    key = margin_key(margin)
    tl.store(keys + n * candidates + i, key, mask=inside)
    if COUNT:
        count_digit(histogram + n * 256, key, inside, 0)


def _tile(channels: int, inside: bool, arch: str, sampled: bool = False) -> dict[str, Any]:
    """Configuration by shape class: cells (or points) and channels of a tile, and warps."""
    if sampled and not inside:  # small programs, for the latency of scattered loads
        return {"BLOCK": 256, "BLOCK_C": 1, "num_warps": 8 if before_sm_90(arch) else 4}
    if not inside:
        return {"BLOCK": 512, "BLOCK_C": 1, "num_warps": 4}
    if channels <= 16:
        return {"BLOCK": 64, "BLOCK_C": 16, "num_warps": 4}
    return {"BLOCK": 32, "BLOCK_C": 32, "num_warps": 4}


def _layout_tile(logits: Tensor, class_index: Tensor | None, sampled: bool = False) -> dict[str, Any]:
    inside = class_index is None and channels_inside(logits)
    return _tile(logits.shape[1], inside, arch_of(logits.device), sampled)


def _key(logits: Tensor, class_index: Tensor | None, tile: dict[str, Any], *sizes: int) -> tuple[Any, ...]:
    """The shape class of a launch, for the tuning."""
    return logits.dtype, class_index is None, tile["BLOCK_C"], *shape_class(*logits.shape[:2], *sizes)


def _margins(
    logits: Tensor, class_index: Tensor | None, out: Tensor, selection: Selection | None, tile: dict[str, Any]
) -> None:
    """Launches _margin_kernel: ``out`` is ``[N, H, W]`` float32 or the keys of ``selection``."""
    n, channels, height, width = logits.shape
    steps = strides(logits)
    flat = height == 1 or width == 1 or steps[2] == width * steps[3]
    if width == 1 and height > 1:
        steps = [*steps[:3], steps[2]]
    counting = selection is not None and selection.counting

    def launch(tile: dict[str, Any]) -> None:
        tiles = triton.cdiv(height * width, tile["BLOCK"])
        _margin_kernel[(check_grid(n * tiles),)](
            logits,
            logits if class_index is None else class_index,
            out,
            out if selection is None else selection.histogram,
            channels,
            height * width,
            width,
            *steps,
            0 if class_index is None else class_index.stride(0),
            tiles,
            KEYS=selection is not None,
            COUNT=counting,
            SINGLE=class_index is not None or channels == 1,
            INDEXED=class_index is not None,
            FLAT=flat,
            WIDE=plane_span(logits) + tile["BLOCK_C"] >= INT32_LIMIT,
            **tile,
            **EXACT,
        )

    key = (selection is None, *_key(logits, class_index, tile, height * width))
    changed = (selection.histogram,) if selection is not None and counting else ()
    launch_tuned("margin", key, tile, ("BLOCK",), logits.device, launch, changed)


def uncertainty_triton(logits: Tensor, class_index: Tensor | None) -> Tensor:
    """Negative margin between the two largest logits: ``[N, C, H, W] -> [N, H, W]`` float32."""
    check.logits(logits)
    check_class_index(class_index, logits)
    logits = logits.detach()
    n, channels, height, width = logits.shape
    check_indices(height * width, "cells")
    out = torch.empty((n, height, width), dtype=torch.float32, device=logits.device)
    if n > 0:
        with on_device(logits):
            _margins(logits, class_index, out, None, _layout_tile(logits, class_index))
    return out


def uncertain_points_triton(logits: Tensor, num_points: int, class_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ``k = min(num_points, H*W)`` most uncertain cells: ascending ``indices [N, k]``, their centres.

    On a GPU a class outside ``[0, C)`` makes its image uncertain everywhere; nothing outside the map is read.
    """
    check.logits(logits)
    check.num_points(num_points)
    check_class_index(class_index, logits)
    logits = logits.detach()
    n, channels, height, width = logits.shape
    tile = _layout_tile(logits, class_index)
    with on_device(logits):
        k = min(num_points, height * width)
        selection = Selection(n, height * width, k, logits.device, tile["BLOCK_C"] == 1)
        if n > 0:
            _margins(logits, class_index, selection.keys, selection, tile)
        return selection.cells(height, width)


def sample_uncertain_points_triton(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    *,
    class_index: Tensor | None,
    image_index: Tensor | None,
    padding_mode: str,
    align_corners: bool,
    generator: torch.Generator | None,
    random_coords: Tensor | None,
) -> Tensor:
    """Training-time selection, ``-> coords [N, num_points, 2]`` float32: the uncertain candidates, then uniform points.

    Draws are made in the kernels, by Philox from a seed that one ``torch.randint`` takes from the generator on the
    device; they are the same for the same state of the generator, but not those of ``torch.rand``.
    """
    check.logits(logits)
    check_class_index(class_index, logits, image_index)
    candidates, kept, uniform = draw_counts(num_points, oversample_ratio, importance_ratio)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    images, channels, height, width = logits.shape
    n, total = images if image_index is None else image_index.shape[0], candidates + uniform
    check_draws(random_coords, logits, n, total)
    check_indices(max(height * width, total), "cells or points")
    logits = logits.detach()
    out = torch.empty((n, num_points, 2), dtype=torch.float32, device=logits.device)
    if n == 0:
        return out
    with on_device(logits):
        if random_coords is None:
            points = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=logits.device, generator=generator)
            mode = DRAWS
        else:
            points, mode = random_coords.detach(), POINTS
        tile = _layout_tile(logits, class_index, sampled=True)
        selection = Selection(n, candidates, kept, logits.device, tile["BLOCK_C"] == 1)
        start = candidates if kept == 0 else 0

        def launch(tile: dict[str, Any]) -> None:
            tiles = triton.cdiv(total - start, tile["BLOCK"])
            _sample_kernel[(check_grid(n * tiles),)](
                logits,
                logits if class_index is None else class_index,
                logits if image_index is None else image_index,
                points,
                selection.keys,
                selection.histogram,
                out,
                channels,
                height,
                width,
                tuple(strides(logits)),
                0 if class_index is None else class_index.stride(0),
                0 if image_index is None else image_index.stride(0),
                images,
                points.stride() if mode == POINTS else (0, 0, 0),
                candidates,
                total,
                kept,
                num_points,
                start,
                tiles,
                COUNT=selection.counting,
                SINGLE=class_index is not None or channels == 1,
                INDEXED=class_index is not None,
                IMAGES=image_index is not None,
                BORDER=padding_mode == "border",
                ALIGN_CORNERS=align_corners,
                MODE=mode,
                WIDE=plane_span(logits) + tile["BLOCK_C"] >= INT32_LIMIT,
                **tile,
                **EXACT,
            )

        key = (mode, *_key(logits, class_index, tile, total))
        changed = (selection.histogram,) if selection.counting else ()
        launch_tuned("sample", key, tile, ("BLOCK",), logits.device, launch, changed)
        if kept > 0:
            selection.points(points, total, out, mode)
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "uncertainty": uncertainty_triton,
    "uncertain_points": uncertain_points_triton,
    "sample_uncertain_points": sample_uncertain_points_triton,
}
