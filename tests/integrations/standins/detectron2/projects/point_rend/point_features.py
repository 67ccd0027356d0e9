"""Sampling and selection with the names and arguments of detectron2's PointRend."""

import torch
import torch.nn.functional as F

from detectron2.structures import Boxes


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


def generate_regular_grid_point_coords(count, side, device):
    steps = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack((x, y), -1).view(1, -1, 2).expand(count, -1, -1)


def get_uncertain_point_coords_on_grid(uncertainty_map, num_points):
    count, _, height, width = uncertainty_map.shape
    index = uncertainty_map.view(count, -1).topk(min(num_points, height * width), dim=1).indices
    return index, torch.stack(((index % width + 0.5) / width, (index // width + 0.5) / height), -1)


def point_sample_fine_grained_features(features_list, feature_scales, boxes, point_coords):
    corners = Boxes.cat(boxes).tensor[:, None]
    in_image = corners[..., :2] + point_coords * (corners[..., 2:] - corners[..., :2])
    sampled = []
    for image, points in enumerate(in_image.split([len(b) for b in boxes])):
        of_image = []
        for map_, scale in zip(features_list, feature_scales, strict=True):
            size = torch.tensor([map_.shape[3], map_.shape[2]]) / scale
            of_image.append(point_sample(map_[image, None], (points / size)[None], align_corners=False)[0])
        sampled.append(torch.cat(of_image).transpose(0, 1))
    return torch.cat(sampled), in_image
