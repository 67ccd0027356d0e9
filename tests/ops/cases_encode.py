"""Sample inputs and bad inputs of the encoding ops, for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Sample = tuple[str, Tensor, Tensor, Tensor]


def make(
    batch: int, channels: int, size: tuple[int, ...], codes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features with a structure that the codewords fit, so that assignments are neither flat nor one-hot."""
    g = torch.Generator().manual_seed(seed)
    codewords = torch.randn(codes, channels, generator=g)
    x = torch.randn(batch, channels, *size, generator=g)
    scale = -torch.rand(codes, generator=g) * 2 / max(channels, 1)
    return x.to(dtype), codewords.to(dtype), scale.to(dtype)


def samples(device: str = "cpu") -> Iterator[Sample]:
    """``(name, x, codewords, scale)`` for ``encode``; float64 cases included."""

    def on(name: str, x: Tensor, codewords: Tensor, scale: Tensor) -> Sample:
        return name, x.to(device), codewords.to(device), scale.to(device)

    yield on("plain", *make(2, 20, (9, 11), 6))
    yield on("tiles", *make(2, 64, (16, 24), 32))
    yield on("odd", *make(3, 37, (7, 31), 33))
    yield on("one channel", *make(2, 1, (13, 17), 5))
    yield on("three channels", *make(1, 3, (13, 17), 16))
    yield on("many channels", *make(1, 515, (10, 10), 32))
    yield on("one codeword", *make(2, 24, (5, 6), 1))
    yield on("many codewords", *make(1, 18, (10, 13), 600))
    yield on("one position", *make(2, 12, (1, 1), 7))
    yield on("one column", *make(2, 12, (50, 1), 7))
    yield on("flat", *make(2, 30, (200,), 9))
    yield on("no images", *make(0, 8, (4, 5), 3))
    yield on("no positions", *make(2, 8, (0, 5), 3))
    yield on("no channels", *make(2, 0, (4, 5), 3))
    x, c, s = make(2, 40, (12, 10), 11)
    yield on("channels_last", x.contiguous(memory_format=torch.channels_last), c, s)
    yield on("sliced", make(4, 60, (14, 26), 11)[0][::2, 3:43, 1:13, ::2][..., :10], c, s)
    yield on("rows of a wider map", make(2, 40, (12, 13), 11)[0][..., :10], c, s)
    yield on("height and width swapped", make(2, 40, (10, 12), 11)[0].transpose(2, 3), c, s)
    yield on("expanded", make(1, 40, (12, 1), 11)[0].expand(2, 40, 12, 10), c, s)
    yield on("transposed codewords", x, c.t().contiguous().t(), s)
    yield on("zero scale", x, c, torch.zeros(11))
    yield on("some zero scales", x, c, s * (torch.arange(11) % 2))
    yield on("positive scale", x, c, -s)
    yield on("steep scale", x, c, s * 1000)
    yield on("equal codewords", x, c[:1].expand(11, -1).contiguous(), s)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        yield on(f"{dtype}"[6:], *make(2, 33, (10, 13), 10, dtype))
        x, c, s = make(2, 33, (10, 13), 10)
        yield on(f"{dtype}"[6:] + " features", x.to(dtype), c, s)
        yield on(f"{dtype}"[6:] + " features, channels_last", x.to(dtype, memory_format=torch.channels_last), c, s)
    x, c, s = make(2, 33, (10, 13), 10)
    yield on("float64 scale", x, c, s.double())


def rows(x: Tensor) -> Tensor:
    """``[B, D, H, W]`` or ``[B, D, M]`` as a view ``[B, M, D]``."""
    return x.flatten(2).transpose(1, 2)


