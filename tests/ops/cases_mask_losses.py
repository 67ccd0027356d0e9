"""Inputs of mask_losses and mask_costs, shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TARGETS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
Case = tuple[dict[str, Any], dict[str, Any]]  # of mask_losses, of mask_costs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(*shape: int, seed: int = 0) -> Tensor:
    """Coordinates, of which some lie outside [0, 1]."""
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1


def masks(count: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise of 0 and 1; of a floating dtype, anything between -0.2 and 1."""
    values = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.2
    return (values if dtype.is_floating_point else values > 0.4).to(dtype)


def build(
    logits: Tensor, targets: Sequence[Tensor], pairs: Sequence[tuple[int, int, int]], num_points: int, **options: Any
) -> Case:
    """``pairs`` are (image, query, target)."""
    images, queries, chosen = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).unbind(1)
    losses = dict(image_index=images, query_index=queries, target_index=chosen, coords=points(len(pairs), num_points))
    costs = dict(coords=points(len(logits), num_points, seed=1))
    common = dict(logits=logits, targets=list(targets), **options)
    return common | losses, common | costs


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Case]]:
    """Named cases with logits of ``dtype``."""
    logits = (normal(2, 3, 9, 7) * 3).to(dtype)
    few = [masks(2, 11, 6, torch.bool), masks(3, 5, 13, torch.uint8)]
    pairs = [(1, 0, 2), (0, 2, 1), (1, 1, 0), (0, 0, 0), (1, 0, 1)]  # query 0 of image 1 twice
    for label_mode in ("bilinear", "nearest"):
        for padding_mode in ("zeros", "border"):
            for canvas in (None, (12, 13)):
                options = dict(label_mode=label_mode, padding_mode=padding_mode, canvas=canvas)
                yield f"{label_mode} {padding_mode} {canvas}", build(logits, few, pairs, 20, **options)
    yield "channels_last", build(logits.contiguous(memory_format=torch.channels_last), few, pairs, 20)
    yield "strided", build((normal(2, 3, 14, 9) * 3).to(dtype)[:, :, ::2].transpose(2, 3), few, pairs, 20)
    kinds = [masks(2, 8, 10 + i, kind, seed=i) for i, kind in enumerate(TARGETS)]
    all_kinds = [(i, i % 3, 1) for i in range(len(TARGETS))]
    yield "every dtype of targets", build((normal(len(TARGETS), 3, 6, 5)).to(dtype), kinds, all_kinds, 17)
    odd = [masks(4, 12, 20, torch.bool)[::2, :, 1::3], masks(9, 4, 2, torch.float32).permute(1, 2, 0)]
    yield "strided targets", build(logits, odd, pairs[1:4], 20)
    yield "expanded targets", build(logits, [few[0][:1].expand(4, -1, -1), few[1]], [(0, 1, 3), (1, 1, 1)], 20)
    yield "an image without targets", build(logits, [few[0], masks(0, 5, 5, torch.bool)], [(0, 1, 1), (0, 2, 0)], 20)
    yield "no targets", build(logits, [masks(0, 0, 0, torch.bool), masks(0, 4, 4, torch.bool)], [], 20)
    yield "no pairs", build(logits, few, [], 20)
    yield "no points", build(logits, few, pairs, 0)
    yield "no images", build(logits[:0], [], [], 20)
    yield (
        "one column",
        build(logits[..., :1], [masks(1, 7, 1, torch.bool), masks(1, 1, 6, torch.bool)], [(0, 0, 0)], 20),
    )
    yield "one row", build(logits[:, :, :1], few, pairs, 20)
    many = [(0, i, 6 - i) for i in range(7)]
    large = (normal(1, 9, 33, 41) * 3).to(dtype)
    yield "several blocks of points", build(large, [masks(7, 50, 61, torch.bool)], many, 1300)
    yield (
        "few points in a large map",
        build((normal(1, 7, 64, 70) * 3).to(dtype), [masks(7, 9, 8, torch.uint8)], many, 30),
    )


