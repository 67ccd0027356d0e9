"""Bilinear and nearest gathering at points. Shapes: N images, C channels, H W grid, P points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check

MODES = ("bilinear", "nearest")
PADDING_MODES = ("zeros", "border")


def point_sample(
    input: Tensor | Sequence[Tensor],
    coords: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """``F.grid_sample(input, 2*coords - 1)``: ``[N, C, P]`` or ``[N, C, Hg, Wg]``; a list is concatenated over channels.

    Halves are sampled in float32 and rounded once.
    """
    check.option(mode, "mode", MODES)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    maps = [input] if isinstance(input, Tensor) else list(input)
    if not maps:
        raise ValueError("input must hold at least one tensor, got an empty list")
    for i, feature in enumerate(maps):
        name = "input" if isinstance(input, Tensor) else f"input[{i}]"
        check.logits(feature, name)
        if feature.shape[0] != maps[0].shape[0]:
            raise ValueError(f"{name} must have N = {maps[0].shape[0]} as in input[0], got shape {check.shape_of(feature)}")
        if feature.dtype != maps[0].dtype:
            raise TypeError(f"{name} must have the dtype of input[0] ({maps[0].dtype}), got {feature.dtype}")
        check.same_device(feature, name, maps[0], "input[0]")
    check.coords(coords, maps[0])
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    grid = 2 * coords.to(dtype) - 1
    if coords.dim() == 3:
        grid = grid.unsqueeze(2)
    if grid.shape[1] == 0 or grid.shape[2] == 0 or grid.shape[0] == 0:  # grid_sample refuses empty sets
        shape = (grid.shape[0], sum(m.shape[1] for m in maps), grid.shape[1], grid.shape[2])
        out = sum(m.sum() for m in maps) * 0 + grid.sum() * 0 + grid.new_zeros(shape)
        out = out.to(maps[0].dtype)
    else:
        sampled = [
            F.grid_sample(m.to(dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners).to(m.dtype)
            for m in maps
        ]
        out = torch.cat(sampled, dim=1)
    return out.squeeze(3) if coords.dim() == 3 else out


def point_labels(labels: Tensor, coords: Tensor, ignore_index: int = 255) -> Tensor:
    """Label of the cell that holds each point: ``[N, H, W] -> [N, P]`` int64; outside the map ``ignore_index``."""
    check.strided(labels, "labels")
    check.rank(labels, "labels", "[N, H, W]", 3)
    if labels.dtype not in check.LABEL_DTYPES:
        raise TypeError(f"labels must be an integer tensor (labels never pass through float), got {labels.dtype}")
    if labels.shape[1] == 0 or labels.shape[2] == 0:
        raise ValueError(f"labels must have at least one cell (H*W > 0), got shape {check.shape_of(labels)}")
    check.coords(coords, labels, "labels", grid=False)
    height, width = labels.shape[1:]
    inside = ((coords >= 0) & (coords <= 1)).all(-1)  # NaN is outside
    col = (coords[..., 0] * width).floor().nan_to_num().clamp(0, width - 1).long()
    row = (coords[..., 1] * height).floor().nan_to_num().clamp(0, height - 1).long()
    picked = labels.flatten(1).gather(1, row * width + col).long()
    return torch.where(inside, picked, torch.full_like(picked, ignore_index))
