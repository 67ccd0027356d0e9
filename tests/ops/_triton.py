"""What the tests of the Triton kernels share: where they run, why they are skipped, and the launchers themselves."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The interpreter also takes CUDA tensors, by copying them; it is meant for machines without a GPU.
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None

# `pytestmark = TRITON` at the head of a test file.
TRITON = [
    pytest.mark.triton,
    pytest.mark.skipif(
        INSTALLED and not INTERPRETED and DEVICE == "cpu",
        reason="torch finds no GPU: run with TRITON_INTERPRET=1 to interpret the kernels on the CPU",
    ),
]


def implementation(file: str, op: str) -> Callable[..., Any]:
    """The launcher of ``rendseg::<op>`` in ``kernels/<file>.py``."""
    return importlib.import_module(f"rendseg.kernels.{file}").IMPLEMENTATIONS[op]


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