def bad_inputs() -> Iterator[tuple[str, str, dict[str, Any], type[Exception], str]]:
    """``(name, op, keyword arguments, exception, pattern of its text)``."""
    few = [masks(2, 11, 6, torch.bool), masks(3, 5, 13, torch.uint8)]
    good = build(normal(2, 3, 9, 7), few, [(1, 0, 2), (0, 2, 1)], 4)
    common: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("rank of logits", {"logits": normal(3, 9, 7)}, ValueError, r"logits must have shape \[N, C, H, W\]"),
        ("integer logits", {"logits": normal(2, 3, 9, 7).long()}, TypeError, "logits must be float32"),
        ("no cell", {"logits": normal(2, 3, 0, 7)}, ValueError, "logits must have at least one cell"),
        ("too few targets", {"targets": few[:1]}, ValueError, "targets must hold one tensor for each of the 2 images"),
        ("rank of a target", {"targets": [few[0], few[1][0]]}, ValueError, r"targets\[1\] must have shape \[T, h, w\]"),
        ("complex target", {"targets": [few[0], few[1] * 1j]}, TypeError, r"targets\[1\] must be bool, integer or"),
        ("target without cells", {"targets": [few[0][:, :0], few[1]]}, ValueError, r"targets\[0\] must have at least"),
        ("sparse target", {"targets": [few[0].to_sparse(), few[1]]}, TypeError, r"targets\[0\] must be a dense"),
        (
            "target elsewhere",
            {"targets": [few[0], few[1].to("meta")]},
            RuntimeError,
            r"targets\[1\] must be on the dev",
        ),
        ("label_mode", {"label_mode": "cubic"}, ValueError, "label_mode must be one of bilinear, nearest, got 'cubic'"),
        ("padding_mode", {"padding_mode": "wrap"}, ValueError, "padding_mode must be one of zeros, border, got 'wrap'"),
        ("canvas of one", {"canvas": [12]}, ValueError, r"canvas must be \(height, width\), both positive, got \[12\]"),
        ("canvas of zero", {"canvas": [0, 12]}, ValueError, r"canvas must be \(height, width\), both positive, got"),
        ("canvas too small", {"canvas": [11, 12]}, ValueError, r"targets\[1\] must fit on the canvas \[11, 12\], got"),
        ("half coords", {"coords": points(2, 4).half()}, TypeError, "coords must be float32 or float64"),
        ("N of coords", {"coords": points(3, 4)}, ValueError, r"coords must have shape \[N, P, 2\] with N = 2 as in"),
        ("grid of coords", {"coords": points(2, 4, 5)}, ValueError, r"coords must have shape \[N, P, 2\] with N = 2"),
        ("coords elsewhere", {"coords": points(2, 4).to("meta")}, RuntimeError, "coords must be on the device of"),
    ]
    for name, wrong, exception, pattern in common:
        yield name, "mask_losses", good[0] | wrong, exception, pattern
        yield name, "mask_costs", good[1] | wrong, exception, pattern
    for what, high, letter in (("image", 2, "B"), ("query", 3, "Q"), ("target", 3, "T")):
        index = f"{what}_index"
        for value in (high, -1):
            values = torch.tensor([value, 1])
            pattern = rf"{index} must lie in \[0, {letter}\) = \[0, {high}\).* got {value} at position 0"
            yield f"{index} {value}", "mask_losses", good[0] | {index: values}, IndexError, pattern
        wrong = {index: torch.tensor([0, 1], dtype=torch.int32)}
        yield f"int32 {index}", "mask_losses", good[0] | wrong, TypeError, f"{index} must be int64"
        wrong = {index: torch.tensor([[0, 1]])}
        yield f"rank of {index}", "mask_losses", good[0] | wrong, ValueError, rf"{index} must have shape \[N\]"
    wrong = {"target_index": torch.tensor([0])}
    yield "N of target_index", "mask_losses", good[0] | wrong, ValueError, "target_index must have shape .* N = 2"
