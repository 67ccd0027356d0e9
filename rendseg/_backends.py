"""Which implementations are usable here, why the rest is not, and the choice between them.

The choice is one process-wide setting (not per thread), so that ``torch.compile`` can guard on it.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import _extension

NAMES = ("auto", "cpp", "triton", "reference")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be asked for here; ``cause`` and ``remedy`` say why not and what to do."""

    name: str
    usable: bool
    devices: tuple[str, ...] = ()
    cause: str = ""
    remedy: str = ""


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the compiled library registered a kernel of ``op`` for ``"cpu"`` or ``"cuda"``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return bool(_extension.LOADED and key and torch._C._dispatch_has_kernel_for_dispatch_key(f"rendseg::{op}", key))


def _cpp() -> BackendStatus:
    if not _extension.LOADED:
        return BackendStatus("cpp", False, (), _extension.CAUSE, _extension.REMEDY)
    cause, remedy = cuda_missing()
    devices = tuple(d for d in ("cpu", "cuda") if compiled_ops(d) and not (d == "cuda" and cause))
    if not devices:
        return BackendStatus("cpp", False, (), "the extension holds no kernels", f"rebuild it: {_extension.BUILD}")
    return BackendStatus("cpp", True, devices, cause, remedy)


def compiled_ops(device_type: str) -> tuple[str, ...]:
    """The operators for which the compiled library holds a kernel for ``"cpu"`` or ``"cuda"``."""
    names = (name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rendseg::"))
    return tuple(sorted(name for name in names if has_kernel(name, device_type)))


def cuda_missing() -> tuple[str, str]:
    """``(cause, remedy)`` why compiled CUDA kernels cannot run here; empty when they can."""
    facts = _extension.facts()
    if not getattr(facts, "CUDA", False):
        reason = getattr(facts, "CUDA_REASON", "") or "the build left no record"
        if not torch.version.cuda:
            first = "install a CUDA build of torch and a CUDA toolkit of its major version, then build again"
        elif "RENDSEG_CUDA=0" in reason:
            first = "build without RENDSEG_CUDA=0"
        else:
            first = f"install the CUDA toolkit {torch.version.cuda.split('.')[0]}, set CUDA_HOME to it, and build again"
        return f"no CUDA kernels are built: {reason}", f"{first}: {_extension.BUILD}"
    if not torch.version.cuda:
        return "the installed torch is built without CUDA", "install a CUDA build of torch"
    if not torch.cuda.is_available():
        return (
            "the CUDA kernels are built, but torch finds no GPU",
            "run where there is an NVIDIA GPU and its driver",
        )
    return "", ""


def triton_ops() -> tuple[str, ...]:
    """The op files in ``kernels/``: the operators that have Triton kernels."""
    from . import kernels

    return tuple(sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_")))


def _triton() -> BackendStatus:
    if not triton_ops():
        cause = "this version of rendseg has no Triton kernels yet"
        return BackendStatus("triton", False, (), cause, 'use set_backend("auto"), "cpp" or "reference"')
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, (), "the package triton is not installed", "pip install triton")
    if not torch.cuda.is_available():
        return BackendStatus(
            "triton", False, (), "torch finds no GPU", "run on a machine with a GPU, or use the other backends"
        )
    return BackendStatus("triton", True, ("cuda",))


class _Backends(Mapping[str, BackendStatus]):
    """Read-only mapping from backend name to :class:`BackendStatus`; printing it gives a small table."""

    _MAKERS = {"cpp": _cpp, "triton": _triton, "reference": lambda: BackendStatus("reference", True, ("any",))}

    def __getitem__(self, name: str) -> BackendStatus:
        return self._MAKERS[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._MAKERS)

    def __len__(self) -> int:
        return len(self._MAKERS)

    def __repr__(self) -> str:
        lines = []
        for status in self.values():
            what = f"usable on {', '.join(status.devices)}" if status.usable else f"not usable: {status.cause}"
            lines.append(f"{status.name:<10} {what}")
        return "\n".join(lines)


backends = _Backends()


class _State:
    """The setting, and why it cannot be served when it came from the environment."""

    def __init__(self) -> None:
        self.name = os.environ.get("RENDSEG_BACKEND") or "auto"
        try:
            _require(self.name, "RENDSEG_BACKEND")
            self.error = ""
        except (ValueError, RuntimeError) as error:  # importing must work; the first call raises
            self.error = str(error)


def _require(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        return
    status = backends[name]
    if not status.usable:
        raise RuntimeError(f"backend {name!r} ({source}) cannot be used here: {status.cause}. Remedy: {status.remedy}")


_STATE = _State()


def current_backend() -> str:
    """The name in force: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``."""
    return _STATE.name


def set_backend(name: str) -> None:
    """Choose the implementation of every op in this process.

    ``"auto"`` takes the fastest that is usable for each device. Asking for one that cannot be used raises
    ``RuntimeError`` with the cause and the remedy; the setting in force is then kept.
    """
    _require(name, "name")
    _STATE.name, _STATE.error = name, ""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with rendseg.backend("reference"): ...`` restores the previous choice on leaving."""
    previous, error = _STATE.name, _STATE.error
    set_backend(name)
    try:
        yield
    finally:
        _STATE.name, _STATE.error = previous, error
