"""The semantic encoding loss: Context Encoding for Semantic Segmentation (Zhang et al. 2018), section 3.1.

N images, C classes, H W size of the labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import widened


def presence_targets(labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Which classes occur in each image: integer ``labels [N, H, W]`` -> float32 ``[N, C]`` of zeros and ones.

    Labels that are ``ignore_index`` or lie outside ``0 .. C - 1`` count for nothing. Computed on the labels' device,
    without a synchronisation. Errors: ``ValueError`` for another rank or ``num_classes`` below 1, ``TypeError`` for
    labels that are not integers.
    """
    if labels.dim() != 3:
        raise ValueError(f"labels must have shape [N, H, W], got {list(labels.shape)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype}")
    index = labels.long().flatten(1)
    outside = (index == ignore_index) | (index < 0) | (index >= num_classes)
    found = torch.zeros(len(index), num_classes + 1, device=labels.device)
    return found.scatter_(1, index.masked_fill(outside, num_classes), 1.0)[:, :num_classes]


def se_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Binary cross-entropy of ``logits [N, C]`` against the classes that occur in ``labels [N, H, W]``, a scalar in
    float32 (float64 for float64), also under autocast.

    The mean over the classes and over the images that have a valid label; without any, exactly 0 with a zero gradient.
    (PyTorch-Encoding, mmsegmentation and PaddleSeg count an image that is wholly ignored as one without any class.)
    Errors: as ``presence_targets``, and ``ValueError`` when the shapes do not fit.
    """
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0]:
        raise ValueError(
            f"logits must have shape [N, C] with N = {labels.shape[0]} as in labels, got {list(logits.shape)}"
        )
    targets = presence_targets(labels, logits.shape[1], ignore_index)
    logits = widened(logits)
    counted = targets.amax(1, keepdim=True)  # 1 for an image with a valid label, else 0
    values = F.binary_cross_entropy_with_logits(
        logits.masked_fill(counted == 0, 0.0), targets.to(logits.dtype), counted.expand_as(logits), reduction="sum"
    )
    return values / (counted.sum() * logits.shape[1]).clamp(min=1)
