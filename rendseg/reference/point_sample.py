"""Bilinear and nearest gathering at points. Shapes: N images, C channels, H W grid, P points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._float64 import widened
from . import _checks as check
from ._types import checked

MODES = ("bilinear", "nearest")
PADDING_MODES = ("zeros", "border")


def of_masks(feature: Tensor) -> Tensor:
    """``feature``, in float32 where it is a mask: bool or uint8."""
    return feature.float() if feature.dtype in (torch.bool, torch.uint8) else feature


def check_point_sample(maps: Sequence[Tensor], coords: Tensor, mode: str, padding_mode: str) -> None:
    """The checks of :func:`point_sample`, shared with the fake kernels."""
    check.option(mode, "mode", MODES)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    if not maps:
        raise ValueError("input must hold at least one tensor, got an empty list")
    for i, feature in enumerate(maps):
        name = "input" if len(maps) == 1 else f"input[{i}]"
        check.sampled_map(feature, name)
        if feature.shape[0] != maps[0].shape[0]:
            raise ValueError(
                f"{name} must have N = {maps[0].shape[0]} as in input[0], got shape {check.shape_of(feature)}"
            )
        if feature.dtype != maps[0].dtype:
            raise TypeError(f"{name} must have the dtype of input[0] ({maps[0].dtype}), got {feature.dtype}")
        check.same_device(feature, name, maps[0], "input[0]")
    check.coords(coords, maps[0])
    check.total_channels(maps, "input")


def check_sample_grad(grad: Tensor, maps: Sequence[Tensor], coords: Tensor) -> None:
    """The checks of the gradient of the output."""
    check.strided(grad, "grad")
    shape = (coords.shape[0], sum(m.shape[1] for m in maps), *coords.shape[1:-1])
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have shape {list(shape)} as the output, got {check.shape_of(grad)}")
    if grad.dtype != maps[0].dtype:
        raise TypeError(f"grad must have the dtype of input ({maps[0].dtype}), got {grad.dtype}")
    check.same_device(grad, "grad", maps[0], "input")


@checked
def point_sample(
    input: Tensor | Sequence[Tensor],
    coords: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """``F.grid_sample(input, 2*coords - 1)``: ``[N, C, P]`` or ``[N, C, Hg, Wg]``; lists are concatenated.

    Halves are sampled in float32 and rounded once; masks, bool or uint8, are sampled as float32. With border padding a
    NaN coordinate is the first cell, as in the forward of ``F.grid_sample`` on the CPU, and has no gradient.
    """
    maps = [of_masks(m) for m in ([input] if isinstance(input, Tensor) else input)]
    check_point_sample(maps, coords, mode, padding_mode)
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    grid = 2 * coords.to(dtype) - 1
    if padding_mode == "border":  # F.grid_sample reads out of bounds in its backward where a coordinate is NaN
        grid = torch.where(grid.isnan(), torch.full_like(grid, -2), grid)
    if coords.dim() == 3:
        grid = grid.unsqueeze(2)
    if grid.shape[1] == 0 or grid.shape[2] == 0 or grid.shape[0] == 0:  # grid_sample refuses empty sets
        shape = (grid.shape[0], sum(m.shape[1] for m in maps), grid.shape[1], grid.shape[2])
        out = grid.new_zeros(shape).to(maps[0].dtype)
        for source in (*maps, grid):  # keeps the graph
            out = out + source.sum().to(out.dtype) * 0
    else:
        sampled = [
            F.grid_sample(m.to(dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=bool(align_corners))
            for m in maps
        ]
        out = torch.cat([s.to(m.dtype) for s, m in zip(sampled, maps, strict=True)], dim=1)
    return out.squeeze(3) if coords.dim() == 3 else out


def gradient_format(tensor: Tensor) -> torch.memory_format:
    """Layout of the gradient of a map: that of the map, where it is one of the two first-class layouts."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _point_sample_backward(
    grad: Tensor,
    input: Sequence[Tensor],
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    input_grad: bool,
    coords_grad: bool,
) -> list[Tensor]:
    """Gradients of :func:`point_sample`: one per map, then that of ``coords``; empty ``[0]`` where not asked for.

    Tap ``t`` at cell ``(y_t, x_t)`` has weight ``w_t = a_t(x) b_t(y)``. The map receives ``w_t * grad`` at that cell;
    the coordinates receive ``grad * value_t`` times the derivative of ``w_t``.
    """
    check_point_sample(input, coords, mode, padding_mode)
    check_sample_grad(grad, input, coords)
    dtype = torch.float64 if input[0].dtype == torch.float64 else torch.float32
    points = coords.to(dtype).flatten(1, -2)
    wide = grad.to(dtype).flatten(2)
    results, first = [], 0
    slope = torch.zeros_like(points)
    for feature in input:
        n, c, height, width = feature.shape
        part, first = wide[:, first : first + c], first + c
        target = torch.zeros(n, c, height * width, dtype=dtype, device=feature.device)
        flat = feature.to(dtype).flatten(2)
        taps = [
            _axis_taps(points[..., i], size, mode, padding_mode, align_corners) for i, size in ((0, width), (1, height))
        ]
        for col, in_x, weight_x, slope_x in taps[0]:
            for row, in_y, weight_y, slope_y in taps[1]:
                inside = in_x & in_y
                cell = torch.where(inside, row * width + col, 0).unsqueeze(1).expand(-1, c, -1)
                if input_grad:
                    weight = torch.where(inside, weight_x * weight_y, 0).unsqueeze(1)
                    target.scatter_add_(2, cell, torch.where(inside.unsqueeze(1), part * weight, 0))
                if coords_grad and mode == "bilinear":
                    value = torch.where(inside.unsqueeze(1), flat.gather(2, cell), 0)
                    dot = (value * part).sum(1)
                    slope[..., 0] += dot * slope_x * weight_y
                    slope[..., 1] += dot * weight_x * slope_y
        if input_grad:
            out = torch.empty(
                feature.shape, dtype=feature.dtype, device=feature.device, memory_format=gradient_format(feature)
            )
            results.append(out.copy_(target.view(n, c, height, width)))
        else:
            results.append(feature.new_empty(0))
    results.append(slope.view(coords.shape).to(coords.dtype) if coords_grad else coords.new_empty(0))
    return results


