"""Every operator in plain PyTorch: the definition of right.

Importable without any binary; float64 where differentiable.
"""

from .encode import aggregate, encode, scaled_l2
from .mask_losses import mask_costs, mask_losses
from .point_sample import point_labels, point_sample
from .refine import HeadLayers, refine
from .scatter_points import scatter_points, scatter_points_
from .subdivide import subdivide
from .uncertain_points import sample_uncertain_points, uncertain_points, uncertainty

__all__ = [
    "HeadLayers",
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
