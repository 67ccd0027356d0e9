"""Writing refined points back. Shapes: N images, C classes, H W grid, P points."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check


def _check(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    check.logits(logits)
    n, c, height, width = logits.shape
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 2 or indices.shape[0] != n:
        raise ValueError(f"indices must have shape [N, P] with N = {n} as in logits, got {check.shape_of(indices)}")
    if values.dim() != 3 or tuple(values.shape) != (n, c, indices.shape[1]):
        raise ValueError(
            f"values must have shape [N, C, P] = [{n}, {c}, {indices.shape[1]}] as in logits and indices, "
            f"got {check.shape_of(values)}"
        )
    if values.dtype != logits.dtype:
        raise TypeError(f"values must have the dtype of logits ({logits.dtype}), got {values.dtype}")
    check.same_device(indices, "indices", logits, "logits")
    check.same_device(values, "values", logits, "logits")
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < height * width):
        raise IndexError(
            f"indices must lie in [0, H*W) = [0, {height * width}), got values from {int(indices.min())} to "
            f"{int(indices.max())}"
        )


def scatter_points(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``out[n, :, indices[n, p]] = values[n, :, p]``, everything else as in ``logits``; out of place."""
    _check(logits, indices, values)
    flat = logits.flatten(2)
    return flat.scatter(2, indices.unsqueeze(1).expand(-1, flat.shape[1], -1), values).view_as(logits)


def scatter_points_(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The in-place form of :func:`scatter_points`."""
    return logits.copy_(scatter_points(logits, indices, values))
