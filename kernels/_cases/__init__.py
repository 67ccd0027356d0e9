"""What is compiled without a GPU: ``calls()`` of ``<op>.py`` yields names and calls of launchers on meta tensors.

``_compile.py`` takes kernel, tile, constants and specialisation of each case from the launches that a call makes. The
sizes are usual ones, because Triton compiles apart for an integer that is 1 or a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Calls = Iterator[tuple[str, Callable[[], object]]]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def indices_of(images: int, points: int) -> Tensor:
    return meta(images, points, dtype=torch.int64)


def layout_name(channels_last: bool) -> str:
    return "channels_last" if channels_last else "nchw"
