"""torchvision's two-stage detector around :class:`rendseg.models.PointRendMaskHead`. Imported when one is built."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .backbones import Backbone
from .instances import PointRendMaskHead, paste_masks

Targets = list[dict[str, Tensor]]


class TimmFPN(nn.Module):
    """torchvision's feature pyramid over the four stages of strides 4 to 32 of a timm network: maps ``"0"`` to ``"3"``
    and ``"pool"``."""

    def __init__(self, body: Backbone, out_channels: int = 256) -> None:
        super().__init__()
        if body.strides[-4:] != [4, 8, 16, 32] or body.fixed:
            raise ValueError(
                f"backbone {body.name!r} must have stages of strides 4, 8, 16 and 32 and take images of any size, got "
                f"strides {body.strides}: choose a ResNet, ConvNeXt, Swin or the like"
            )
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.channels[-4:], out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(images)[-4:])))


class PointRendRoIHeads(RoIHeads):
    """torchvision's heads for boxes, and ``mask_head`` for their masks."""

    def __init__(self, heads: RoIHeads, mask_head: PointRendMaskHead) -> None:
        super().__init__(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            heads.proposal_matcher.high_threshold,
            heads.proposal_matcher.low_threshold,
            heads.fg_bg_sampler.batch_size_per_image,
            heads.fg_bg_sampler.positive_fraction,
            heads.box_coder.weights,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
            mask_head=mask_head,
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Targets, dict[str, Tensor]]:
        if not self.training:
            logits, deltas = self._boxes(features, proposals, image_shapes)
            boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
            masks = self.mask_head(features, boxes, labels)
            found = zip(boxes, labels, scores, masks, strict=True)
            return [{"boxes": b, "labels": of, "scores": s, "masks": m} for b, of, s, m in found], {}
        if targets is None:
            raise ValueError("targets must be given in training, got None")
        for i, target in enumerate(targets):
            if target["masks"].shape[0] != target["boxes"].shape[0]:
                raise ValueError(
                    f"targets[{i}]['masks'] must have a mask for each of {target['boxes'].shape[0]} boxes, got shape "
                    f"{list(target['masks'].shape)}"
                )
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self._boxes(features, proposals, image_shapes)
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, regression_targets)
        positive = [torch.where(of > 0)[0] for of in labels]
        losses = self.mask_head.losses(
            features,
            [boxes[at] for boxes, at in zip(proposals, positive, strict=True)],
            [of[at] for of, at in zip(labels, positive, strict=True)],
            [target["masks"] for target in targets],
            [of[at] for of, at in zip(matched, positive, strict=True)],
        )
        return [], {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, **losses}

    def _boxes(self, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]) -> Any:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, shapes)))


class PointRendTransform(GeneralizedRCNNTransform):
    """torchvision's resizing and padding; masks come back as bool at the size of the image.

    ``min_size`` 0 leaves images as they are. So does training where ``resizes_in_training`` is false.
    """

    resizes_in_training = True

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.min_size == (0,) or (self.training and not self.resizes_in_training):
            return image, target
        return super().resize(image, target)

    def postprocess(
        self, result: Targets, image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> Targets:
        if self.training:
            return result
        masks = [found.pop("masks") for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, logits, size in zip(result, masks, original_image_sizes, strict=True):
            found["masks"] = paste_masks(logits, found["boxes"], size)[:, None]
        return result


class PointRendRCNN(GeneralizedRCNN):
    """A detector of torchvision, with masks by ``mask_head``. See :func:`rendseg.models.pointrend_rcnn`."""

    normalize = "process"

    def __init__(self, detector: FasterRCNN, mask_head: PointRendMaskHead) -> None:
        old = detector.transform
        transform = PointRendTransform(
            old.min_size, old.max_size, old.image_mean, old.image_std, old.size_divisible, old.fixed_size
        )
        heads = PointRendRoIHeads(detector.roi_heads, mask_head)
        super().__init__(detector.backbone, detector.rpn, heads, transform)
