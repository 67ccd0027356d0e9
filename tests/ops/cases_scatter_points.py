"""Inputs of scatter_points and scatter_points_, shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def distinct(n: int, p: int, cells: int, seed: int = 0) -> Tensor:
    """``[n, p]`` distinct indices of ``cells``, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(cells, generator=generator)[:p] for _ in range(n)]
    return torch.stack(rows) if rows else torch.zeros(0, p, dtype=torch.int64)


def make(
    n: int, c: int, h: int, w: int, p: int, dtype: torch.dtype = torch.float32, layout: str = "nchw"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logits, indices, values)``."""
    generator = torch.Generator().manual_seed(n + c + h + w + p)
    logits = torch.randn(n, c, h, w, generator=generator).to(dtype)
    values = torch.randn(n, c, p, generator=generator).to(dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "strided":  # rows and columns swapped, every second row of a larger map
        wide = torch.zeros(n, c, w, 2 * h, dtype=dtype)
        wide[..., ::2] = logits.transpose(2, 3)
        logits = wide[..., ::2].transpose(2, 3)
    elif layout == "slice":  # some channels of a wider channels_last map
        wide = torch.zeros(n, c + 3, h, w, dtype=dtype).to(memory_format=torch.channels_last)
        wide[:, 2 : 2 + c] = logits
        logits = wide[:, 2 : 2 + c]
    return logits, distinct(n, p, h * w), values


def samples(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Named arguments."""
    for layout in ("nchw", "channels_last", "strided", "slice"):
        yield layout, make(2, 5, 7, 9, 20, dtype, layout)
        yield f"{layout}, one channel", make(2, 1, 7, 9, 20, dtype, layout)
        yield f"{layout}, every cell", make(2, 5, 3, 4, 12, dtype, layout)
        yield f"{layout}, several blocks", make(1, 19, 40, 50, 1200, dtype, layout)
    yield "more channels than points", make(2, 40, 4, 4, 3, dtype)
    yield "one cell", make(3, 2, 1, 1, 1, dtype)
    yield "no points", make(2, 5, 7, 9, 0, dtype)
    yield "no images", make(0, 5, 7, 9, 4, dtype)
    logits, indices, values = make(2, 5, 7, 9, 20, dtype)
    yield (
        "strided values and indices",
        (logits, indices[:, ::2], values.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]),
    )


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    """Named keyword arguments with the exception and its words."""
    logits, indices, values = make(2, 3, 4, 5, 6)
    good = dict(logits=logits, indices=indices, values=values)
    high, low = indices.clone(), indices.clone()
    high[1, 2], low[0, 0] = 20, -1
    yield "index too high", good | {"indices": high}, IndexError, r"indices must lie in \[0, H\*W\) = \[0, 20\)"
    yield "negative index", good | {"indices": low}, IndexError, "indices must lie in .* got values from -1"
    yield "rank of logits", good | {"logits": logits[0]}, ValueError, r"logits must have shape \[N, C, H, W\]"
    yield "integer logits", good | {"logits": logits.long()}, TypeError, "logits must be float32"
    yield "no cells", good | {"logits": logits[:, :, :0]}, ValueError, "logits must have at least one cell"
    yield "rank of indices", good | {"indices": indices[0]}, ValueError, r"indices must have shape \[N, P\] with N = 2"
    yield "N of indices", good | {"indices": indices[:1]}, ValueError, r"indices must have shape .* got \[1, 6\]"
    yield "int32 indices", good | {"indices": indices.int()}, TypeError, "indices must be int64"
    yield (
        "channels of values",
        good | {"values": values[:, :2]},
        ValueError,
        r"values must have shape \[N, C, P\] = \[2, 3, 6\]",
    )
    yield "points of values", good | {"values": values[..., :5]}, ValueError, r"values must have shape"
    yield "rank of values", good | {"values": values[0]}, ValueError, r"values must have shape"
    sparse = good | {"values": values.to_sparse()}
    yield "sparse values", sparse, TypeError, r"values must be a dense \(strided\) tensor, got layout torch.sparse_coo"
    yield "sparse values, negative view", sparse | {"logits": torch._neg_view(-logits)}, TypeError, "values must be a"
    yield "dtype of values", good | {"values": values.half()}, TypeError, "values must have the dtype of logits"
