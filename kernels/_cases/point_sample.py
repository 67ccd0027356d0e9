"""Every kernel for 256 channels and few, in both layouts; bfloat16 stands for float16 too."""

from __future__ import annotations

import functools

import torch

from ..point_sample import point_labels_triton, point_sample_backward_triton, point_sample_triton
from . import NAMES, Calls, layout_name, meta


def calls() -> Calls:
    coords = meta(2, 2048, 2)
    for last in (True, False):
        for dtype, channels in (
            (torch.float32, 256),
            (torch.float32, 19),
            (torch.float32, 1),
            (torch.bfloat16, 256),
            (torch.bfloat16, 19),
            (torch.float64, 256),
        ):
            maps = [meta(2, channels, 128, 256, dtype=dtype, channels_last=last)]
            grad = meta(2, channels, 2048, dtype=dtype)
            name = f"{NAMES[dtype]} {layout_name(last)} C={channels}"
            yield name, functools.partial(point_sample_triton, maps, coords, "bilinear", "zeros", False)
            if dtype == torch.float64:
                continue
            rest = (maps, coords, "bilinear", "zeros", False, True, True)
            yield name, functools.partial(point_sample_backward_triton, grad, *rest)
            if name.startswith("fp32") and channels == 256:
                for mode, padding, align in (("nearest", "zeros", False), ("bilinear", "border", True)):
                    call = functools.partial(point_sample_triton, maps, coords, mode, padding, align)
                    yield f"{name} {mode} {padding}", call
                rest = (maps, coords, "nearest", "zeros", False, True, False)
                yield f"{name} nearest", functools.partial(point_sample_backward_triton, grad, *rest)
    labels = meta(2, 512, 1024, dtype=torch.int64)
    yield "labels", functools.partial(point_labels_triton, labels, coords, 255)
