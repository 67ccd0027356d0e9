"""The consumer whose uncertainty is the margin of the two largest classes."""

from .point_features import get_uncertain_point_coords_with_randomness, point_sample


def calculate_uncertainty(sem_seg_logits):
    first, second = sem_seg_logits.topk(2, dim=1).values.unbind(1)
    return (second - first)[:, None]


def points_and_values(logits):
    coords = get_uncertain_point_coords_with_randomness(logits, calculate_uncertainty, 16, 3, 0.75)
    return coords, point_sample(logits, coords, align_corners=False)
