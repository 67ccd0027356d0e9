"""Sampling and selection with the names and arguments of detectron2's PointRend."""

import torch
import torch.nn.functional as F


def point_sample(input, point_coords, **kwargs):
    if point_coords.dim() == 4:
        return F.grid_sample(input, 2 * point_coords - 1, **kwargs)
    return F.grid_sample(input, 2 * point_coords[:, :, None] - 1, **kwargs)[..., 0]


def get_uncertain_point_coords_with_randomness(
    coarse_logits, uncertainty_func, num_points, oversample_ratio, importance_sample_ratio
):
    maps, kept = len(coarse_logits), int(importance_sample_ratio * num_points)
    candidates = torch.rand(maps, int(num_points * oversample_ratio), 2, device=coarse_logits.device)
    scores = uncertainty_func(point_sample(coarse_logits, candidates, align_corners=False))[:, 0]
    best = scores.topk(kept, dim=1).indices
    chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    if kept == num_points:
        return chosen
    return torch.cat([chosen, torch.rand(maps, num_points - kept, 2, device=coarse_logits.device)], 1)
