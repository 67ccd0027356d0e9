"""Inputs of point_sample and point_labels, shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")

# Coordinates that must be defined and must never read outside the map.
WILD = [
    (NAN, 0.5), (0.5, NAN), (NAN, NAN), (INF, 0.5), (0.5, -INF), (1e30, 0.5), (-1e30, 0.5), (3e38, 0.5), (0.5, -3e38),
    (1e9, 1e9), (-1e9, 0.1), (2.2e9, 0.5), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (-0.01, 0.5), (1.01, 0.99), (-0.2, -0.2),
]  # fmt: skip


def points(n: int, p: int, spread: float = 0.2, seed: int = 0) -> Tensor:
    """``[n, p, 2]`` points, some of them off the map."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, p, 2, generator=generator) * (1 + 2 * spread) - spread


def maps(
    n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32, layout: str = "nchw", seed: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(n, c, h, w, generator=generator).to(dtype)
    if layout == "channels_last":
        return value.to(memory_format=torch.channels_last)
    if layout == "strided":  # every second column of a wider map, transposed
        wide = torch.zeros(n, c, w * 2, h, dtype=dtype)
        wide[:, :, ::2] = value.transpose(2, 3)
        return wide[:, :, ::2].transpose(2, 3)
    return value


def samples() -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """Named ``(maps, coords)`` in float32."""
    yield "one channel", [maps(2, 1, 9, 7)], points(2, 33)
    yield "few channels", [maps(2, 3, 9, 7)], points(2, 33)
    yield "many channels", [maps(2, 35, 9, 7)], points(2, 50)
    yield "more channels than one pass", [maps(1, 133, 5, 6)], points(1, 21)
    yield "channels_last", [maps(2, 35, 9, 7, layout="channels_last")], points(2, 50)
    yield "channels_last, few channels", [maps(2, 3, 9, 7, layout="channels_last")], points(2, 50)
    yield "channels_last, many channels", [maps(1, 133, 5, 6, layout="channels_last")], points(1, 21)
    yield "strided", [maps(2, 11, 9, 7, layout="strided")], points(2, 40)
    yield "list", [maps(2, 20, 9, 7), maps(2, 4, 3, 5, layout="channels_last"), maps(2, 9, 17, 2)], points(2, 40)
    yield "grid coords", [maps(2, 10, 6, 5)], points(2, 12).view(2, 4, 3, 2)
    yield "strided coords", [maps(2, 10, 6, 5)], points(2, 24)[:, ::2]
    yield "one cell", [maps(2, 9, 1, 1)], points(2, 20)
    yield "one row", [maps(2, 9, 1, 8)], points(2, 20)
    yield "wild coordinates", [maps(2, 9, 5, 6)], torch.tensor([WILD, WILD])
    yield "wild coordinates, channels_last", [maps(2, 9, 5, 6, layout="channels_last")], torch.tensor([WILD, WILD])
    yield "wild coordinates, one channel", [maps(2, 1, 5, 6)], torch.tensor([WILD, WILD])
    yield "wild coordinates among many, one channel", [maps(2, 1, 5, 6)], torch.tensor([WILD * 8, WILD * 8])
    yield "same point many times", [maps(1, 12, 5, 6)], torch.full((1, 40, 2), 0.37)
    yield "more than one block", [maps(2, 2, 20, 30)], points(2, 1300)
    yield "a map larger than the cache", [maps(1, 9, 500, 500)], points(1, 700)
    yield "no points", [maps(2, 9, 5, 6)], points(2, 0)
    yield "no images", [maps(0, 9, 5, 6)], points(0, 7)
    yield "no images, no points", [maps(0, 9, 5, 6)], points(0, 0)


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    """Named keyword arguments of point_sample with the exception and its words."""
    good = dict(input=[maps(2, 3, 4, 5)], coords=points(2, 6))
    yield "empty list", good | {"input": []}, ValueError, "input must hold at least one tensor"
    yield (
        "rank of the map",
        good | {"input": [torch.zeros(2, 3, 4)]},
        ValueError,
        r"input must have shape \[N, C, H, W\]",
    )
    yield (
        "integer map",
        good | {"input": [torch.zeros(2, 3, 4, 5, dtype=torch.long)]},
        TypeError,
        "input must be float32",
    )
    yield "no cells", good | {"input": [torch.zeros(2, 3, 0, 5)]}, ValueError, "input must have at least one cell"
    yield "no channels", good | {"input": [torch.zeros(2, 0, 4, 5)]}, ValueError, "input must have at least one channel"
    yield "sparse map", good | {"input": [torch.zeros(2, 3, 4, 5).to_sparse()]}, TypeError, "input must be a dense"
    yield "another N", good | {"input": [maps(2, 3, 4, 5), maps(3, 3, 4, 5)]}, ValueError, r"input\[1\] must have N = 2"
    yield (
        "mixed dtypes",
        good | {"input": [maps(2, 3, 4, 5), maps(2, 3, 4, 5, torch.float16)]},
        TypeError,
        r"input\[1\] must have the dtype of input\[0\]",
    )
    yield "rank of coords", good | {"coords": torch.rand(6, 2)}, ValueError, r"coords must have shape \[N, P, 2\]"
    yield "N of coords", good | {"coords": torch.rand(3, 6, 2)}, ValueError, r"with N = 2 as in input, got \[3, 6, 2\]"
    yield "last size of coords", good | {"coords": torch.rand(2, 6, 3)}, ValueError, r"got \[2, 6, 3\]"
    yield "half coords", good | {"coords": torch.rand(2, 6, 2).half()}, TypeError, "coords must be float32 or float64"
    yield (
        "integer coords",
        good | {"coords": torch.zeros(2, 6, 2, dtype=torch.long)},
        TypeError,
        "coords must be float32",
    )
    wide = torch.zeros(2, 1, 1, 1).expand(2, 1 << 61, 1, 1)
    for count in (3, 4, 8):  # 8: the sum of 64 bits is zero
        yield f"{count} maps of 2^61 channels", good | {"input": [wide] * count}, ValueError, "2.62 channels in all"
    yield "mode", good | {"mode": "bicubic"}, ValueError, "mode must be one of bilinear, nearest, got 'bicubic'"
    yield "padding", good | {"padding_mode": "reflection"}, ValueError, "padding_mode must be one of zeros, border"


LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def bad_labels() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    good = dict(labels=torch.zeros(2, 4, 5, dtype=torch.uint8), coords=points(2, 6))
    yield "rank", good | {"labels": torch.zeros(2, 1, 4, 5, dtype=torch.uint8)}, ValueError, r"labels must have shape"
    yield "float labels", good | {"labels": torch.zeros(2, 4, 5)}, TypeError, "labels must be an integer tensor"
    yield (
        "bool labels",
        good | {"labels": torch.zeros(2, 4, 5, dtype=torch.bool)},
        TypeError,
        "labels must be an integer",
    )
    yield (
        "no cells",
        good | {"labels": torch.zeros(2, 4, 0, dtype=torch.uint8)},
        ValueError,
        "labels must have at least",
    )
    yield "grid coords", good | {"coords": torch.rand(2, 3, 2, 2)}, ValueError, r"coords must have shape \[N, P, 2\]"
    yield "N", good | {"coords": torch.rand(3, 6, 2)}, ValueError, "with N = 2 as in labels"
    yield "half coords", good | {"coords": torch.rand(2, 6, 2).half()}, TypeError, "coords must be float32 or float64"
