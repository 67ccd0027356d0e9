"""A criterion with the names and arguments of Mask2Former's repository, one layer after the other."""

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import get_uncertain_point_coords_with_randomness, point_sample
from torch import nn


def calculate_uncertainty(logits):
    return -logits.abs()


def pair_losses(x, y):
    s = x.sigmoid()
    dice = 1 - (2 * (s * y).sum(1) + 1) / (s.sum(1) + y.sum(1) + 1)
    return F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1), dice


class SetCriterion(nn.Module):
    def __init__(self, num_classes, matcher, losses, num_points, oversample_ratio, importance_sample_ratio):
        super().__init__()
        self.num_classes, self.matcher, self.losses = num_classes, matcher, losses
        self.num_points = num_points
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio

    def loss_labels(self, outputs, targets, indices, num_masks):
        wanted = torch.full(outputs["pred_logits"].shape[:2], self.num_classes)
        for b, (query, target) in enumerate(indices):
            wanted[b, query] = targets[b]["labels"][target]
        return {"loss_ce": F.cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted)}

    def loss_masks(self, outputs, targets, indices, num_masks):
        masks = outputs["pred_masks"][self._get_src_permutation_idx(indices)][:, None]
        # All targets of the batch, padded to the most and the largest of an image.
        sizes = torch.tensor([target["masks"].shape for target in targets]).amax(0).tolist()
        padded = torch.zeros(len(targets), *sizes, dtype=targets[0]["masks"].dtype)
        for image, target in zip(padded, targets, strict=True):
            count, height, width = target["masks"].shape
            image[:count, :height, :width] = target["masks"]
        wanted = padded.to(masks)[self._get_tgt_permutation_idx(indices)][:, None]
        with torch.no_grad():
            points = get_uncertain_point_coords_with_randomness(
                masks,
                lambda logits: calculate_uncertainty(logits),
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            labels = point_sample(wanted, points, align_corners=False)[:, 0]
        entropy, dice = pair_losses(point_sample(masks, points, align_corners=False)[:, 0], labels)
        return {"loss_mask": entropy.sum() / num_masks, "loss_dice": dice.sum() / num_masks}

    def _get_src_permutation_idx(self, indices):
        images = [torch.full_like(query, b) for b, (query, _) in enumerate(indices)]
        return torch.cat(images), torch.cat([query for query, _ in indices])

    def _get_tgt_permutation_idx(self, indices):
        images = [torch.full_like(target, b) for b, (_, target) in enumerate(indices)]
        return torch.cat(images), torch.cat([target for _, target in indices])

    def get_loss(self, loss, outputs, targets, indices, num_masks):
        return getattr(self, f"loss_{loss}")(outputs, targets, indices, num_masks)

    def forward(self, outputs, targets):
        num_masks = max(sum(len(target["labels"]) for target in targets), 1)
        found = {}
        last = {name: value for name, value in outputs.items() if name != "aux_outputs"}
        for i, layer in enumerate([last, *outputs.get("aux_outputs", [])]):
            indices = self.matcher(layer, targets)
            for loss in self.losses:
                for name, value in self.get_loss(loss, layer, targets, indices, num_masks).items():
                    found[f"{name}_{i - 1}" if i else name] = value
        return found
