"""Decoders and data sets are found by importing the files of their package: a new one needs no entry in a list."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import cache


@cache
def import_modules(package: str) -> None:
    """Import every module of an imported package, once; each registers what it holds."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        importlib.import_module(module.name)
