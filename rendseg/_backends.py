"""Which implementations are usable here, why the rest is not, and the choice between them.

The choice is one process-wide setting (not per thread), so that ``torch.compile`` can guard on it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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


KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# (operator, dispatch key) that rendseg.ops filled with Triton because the compiled library has no kernel there.
FALLBACKS: set[tuple[str, str]] = set()


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the compiled library registered a kernel of ``op`` for ``"cpu"`` or ``"cuda"``."""
    key = KEYS.get(device_type)
    if not _extension.LOADED or key is None or (op, key) in FALLBACKS:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"rendseg::{op}", key))


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


@cache
def triton_ops() -> dict[str, str]:
    """Operators that have a Triton kernel, and their file in ``kernels/``.

    These are the keys of ``IMPLEMENTATIONS`` in each file, read from its text: importing it would need Triton.
    """
    from . import kernels

    found: dict[str, str] = {}
    for path in sorted(p for folder in kernels.__path__ for p in Path(folder).glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == "IMPLEMENTATIONS" for target in targets)
            if named and isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
                found.update({str(key.value): path.stem for key in node.value.keys if isinstance(key, ast.Constant)})
    return found


def triton_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def triton_wanted() -> str:
    """What torch asks pip for, as ``"triton==3.8.0"``; ``"triton"`` if it asks for none, as builds for the CPU do."""
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        found = re.match(r"([\w-]*triton[\w-]*)\s*\(?\s*(==\s*[\w.+]+)", requirement)
        if found:
            return found[1] + found[2].replace(" ", "")
    return "triton"


def interpreted() -> bool:
    """Whether Triton will interpret its kernels on the CPU. The variable must be set before Python starts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton() -> BackendStatus:
    if not triton_ops():
        cause = "this installation of rendseg holds no Triton kernels"
        return BackendStatus("triton", False, (), cause, "install rendseg again")
    if not triton_installed():
        cause = "the package triton is not installed"
        return BackendStatus("triton", False, (), cause, f'pip install "{triton_wanted()}"')
    devices: tuple[str, ...] = ("cpu",) if interpreted() else ()
    if torch.cuda.is_available():
        devices += ("cuda",)
    if not devices:
        return BackendStatus(
            "triton",
            False,
            (),
            "torch finds no GPU",
            "run on a machine with a GPU; or start Python with TRITON_INTERPRET=1, which interprets the kernels on the "
            "CPU, slowly, for tests",
        )
    return BackendStatus("triton", True, devices)


def serving(op: str, device_type: str) -> str:
    """Which backend runs ``op`` on tensors of a device under the setting in force; empty when it would be refused."""
    chosen = _STATE.name
    if chosen == "reference":
        return "reference"
    if chosen == "triton":
        return "triton" if op in triton_ops() and device_type in backends["triton"].devices else ""
    if has_kernel(op, device_type):
        return "cpp"
    if chosen == "cpp":
        return ""
    return "triton" if device_type == "cuda" and triton_installed() and op in triton_ops() else "reference"


def warn_of_reference(device_type: str) -> None:
    """Warns once, at the first call that the reference serves on a CPU or GPU that could have had compiled kernels."""
    if sys.platform != "linux" or device_type not in KEYS:
        return
    cause, remedy = _extension.CAUSE, _extension.REMEDY
    if _extension.LOADED and device_type == "cuda":
        cause, remedy = cuda_missing()
    if cause and "RENDSEG_" not in cause:  # such a setting was made on purpose
        _extension.warn_once(cause, remedy)


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
# Called with every change of the setting: rendseg.ops routes the operators to Triton and back.
ON_CHANGE: list[Callable[[str], None]] = []


def _apply(name: str, error: str) -> None:
    _STATE.name, _STATE.error = name, error
    for notify in ON_CHANGE:
        notify("auto" if error else name)


def current_backend() -> str:
    """The name in force: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``."""
    return _STATE.name


def set_backend(name: str) -> None:
    """Choose the implementation of every op in this process.

    ``"auto"`` takes the fastest that is usable for each device: compiled kernels, else Triton on a GPU, else the
    reference. ``"triton"`` routes every operator to Triton, compiled kernels or not; one that has no Triton kernel then
    raises. Asking for a backend that cannot be used raises ``RuntimeError`` with the cause and the remedy; the setting
    in force is then kept.
    """
    _require(name, "name")
    _apply(name, "")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with rendseg.backend("reference"): ...`` restores the previous choice on leaving."""
    previous, error = _STATE.name, _STATE.error
    set_backend(name)
    try:
        yield
    finally:
        _apply(previous, error)
