"""Both kernels in both layouts; the widest of a tile, and elements of 8 bytes, take most registers."""

from __future__ import annotations

import functools

import torch

from ..scatter_points import scatter_points_backward_triton, scatter_points_triton
from . import NAMES, Calls, indices_of, layout_name, meta


def calls() -> Calls:
    for dtype, last, channels in (
        (torch.float32, True, 160),
        (torch.bfloat16, True, 19),
        (torch.float64, True, 19),
        (torch.float64, False, 19),
        (torch.float32, False, 1),
    ):
        logits = meta(2, channels, 128, 256, dtype=dtype, channels_last=last)
        values, indices = meta(2, channels, 2048, dtype=dtype), indices_of(2, 2048)
        name = f"{NAMES[dtype]} {layout_name(last)} C={channels}"
        yield name, functools.partial(scatter_points_triton, logits, indices, values)
        yield name, functools.partial(scatter_points_backward_triton, logits, indices)
