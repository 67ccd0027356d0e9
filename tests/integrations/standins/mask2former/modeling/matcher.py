"""A matcher with the names and arguments of Mask2Former's repository, one image after the other."""

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from scipy.optimize import linear_sum_assignment
from torch import nn


def costs(x, y):
    """Cross-entropy and dice of every row of x with every row of y."""
    where_one, where_zero = (
        F.binary_cross_entropy_with_logits(x, label, reduction="none") / x.shape[1]
        for label in (torch.ones_like(x), torch.zeros_like(x))
    )
    s = x.sigmoid()
    return where_one @ y.T + where_zero @ (1 - y).T, 1 - (2 * s @ y.T + 1) / (s.sum(1)[:, None] + y.sum(1) + 1)


class HungarianMatcher(nn.Module):
    def __init__(self, cost_class=1, cost_mask=1, cost_dice=1, num_points=0):
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def memory_efficient_forward(self, outputs, targets):
        indices = []
        for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
            points = torch.rand(1, self.num_points, 2)
            x, y = (
                point_sample(maps[:, None], points.repeat(len(maps), 1, 1), align_corners=False)[:, 0]
                for maps in (masks, target["masks"].to(masks))
            )
            with torch.autocast(x.device.type, enabled=False):
                mask, dice = costs(x.float(), y.float())
            cost = self.cost_mask * mask + self.cost_dice * dice
            cost = cost - self.cost_class * logits.softmax(-1)[:, target["labels"]]
            indices.append([torch.as_tensor(index) for index in linear_sum_assignment(cost.cpu())])
        return indices

    def forward(self, outputs, targets):
        return self.memory_efficient_forward(outputs, targets)
