"""Masks of objects: instance PointRend (Kirillov et al. 2020), section 4.1, for torchvision's detectors.

B images, N boxes of all images, C classes without background, P points of a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import CoarseMaskHead, PointHead, grid_points, mask_labels, place_in_boxes, roi_point_sample
from ..reference.uncertain_points import draw_counts
from .pointrend import draws_of_keys


class PointRendMaskHead(nn.Module):
    """Coarse masks of boxes, then refinement at points: the mask head of detectron2's PointRend, with its names.

    The features of a box are those of one map (``feature`` of the pyramid, of ``stride``) at a grid of points, from
    which ``coarse_head`` makes a mask of ``coarse_size`` cells a side for every class. In training the point head
    learns at ``train_points`` uncertain points of each box; at inference ``steps`` steps predict
    ``subdivision_points`` cells each (with the defaults, masks of 224 x 224).
    """

    keys: Tensor | None = None
    """int64 of each image: the points of :meth:`losses` are a function of them alone."""
    count = 0
    """Boxes of the last :meth:`losses`."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature: str = "0",
        stride: int = 4,
        hidden_channels: int = 256,
        coarse_hidden_channels: int = 1024,
        coarse_size: int = 7,
        train_points: int = 14**2,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        steps: int = 5,
        subdivision_points: int = 28**2,
    ) -> None:
        super().__init__()
        for name, value, least in (("stride", stride, 1), ("train_points", train_points, 1), ("steps", steps, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.feature, self.stride, self.num_classes = feature, stride, num_classes
        self.train_points, self.oversample_ratio, self.importance_ratio = (
            train_points,
            oversample_ratio,
            importance_ratio,
        )
        self.steps, self.subdivision_points = steps, subdivision_points
        self.coarse_head = CoarseMaskHead(
            in_channels, num_classes, hidden_channels=coarse_hidden_channels, output_size=coarse_size
        )
        self.point_head = PointHead(in_channels, num_classes, hidden_channels)

    @property
    def stages(self) -> dict[str, int]:
        """By name the steps to the masks that are compared: the ``coarse`` ones; those of a ``grid`` (with the defaults
        28 x 28, whose every cell is predicted); and the ``refined`` ones."""
        return {"coarse": 0, "grid": min(2, self.steps), "refined": self.steps}

    def _boxes_of_map(self, map_: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes in pixels to boxes in [0, 1] of the map, which covers the padded images."""
        height, width = map_.shape[2:]
        size = torch.tensor([width, height, width, height], dtype=torch.float32, device=map_.device) * self.stride
        return [box.detach().float() / size for box in boxes]

    def _coarse(self, map_: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """``[N, C, h, w]``. A grid of points is RoIAlign with one sample to a cell."""
        side, count = self.coarse_head.input_size, sum(map(len, boxes))
        grid = grid_points(side, side, map_).expand(count, -1, -1)
        return self.coarse_head(roi_point_sample(map_, boxes, grid).unflatten(2, (side, side)))

    def forward(
        self,
        features: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        steps: int | None = None,
    ) -> list[Tensor]:
        """For each image logits ``[N_b, H, W]`` of the masks of its ``boxes [N_b, 4]`` (pixels of the padded images),
        of the classes ``labels [N_b]``, which begin at 1; after all ``steps``, or so many."""
        map_ = features[self.feature]
        counts = [len(b) for b in boxes]
        placed = self._boxes_of_map(map_, boxes)
        coarse = self._coarse(map_, placed)
        images = torch.arange(len(boxes), device=map_.device)
        image_index = images.repeat_interleave(torch.tensor(counts, device=map_.device), output_size=sum(counts))
        masks = ops.refine(
            coarse,
            map_,
            self.point_head,
            steps=self.steps if steps is None else steps,
            num_points=self.subdivision_points,
            output="class",
            rois=(image_index, torch.cat(placed)),
            class_index=torch.cat([label - 1 for label in labels]),
        )
        return list(masks[:, 0].split(counts))

    def losses(
        self,
        features: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
        mask_index: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """``loss_mask`` of the coarse masks and ``loss_mask_point`` of the points, both binary cross-entropies of the
        class of each box. Box n of image b belongs to ``masks[b][mask_index[b][n]]``, ``[T_b, H, W]``."""
        from torchvision.models.detection.roi_heads import project_masks_on_boxes

        map_ = features[self.feature]
        placed = self._boxes_of_map(map_, boxes)
        coarse = self._coarse(map_, placed)
        classes = torch.cat([label - 1 for label in labels])
        self.count = len(classes)
        if len(classes) == 0:  # both heads still get a gradient, of zeros
            nothing = coarse.sum() + sum(p.sum() for p in self.point_head.parameters()) * 0
            return {"loss_mask": nothing, "loss_mask_point": nothing}
        side = coarse.shape[-1]
        with torch.no_grad():
            wanted = torch.cat(
                [project_masks_on_boxes(*of, side) for of in zip(masks, boxes, mask_index, strict=True) if len(of[1])]
            )
            coords = ops.sample_uncertain_points(
                coarse,
                self.train_points,
                self.oversample_ratio,
                self.importance_ratio,
                class_index=classes,
                random_coords=self._draws([len(b) for b in boxes]),
            )
            per_image = zip(masks, mask_index, boxes, coords.split([len(b) for b in boxes]), strict=True)
            at_points = torch.cat([mask_labels(m, i, place_in_boxes(b.float(), p)) for m, i, b, p in per_image])
        fine = roi_point_sample(map_, placed, coords)
        points = self.point_head(fine, ops.point_sample(coarse, coords))
        own = torch.arange(len(classes), device=classes.device)
        return {
            "loss_mask": F.binary_cross_entropy_with_logits(coarse[own, classes].float(), wanted),
            "loss_mask_point": F.binary_cross_entropy_with_logits(points[own, classes].float(), at_points),
        }

    def _draws(self, counts: Sequence[int]) -> Tensor | None:
        """What ``sample_uncertain_points`` draws for so many boxes of each image; ``None`` without keys."""
        if self.keys is None:
            return None
        candidates, _, uniform = draw_counts(self.train_points, self.oversample_ratio, self.importance_ratio)
        each = candidates + uniform
        of_images = zip(self.keys.split(1), counts, strict=True)
        return torch.cat([draws_of_keys(key, n * each).view(n, each, 2) for key, n in of_images])


def paste_masks(logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Masks ``[N, h, w]`` of ``boxes [N, 4]`` (pixels) in an image of ``size``: bool ``[N, H, W]``, true where the
    probability between the cells of the mask reaches ``threshold``. No map of floats is larger than a box."""
    height, width = size
    pasted = torch.zeros((len(boxes), height, width), dtype=torch.bool, device=logits.device)
    boxes = boxes.float()
    probabilities = logits.float().sigmoid()
    for n, (left, top, right, bottom) in enumerate(boxes.tolist()):  # one copy to the host for all boxes
        x0, x1 = max(int(left) - 1, 0), min(int(right) + 2, width)
        y0, y1 = max(int(top) - 1, 0), min(int(bottom) + 2, height)
        if x0 >= x1 or y0 >= y1 or right <= left or bottom <= top:
            continue
        x = (torch.arange(x0, x1, device=boxes.device) + 0.5 - boxes[n, 0]) / (boxes[n, 2] - boxes[n, 0])
        y = (torch.arange(y0, y1, device=boxes.device) + 0.5 - boxes[n, 1]) / (boxes[n, 3] - boxes[n, 1])
        coords = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
        pasted[n, y0:y1, x0:x1] = ops.point_sample(probabilities[n][None, None], coords[None])[0, 0] >= threshold
    return pasted
