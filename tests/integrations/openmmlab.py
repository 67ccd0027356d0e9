"""mmdet and mmseg without compiled mmcv: their point sampling is plain PyTorch, but its package loads ``mmcv._ext``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class _Absent(ModuleType):
    """Has every function that mmcv looks for; calling one is an error."""

    __file__ = "absent"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"mmcv._ext.{name} is not compiled here")

        return missing


def prepare() -> None:
    mmcv = pytest.importorskip("mmcv", reason="needs the package mmcv or mmcv-lite: pip install -e .[peers]")
    try:
        import mmcv.ops  # noqa: F401
    except ImportError:
        sys.modules["mmcv._ext"] = _Absent("mmcv._ext")
    # Both refuse mmcv 2.2, although nothing that is tested here changed in it.
    if mmcv.__version__.startswith("2.2"):
        mmcv.__version__ = "2.1.0"
