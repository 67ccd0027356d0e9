"""Building blocks of segmentation networks, as modules."""

from .aspp import ASPP, default_rates
from .conv import ConvNorm, SeparableConvNorm, make_norm
from .enc_module import EncModule
from .encoding import Encoding
from .fcn_head import FCNHead
from .fpn import FPN
from .mask_criterion import MaskCriterion, MaskLosses
from .point_head import PointHead
from .ppm import PPM

__all__ = [
    "ASPP",
    "FPN",
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
    "make_norm",
]
