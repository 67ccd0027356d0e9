"""Uncertainty and selection: PointRend (Kirillov et al. 2020), sections 3.1 and 3.2.

Shapes: N images (or masks), C classes, H W grid, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from ._draws import draw_key, uniform_points
from ._types import checked
from .point_sample import PADDING_MODES, of_masks, point_sample


def check_class_index(class_index: Tensor | None, logits: Tensor, image_index: Tensor | None = None) -> None:
    """Shape, dtype and, on the CPU, the range of ``class_index`` and ``image_index``."""
    check.class_index(class_index, logits, image_index)
    if image_index is not None:
        check.in_range(image_index, "image_index", logits.shape[0], "B")
    if class_index is not None:
        check.in_range(class_index, "class_index", logits.shape[1], "C")


@checked
def uncertainty(logits: Tensor, class_index: Tensor | None = None) -> Tensor:
    """Negative margin between the two largest logits: ``[N, C, H, W] -> [N, H, W]`` float32, <= 0."""
    check.logits(logits)
    check_class_index(class_index, logits)
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
    x = (indices % width).float() + 0.5
    y = torch.div(indices, width, rounding_mode="floor").float() + 0.5
    # By tensors, not by numbers: on a GPU, ATen multiplies by the rounded reciprocal of a number, and is one ulp off.
    return torch.stack((x / torch.full_like(x, width), y / torch.full_like(y, height)), dim=-1)


def most_uncertain(scores: Tensor, k: int) -> Tensor:
    """Ascending indices ``[N, k]`` of the largest ``scores[N, M]``; NaN ranks first, ties go to the smallest index."""
    # A stable descending sort keeps equal scores in index order; torch sorts NaN as largest.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order.sort(dim=1).values


@checked
def uncertain_points(logits: Tensor, num_points: int, class_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k = min(num_points, H*W)`` most uncertain cells: ascending ``indices [N, k]``, their centres."""
    check.logits(logits)
    check.num_points(num_points)
    check_class_index(class_index, logits)
    n, _, height, width = logits.shape
    scores = uncertainty(logits, class_index).reshape(n, height * width)
    indices = most_uncertain(scores, min(num_points, height * width))
    return indices, cell_centres(indices, height, width)


def draw_counts(num_points: int, oversample_ratio: float, importance_ratio: float) -> tuple[int, int, int]:
    """``(candidates, kept, random)`` of section 3.2, checked."""
    check.num_points(num_points)
    num_points, oversample_ratio = int(num_points), float(oversample_ratio)  # NumPy's integers overflow
    if not 1 <= oversample_ratio < float("inf"):
        raise ValueError(f"oversample_ratio must be at least 1 and finite, got {oversample_ratio}")
    if not 0 <= importance_ratio <= 1:
        raise ValueError(f"importance_ratio must lie in [0, 1], got {importance_ratio}")
    if not oversample_ratio * num_points < 2**31:
        raise ValueError(f"oversample_ratio * num_points must be less than 2**31, got {oversample_ratio * num_points}")
    kept = int(importance_ratio * num_points)
    return int(oversample_ratio * num_points), kept, num_points - kept


def check_draws(random_coords: Tensor | None, logits: Tensor, n: int, total: int) -> None:
    if logits.shape[2] * logits.shape[3] >= 2**31:
        raise ValueError(
            f"logits must have fewer than 2**31 cells (H*W) for sampling, got shape {check.shape_of(logits)}"
        )
    if random_coords is None:
        return
    check.strided(random_coords, "random_coords")
    if random_coords.dim() != 3 or tuple(random_coords.shape) != (n, total, 2):
        raise ValueError(
            f"random_coords must have shape [N, Q, 2] = [{n}, {total}, 2], got {check.shape_of(random_coords)}"
        )
    if random_coords.dtype != torch.float32:
        raise TypeError(f"random_coords must be float32, got {random_coords.dtype}")
    check.same_device(random_coords, "random_coords", logits, "logits")


@checked
def sample_uncertain_points(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_ratio: float = 0.75,
    *,
    class_index: Tensor | None = None,
    image_index: Tensor | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    generator: torch.Generator | None = None,
    random_coords: Tensor | None = None,
) -> Tensor:
    """Training-time selection, ``-> coords [N, num_points, 2]`` float32: the uncertain candidates, then uniform points.

    ``random_coords [N, Q, 2]`` replaces the draws: first the ``int(oversample_ratio * num_points)`` candidates, then
    the ``num_points - int(importance_ratio * num_points)`` uniform points. With ``image_index [N]`` mask n lies in
    ``logits[image_index[n]]``. Masks, bool or uint8, are sampled as float32.
    """
    logits = of_masks(logits)
    check.logits(logits)
    check_class_index(class_index, logits, image_index)
    candidates, kept, uniform = draw_counts(num_points, oversample_ratio, importance_ratio)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    n, total = (logits if image_index is None else image_index).shape[0], candidates + uniform
    check_draws(random_coords, logits, n, total)
    if n == 0:
        return torch.empty((0, num_points, 2), dtype=torch.float32, device=logits.device)
    if image_index is not None and class_index is not None:
        logits, class_index = logits[image_index, class_index].unsqueeze(1), None
    elif image_index is not None:
        logits = logits[image_index]
    if random_coords is None:
        random_coords = uniform_points(draw_key(logits.device, generator), n, total)
    random_coords = random_coords.detach()
    drawn, rest = random_coords[:, :candidates], random_coords[:, candidates:]
    # Sample first, then take the uncertainty of the sampled values: the margin is not linear in the logits.
    # Infinities are as far outside as any other point, and so is NaN; border padding takes NaN to the low edge.
    at_points = point_sample(
        logits.detach(), drawn.nan_to_num(-2.0, 3.0, -2.0), padding_mode=padding_mode, align_corners=align_corners
    )
    if padding_mode == "zeros":
        at_points = at_points.masked_fill(~drawn.isfinite().all(-1).unsqueeze(1), 0.0)
    scores = uncertainty(at_points.unsqueeze(-1), class_index).squeeze(-1)
    indices = most_uncertain(scores, kept)
    return torch.cat((drawn.gather(1, indices.unsqueeze(-1).expand(-1, -1, 2)), rest), dim=1)
