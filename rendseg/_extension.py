"""Loads the compiled library ``rendseg._C`` once, and keeps the reason when it cannot be loaded.

``import rendseg`` must work everywhere, so nothing here raises: the cause is kept for ``rendseg doctor`` and for the
first call that asks for the C++ kernels by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch  # the extension links against libtorch, which this import loads

from . import _toolchain

BUILD = f"`python setup.py build_ext --inplace` in a checkout, or `{_toolchain.INSTALL}`"
_FOLDER = Path(__file__).resolve().parent


def _is_here(name: str) -> bool:
    """Whether this very folder holds ``rendseg.<name>``; an editable install of another checkout may offer its own."""
    return importlib.machinery.PathFinder.find_spec(f"rendseg.{name}", [str(_FOLDER)]) is not None


def facts() -> ModuleType | None:
    """What the build wrote down about itself (``rendseg/_build_facts.py``), readable even when the library is not."""
    return importlib.import_module("rendseg._build_facts") if _is_here("_build_facts") else None


def _release(version: str) -> str:
    """``2.15.0+cu130`` -> ``2.15``: libtorch keeps its binary interface within one minor release only."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _absent(folder: Path) -> tuple[str, str]:
    """Cause and remedy when there is no library for this Python."""
    usable = {f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    others = sorted(f.name for f in folder.glob("_C.*") if f.suffix in (".so", ".pyd") and f.name not in usable)
    if others:
        this = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return f"the extension is built for another Python ({', '.join(others)}), this is {this}", f"build it: {BUILD}"
    reason = getattr(facts(), "REASON", "")
    if "NO_EXTENSION" in reason:
        return f"the extension rendseg._C was left out: {reason}", f"build it without that setting: {BUILD}"
    if "torch cannot be imported" in reason:
        remedy = f"in the folder of the sources, run {_toolchain.INSTALL}"
        return f"the extension rendseg._C was not built: {reason}", remedy
    cause = "the extension rendseg._C is not built" + (f": {reason}" if reason else "")
    return cause, f"install a C++20 compiler (GCC 11 or later) and run {BUILD}"


def _explain(error: Exception, built: str, running: str) -> tuple[str, str]:
    """Cause and remedy when the library is there and does not load."""
    text = f"{type(error).__name__}: {error}"
    rebuild = f"rebuild it against the installed torch: {BUILD}"
    other = f" (built for torch {built}, running {running})" if built and built != running else ""
    missing = re.search(r"(\S+?): cannot open shared object file", str(error))
    if missing:
        name = missing[1]
        if re.match(r"lib(cudart|c10_cuda|torch_cuda)", name):
            return (
                f"rendseg._C needs the shared library {name}, which is missing: it was built for a CUDA torch{other}",
                f"install the torch that it was built for, or {rebuild}",
            )
        return (
            f"rendseg._C needs the shared library {name}, which is missing{other}",
            f"install the package that holds {name}, or {rebuild}",
        )
    if "undefined symbol" in str(error):
        return f"rendseg._C was built against another torch, whose symbols differ{other}: {text}", rebuild
    if re.search(r"version `\w+_[\d.]+' not found", str(error)):
        return f"rendseg._C needs newer system libraries than are here: {text}", f"build it on this machine: {BUILD}"
    return f"rendseg._C does not load{other}: {text}", rebuild


@functools.cache
def warn_once(cause: str, remedy: str) -> None:
    """Says, once in a process, that the compiled kernels are not used."""
    warnings.warn(
        f"the operators run without the compiled kernels, which is slower: {cause}. Remedy: {remedy}. "
        "RENDSEG_DISABLE_EXTENSION=1 silences this",
        RuntimeWarning,
        stacklevel=2,
    )


def _load() -> tuple[ModuleType | None, str, str]:
    """Return ``(module, cause, remedy)``; cause and remedy are empty when the module loaded."""
    if os.environ.get("RENDSEG_DISABLE_EXTENSION", "") not in ("", "0"):
        value = os.environ["RENDSEG_DISABLE_EXTENSION"]
        return None, f"RENDSEG_DISABLE_EXTENSION={value} is set", "unset RENDSEG_DISABLE_EXTENSION"
    if not _is_here("_C"):
        return None, *_absent(_FOLDER)
    built = str(getattr(facts(), "TORCH_VERSION", ""))
    if built and _release(built) != _release(torch.__version__):
        # Not tried: a library of another release may crash the process instead of raising.
        cause = f"rendseg._C was built for torch {built}, running {torch.__version__}: the binary interfaces differ"
        remedy = f"rebuild it against the installed torch: {BUILD}"
        warn_once(cause, remedy)
        return None, cause, remedy
    try:
        return importlib.import_module("rendseg._C"), "", ""
    except Exception as error:  # ImportError, OSError, or a schema clash reported by libtorch
        return None, *_explain(error, built, torch.__version__)


C, CAUSE, REMEDY = _load()
LOADED = C is not None
