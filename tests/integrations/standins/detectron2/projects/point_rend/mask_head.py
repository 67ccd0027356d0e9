"""The consumer whose uncertainty is that of the class of each region, given by a closure."""

import torch

from .point_features import get_uncertain_point_coords_with_randomness, point_sample


def calculate_uncertainty(logits, classes):
    return -logits[torch.arange(len(logits)), classes].abs()[:, None]


def points_and_values(logits, gt_classes):
    coords = get_uncertain_point_coords_with_randomness(
        logits, lambda at_points: calculate_uncertainty(at_points, gt_classes), 16, 3, 0.75
    )
    return coords, point_sample(logits, coords, align_corners=False)


def points_by_largest(logits):
    return get_uncertain_point_coords_with_randomness(logits, lambda x: x.amax(1, keepdim=True), 16, 3, 0.75)
