"""Weights of other frameworks: read without executing anything, renamed by tables (``formats/``), and put into networks
of rendseg. ``rendseg convert`` is the command; ``docs/convert.md`` says what loads."""

from .containers import Source, read
from .errors import ConversionError

__all__ = ["ConversionError", "Source", "read"]
