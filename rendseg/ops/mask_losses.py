"""Losses and matching costs of masks at points, as in Mask2Former (Cheng et al. 2022), section 3.3.

Shapes: B images, Q queries, T_b targets of image b, N pairs of a query and a target, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from .. import reference
from ..reference._types import explained
from ..reference.mask_losses import (
    _arithmetic,
    _mask_losses_backward,
    check_loss_grads,
    check_mask_costs,
    check_mask_losses,
)
from ..reference.point_sample import gradient_format
from . import _register as _registry

__all__ = ["mask_costs", "mask_losses"]


@explained
def mask_losses(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    *,
    label_mode: str = "bilinear",
    padding_mode: str = "zeros",
    canvas: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of pairs of a predicted mask and a target, each pair at its own points.

    With ``x`` the logits of query ``query_index[n]`` of image ``image_index[n]`` at ``coords[n]``, ``y`` its target
    there, and ``s = sigmoid(x)``: ``cross_entropy = mean(softplus(x) - x * y)`` and
    ``dice = 1 - (2 * sum(s * y) + 1) / (sum(s) + sum(y) + 1)``. Without points both are zero.

    Args:
        logits: ``[B, Q, H, W]`` float32, float64, float16 or bfloat16; no mask is gathered or copied first.
        targets: a list of B tensors ``[T_b, h_b, w_b]``, each of its own size; bool, uint8, int8 to int64 or floating.
            Each is read where it lies, with any strides and in its own dtype; none is converted, padded or stacked.
        coords: points ``(x, y)`` in ``[0, 1]²``, ``[N, P, 2]`` float32 or float64.
        image_index: ``[N]`` int64 in ``[0, B)``.
        query_index: ``[N]`` int64 in ``[0, Q)``. A query may be in several pairs.
        target_index: ``[N]`` int64 in ``[0, T_b)`` of image ``b = image_index[n]``.
        label_mode: how targets are sampled: ``"bilinear"`` or ``"nearest"``. Logits always are bilinear.
        padding_mode: ``"zeros"`` or ``"border"``, for logits and targets; see ``point_sample``.
        canvas: the ``(height, width)`` that the coordinates refer to for the targets, as after padding each with zeros
            at the right and at the bottom. ``None``: the size of each target.

    Returns:
        ``(cross_entropy [N], dice [N])``, float32 (float64 for float64 logits), also under autocast.

    ``logits`` have a first derivative: dense, in their layout, each element written once; it is the same from run to
    run. Nothing of size ``[N, P]`` is kept for it: the backward samples again.

    Raises:
        ValueError: a wrong rank, size or option, or a target beyond the canvas.
        TypeError: a wrong dtype.
        IndexError: an image, a query or a target that does not exist (checked on the CPU).
        RuntimeError: tensors on different devices, or a second derivative.

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", 2022, section 3.3.
    """
    function = (
        reference.mask_losses if _registry.use_reference("mask_losses", logits) else torch.ops.rendseg.mask_losses
    )
    return function(
        logits,
        targets,
        coords,
        image_index,
        query_index,
        target_index,
        label_mode=label_mode,
        padding_mode=padding_mode,
        canvas=canvas,
    )


@explained
def mask_costs(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    *,
    label_mode: str = "bilinear",
    padding_mode: str = "zeros",
    canvas: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two losses of ``mask_losses`` for every query and every target of an image, at points that they share.

    Args:
        logits: ``[B, Q, H, W]`` float32, float64, float16 or bfloat16.
        targets: a list of B tensors ``[T_b, h_b, w_b]``, as in ``mask_losses``.
        coords: points ``(x, y)`` in ``[0, 1]²``, ``[B, P, 2]`` float32 or float64.
        label_mode: how targets are sampled: ``"bilinear"`` or ``"nearest"``.
        padding_mode: ``"zeros"`` or ``"border"``.
        canvas: the size that the coordinates refer to for the targets; see ``mask_losses``.

    Returns:
        ``(cross_entropy [B, Q, T], dice [B, Q, T])`` with ``T = max T_b``, float32 (float64 for float64 logits), also
        under autocast. What lies beyond the targets of an image is zero.

    The points of an image are sampled once for all pairs; the rest is two products of matrices, summed in float32 or
    wider. No gradient.

    Raises:
        ValueError: a wrong rank, size or option, or a target beyond the canvas.
        TypeError: a wrong dtype.
        RuntimeError: tensors on different devices.

    Source: the same paper; the cost of the Hungarian matching.
    """
    function = reference.mask_costs if _registry.use_reference("mask_costs", logits) else torch.ops.rendseg.mask_costs
    return function(logits, targets, coords, label_mode=label_mode, padding_mode=padding_mode, canvas=canvas)


def _fake(
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
    check_mask_losses(logits, targets, coords, image_index, query_index, target_index, label_mode, padding_mode, canvas)
    result = logits.new_empty(image_index.shape, dtype=_arithmetic(logits))
    return result, torch.empty_like(result)


def _fake_backward(
    cross_entropy_grad: Tensor,
    dice_grad: Tensor,
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    *rest: Any,
) -> Tensor:
    check_mask_losses(logits, targets, coords, image_index, *rest)
    check_loss_grads(cross_entropy_grad, dice_grad, logits, image_index)
    return torch.empty_like(logits, memory_format=gradient_format(logits))


def _fake_costs(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    *,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    check_mask_costs(logits, targets, coords, label_mode, padding_mode, canvas)
    size = (*logits.shape[:2], max((target.shape[0] for target in targets), default=0))
    result = logits.new_empty(size, dtype=_arithmetic(logits))
    return result, torch.empty_like(result)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    logits, targets, *tensors = inputs
    ctx.count = len(targets)
    ctx.options = [keyword_only_inputs[name] for name in ("label_mode", "padding_mode", "canvas")]
    ctx.save_for_backward(logits, *targets, *tensors)


def _backward(ctx: Any, cross_entropy_grad: Tensor, dice_grad: Tensor) -> tuple[Any, ...]:
    logits, *rest = ctx.saved_tensors
    targets, tensors = rest[: ctx.count], rest[ctx.count :]
    grad = torch.ops.rendseg._mask_losses_backward(
        cross_entropy_grad, dice_grad, logits, targets, *tensors, *ctx.options
    )
    return grad, [None] * ctx.count, None, None, None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("mask_losses can be differentiated once only: its gradient has no gradient")


_registry.register(
    "mask_losses",
    reference=reference.mask_losses,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_registry.register("_mask_losses_backward", reference=_mask_losses_backward, fake=_fake_backward, backward=_refuse)
_registry.register("mask_costs", reference=reference.mask_costs, fake=_fake_costs)
# Costs only serve the matching: autograd is passed by, so that they never require grad.
_registry.impl("mask_costs", library.fallthrough_kernel, "Autograd")
