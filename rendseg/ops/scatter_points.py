"""Placeholder: the reference, until the op lands."""

from ..reference.scatter_points import scatter_points, scatter_points_

__all__ = ["scatter_points", "scatter_points_"]