def bad_inputs(device: str = "cpu") -> Iterator[tuple[str, str, Callable[[], dict[str, Any]], type[Exception], str]]:
    """``(name, op, kwargs, exception, pattern)``; the op's name may be a private gradient."""

    def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device).to(dtype)

    x, r, a, c, s = t(2, 4, 3, 5), t(2, 15, 4), t(2, 15, 6), t(6, 4), t(6)
    e = t(2, 6, 4)
    encode = {"x": x, "codewords": c, "scale": s}
    l2 = {"x": r, "codewords": c, "scale": s}
    agg = {"assignment": a, "x": r, "codewords": c}

    def case(name: str, op: str, base: dict[str, Any], error: type[Exception], pattern: str, **changed: Any) -> Any:
        return name, op, lambda: base | changed, error, pattern

    shape = r"x must have shape \[B, D, H, W\] or \[B, D, M\], got \[4, 3\]"
    yield case("rank of x", "encode", encode, ValueError, shape, x=t(4, 3))
    yield case("rank 5", "encode", encode, ValueError, r"x must have shape", x=t(2, 4, 3, 5, 1))
    yield case(
        "integer x", "encode", encode, TypeError, r"x must be float32, float64", x=t(2, 4, 3, 5, dtype=torch.int64)
    )
    yield case("complex x", "encode", encode, TypeError, r"x must be float32", x=t(2, 4, 3, 5, dtype=torch.complex64))
    yield case("sparse x", "encode", encode, TypeError, r"x must be a dense \(strided\) tensor", x=x.to_sparse())
    wrong = r"codewords must have shape \[K, D\] with D = 4 as in x, got \[6, 5\]"
    yield case("channels of codewords", "encode", encode, ValueError, wrong, codewords=t(6, 5))
    yield case("rank of codewords", "encode", encode, ValueError, r"codewords must have shape \[K, D\]", codewords=t(6))
    yield case("no codewords", "encode", encode, ValueError, r"at least one codeword", codewords=t(0, 4), scale=t(0))
    yield case(
        "integer codewords", "encode", encode, TypeError, r"codewords must be", codewords=t(6, 4, dtype=torch.int32)
    )
    yield case("sparse codewords", "encode", encode, TypeError, r"codewords must be a dense", codewords=c.to_sparse())
    yield case("length of scale", "encode", encode, ValueError, r"scale must have shape \[K\] with K = 6", scale=t(5))
    yield case(
        "rank of scale", "encode", encode, ValueError, r"scale must have shape \[K\].*got \[6, 1\]", scale=t(6, 1)
    )
    yield case("integer scale", "encode", encode, TypeError, r"scale must be", scale=t(6, dtype=torch.uint8))
    yield case("rank of x", "scaled_l2", l2, ValueError, r"x must have shape \[B, M, D\], got \[2, 4, 3, 5\]", x=x)
    yield case("channels", "scaled_l2", l2, ValueError, r"codewords must have shape", codewords=t(6, 3))
    yield case("length of scale", "scaled_l2", l2, ValueError, r"scale must have shape", scale=t(1))
    yield case("boolean x", "scaled_l2", l2, TypeError, r"x must be float32", x=t(2, 15, 4, dtype=torch.bool))
    wrong = r"assignment must have shape \[B, M, K\] = \[2, 15, 6\], got \[2, 6, 15\]"
    yield case("transposed assignment", "aggregate", agg, ValueError, wrong, assignment=t(2, 6, 15))
    yield case("rank of assignment", "aggregate", agg, ValueError, r"assignment must have shape", assignment=t(15, 6))
    yield case(
        "integer assignment",
        "aggregate",
        agg,
        TypeError,
        r"assignment must be",
        assignment=t(2, 15, 6, dtype=torch.int64),
    )
    yield case("rank of x", "aggregate", agg, ValueError, r"x must have shape \[B, M, D\]", x=x)
    yield case("rank of codewords", "aggregate", agg, ValueError, r"codewords must have shape", codewords=t(1, 6, 4))
    for op, base, grad in (("encode", encode, e), ("scaled_l2", l2, a), ("aggregate", agg, e)):
        private = f"_{op}_backward"
        yield case("shape of grad", private, base, ValueError, r"grad must have shape", grad=grad[:, :-1])
        yield case("integer grad", private, base, TypeError, r"grad must be", grad=grad.long())
        yield case("codewords", private, {"grad": grad} | base, ValueError, r"codewords must have", codewords=t(6, 5))
