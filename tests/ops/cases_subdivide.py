"""Sample inputs and bad inputs of ``subdivide``, shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# How far a stored value may lie from float64 arithmetic: one rounding of the dtype. In float32 it is the position along
# an axis that counts, which F.interpolate rounds in float32 (the kernels do not): 2^-24 * 160 cells, times the slope.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 1e-4},
    torch.float16: {"rtol": 1.1e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 8.5e-3, "atol": 1e-4},
}


def make(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def logits_cases() -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """``(name, logits float64, keyword arguments)``; the tests convert the dtype."""
    yield "odd sizes", make(2, 5, 7, 11), {"num_points": 40}
    yield "wide rows", make(1, 19, 9, 150), {"num_points": 300}
    yield "rows of 16", make(2, 3, 8, 64), {"num_points": 100}
    yield "factor 1", make(1, 4, 6, 21), {"num_points": 9, "scale_factor": 1}
    yield "factor 3", make(1, 4, 6, 40), {"num_points": 50, "scale_factor": 3}
    yield "factor 4, aligned corners", make(1, 6, 5, 37), {"num_points": 50, "scale_factor": 4, "align_corners": True}
    yield "aligned corners", make(1, 6, 17, 33), {"num_points": 50, "align_corners": True}
    yield "one cell", make(3, 4, 1, 1), {"num_points": 2, "scale_factor": 5}
    yield "one column", make(1, 4, 9, 1), {"num_points": 7}
    yield "one row", make(1, 4, 1, 40), {"num_points": 7, "align_corners": True}
    yield "one channel", make(2, 1, 13, 24), {"num_points": 30}
    yield "two channels", make(2, 2, 13, 24), {"num_points": 30}
    yield "class index", make(3, 5, 9, 20), {"num_points": 30, "class_index": torch.tensor([4, 0, 2])}
    yield "more points than cells", make(1, 3, 4, 5), {"num_points": 1000}
    yield "many channels", make(1, 300, 4, 50), {"num_points": 20}
    yield "several bands and tiles", make(1, 70, 40, 400, seed=3), {"num_points": 500}
    yield "large offset", make(1, 7, 10, 30) + 1000, {"num_points": 60}
    yield "all equal", torch.zeros(2, 4, 8, 20, dtype=torch.float64), {"num_points": 33}
    yield "ties", make(1, 3, 12, 40, scale=1.0).round(), {"num_points": 60}


def special_cases() -> Iterator[tuple[str, Tensor]]:
    """NaN and infinities; compared with their meaning, not to a tolerance."""
    logits = make(2, 5, 9, 40)
    with_nan = logits.clone()
    with_nan[0, 2, 4, 17] = float("nan")
    with_nan[0, 4, 4, 17] = float("nan")
    with_nan[1, 0, 0, 0] = float("nan")
    yield "NaN", with_nan
    infinite = logits.clone()
    infinite[0, 1, 3, 5] = float("inf")
    infinite[0, 2, 3, 6] = float("-inf")
    infinite[1, :, 8, 39] = float("-inf")
    infinite[1, :2, 2, 30] = float("inf")
    yield "infinities", infinite
    yield "all NaN", torch.full((1, 3, 4, 18), float("nan"), dtype=torch.float64)


# Factor and align_corners; F.interpolate in float64 has exact weights there.
SPECIAL_FACTORS = ((1, False), (1, True), (2, False), (2, True), (3, False))


def layouts(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in memory layouts that must not matter."""
    yield "contiguous", logits.contiguous()
    yield "channels_last", logits.contiguous(memory_format=torch.channels_last)
    padded = torch.zeros(*logits.shape[:3], logits.shape[3] + 3, dtype=logits.dtype)
    padded[..., 2:-1] = logits
    yield "a slice", padded[..., 2:-1]
    yield "transposed", logits.transpose(2, 3).contiguous().transpose(2, 3)


def bad_inputs() -> list[tuple[str, dict[str, Any], type[Exception], str]]:
    good = torch.zeros(2, 3, 4, 5)
    index = torch.zeros(2, dtype=torch.int64)

    def case(**changes: Any) -> dict[str, Any]:
        return {"logits": good, "num_points": 4} | changes

    return [
        (
            "rank",
            case(logits=torch.zeros(3, 4, 5)),
            ValueError,
            r"logits must have shape \[N, C, H, W\], got \[3, 4, 5\]",
        ),
        ("integer", case(logits=good.long()), TypeError, "logits must be float32, float64, float16 or bfloat16"),
        ("complex", case(logits=good.cfloat()), TypeError, "logits must be float32, float64, float16 or bfloat16"),
        ("no channel", case(logits=good[:, :0]), ValueError, "logits must have at least one channel"),
        ("no cell", case(logits=good[..., :0]), ValueError, "logits must have at least one cell"),
        ("sparse", case(logits=good.to_sparse()), TypeError, "logits must be a dense"),
        ("no points", case(num_points=0), ValueError, "num_points must be positive, got 0"),
        ("negative points", case(num_points=-3), ValueError, "num_points must be positive, got -3"),
        ("factor", case(scale_factor=0), ValueError, "scale_factor must be at least 1, got 0"),
        ("huge factor", case(scale_factor=1 << 33), ValueError, r"scale_factor must give fewer than 2\^32 cells"),
        (
            "a height that overflows",
            case(logits=torch.zeros(0, 1, 1, 1).expand(0, 1, 1 << 62, 1), scale_factor=4),
            ValueError,
            r"scale_factor must give fewer than 2\^32 cells",
        ),
        ("index dtype", case(class_index=index.int()), TypeError, "class_index must be int64"),
        ("index shape", case(class_index=index[:1]), ValueError, r"class_index must have shape \[N\] with N = 2"),
        ("index value", case(class_index=index + 3), IndexError, "class_index must lie in"),
        (
            "index device",
            case(class_index=index.to("meta")),
            RuntimeError,
            "class_index must be on the device of logits",
        ),
    ]
