"""Fused operators for point-based and context-encoded segmentation, with a reference trainer."""

from ._backends import backend, backends, current_backend, set_backend
from ._version import __version__
from .integrations import patch, patched, unpatch

__all__ = ["__version__", "backend", "backends", "current_backend", "patch", "patched", "set_backend", "unpatch"]
