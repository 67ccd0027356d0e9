"""Losses of the models. N images, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segmentation_loss(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, ignore_index: int = 255, mean: str = "valid"
) -> Tensor:
    """Cross-entropy of ``logits [N, C, ...]`` against integer ``labels [N, ...]``, a scalar in float32 (float64 for
    float64).

    ``mean="valid"`` divides the (class-weighted) sum by the summed weights of the labels that are not ``ignore_index``;
    ``mean="all"`` divides it by the number of labels, ignored ones included. Without any valid label the loss is
    exactly 0 and its gradient is 0, never NaN. Half logits are widened first.
    """
    if mean not in ("valid", "all"):
        raise ValueError(f"mean must be valid or all, got {mean!r}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = labels.long()
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
    if mean == "all":
        return total / max(1, labels.numel())
    valid = labels != ignore_index
    if weights is None:
        count = valid.sum().to(total.dtype)
    else:
        count = (weights[labels.masked_fill(~valid, 0)] * valid).sum()
    return total / torch.where(count > 0, count, torch.ones_like(count))
