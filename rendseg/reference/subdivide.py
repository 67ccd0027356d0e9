"""One step of subdivision: PointRend (Kirillov et al. 2020), section 3.1. N images, C classes, h w coarse grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check
from .uncertain_points import uncertain_points


def subdivide(
    logits: Tensor,
    num_points: int,
    scale_factor: int = 2,
    align_corners: bool = False,
    class_index: Tensor | None = None,
    return_logits: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Upsample bilinearly by ``scale_factor`` and select: ``(logits [N, C, s*h, s*w] | None, indices, coords)``.

    The margin is that of the stored (rounded) values.
    """
    check.logits(logits)
    check.num_points(num_points)
    check.class_index(class_index, logits)
    if scale_factor < 1:
        raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
    size = (logits.shape[2] * scale_factor, logits.shape[3] * scale_factor)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[0] == 0:  # interpolate refuses an empty batch of zero images on some versions
        fine = logits.new_zeros((0, logits.shape[1], *size))
    else:
        fine = F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners).to(logits.dtype)
    indices, coords = uncertain_points(fine, num_points, class_index)
    return (fine if return_logits else None), indices, coords
