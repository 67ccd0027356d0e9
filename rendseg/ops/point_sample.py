"""Gathering at points, PointRend (Kirillov et al. 2020), section 3.3. N images, C channels, H W grid, P points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference._types import explained
from ..reference.point_sample import _point_sample_backward as reference_backward
from ..reference.point_sample import (
    check_point_labels,
    check_point_sample,
    check_sample_grad,
    gradient_format,
    of_masks,
)
from ..reference.point_sample import point_labels as reference_labels
from ..reference.point_sample import point_sample as reference_sample
from ._register import impl, register, use_reference

__all__ = ["point_labels", "point_sample"]

# Widest last: what maps of several dtypes are promoted to under autocast (float16 with bfloat16 gives float32).
_RANK = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


@explained
def point_sample(
    input: Tensor | Sequence[Tensor],
    coords: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Sample maps at points, as ``F.grid_sample(input, 2 * coords - 1, mode, padding_mode, align_corners)`` does.

    Args:
        input: a map ``[N, C, H, W]``, or a list of maps with the same N and any C, H, W. All maps of a list are sampled
            at the same points and concatenated over channels, without an intermediate tensor. float16, bfloat16,
            float32 or float64; contiguous and channels_last maps are read in place. Masks, bool or uint8, are copied
            to float32.
        coords: points ``(x, y)`` in ``[0, 1]²``, ``[N, P, 2]`` or ``[N, Hg, Wg, 2]``, float32 (also for half maps) or
            float64. ``(0, 0)`` is the outer corner of the top-left cell.
        mode: ``"bilinear"``, or ``"nearest"`` (a tie goes to the even cell, as in PyTorch).
        padding_mode: ``"zeros"`` or ``"border"``.
        align_corners: ``True``: 0 and 1 are the centres of the outer cells; ``False``: they are the edges of the map.

    Returns:
        ``[N, C, P]`` or ``[N, C, Hg, Wg]``, contiguous, in the dtype of the maps. Half maps are interpolated in
        float32 and rounded once.

    A NaN or infinite coordinate never reads outside the map. With zeros padding, bilinear gives NaN for both
    (``0 * NaN``) and nearest gives 0. With border padding NaN takes the first cell, and an infinity the nearest cell.

    ``input`` has a first derivative, and so have ``coords`` with bilinear (with nearest it is zero). The gradient of a
    map is dense and has the layout of the map. On the CPU it is the same to the last bit for any number of threads.

    Autocast: maps that share a dtype keep it. Maps of different dtypes are promoted to the widest of them; outside
    autocast they are an error. ``coords`` keep their dtype. (In detectron2, ``F.grid_sample`` widens a bfloat16 map to
    float32 under autocast and returns float32; here the result is rounded to bfloat16, so that the selection of points
    may differ where margins tie.)

    Raises:
        ValueError: a wrong rank or size, an empty list or map, or an unknown option.
        TypeError: maps of different dtypes, an unsupported dtype, or half coordinates.
        RuntimeError: tensors on different devices.

    Source: PointRend (Kirillov et al. 2020), section 3.3.
    """
    maps = [of_masks(m) for m in ([input] if isinstance(input, Tensor) else input)]
    if use_reference("point_sample", maps[0] if maps else coords):
        if maps and torch.is_autocast_enabled(maps[0].device.type):
            maps = _promote(maps)
        return reference_sample(maps, coords, mode, padding_mode, align_corners)
    return torch.ops.rendseg.point_sample(maps, coords, mode, padding_mode, align_corners)


