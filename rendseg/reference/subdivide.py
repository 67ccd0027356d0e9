"""One step of subdivision: PointRend (Kirillov et al. 2020), section 3.1. N images, C classes, h w coarse grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check
from ._types import checked
from .uncertain_points import check_class_index, uncertain_points


def countable(height: int, width: int) -> bool:
    """Whether an upsampled map has sides below 2^31 and fewer than 2^32 cells."""
    return height < 2**31 and width < 2**31 and height * width < 2**32


def check_subdivide(logits: Tensor, num_points: int, class_index: Tensor | None, scale_factor: int) -> None:
    check.logits(logits)
    check.num_points(num_points)
    check.class_index(class_index, logits)
    if scale_factor < 1:
        raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
    height, width = logits.shape[2] * scale_factor, logits.shape[3] * scale_factor
    if scale_factor >= 2**31 or not countable(height, width):
        raise ValueError(
            f"scale_factor must give fewer than 2^32 cells, got {scale_factor} for shape {check.shape_of(logits)}"
        )


def label_dtype(classes: int) -> torch.dtype:
    """uint8 where it holds every class, else int16."""
    if classes > 32768:
        raise ValueError(f'output="labels" holds at most 32768 classes, got {classes}')
    return torch.uint8 if classes <= 256 else torch.int16


def upsample(logits: Tensor, scale_factor: int, align_corners: bool) -> Tensor:
    """Bilinear, in float32 for halves and rounded once; the result has the layout of ``logits``.

    ``F.interpolate`` rounds positions, except at half-pixel powers of two. Elsewhere a weight that is zero may come out
    tiny, by the processor: an infinity beside such a cell is then infinite or NaN (0 * inf). So the exact weights are
    taken there.
    """
    size = (logits.shape[2] * scale_factor, logits.shape[3] * scale_factor)
    layout = torch._prims_common.suggest_memory_format(logits)
    if logits.shape[0] == 0:  # no image to interpolate
        return logits.new_zeros((0, logits.shape[1], *size)).contiguous(memory_format=layout) + logits.sum()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if align_corners or scale_factor & (scale_factor - 1):
        for dim in (3, 2):
            position = torch.arange(size[dim - 2], device=logits.device)
            lower, upper, weight = _taps(position, logits.shape[dim], scale_factor, align_corners)
            weight = weight.to(wide.dtype).unsqueeze(1) if dim == 2 else weight.to(wide.dtype)
            wide = wide.index_select(dim, lower) * (1 - weight) + wide.index_select(dim, upper) * weight
        fine = wide
    else:
        fine = F.interpolate(wide, size=size, mode="bilinear", align_corners=False)
    return fine.to(logits.dtype).contiguous(memory_format=layout)


def _taps(position: Tensor, size: int, scale_factor: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of upsampled cells along one axis: the cells below and above, and the weight of the upper one as a fraction."""
    if align_corners:
        numerator, denominator = position * (size - 1), max(size * scale_factor - 1, 1)
    else:
        numerator, denominator = (2 * position + (1 - scale_factor)).clamp(min=0), 2 * scale_factor
    lower = torch.div(numerator, denominator, rounding_mode="floor")
    rest = (numerator - lower * denominator).double()
    # At a factor of one a cell has no other neighbour than itself: 0 * inf is NaN.
    upper = (lower + 1).clamp(max=size - 1) if scale_factor > 1 else lower
    return lower, upper, rest / torch.full_like(rest, denominator)


def upsample_cells(logits: Tensor, indices: Tensor, scale_factor: int, align_corners: bool) -> Tensor:
    """Cells ``indices [N, P]`` of the upsampled map, ``[N, C, P]``, without the map.

    The bits are those of the kernels of ``subdivide`` (``csrc/math/upsample.h``): ``lower_weight * a + upper_weight *
    b`` along x, then along y, every product and sum rounded, in float32 for halves, and rounded to the dtype at last.
    """
    height, width = logits.shape[2:]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    y = torch.div(indices, width * scale_factor, rounding_mode="floor")
    top, bottom, down = _taps(y, height, scale_factor, align_corners)
    left, right, across = _taps(indices - y * (width * scale_factor), width, scale_factor, align_corners)
    down, across = down.to(dtype).unsqueeze(1), across.to(dtype).unsqueeze(1)
    flat = logits.flatten(2)

    def row(y: Tensor) -> Tensor:
        a, b = (
            flat.gather(2, (y * width + x).unsqueeze(1).expand(-1, flat.shape[1], -1)).to(dtype) for x in (left, right)
        )
        return a * (1 - across) + b * across

    return (row(top) * (1 - down) + row(bottom) * down).to(logits.dtype)


@checked
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
    check_subdivide(logits, num_points, class_index, scale_factor)
    check_class_index(class_index, logits)
    fine = upsample(logits, scale_factor, align_corners)
    indices, coords = uncertain_points(fine.detach(), num_points, class_index)
    return (fine if return_logits else None), indices, coords


def subdivide_labels(
    logits: Tensor, num_points: int, scale_factor: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`subdivide` with labels for logits: ``(labels [N, s*h, s*w] uint8 or int16, indices, coords)``.

    The lowest class wins a tie, and the first NaN wins over every number, as in ``torch.argmax``.
    """
    check_subdivide(logits, num_points, None, scale_factor)
    dtype = label_dtype(logits.shape[1])
    fine = upsample(logits.detach(), scale_factor, align_corners)
    indices, coords = uncertain_points(fine, num_points)
    return fine.argmax(1).to(dtype), indices, coords


def check_subdivide_backward(grad: Tensor, height: int, width: int) -> int:
    """The factor between ``height x width`` and ``grad``, a whole one and the same in both directions."""
    check.strided(grad, "grad")
    check.rank(grad, "grad", "[N, C, H, W]", 4)
    check.feature_dtype(grad, "grad")
    scale = grad.shape[2] // height if height > 0 else 0
    if scale < 1 or width < 1 or height * scale != grad.shape[2] or width * scale != grad.shape[3]:
        raise ValueError(
            f"grad must be a whole multiple of height and width = [{height}, {width}], got {check.shape_of(grad)}"
        )
    return scale


def subdivide_backward(grad: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """Gradient of :func:`upsample` to ``[N, C, height, width]``: each cell gathers ``weight * grad``."""
    check_subdivide_backward(grad, height, width)
    layout = torch._prims_common.suggest_memory_format(grad)
    size = [*grad.shape[:2], height, width]
    if grad.shape[0] == 0:
        return grad.new_zeros(size).contiguous(memory_format=layout)
    wide = grad if grad.dtype == torch.float64 else grad.float()
    out = torch.ops.aten.upsample_bilinear2d_backward(wide, list(grad.shape[2:]), size, align_corners)
    return out.to(grad.dtype).contiguous(memory_format=layout)
