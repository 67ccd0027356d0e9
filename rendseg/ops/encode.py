"""Placeholder: the reference, until the op lands."""

from ..reference.encode import aggregate, encode, scaled_l2

__all__ = ["aggregate", "encode", "scaled_l2"]
