"""Building blocks of segmentation networks, as modules."""

from .aspp import ASPP, default_rates
from .coarse_mask_head import CoarseMaskHead
from .conv import ConvNorm, SeparableConvNorm, make_norm
from .enc_module import EncModule
from .encoding import Encoding
from .fcn_head import FCNHead
from .fpn import FPN
from .mask_criterion import MaskCriterion, MaskLosses
from .point_head import PointHead
from .ppm import PPM
from .roi_points import grid_points, mask_labels, place_in_boxes, roi_point_sample

__all__ = [
    "ASPP",
    "FPN",
    "CoarseMaskHead",
    "ConvNorm",
    "EncModule",
    "Encoding",
    "FCNHead",
    "MaskCriterion",
    "MaskLosses",
    "PPM",
    "PointHead",
    "SeparableConvNorm",
    "default_rates",
    "grid_points",
    "make_norm",
    "mask_labels",
    "place_in_boxes",
    "roi_point_sample",
]