def _axis_taps(
    coord: Tensor, size: int, mode: str, padding_mode: str, align_corners: bool
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Taps along one axis: ``(cell, whether it is on the map, weight, d weight / d coord)``, one (nearest) or two."""
    position = (coord * 2 - 1 + 1) * (size - 1) / 2 if align_corners else ((coord * 2 - 1 + 1) * size - 1) / 2
    scale = torch.full_like(coord, size - 1 if align_corners else size)
    if padding_mode == "border":
        scale = torch.where((position > 0) & (position < size - 1), scale, 0)
        position = torch.where(position > 0, position, 0).clamp(max=size - 1)  # NaN to 0
    if mode == "nearest":
        cells, weights, slopes = [position.round()], [torch.ones_like(coord)], [torch.zeros_like(coord)]
    else:
        cells = [position.floor(), position.floor() + 1]
        fraction = position - position.floor()
        weights, slopes = [1 - fraction, fraction], [-scale, scale]
    taps = []
    for cell, weight, slope in zip(cells, weights, slopes, strict=True):
        inside = (cell >= 0) & (cell < size)
        taps.append((torch.where(inside, cell, 0).long(), inside, weight, slope))
    return taps


def check_point_labels(labels: Tensor, coords: Tensor) -> None:
    """The checks of :func:`point_labels`, shared with the fake kernel."""
    check.strided(labels, "labels")
    check.rank(labels, "labels", "[N, H, W]", 3)
    if labels.dtype not in check.LABEL_DTYPES:
        raise TypeError(f"labels must be an integer tensor (labels never pass through float), got {labels.dtype}")
    if labels.shape[1] == 0 or labels.shape[2] == 0:
        raise ValueError(f"labels must have at least one cell (H*W > 0), got shape {check.shape_of(labels)}")
    check.coords(coords, labels, "labels", grid=False)


@checked
def point_labels(labels: Tensor, coords: Tensor, ignore_index: int = 255) -> Tensor:
    """Label of the cell that holds each point: ``[N, H, W] -> [N, P]`` int64; outside the map ``ignore_index``.

    Cell ``i`` of ``W`` is ``[i / W, (i + 1) / W)``, the last one closed; the product is exact in float64.
    """
    check_point_labels(labels, coords)
    height, width = labels.shape[1:]
    inside = ((coords >= 0) & (coords <= 1)).all(-1)  # NaN is outside
    at = widened(torch.where(inside.unsqueeze(-1), coords, 0))
    col = (at[..., 0] * width).floor().clamp(max=width - 1).long()
    row = (at[..., 1] * height).floor().clamp(max=height - 1).long()
    picked = labels.flatten(1).gather(1, (row * width + col).to(labels.device)).long()
    return torch.where(inside, picked, torch.full_like(picked, ignore_index))
