"""Points of boxes in images. N boxes of all images, P points of a box, C channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops


def place_in_boxes(boxes: Tensor, coords: Tensor) -> Tensor:
    """Points ``coords [N, P, 2]`` in ``[0, 1]`` of ``boxes [N, 4]`` (``x0, y0, x1, y1``), in the units of the boxes."""
    lower, upper = boxes[:, None, :2], boxes[:, None, 2:]
    return lower + coords * (upper - lower)


def grid_points(height: int, width: int, like: Tensor) -> Tensor:
    """The centres of the cells of a grid, ``[H*W, 2]`` in row order, on the device of ``like``."""
    y, x = ((torch.arange(n, device=like.device) + 0.5) / n for n in (height, width))
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)


def roi_point_sample(
    features: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], coords: Tensor, padding_mode: str = "zeros"
) -> Tensor:
    """Features of images at points of their boxes: ``[N, C, P]``, the maps of a list joined over channels.

    ``features`` are ``[B, C, H, W]``, ``boxes`` one tensor ``[N_b, 4]`` per image, in ``[0, 1]`` of the maps, and
    ``coords [N, P, 2]`` the points of all boxes in the order of the images. Differentiable in the features; each image
    is one call of ``rendseg.ops.point_sample``, without a copy of its maps.
    """
    maps = [features] if isinstance(features, Tensor) else list(features)
    if len(boxes) != maps[0].shape[0]:
        raise ValueError(f"boxes must hold a tensor for each of {maps[0].shape[0]} images, got {len(boxes)}")
    counts = [len(b) for b in boxes]
    if coords.dim() != 3 or coords.shape[0] != sum(counts) or coords.shape[2] != 2:
        raise ValueError(f"coords must have shape [N, P, 2] with N = {sum(counts)} boxes, got {list(coords.shape)}")
    points, sampled = coords.shape[1], []
    for image, (own, at) in enumerate(zip(boxes, coords.split(counts), strict=True)):
        placed = place_in_boxes(own, at).reshape(1, -1, 2)
        values = ops.point_sample([m[image : image + 1] for m in maps], placed, padding_mode=padding_mode)
        sampled.append(values.view(values.shape[1], len(own), points).transpose(0, 1))
    return torch.cat(sampled)


def mask_labels(masks: Tensor, mask_index: Tensor, points: Tensor) -> Tensor:
    """What masks of objects say at points: ``[N, P]`` float32 in ``[0, 1]``, interpolated between pixels, 0 outside.

    ``masks [T, H, W]`` (bool or numbers) are read where they lie: only the four pixels around each point are converted.
    Box n belongs to ``masks[mask_index[n]]``; ``points [N, P, 2]`` are in pixels, the first of which has its centre at
    (0.5, 0.5). Equal to ``F.grid_sample`` of the masks as floats.
    """
    height, width = masks.shape[1:]
    position = points.float() - 0.5
    lower = position.floor()
    x, y = lower.long().unbind(-1)
    far = (position - lower).unbind(-1)
    of = mask_index[:, None]
    total = torch.zeros(points.shape[:2], device=masks.device)
    for right in (0, 1):
        for down in (0, 1):
            column, row = x + right, y + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            value = masks[of, row.clamp(0, height - 1), column.clamp(0, width - 1)].float()
            weight = (far[0] if right else 1 - far[0]) * (far[1] if down else 1 - far[1])
            total += torch.where(inside, value * weight, 0)
    return total
