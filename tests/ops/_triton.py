"""What the tests of the Triton kernels share: where they run, why they are skipped, and the launchers themselves."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rendseg.ops.schemas import with_defaults

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The interpreter also takes CUDA tensors, by copying them; it is meant for machines without a GPU.
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None

# `pytestmark = TRITON` at the head of a test file.
TRITON = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),  # NaN and infinity, from NumPy
    pytest.mark.skipif(
        INSTALLED and not INTERPRETED and DEVICE == "cpu",
        reason="torch finds no GPU: run with TRITON_INTERPRET=1 to interpret the kernels on the CPU",
    ),
]


def _hasten_the_interpreter() -> None:
    """Leaves out two thirds of what Triton's interpreter does, to no effect on the results.

    It patches ``triton.language`` anew at every call of a device function, while the patches of one launch last until
    its end; and it computes whether 32-bit integers overflow for an assert that is not live.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch, execute = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    if patch is None:
        return
    patched: set[str] = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        modules = {v.__name__ for v in fn.__globals__.values() if inspect.ismodule(v)} & {
            "triton.language",
            "triton.language.core",
        }
        if patched and modules <= patched:
            return None  # what a launch restores is what it patched first
        patched.update(modules)
        return patch(fn)

    def execute_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return execute(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_once


if INTERPRETED and INSTALLED:
    _hasten_the_interpreter()


def implementation(file: str, op: str) -> Callable[..., Any]:
    """The launcher of ``rendseg::<op>`` in ``kernels/<file>.py``, with the defaults of the operator."""
    return with_defaults(op, importlib.import_module(f"rendseg.kernels.{file}").IMPLEMENTATIONS[op])


def to_device(value: Any) -> Any:
    """Tensors, also within lists and dicts, on the device that runs the kernels; strides are kept."""
    if isinstance(value, torch.Tensor):
        if value.device.type == DEVICE:
            return value
        storage = torch.empty(0, dtype=value.dtype, device=DEVICE)
        storage.set_(value.untyped_storage().to(DEVICE), value.storage_offset(), value.size(), value.stride())
        return storage
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item) for item in value)
    return value
