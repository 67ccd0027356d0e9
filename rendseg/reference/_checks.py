"""Argument checks of the reference and of the fake kernels; ``csrc/checks.h`` says the same words for the compiled ops.

Wrong shapes and values raise ``ValueError``, wrong dtypes ``TypeError``, tensors on different devices ``RuntimeError``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> str:
    return str([int(s) if isinstance(s, int) else s for s in tensor.shape])


def rank(tensor: Tensor, name: str, shape: str, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}, got {shape_of(tensor)}")


def feature_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def strided(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


def same_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise RuntimeError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def option(value: str, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def logits(tensor: Tensor, name: str = "logits") -> None:
    """``[N, C, H, W]`` with at least one channel and one cell."""
    strided(tensor, name)
    rank(tensor, name, "[N, C, H, W]", 4)
    feature_dtype(tensor, name)
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got shape {shape_of(tensor)}")
    if tensor.shape[2] == 0 or tensor.shape[3] == 0:
        raise ValueError(f"{name} must have at least one cell (H*W > 0), got shape {shape_of(tensor)}")


def sampled_map(tensor: Tensor, name: str) -> None:
    """A map whose cells a position can count."""
    logits(tensor, name)
    if max(tensor.shape[2:]) >= 2**31 - 1:
        raise ValueError(f"{name} must have H and W below 2^31, got shape {shape_of(tensor)}")


def total_channels(maps: Sequence[Tensor], name: str) -> int:
    """The channels of all maps together. Views that repeat one channel can have more than fit into an integer."""
    channels = sum(feature.shape[1] for feature in maps)
    if channels >= 2**62:
        raise ValueError(f"{name} must have fewer than 2^62 channels in all")
    return channels


def num_points(value: int) -> None:
    if value <= 0:
        raise ValueError(f"num_points must be positive, got {value}")


def index(
    values: Tensor, name: str, like: Tensor | None, like_name: str, logits: Tensor, logits_name: str = "logits"
) -> None:
    """``[N]`` int64 on the device of ``logits``, with the N of ``like`` if that is given."""
    strided(values, name)
    if values.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {values.dtype}")
    if values.dim() != 1 or (like is not None and values.shape[0] != like.shape[0]):
        wanted = "" if like is None else f" with N = {like.shape[0]} as in {like_name}"
        raise ValueError(f"{name} must have shape [N]{wanted}, got {shape_of(values)}")
    same_device(values, name, logits, logits_name)


def class_index(classes: Tensor | None, of: Tensor, image_index: Tensor | None = None) -> None:
    if image_index is not None:
        index(image_index, "image_index", None, "", of)
    if classes is not None:
        like, name = (of, "logits") if image_index is None else (image_index, "image_index")
        index(classes, "class_index", like, name, of)


def in_range(values: Tensor, name: str, limit: int, what: str) -> None:
    """Refuses an index outside ``[0, limit)``, on the CPU, where looking costs no synchronisation."""
    if values.device.type != "cpu":
        return
    if values.stride(0) == 0:  # a view that repeats one value may have more of them than memory holds
        values = values[:1]
    wrong = ((values < 0) | (values >= limit)).nonzero()
    if wrong.numel():
        n = int(wrong[0, 0])
        raise IndexError(f"{name} must lie in [0, {what}) = [0, {limit}), got {int(values[n])} at position {n}")


def coords(points: Tensor, of: Tensor, of_name: str = "input", grid: bool = True) -> None:
    """``[N, P, 2]`` (or ``[N, Hg, Wg, 2]``) float32, or float64 where the features are."""
    wanted = "[N, P, 2] or [N, Hg, Wg, 2]" if grid else "[N, P, 2]"
    strided(points, "coords")
    if points.dim() not in ((3, 4) if grid else (3,)) or points.shape[-1] != 2 or points.shape[0] != of.shape[0]:
        raise ValueError(
            f"coords must have shape {wanted} with N = {of.shape[0]} as in {of_name}, got {shape_of(points)}"
        )
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"coords must be float32 or float64 (half precision cannot address a large map), got {points.dtype}"
        )
    same_device(points, "coords", of, of_name)
