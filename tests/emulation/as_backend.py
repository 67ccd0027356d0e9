"""A pytest plugin that puts the emulated CUDA kernels in the place of the CPU kernels.

``pytest -p tests.emulation.as_backend tests/ops`` then runs the whole test suite of the operators (gradcheck, opcheck,
every dtype and layout, bad input) through the CUDA code, host and device. Slow, so it is not part of ``make test``.
``RENDSEG_EMULATED_OPS=encode,scaled_l2`` takes these operators only, the gradients of each with it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import library

import rendseg.ops  # noqa: F401  (registers the operators first)
from rendseg.ops.schemas import SCHEMAS
from tests.emulation import build

_LIBRARY = library.Library("rendseg", "IMPL")
_EMULATED = build.Emulated()


def _forward(name: str) -> Any:
    target = getattr(_EMULATED.ops, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # a kernel is called below autograd, and so is its stand-in
            return target(*args, **kwargs)

    return kernel


def _wanted(name: str) -> bool:
    chosen = os.environ.get("RENDSEG_EMULATED_OPS")
    return not chosen or name.strip("_").removesuffix("_backward") in chosen.split(",")


_TAKEN = []
for _schema in SCHEMAS:
    _name = _schema.split("(", 1)[0]
    if _wanted(_name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"rendseg_emulated::{_name}", "CPU"):
        _LIBRARY.impl(_name, _forward(_name), "CPU", allow_override=True)
        _TAKEN.append(_name)


def pytest_report_header() -> str:
    return f"emulated CUDA kernels in place of the CPU's: {', '.join(_TAKEN)}"
