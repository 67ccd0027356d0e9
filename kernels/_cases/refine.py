"""First, middle and last layers of the usual head, in every way of multiplying; bfloat16 stands for float16 too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rendseg.reference import HeadLayers

from ..refine import _Head
from . import NAMES, Calls, meta


def calls() -> Calls:
    for dtype in (torch.float32, torch.bfloat16):
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for classes in (19, 80, 150):
                if classes == 80 and dtype == torch.float32:  # masks of boxes; one dtype is enough
                    continue
                for labels in (False,) if classes == 80 else (False, True):
                    name = f"{NAMES[dtype]}{' tf32' * (precision == 'tf32')} C={classes}{' labels' * labels}"
                    yield name, functools.partial(_layers, dtype, classes, labels, precision)


def _layers(dtype: torch.dtype, classes: int, labels: bool, precision: str) -> None:
    """Three hidden layers of 256 and the last on 2048 points, as ``refine`` calls them."""
    weights = [meta(256, 256 + classes, dtype=dtype) for _ in range(3)] + [meta(classes, 256 + classes, dtype=dtype)]
    biases = [meta(weight.shape[0], dtype=dtype) for weight in weights]
    out: Tensor = meta(2, classes, 128, 256, dtype=dtype)
    if labels:
        out = meta(2, 128, 256, dtype=torch.uint8)
    cudnn: Any = torch.backends.cudnn
    flag: tuple[Any, str, Any] = (cudnn, "allow_tf32", precision == "tf32")  # PyTorch 2.8
    if hasattr(cudnn, "conv"):
        flag = (cudnn.conv, "fp32_precision", precision)
    owner, name, value = flag
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        head = _Head(HeadLayers(weights, biases, coarse_each_layer=True, coarse_first=False), classes)
        points = [meta(2, channels, 2048, dtype=dtype) for channels in (256, classes)]
        head(*points, meta(2, 2048, dtype=torch.int64), out)
    finally:
        setattr(owner, name, before)
