"""Every kernel for usual sizes, with targets of bytes and of float32; bfloat16 stands for float16 too."""

from __future__ import annotations

import functools

import torch

from ..mask_losses import mask_costs_triton, mask_losses_backward_triton, mask_losses_triton
from . import NAMES, Calls, layout_name, meta


def calls() -> Calls:
    indices = [meta(20, dtype=torch.int64) for _ in range(3)]
    modes = {"label_mode": "bilinear", "padding_mode": "zeros", "canvas": None}
    for dtype, last, kind in (
        (torch.float32, False, torch.bool),
        (torch.float32, True, torch.float32),
        (torch.bfloat16, False, torch.bool),
        (torch.float64, False, torch.uint8),
    ):
        logits = meta(1, 96, 256, 256, dtype=dtype, channels_last=last)
        targets = [meta(16, 1024, 1024, dtype=kind)]
        own, shared = meta(20, 12544, 2), meta(1, 12544, 2)
        name = f"{NAMES[dtype]} {layout_name(last)} {str(kind).removeprefix('torch.')}"
        grads = [meta(20, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
        yield name, functools.partial(mask_losses_triton, logits, targets, own, *indices, **modes)
        backward = functools.partial(mask_losses_backward_triton, *grads, logits, targets, own, *indices)
        yield f"{name} backward", functools.partial(backward, *modes.values())
        yield f"{name} costs", functools.partial(mask_costs_triton, logits, targets, shared, **modes)
        if name.startswith("fp32 nchw"):
            other = {"label_mode": "nearest", "padding_mode": "border", "canvas": (1024, 1280)}
            yield f"{name} nearest", functools.partial(mask_losses_triton, logits, targets, own, *indices, **other)
            yield f"{name} nearest costs", functools.partial(mask_costs_triton, logits, targets, shared, **other)
