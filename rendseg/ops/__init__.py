"""The operators: fused kernels where one exists, else the reference. ``torch.ops.rendseg`` holds the same functions."""

from . import _flops as _flops
from .encode import aggregate, encode, scaled_l2
from .mask_losses import mask_costs, mask_losses
from .point_sample import point_labels, point_sample
from .refine import refine
from .scatter_points import scatter_points, scatter_points_
from .subdivide import subdivide
from .uncertain_points import sample_uncertain_points, uncertain_points, uncertainty

__all__ = [
    "aggregate",
    "encode",
    "mask_costs",
    "mask_losses",
    "point_labels",
    "point_sample",
    "refine",
    "sample_uncertain_points",
    "scaled_l2",
    "scatter_points",
    "scatter_points_",
    "subdivide",
    "uncertain_points",
    "uncertainty",
]
