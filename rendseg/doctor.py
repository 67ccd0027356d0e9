"""``rendseg doctor``: what is installed, what was built, what can be used here, and why the rest cannot.

Needs nothing but torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import _backends, _extension, _toolchain
from ._version import __version__

# What `pip install rendseg[train]` brings; import name and the name on PyPI.
TRAIN_PACKAGES = (
    ("timm", "timm"),
    ("torchvision", "torchvision"),
    ("torchmetrics", "torchmetrics"),
    ("accelerate", "accelerate"),
    ("pydantic", "pydantic"),
    ("yaml", "pyyaml"),
    ("tqdm", "tqdm"),
    ("tensorboard", "tensorboard"),
    ("matplotlib", "matplotlib"),
    ("typer", "typer"),
    ("PIL", "pillow"),
)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compiler() -> str:
    candidate, cause = _toolchain.find_cxx()
    if candidate is None:
        return f"{cause}; only needed to build"
    return f"{candidate}: {_toolchain.cxx_version(candidate) or 'found, but it does not run'}"


def _toolkit() -> str:
    home, cause = _toolchain.find_cuda_home()
    if home is None:
        return f"{cause}; only needed to build the CUDA kernels"
    return f"{_toolchain.nvcc_release(home) or 'nvcc does not run'} at {home}"


def _torch() -> str:
    text = f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})"
    if _toolchain.too_old(torch.__version__):
        minimum = _toolchain.MIN_TORCH
        text += f": too old, rendseg needs {minimum} or later; remedy: pip install -U 'torch>={minimum}' torchvision"
    return text


def _triton() -> str:
    wanted = _backends.triton_wanted()
    name, _, version = wanted.partition("==")
    here = _version(name) or _version("triton")
    if not here:
        return f'not installed; remedy: pip install "{wanted}"'
    other = version not in ("", here)
    return here + (f', but torch wants another; remedy: pip install "{wanted}"' if other else "")


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<14}{value}" for name, value in rows]


def _versions() -> list[str]:
    return [
        "Versions",
        *_rows(
            [
                ("rendseg", f"{__version__} ({Path(__file__).resolve().parent})"),
                ("python", f"{platform.python_version()} ({sys.executable})"),
                ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
                ("torch", _torch()),
                ("triton", _triton()),
                ("compiler", _compiler()),
                ("CUDA toolkit", _toolkit()),
                ("GPU", _gpus()),
            ]
        ),
    ]


def _build() -> list[str]:
    facts = _extension.facts()
    if facts is None:
        if _extension.LOADED:
            return ["Build", "  the library is there, but it carries no record of its build"]
        return ["Build", "  no record of a build: the extension was never built here"]
    if not facts.EXTENSION:
        return ["Build", *_rows([("extension", f"no: {facts.REASON}"), ("torch", facts.TORCH_VERSION or "none")])]
    cuda = f"{facts.CUDA_VERSION}, cubins for {facts.CUDA_ARCHS}" if facts.CUDA else f"no: {facts.CUDA_REASON}"
    rows = [
        ("torch", facts.TORCH_VERSION),
        ("python", facts.PYTHON),
        ("compiler", facts.COMPILER),
        ("flags", " ".join(facts.FLAGS.get("cxx", ()))),
        ("CPU", ", ".join(facts.CPU_ISAS)),
        ("CUDA", cuda),
    ]
    if _extension.C is not None:
        try:
            rows.append(("CPU in force", f"{_extension.C.isa()} (widest on this machine: {_extension.C.widest_isa()})"))
            rows.append(("CPU products", f"{_extension.C.gemm()} (RENDSEG_CPU_GEMM=auto, own or aten)"))
        except Exception as error:  # a variable names a set that this machine lacks, or nothing there is
            rows.append(("CPU in force", f"none: {error}"))
    return ["Build", *_rows(rows)]


def _usable() -> list[str]:
    lines = ["Backends"]
    for status in _backends.backends.values():
        lines.append(
            f"  {status.name:<14}" + (f"usable on {', '.join(status.devices)}" if status.usable else "not usable")
        )
        if status.cause:
            lines.append(f"  {'':<14}cause:  {status.cause}")
            lines.append(f"  {'':<14}remedy: {status.remedy}")
    chosen = _backends.current_backend()
    source = " (RENDSEG_BACKEND)" if os.environ.get("RENDSEG_BACKEND") else ""
    lines.append(f"  {'in force':<14}{chosen}{source}")
    if _backends._STATE.error:
        lines.append(f"  {'':<14}cannot be served: {_backends._STATE.error}")
    return lines


def _table() -> list[str]:
    """Operator by backend. Private operators are gradients and steps of the public ones."""
    from .ops.schemas import SCHEMAS

    triton = _backends.triton_ops() if _backends.triton_installed() else {}
    header = ("operator", "cpp cpu", "cpp cuda", "triton", "reference", "on a GPU")
    rows = []
    for schema in SCHEMAS:
        op = schema.split("(", 1)[0]
        rows.append(
            (
                op,
                "yes" if _backends.has_kernel(op, "cpu") else "-",
                "yes" if _backends.has_kernel(op, "cuda") else "-",
                "yes" if op in triton else "-",
                "yes",
                _backends.serving(op, "cuda") or "refused",
            )
        )
    width = max(len(row[0]) for row in rows) + 2
    lines = ["Operators (yes: a kernel is here; last column: what serves a CUDA tensor under the backend in force)"]
    for row in (header, *rows):
        lines.append("  " + row[0].ljust(width) + "".join(cell.ljust(11) for cell in row[1:]).rstrip())
    lines.append(f"  {'refine'.ljust(width)}composed of those above; _refine_mlp is its fused path for stock heads")
    return lines


def _training() -> list[str]:
    missing = [name for _, name in TRAIN_PACKAGES if not _version(name)]
    if not missing:
        return ["Training", "  every package of rendseg[train] is installed"]
    return [
        "Training",
        f"  cause:  missing {', '.join(missing)}; the operators work without, `rendseg train` does not",
        f"  remedy: pip install {' '.join(missing)}",
    ]


def report() -> str:
    """The whole report, as printed by ``rendseg doctor``."""
    return "\n\n".join("\n".join(part()) for part in (_versions, _build, _usable, _table, _training))
