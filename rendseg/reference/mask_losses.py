"""Losses and matching costs of masks at points: PointRend (Kirillov et al. 2020), section 3.2; Mask2Former (Cheng et
al. 2022), section 3.3.

Shapes: B images, Q queries, T_b targets of image b, N pairs of a query and a target, P points, H W grid of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._float64 import widest
from . import _checks as check
from ._types import checked
from .point_sample import MODES, PADDING_MODES, _point_sample_backward, gradient_format, point_sample

TARGET_DTYPES = (torch.bool, *check.LABEL_DTYPES, *check.FEATURE_DTYPES)


def check_masks(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> None:
    """What both operators ask of logits, targets and options, and of ``coords`` but their first size."""
    check.option(label_mode, "label_mode", MODES)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    check.logits(logits)
    if len(targets) != logits.shape[0]:
        raise ValueError(
            f"targets must hold one tensor for each of the {logits.shape[0]} images of logits, got {len(targets)}"
        )
    if canvas is not None and (len(canvas) != 2 or canvas[0] <= 0 or canvas[1] <= 0):
        raise ValueError(f"canvas must be (height, width), both positive, got {list(canvas)}")
    if canvas is not None and max(canvas) >= 2**31 - 1:
        raise ValueError(f"canvas must have sides below 2^31, got {list(canvas)}")
    for b, target in enumerate(targets):
        name = f"targets[{b}]"
        check.strided(target, name)
        check.rank(target, name, "[T, h, w]", 3)
        if target.dtype not in TARGET_DTYPES:
            raise TypeError(f"{name} must be bool, integer or floating, got {target.dtype}")
        count, height, width = target.shape
        if count > 0 and height * width == 0:
            raise ValueError(f"{name} must have at least one cell (h*w > 0), got shape {check.shape_of(target)}")
        if canvas is not None and (height > canvas[0] or width > canvas[1]):
            raise ValueError(f"{name} must fit on the canvas {list(canvas)}, got shape {check.shape_of(target)}")
        check.same_device(target, name, logits, "logits")
    check.strided(coords, "coords")


def check_mask_costs(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> None:
    """The checks of :func:`mask_costs`, shared with the fake kernel."""
    check_masks(logits, targets, coords, label_mode, padding_mode, canvas)
    check.coords(coords, logits, "logits", grid=False)


def check_mask_losses(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> None:
    """The checks of :func:`mask_losses` but those of the values of indices, shared with the fake kernels."""
    check_masks(logits, targets, coords, label_mode, padding_mode, canvas)
    check.index(image_index, "image_index", None, "", logits)
    check.coords(coords, image_index, "image_index", grid=False)
    check.index(query_index, "query_index", image_index, "image_index", logits)
    check.index(target_index, "target_index", image_index, "image_index", logits)


def check_pairs(
    logits: Tensor, targets: Sequence[Tensor], image_index: Tensor, query_index: Tensor, target_index: Tensor
) -> None:
    """The range of the indices, on the CPU."""
    check.in_range(image_index, "image_index", logits.shape[0], "B")
    check.in_range(query_index, "query_index", logits.shape[1], "Q")
    if image_index.device.type == "cpu":
        counts = torch.tensor([target.shape[0] for target in targets])[image_index]
        wrong = ((target_index < 0) | (target_index >= counts)).nonzero()
        if wrong.numel():
            n = int(wrong[0, 0])
            raise IndexError(
                f"target_index must lie in [0, T) = [0, {int(counts[n])}) of image {int(image_index[n])}, got "
                f"{int(target_index[n])} at position {n}"
            )


def _arithmetic(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _at_points(
    masks: Tensor, coords: Tensor, dtype: torch.dtype, mode: str, padding_mode: str, canvas: Sequence[int] | None
) -> Tensor:
    """Targets ``masks [T, h, w]`` at ``coords [P, 2]``: ``[T, P]``."""
    if masks.shape[0] == 0:
        return torch.zeros((0, coords.shape[0]), dtype=dtype, device=coords.device)
    masks = masks.detach().to(dtype)
    if canvas is not None:
        masks = F.pad(masks, (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))
    return point_sample(masks.unsqueeze(0), coords.unsqueeze(0), mode, padding_mode)[0]


def _pairs_at_points(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    label_mode: str,
    padding_mode: str,
    canvas: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``x`` and ``y``, both ``[N, P]``: the logits of each pair, and its target, at its points."""
    dtype = _arithmetic(logits)
    x = point_sample(logits[image_index, query_index].unsqueeze(1).to(dtype), coords, padding_mode=padding_mode)
    numbers = ([int(n) for n in index] for index in (image_index, target_index))  # torch.func wraps them
    pairs = zip(*numbers, coords, strict=True)
    y = [_at_points(targets[b][t : t + 1], at, dtype, label_mode, padding_mode, canvas) for b, t, at in pairs]
    return x.squeeze(1), torch.cat(y) if y else x.new_zeros(coords.shape[:2])