@explained
def point_labels(labels: Tensor, coords: Tensor, ignore_index: int = 255) -> Tensor:
    """The label of the cell that holds each point, as an exact integer.

    Args:
        labels: ``[N, H, W]`` of uint8, int8, int16, int32 or int64.
        coords: points ``(x, y)``, ``[N, P, 2]``, float32 or float64.
        ignore_index: the label of points outside the map.

    Returns:
        ``[N, P]`` int64. Cell ``i`` of ``W`` covers ``[i / W, (i + 1) / W)``. The last cell also covers 1.0, so 1.0
        belongs to the map. A point outside ``[0, 1]²`` or with a NaN coordinate gets ``ignore_index``. Away from cell
        borders this equals ``F.grid_sample(labels, 2 * coords - 1, mode="nearest", align_corners=False)``, which takes
        the even cell on a border, and puts 1.0 outside a map of even size.

    No gradient. Autocast changes nothing.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: labels that are not integers, or half coordinates.
        RuntimeError: tensors on different devices.

    Source: PointRend (Kirillov et al. 2020), section 3.2: labels at the sampled training points.
    """
    if use_reference("point_labels", labels):
        return reference_labels(labels, coords, ignore_index)
    return torch.ops.rendseg.point_labels(labels, coords, ignore_index)


def _promote(maps: Sequence[Tensor]) -> list[Tensor]:
    dtypes = {m.dtype for m in maps}
    if len(dtypes) < 2 or not dtypes <= _RANK.keys():
        return list(maps)
    widest = max(dtypes, key=_RANK.__getitem__)
    if dtypes == {torch.float16, torch.bfloat16}:
        widest = torch.float32
    return [m.to(widest) for m in maps]


def _fake(input: Sequence[Tensor], coords: Tensor, mode: str, padding_mode: str, align_corners: bool) -> Tensor:
    check_point_sample(input, coords, mode, padding_mode)
    channels = sum(m.shape[1] for m in input)
    return input[0].new_empty((coords.shape[0], channels, *coords.shape[1:-1]))


def _fake_backward(
    grad: Tensor,
    input: Sequence[Tensor],
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    input_grad: bool,
    coords_grad: bool,
) -> list[Tensor]:
    check_point_sample(input, coords, mode, padding_mode)
    check_sample_grad(grad, input, coords)
    results = [torch.empty_like(m, memory_format=gradient_format(m)) if input_grad else m.new_empty(0) for m in input]
    results.append(
        torch.empty_like(coords, memory_format=torch.contiguous_format) if coords_grad else coords.new_empty(0)
    )
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, coords, *ctx.options = inputs
    ctx.save_for_backward(*maps, coords)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *maps, coords = ctx.saved_tensors
    op = torch.ops.rendseg._point_sample_backward
    needs_maps, needs_coords = list(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
    if all(needs_maps) or not any(needs_maps):
        *map_grads, coords_grad = op(grad, maps, coords, *ctx.options, any(needs_maps), needs_coords)
        results = [g if any(needs_maps) else None for g in map_grads]
    else:  # a frozen map among trained ones: its dense gradient is not made
        results, first = [], 0
        coords_grad = op(grad, maps, coords, *ctx.options, False, True)[-1] if needs_coords else None
        for feature, needed in zip(maps, needs_maps, strict=True):
            part, first = grad.narrow(1, first, feature.shape[1]), first + feature.shape[1]
            results.append(op(part, [feature], coords, *ctx.options, True, False)[0] if needed else None)
    gradients = (results, coords_grad if needs_coords else None, None, None, None)
    # PyTorch 2.11 leaves arguments at their defaults out, and wants as many gradients as there were arguments.
    return gradients[: len(ctx.needs_input_grad)]


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("point_sample can be differentiated once only: its gradient has no gradient")


def _fake_labels(labels: Tensor, coords: Tensor, ignore_index: int) -> Tensor:
    check_point_labels(labels, coords)
    return labels.new_empty(coords.shape[:2], dtype=torch.int64)


register(
    "point_sample",
    reference=reference_sample,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register("_point_sample_backward", reference=reference_backward, fake=_fake_backward, backward=_refuse)
register("point_labels", reference=reference_labels, fake=_fake_labels)


def _autocast(key: torch._C.DispatchKey) -> Any:
    def kernel(input: Sequence[Tensor], *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.rendseg.point_sample(_promote(input), *rest)

    return kernel


for _key in ("AutocastCPU", "AutocastCUDA"):
    impl("point_sample", _autocast(getattr(torch._C.DispatchKey, _key)), _key)
