"""Loads the compiled library ``rendseg._C`` once, and keeps the reason when it cannot be loaded.

``import rendseg`` must work everywhere, so nothing here raises: the cause is kept for ``rendseg doctor`` and for the
first call that asks for the C++ kernels by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch  # the extension links against libtorch, which this import loads


def _load() -> tuple[ModuleType | None, str, str]:
    """Return ``(module, cause, remedy)``; cause and remedy are empty when the module loaded."""
    if os.environ.get("RENDSEG_DISABLE_EXTENSION") == "1":
        return None, "RENDSEG_DISABLE_EXTENSION=1 is set", "unset RENDSEG_DISABLE_EXTENSION"
    if importlib.util.find_spec("rendseg._C") is None:
        return (
            None,
            "the extension rendseg._C is not built for this Python",
            "install a C++17 compiler and run `python setup.py build_ext --inplace` in a checkout, "
            "or `pip install --no-build-isolation .`",
        )
    try:
        return importlib.import_module("rendseg._C"), "", ""
    except Exception as error:  # ImportError, OSError, or a schema clash reported by libtorch
        built = getattr(_facts(), "TORCH_VERSION", None)
        hint = f" (built for torch {built}, running {torch.__version__})" if built and built != torch.__version__ else ""
        return (
            None,
            f"rendseg._C does not load: {type(error).__name__}: {error}{hint}",
            "rebuild it against the installed torch: `python setup.py build_ext --inplace --force`",
        )


def _facts() -> ModuleType | None:
    """What the build wrote down about itself (``rendseg/_build_facts.py``), readable even when the library is not."""
    try:
        return importlib.import_module("rendseg._build_facts")
    except ImportError:
        return None


C, CAUSE, REMEDY = _load()
LOADED = C is not None
