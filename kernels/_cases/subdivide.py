"""Every kernel in every configuration that is used by default; bfloat16 stands for float16 too."""

from __future__ import annotations

import functools

import torch

from ..subdivide import (
    subdivide_backward_triton,
    subdivide_labels_triton,
    subdivide_triton,
    upsample_cells_triton,
)
from . import NAMES, Calls, indices_of, layout_name, meta


def calls() -> Calls:
    classes = meta(2, dtype=torch.int64)
    for dtype, kind in NAMES.items():
        for channels, width, last in ((19, 512, False), (19, 32, False), (19, 512, True), (8, 512, True)):
            logits = meta(2, channels, 128, width, dtype=dtype, channels_last=last)
            name = f"{kind} {layout_name(last)} C={channels} W={width}"
            args = (logits, 2048, 2, False)
            yield f"{name} logits", functools.partial(subdivide_triton, *args, None, True)
            if dtype == torch.float32 or last:
                yield f"{name} labels", functools.partial(subdivide_labels_triton, *args)
            if dtype == torch.float32 and (width, last) == (512, False):
                yield f"{name} nothing", functools.partial(subdivide_triton, *args, None, False)
                yield f"{name} class", functools.partial(subdivide_triton, *args, classes, False)
                one = meta(2, 1, 128, width)
                yield f"{kind} one channel", functools.partial(subdivide_triton, one, 2048, 2, False, None, True)
            if channels == 8 or width == 32:
                continue
            fine = meta(2, channels, 256, 2 * width, dtype=dtype, channels_last=last)
            for aligned in (False, True) if dtype == torch.float32 else (True,):
                call = functools.partial(subdivide_backward_triton, fine, 128, width, aligned)
                yield f"{name}{' aligned' * aligned}", call
            if dtype != torch.float64:  # in float64 refine runs the reference
                yield name, functools.partial(upsample_cells_triton, logits, indices_of(2, 2048), 2, True)
