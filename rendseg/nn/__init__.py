"""Building blocks."""

from .conv import ConvNorm, make_norm
from .fpn import FPN
from .point_head import PointHead

__all__ = ["FPN", "ConvNorm", "PointHead", "make_norm"]
