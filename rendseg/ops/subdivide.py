"""Upsampling, uncertainty and selection in one pass: PointRend (Kirillov et al. 2020), section 3.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._types import explained
from ..reference.subdivide import check_subdivide, check_subdivide_backward, label_dtype, subdivide_backward, upsample
from ..reference.subdivide import subdivide as reference
from ..reference.subdivide import subdivide_labels as reference_labels
from ._register import register, use_reference

__all__ = ["subdivide"]


@explained
def subdivide(
    logits: Tensor,
    num_points: int,
    scale_factor: int = 2,
    align_corners: bool = False,
    class_index: Tensor | None = None,
    return_logits: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Upsample a logit map bilinearly and select its most uncertain cells, in one pass over memory.

    The result equals ``fine = F.interpolate(logits, scale_factor=s, mode="bilinear", align_corners=align_corners)``
    followed by ``uncertain_points`` of ``fine``. The margin is that of the stored values, rounded to the dtype. Weights
    are exact, so that beside an infinity a weight of zero gives NaN (0 * inf). ``F.interpolate`` rounds some of these
    weights to tiny ones, depending on the processor, except at half-pixel powers of two.

    Args:
        logits: ``[N, C, h, w]``, float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        num_points: how many cells to select per image; ``k = min(num_points, s*h * s*w)``.
        scale_factor: whole factor ``s >= 1``.
        align_corners: as in ``F.interpolate``, for the upsampling only. ``coords`` are always cell centres in the
            half-pixel convention.
        class_index: ``[N]`` int64; the margin is then ``|logits[n, class_index[n]]|`` (instance masks).
        return_logits: with ``False`` the upsampled logits are never allocated.

    Returns:
        ``(fine, indices, coords)``. ``fine [N, C, s*h, s*w]`` has the dtype and layout of ``logits``, or is ``None``.
        ``indices [N, k]`` are int64 and ascend; ties go to the smallest. ``coords [N, k, 2]`` are float32 ``(x, y)`` in
        ``[0, 1]``.

    Half logits are interpolated in float32 and rounded once. A cell with a NaN logit is the most uncertain. The result
    is the same for any number of threads. ``fine`` is differentiable in ``logits``, twice too; ``indices`` and
    ``coords`` are not. Autocast does not change the dtype.

    Raises:
        ValueError: a wrong rank or size, ``num_points <= 0``, ``scale_factor < 1``, or 2^32 cells or more.
        TypeError: an unsupported dtype.
        IndexError: a class outside ``[0, C)``.
        RuntimeError: tensors on different devices.

    Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    if use_reference("subdivide", logits):
        return reference(logits, num_points, scale_factor, align_corners, class_index, return_logits)
    fine, indices, coords = torch.ops.rendseg.subdivide(
        logits, num_points, scale_factor, align_corners, class_index, return_logits
    )
    return (fine if return_logits else None), indices, coords


def _reference_kernel(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An op returns tensors: an empty one stands for the logits that were not wanted."""
    fine, indices, coords = reference(logits, *options)
    if fine is None:
        return logits.new_empty(0), indices, coords
    return (fine.clone() if fine.data_ptr() == logits.data_ptr() else fine), indices, coords


def _selection(logits: Tensor, num_points: int, scale_factor: int) -> tuple[Tensor, Tensor]:
    cells = logits.shape[2] * scale_factor * logits.shape[3] * scale_factor
    count = torch.sym_min(num_points, cells)
    indices = logits.new_empty((logits.shape[0], count), dtype=torch.int64)
    return indices, logits.new_empty((logits.shape[0], count, 2), dtype=torch.float32)


def _fake(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_points, scale_factor, _, class_index, return_logits = options
    check_subdivide(logits, num_points, class_index, scale_factor)
    indices, coords = _selection(logits, num_points, scale_factor)
    if not return_logits:
        return logits.new_empty(0), indices, coords
    n, c, h, w = logits.shape
    layout = torch._prims_common.suggest_memory_format(logits)
    fine = torch.empty(
        (n, c, h * scale_factor, w * scale_factor), dtype=logits.dtype, device=logits.device, memory_format=layout
    )
    return fine, indices, coords


def _fake_labels(
    logits: Tensor, num_points: int, scale_factor: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_subdivide(logits, num_points, None, scale_factor)
    n, c, h, w = logits.shape
    labels = logits.new_empty((n, h * scale_factor, w * scale_factor), dtype=label_dtype(c))
    return labels, *_selection(logits, num_points, scale_factor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, ctx.scale_factor, ctx.align_corners, _, ctx.return_logits = inputs
    ctx.shape, ctx.dtype = logits.shape, logits.dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    if not ctx.return_logits:
        return (grad.new_zeros(ctx.shape, dtype=ctx.dtype), *(None,) * 5)
    upstream = torch.ops.rendseg._subdivide_backward(grad, ctx.shape[2], ctx.shape[3], ctx.align_corners)
    return (upstream, *(None,) * 5)


def _fake_backward(grad: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    check_subdivide_backward(grad, height, width)
    layout = torch._prims_common.suggest_memory_format(grad)
    size = (*grad.shape[:2], height, width)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, height, width, ctx.align_corners = inputs
    ctx.scale_factor = grad.shape[2] // height


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return upsample(grad, ctx.scale_factor, ctx.align_corners), None, None, None


register("subdivide", reference=_reference_kernel, fake=_fake, backward=_backward, setup_context=_setup_context)
register("_subdivide_labels", reference=reference_labels, fake=_fake_labels)
register(
    "_subdivide_backward",
    reference=subdivide_backward,
    fake=_fake_backward,
    backward=_double_backward,
    setup_context=_setup_double,
)