@checked
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
    """Binary cross-entropy and dice loss of N pairs of a query and a target, each at its own points: ``[N]``, ``[N]``.

    A target is padded with zeros at the right and at the bottom to ``canvas``, and then sampled as the logits are.
    """
    options = label_mode, padding_mode, canvas
    check_mask_losses(logits, targets, coords, image_index, query_index, target_index, *options)
    check_pairs(logits, targets, image_index, query_index, target_index)
    x, y = _pairs_at_points(logits, targets, coords, image_index, query_index, target_index, *options)
    cross_entropy = (F.softplus(x) - x * y).sum(1) / max(coords.shape[1], 1)
    s = x.sigmoid()
    return cross_entropy, 1 - (2 * (s * y).sum(1) + 1) / (s.sum(1) + y.sum(1) + 1)


def _mask_losses_backward(
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
    """The gradient of ``logits``. With ``n = 2 sum(s y) + 1`` and ``d = sum(s) + sum(y) + 1`` that of x is
    ``cross_entropy_grad (s - y) / P + dice_grad s (1 - s) (n / d - 2 y) / d``, spread over the four cells around.
    """
    options = label_mode, padding_mode, canvas
    check_mask_losses(logits, targets, coords, image_index, query_index, target_index, *options)
    check_loss_grads(cross_entropy_grad, dice_grad, logits, image_index)
    check_pairs(logits, targets, image_index, query_index, target_index)
    x, y = _pairs_at_points(logits, targets, coords, image_index, query_index, target_index, *options)
    s = x.sigmoid()
    d = s.sum(1, keepdim=True) + y.sum(1, keepdim=True) + 1
    ratio = (2 * (s * y).sum(1, keepdim=True) + 1) / d
    slope = cross_entropy_grad.unsqueeze(1) * (s - y) / max(coords.shape[1], 1)
    slope = slope + dice_grad.unsqueeze(1) * s * (1 - s) * (ratio - 2 * y) / d
    planes = logits[image_index, query_index].unsqueeze(1).to(x.dtype)
    spread = _point_sample_backward(slope.unsqueeze(1), [planes], coords, "bilinear", padding_mode, False, True, False)[
        0
    ]
    images, queries, height, width = logits.shape
    total = x.new_zeros(images * queries, height, width)
    total.index_add_(0, image_index * queries + query_index, spread.squeeze(1))
    return torch.empty_like(logits, memory_format=gradient_format(logits)).copy_(total.view(logits.shape))


def check_loss_grads(cross_entropy_grad: Tensor, dice_grad: Tensor, logits: Tensor, image_index: Tensor) -> None:
    for name, grad in (("cross_entropy_grad", cross_entropy_grad), ("dice_grad", dice_grad)):
        if tuple(grad.shape) != tuple(image_index.shape):
            raise ValueError(
                f"{name} must have shape [N] with N = {image_index.shape[0]} as in image_index, "
                f"got {check.shape_of(grad)}"
            )
        if grad.dtype != _arithmetic(logits):
            raise TypeError(f"{name} must be {_arithmetic(logits)}, got {grad.dtype}")
        check.same_device(grad, name, logits, "logits")


@checked
def mask_costs(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    *,
    label_mode: str = "bilinear",
    padding_mode: str = "zeros",
    canvas: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of every query with every target of its image at the points of the image: ``[B, Q, T]`` twice.

    ``T`` is the largest number of targets of an image; what lies beyond the targets of an image is zero.
    """
    check_mask_costs(logits, targets, coords, label_mode, padding_mode, canvas)
    images, queries = logits.shape[:2]
    dtype, wide = _arithmetic(logits), widest(logits.device)
    size = (images, queries, max((len(target) for target in targets), default=0))
    cross_entropy, dice = (torch.zeros(size, dtype=dtype, device=logits.device) for _ in range(2))
    x = point_sample(logits.detach().to(dtype), coords, padding_mode=padding_mode)
    with torch.autocast(logits.device.type, enabled=False):  # which would round the products to half
        for b, target in enumerate(targets):
            y = _at_points(target, coords[b], dtype, label_mode, padding_mode, canvas).to(wide)
            s, at = x[b].sigmoid().to(wide), x[b].to(wide)
            entropy = F.softplus(at).sum(1, keepdim=True) - at @ y.T
            cross_entropy[b, :, : len(target)] = entropy / max(coords.shape[1], 1)
            dice[b, :, : len(target)] = 1 - (2 * s @ y.T + 1) / (s.sum(1, keepdim=True) + y.sum(1) + 1)
    return cross_entropy, dice
