"""Every kernel for 512 channels and 32 codewords, and with other numbers of them; bfloat16 stands for float16 too."""

from __future__ import annotations

import functools

import torch

from ..encode import (
    FLOAT64,
    aggregate_backward_triton,
    aggregate_triton,
    encode_backward_triton,
    encode_triton,
    scaled_l2_backward_triton,
    scaled_l2_triton,
)
from . import NAMES, Calls, layout_name, meta


def calls() -> Calls:
    for dtype, last, channels, codes in (
        (torch.float32, False, 512, 32),
        (torch.float32, True, 512, 32),
        (torch.bfloat16, True, 512, 32),
        (torch.float32, False, 512, 64),
        (torch.float32, False, 512, 128),
        (torch.float32, False, 512, 256),
        (torch.float32, False, 512, 512),
        (torch.float64, False, 512, 32),
        (torch.float32, False, 19, 5),
    ):
        if dtype == torch.float64 and not FLOAT64:
            continue
        x = meta(4, channels, 64, 64, dtype=dtype, channels_last=last)
        name = f"{NAMES[dtype]} {layout_name(last)} D={channels} K={codes}"
        yield from _encode(name, x, codes)
    # One stride does not walk through rows and columns.
    cropped = meta(4, 128, 64, 512, dtype=torch.bfloat16).permute(0, 3, 1, 2)[..., :32]
    yield from _encode("bf16 rows and columns", cropped, 32)
    for codes in (5, 32, 64, 256):
        x, codewords, scale = meta(4, 512, 4096).transpose(1, 2), meta(codes, 512), meta(codes)
        given, grad = meta(4, 4096, codes), meta(4, codes, 512)
        name = f"fp32 nchw D=512 K={codes}"
        yield f"scaled_l2 {name}", functools.partial(scaled_l2_backward_triton, given, x, codewords, scale)
        yield f"aggregate {name}", functools.partial(aggregate_backward_triton, grad, given, x, codewords)
        if codes == 32:
            yield f"scaled_l2 {name}", functools.partial(scaled_l2_triton, x, codewords, scale)
            yield f"aggregate {name}", functools.partial(aggregate_triton, given, x, codewords)


def _encode(name: str, x: torch.Tensor, codes: int) -> Calls:
    codewords, scale = meta(codes, x.shape[1], dtype=x.dtype), meta(codes, dtype=x.dtype)
    grad = meta(x.shape[0], codes, x.shape[1], dtype=x.dtype)
    yield name, functools.partial(encode_triton, x, codewords, scale)
    yield name, functools.partial(encode_backward_triton, grad, x, codewords, scale)
