"""Uncertainty and selection: PointRend (Kirillov et al. 2020), sections 3.1 and 3.2.

Shapes: N images (or masks), C classes, H W grid, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from .point_sample import point_sample


def uncertainty(logits: Tensor, class_index: Tensor | None = None) -> Tensor:
    """Negative margin between the two largest logits: ``[N, C, H, W] -> [N, H, W]`` float32, <= 0."""
    check.logits(logits)
    check.class_index(class_index, logits)
    # Half inputs are widened first: the difference of two halves is exact in float32.
    wide = logits.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if class_index is not None:
        chosen = wide.gather(1, class_index.view(-1, 1, 1, 1).expand(-1, 1, *wide.shape[2:])).squeeze(1)
        margin = -chosen.abs()
    elif wide.shape[1] == 1:
        margin = -wide.squeeze(1).abs()
    else:
        top = wide.topk(2, dim=1).values
        margin = top[:, 1] - top[:, 0]
    # A position with any NaN is NaN; two equal infinities also give inf - inf = NaN, and rank as uncertain.
    unknown = wide.isnan().any(1) if class_index is None else margin.isnan()
    return margin.masked_fill(unknown, float("nan")).float()


def cell_centres(indices: Tensor, height: int, width: int) -> Tensor:
    """``[..., P]`` flat indices of an H x W grid to ``[..., P, 2]`` float32 ``(x, y)`` in ``[0, 1]``."""
    x = ((indices % width).float() + 0.5) / width
    y = (torch.div(indices, width, rounding_mode="floor").float() + 0.5) / height
    return torch.stack((x, y), dim=-1)


def most_uncertain(scores: Tensor, k: int) -> Tensor:
    """Ascending indices ``[N, k]`` of the largest ``scores[N, M]``; NaN ranks first, ties go to the smallest index."""
    # A stable descending sort keeps equal scores in index order; torch sorts NaN as largest.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order.sort(dim=1).values


def uncertain_points(logits: Tensor, num_points: int, class_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``min(num_points, H*W)`` most uncertain cells: ascending ``indices [N, k]`` and their centres ``[N, k, 2]``."""
    check.logits(logits)
    check.num_points(num_points)
    n, _, height, width = logits.shape
    scores = uncertainty(logits, class_index).reshape(n, height * width)
    indices = most_uncertain(scores, min(num_points, height * width))
    return indices, cell_centres(indices, height, width)


def draw_counts(num_points: int, oversample_ratio: float, importance_ratio: float) -> tuple[int, int, int]:
    """``(candidates, kept, random)`` of section 3.2, checked."""
    check.num_points(num_points)
    if not 1 <= oversample_ratio < float("inf"):
        raise ValueError(f"oversample_ratio must be at least 1 and finite, got {oversample_ratio}")
    if not 0 <= importance_ratio <= 1:
        raise ValueError(f"importance_ratio must lie in [0, 1], got {importance_ratio}")
    kept = int(importance_ratio * num_points)
    return int(oversample_ratio * num_points), kept, num_points - kept


def sample_uncertain_points(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_ratio: float = 0.75,
    *,
    class_index: Tensor | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    generator: torch.Generator | None = None,
    random_coords: Tensor | None = None,
) -> Tensor:
    """Training-time selection, ``-> coords [N, num_points, 2]`` float32: the most uncertain candidates, then uniform points.

    ``random_coords [N, Q, 2]`` replaces the draws: first the ``int(oversample_ratio * num_points)`` candidates, then the
    ``num_points - int(importance_ratio * num_points)`` uniform points.
    """
    check.logits(logits)
    check.class_index(class_index, logits)
    candidates, kept, uniform = draw_counts(num_points, oversample_ratio, importance_ratio)
    n, total = logits.shape[0], candidates + uniform
    if random_coords is None:
        random_coords = torch.rand(n, total, 2, generator=generator, device=logits.device)
    elif random_coords.dim() != 3 or tuple(random_coords.shape) != (n, total, 2):
        raise ValueError(f"random_coords must have shape [N, Q, 2] = [{n}, {total}, 2], got {check.shape_of(random_coords)}")
    elif random_coords.dtype != torch.float32:
        raise TypeError(f"random_coords must be float32, got {random_coords.dtype}")
    drawn, rest = random_coords[:, :candidates], random_coords[:, candidates:]
    # Sample first, then take the uncertainty of the sampled values: the margin is not linear in the logits.
    at_points = point_sample(logits.detach(), drawn, padding_mode=padding_mode, align_corners=align_corners)
    scores = uncertainty(at_points.unsqueeze(-1), class_index).squeeze(-1)
    indices = most_uncertain(scores, kept)
    return torch.cat((drawn.gather(1, indices.unsqueeze(-1).expand(-1, -1, 2)), rest), dim=1)
