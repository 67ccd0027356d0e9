"""The inference loop: PointRend (Kirillov et al. 2020), section 3.1. N images, C classes, h w coarse grid, P points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checks as check
from .point_sample import PADDING_MODES, point_sample
from .scatter_points import scatter_points
from .subdivide import subdivide
from .uncertain_points import cell_centres

Head = Callable[[Tensor, Tensor], Tensor]


def resolve_steps(
    coarse: Tensor, steps: int | None, output_size: Sequence[int] | None, scale_factor: int
) -> int:
    """Number of steps, from ``steps`` or from an ``output_size`` that steps of ``scale_factor`` reach exactly."""
    if (steps is None) == (output_size is None):
        raise ValueError(f"exactly one of steps and output_size must be given, got steps={steps}, output_size={output_size}")
    if scale_factor < 2:
        raise ValueError(f"scale_factor must be at least 2, got {scale_factor}")
    if steps is not None:
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        return steps
    assert output_size is not None
    height, width = coarse.shape[2:]
    count = 0
    while height < output_size[0] or width < output_size[1]:
        height, width, count = height * scale_factor, width * scale_factor, count + 1
    if (height, width) != tuple(output_size):
        raise ValueError(
            f"output_size {tuple(output_size)} cannot be reached from {tuple(coarse.shape[2:])} by steps of {scale_factor}; "
            f"the next size that can is {(height, width)}: pad the image, refine, then crop"
        )
    return count


def label_dtype(classes: int) -> torch.dtype:
    if classes > 32768:
        raise ValueError(f'output="labels" holds at most 32768 classes, got {classes}')
    return torch.uint8 if classes <= 256 else torch.int16


def refine(
    coarse: Tensor,
    features: Tensor | Sequence[Tensor],
    head: Head,
    *,
    steps: int | None = None,
    output_size: Sequence[int] | None = None,
    num_points: int,
    coarse_source: str = "original",
    scale_factor: int = 2,
    align_corners: bool = False,
    padding_mode: str = "zeros",
    output: str = "logits",
) -> Tensor:
    """Subdivide, gather, ``head(fine [N, Cf, P], coarse [N, C, P]) -> [N, C, P]``, scatter, repeat."""
    check.logits(coarse, "coarse")
    check.num_points(num_points)
    check.option(coarse_source, "coarse_source", ("original", "current"))
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    check.option(output, "output", ("logits", "labels"))
    steps = resolve_steps(coarse, steps, output_size, scale_factor)
    if output == "labels":
        label_dtype(coarse.shape[1])
    current = coarse
    for _ in range(steps):
        previous = current
        size = (previous.shape[2] * scale_factor, previous.shape[3] * scale_factor)
        if num_points >= size[0] * size[1]:  # every cell is recomputed, so nothing is selected
            indices = torch.arange(size[0] * size[1], device=coarse.device).expand(coarse.shape[0], -1)
            coords = cell_centres(indices, *size)
            fine_logits = coarse.new_zeros((coarse.shape[0], coarse.shape[1], *size))
        else:
            fine_logits, indices, coords = subdivide(previous, num_points, scale_factor, align_corners)
        source = coarse if coarse_source == "original" else previous
        values = head(
            point_sample(features, coords, padding_mode=padding_mode),
            point_sample(source, coords, padding_mode=padding_mode),
        )
        current = scatter_points(fine_logits, indices, values.to(fine_logits.dtype))
    if output == "labels":
        return current.argmax(1).to(label_dtype(coarse.shape[1]))
    return current
