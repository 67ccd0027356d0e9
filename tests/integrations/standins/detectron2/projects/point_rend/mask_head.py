"""The consumer whose uncertainty is that of the class of each region: the selection by a closure, and the mask head."""

import torch
import torch.nn.functional as F
from torch import nn

from .point_features import (
    generate_regular_grid_point_coords,
    get_uncertain_point_coords_on_grid,
    get_uncertain_point_coords_with_randomness,
    point_sample,
    point_sample_fine_grained_features,
)


def calculate_uncertainty(logits, classes):
    own = logits[:, 0] if logits.shape[1] == 1 else logits[torch.arange(len(logits)), classes]
    return -own.abs()[:, None]


def points_and_values(logits, gt_classes):
    coords = get_uncertain_point_coords_with_randomness(
        logits, lambda at_points: calculate_uncertainty(at_points, gt_classes), 16, 3, 0.75
    )
    return coords, point_sample(logits, coords, align_corners=False)


def points_by_largest(logits):
    return get_uncertain_point_coords_with_randomness(logits, lambda x: x.amax(1, keepdim=True), 16, 3, 0.75)


def mask_rcnn_inference(pred_mask_logits, pred_instances):
    if pred_mask_logits.shape[1] > 1:
        classes = torch.cat([found.pred_classes for found in pred_instances])
        pred_mask_logits = pred_mask_logits[torch.arange(len(classes)), classes][:, None]
    masks = pred_mask_logits.sigmoid().split([len(found) for found in pred_instances])
    for found, probabilities in zip(pred_instances, masks, strict=True):
        found.pred_masks = probabilities


class PointRendMaskHead(nn.Module):
    def __init__(self, point_head, in_features, scales, resolution=7, steps=5, num_points=28 * 28):
        super().__init__()
        self.point_head = point_head
        self.mask_point_in_features = in_features
        self._feature_scales = scales
        self.mask_point_subdivision_num_points = num_points
        while 4 * resolution**2 <= num_points:  # all of the next grid would be predicted again
            resolution, steps = 2 * resolution, steps - 1
        self.mask_point_subdivision_init_resolution, self.mask_point_subdivision_steps = resolution, steps

    def _point_pooler(self, features, proposal_boxes, point_coords):
        names = self.mask_point_in_features
        scales = [self._feature_scales[name] for name in names]
        return point_sample_fine_grained_features([features[n] for n in names], scales, proposal_boxes, point_coords)[0]

    def _get_point_logits(self, point_fine_grained_features, point_coords, coarse_mask):
        coarse = point_sample(coarse_mask, point_coords, align_corners=False)
        return self.point_head(point_fine_grained_features, coarse)

    def _subdivision_inference(self, features, mask_representations, instances):
        boxes, classes = [x.pred_boxes for x in instances], torch.cat([x.pred_classes for x in instances])
        if len(classes) == 0:
            return instances
        side = self.mask_point_subdivision_init_resolution
        grid = generate_regular_grid_point_coords(len(classes), side, boxes[0].device)
        fine = self._point_pooler(features, boxes, grid)
        logits = self._get_point_logits(fine, grid, mask_representations).unflatten(2, (side, side))
        for _ in range(self.mask_point_subdivision_steps):
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            uncertainty = calculate_uncertainty(logits, classes)
            index, points = get_uncertain_point_coords_on_grid(uncertainty, self.mask_point_subdivision_num_points)
            fine = self._point_pooler(features, boxes, points)
            values = self._get_point_logits(fine, points, mask_representations)
            index = index[:, None].expand_as(values)
            logits = logits.flatten(2).scatter_(2, index, values).view_as(logits)
        mask_rcnn_inference(logits, instances)
        return instances
