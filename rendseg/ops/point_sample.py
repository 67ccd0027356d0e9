"""Placeholder: the reference, until the op lands."""

from ..reference.point_sample import point_labels, point_sample

__all__ = ["point_labels", "point_sample"]
