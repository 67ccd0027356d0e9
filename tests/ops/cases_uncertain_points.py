"""Inputs of the tests of uncertainty, uncertain_points and sample_uncertain_points, for every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_cases(device: str = "cpu") -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """``(name, logits [N, C, H, W], class_index [N] or None)``."""
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for shape in ((2, 19, 33, 37), (1, 1, 5, 7), (3, 2, 1, 9), (2, 40, 17, 1), (1, 5, 1, 1), (2, 3, 70, 131)):
            x = _normal(*shape).to(device, dtype)
            name = f"{kind} {'x'.join(map(str, shape))}"
            yield name, x, None
            yield f"{name} channels_last", x.contiguous(memory_format=torch.channels_last), None
        x = _normal(3, 6, 9, 13, seed=1).to(device, dtype)
        chosen = torch.tensor([5, 0, 2], device=device)
        yield f"{kind} class_index", x, chosen
        yield f"{kind} class_index channels_last", x.contiguous(memory_format=torch.channels_last), chosen
        yield f"{kind} large offset", _normal(1, 4, 11, 12).to(device, dtype) + 1000, None
        x = _normal(2, 20, 12, 21, seed=2).to(device, dtype)
        x[0, 3, 2, :] = math.nan
        x[0, :, 5, 4] = math.nan
        x[1, 0, :, 3] = math.inf
        x[1, 19, ::2, 3] = math.inf
        x[1, :, 7, 7] = -math.inf
        x[1, 4, 7, 8] = -math.inf
        yield f"{kind} NaN and infinities", x, None
        yield f"{kind} NaN and infinities channels_last", x.contiguous(memory_format=torch.channels_last), None
        yield f"{kind} NaN, one channel", x[:, 3:4].clone(), None
        yield f"{kind} ties", (_normal(2, 4, 23, 29) * 1.5).round().to(device, dtype), None
        yield f"{kind} all equal", torch.zeros(2, 3, 16, 20, device=device, dtype=dtype), None
    x = _normal(4, 24, 18, 20, seed=3).to(device)
    yield "slice of channels", x[:, 3:20], None
    yield "slice of channels, channels_last", x.contiguous(memory_format=torch.channels_last)[:, 3:20], None
    yield "slice of rows", x[:, :, 2:9], None
    yield "slice of columns", x[:, :, :, 3:11], None
    yield "every other column", x[:, :, :, ::2], None
    yield "every other image", x[::2], None
    yield "transposed", x.transpose(2, 3), None
    yield "flipped order of dimensions", x.permute(3, 2, 1, 0), None
    yield "expanded images", x[:1].expand(3, -1, -1, -1), None
    yield "expanded cells", x[:, :, :1, :1].expand(-1, -1, 5, 6), None
    yield "expanded channels", x[:, :1].expand(-1, 7, -1, -1), None
    yield "class_index with a stride", x, torch.tensor([3, 9, 23, 9, 0, 9, 11, 9], device=device)[::2]
    yield "large, one image", _normal(1, 3, 300, 700, seed=4).to(device), None
    yield "empty batch", torch.zeros(0, 5, 6, 7, device=device), None
    yield (
        "empty batch, class_index",
        torch.zeros(0, 5, 6, 7, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
    )


def bad_inputs(device: str = "cpu") -> Iterator[tuple[str, str, dict[str, Any], type[Exception], str]]:
    """``(name, op, keyword arguments, exception, pattern of its text)``."""
    good = torch.zeros(2, 3, 4, 5, device=device)
    common: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("rank 3", {"logits": good[0]}, ValueError, r"logits must have shape \[N, C, H, W\], got \[3, 4, 5\]"),
        ("rank 5", {"logits": good[None]}, ValueError, r"logits must have shape \[N, C, H, W\]"),
        (
            "integer logits",
            {"logits": good.long()},
            TypeError,
            r"logits must be float32, float64, float16 or bfloat16, got",
        ),
        ("complex logits", {"logits": good.to(torch.complex64)}, TypeError, r"logits must be float32"),
        (
            "sparse logits",
            {"logits": good.to_sparse()},
            TypeError,
            r"logits must be a dense \(strided\) tensor, got layout",
        ),
        ("no channel", {"logits": good[:, :0]}, ValueError, r"at least one channel, got shape \[2, 0, 4, 5\]"),
        ("no row", {"logits": good[:, :, :0]}, ValueError, r"at least one cell \(H\*W > 0\), got shape \[2, 3, 0, 5\]"),
        (
            "no column",
            {"logits": good[..., :0]},
            ValueError,
            r"at least one cell \(H\*W > 0\), got shape \[2, 3, 4, 0\]",
        ),
    ]

    def index(values: Any, **kwargs: Any) -> dict[str, Any]:
        return {"logits": good, "class_index": torch.tensor(values, device=device, **kwargs)}

    common += [
        ("class_index int32", index([0, 1], dtype=torch.int32), TypeError, r"class_index must be int64, got"),
        ("class_index float", index([0.0, 1.0]), TypeError, r"class_index must be int64, got"),
        (
            "class_index of another N",
            index([0, 1, 2]),
            ValueError,
            r"class_index must have shape \[N\] with N = 2 as in logits, got \[3\]",
        ),
        ("class_index rank 2", index([[0, 1]]), ValueError, r"class_index must have shape \[N\]"),
        (
            "class_index elsewhere",
            {"logits": good, "class_index": torch.zeros(2, dtype=torch.int64, device="meta")},
            RuntimeError,
            r"class_index must be on the device of logits \(.*\), got meta",
        ),
    ]
    if device == "cpu":
        common += [
            ("class_index = C", index([0, 3]), IndexError, r"\[0, C\) = \[0, 3\), got 3 at position 1"),
            ("class_index < 0", index([-1, 0]), IndexError, r"\[0, C\) = \[0, 3\), got -1 at position 0"),
        ]
    endless = torch.zeros(1, dtype=torch.int64, device=device).expand(2**59)
    sampled = {"logits": good, "image_index": endless, "num_points": 4, "oversample_ratio": -1.0}
    yield "endless image_index", "sample_uncertain_points", sampled, ValueError, "oversample_ratio must be at"
    more: dict[str, dict[str, Any]] = {
        "uncertainty": {},
        "uncertain_points": {"num_points": 4},
        "sample_uncertain_points": {"num_points": 4},
    }
    for op, extra in more.items():
        for name, kwargs, exception, pattern in common:
            yield name, op, {**kwargs, **extra}, exception, pattern
    for op in ("uncertain_points", "sample_uncertain_points"):
        for count in (0, -3):
            pattern = f"num_points must be positive, got {count}"
            yield f"num_points = {count}", op, {"logits": good, "num_points": count}, ValueError, pattern
    op = "sample_uncertain_points"
    sample = {"logits": good, "num_points": 4}
    for ratio in (0.5, math.inf, math.nan, -1.0):
        pattern = "oversample_ratio must be at least 1 and finite, got"
        yield f"oversample_ratio = {ratio}", op, {**sample, "oversample_ratio": ratio}, ValueError, pattern
    for ratio in (-0.1, 1.5, math.nan):
        pattern = r"importance_ratio must lie in \[0, 1\], got"
        yield f"importance_ratio = {ratio}", op, {**sample, "importance_ratio": ratio}, ValueError, pattern
    pattern = r"oversample_ratio \* num_points must be less than 2\*\*31, got"
    yield "too many candidates", op, {**sample, "oversample_ratio": 1e9}, ValueError, pattern
    masks = {**sample, "image_index": torch.tensor([0, 1, 1], device=device)}
    pattern = r"class_index must have shape \[N\] with N = 3 as in image_index, got \[2\]"
    kwargs = {**masks, "class_index": torch.tensor([0, 1], device=device)}
    yield "class_index of another N than image_index", op, kwargs, ValueError, pattern
    kwargs = {**masks, "image_index": masks["image_index"].int()}
    yield "image_index int32", op, kwargs, TypeError, "image_index must be int64, got"
    kwargs = {**masks, "image_index": masks["image_index"][None]}
    yield "image_index rank 2", op, kwargs, ValueError, r"image_index must have shape \[N\], got \[1, 3\]"
    kwargs = {**masks, "random_coords": torch.zeros(2, 13, 2, device=device)}
    yield "random_coords of another N", op, kwargs, ValueError, r"random_coords must have shape .* = \[3, 13, 2\]"
    if device == "cpu":
        for value in (2, -1):
            kwargs = {**masks, "image_index": torch.tensor([0, value])}
            pattern = rf"image_index must lie in \[0, B\) = \[0, 2\), got {value} at position 1"
            yield f"image_index = {value}", op, kwargs, IndexError, pattern
    pattern = "padding_mode must be one of zeros, border, got 'reflection'"
    yield "padding_mode", op, {**sample, "padding_mode": "reflection"}, ValueError, pattern
    for shape in ((2, 12, 2), (2, 13, 3), (1, 13, 2), (2, 26), (2, 13, 2, 1)):
        pattern = r"random_coords must have shape \[N, Q, 2\] = \[2, 13, 2\], got \[" + ", ".join(map(str, shape))
        kwargs = {**sample, "random_coords": torch.zeros(shape, device=device)}
        yield f"random_coords {shape}", op, kwargs, ValueError, pattern
    draws = torch.zeros(2, 13, 2, device=device)
    for dtype in (torch.float64, torch.float16, torch.int64):
        kwargs = {**sample, "random_coords": draws.to(dtype)}
        yield f"random_coords {dtype}", op, kwargs, TypeError, "random_coords must be float32, got"
    pattern = "random_coords must be a dense"
    yield "random_coords sparse", op, {**sample, "random_coords": draws.to_sparse()}, TypeError, pattern
    pattern = r"random_coords must be on the device of logits \(.*\), got meta"
    yield "random_coords elsewhere", op, {**sample, "random_coords": draws.to("meta")}, RuntimeError, pattern
