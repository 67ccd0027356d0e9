"""Placeholder: the reference, until the op lands."""

from ..reference.uncertain_points import sample_uncertain_points, uncertain_points, uncertainty

__all__ = ["sample_uncertain_points", "uncertain_points", "uncertainty"]
