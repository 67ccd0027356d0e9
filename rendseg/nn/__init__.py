"""Building blocks."""

from .conv import ConvNorm, make_norm
from .encoding import Encoding
from .fcn_head import FCNHead
from .fpn import FPN
from .point_head import PointHead
from .ppm import PPM

__all__ = ["FPN", "PPM", "ConvNorm", "Encoding", "FCNHead", "PointHead", "make_norm"]
