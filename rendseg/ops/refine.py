"""Placeholder: the reference, until the op lands."""

from ..reference.refine import refine

__all__ = ["refine"]
