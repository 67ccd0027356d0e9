"""Building blocks."""

from .conv import ConvNorm, make_norm
from .encoding import Encoding
from .fpn import FPN
from .point_head import PointHead

__all__ = ["FPN", "ConvNorm", "Encoding", "PointHead", "make_norm"]
