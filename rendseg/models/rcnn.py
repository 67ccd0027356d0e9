"""torchvision's two-stage detector around :class:`rendseg.models.PointRendMaskHead`. Imported when one is built."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .backbones import Backbone
from .instances import PointRendMaskHead, paste_masks
from .losses import over_processes, process_count
from .pointrend import draws_of_keys

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


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or boxes to learn from. With ``keys``, int64 of each image, what is chosen is a
    function of them alone. ``count`` is how many were chosen last."""

    keys: Tensor | None = None
    count = 0

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.count = 0
        for image, matched in enumerate(matched_idxs):
            if self.keys is None:
                draws = torch.rand(len(matched), device=matched.device)
            else:
                draws = draws_of_keys(self.keys[image : image + 1], len(matched))[0, :, 0]
            left = self.batch_size_per_image
            for into, kind, most in zip(
                chosen, (matched >= 1, matched == 0), (int(left * self.positive_fraction), left), strict=True
            ):
                of_kind = torch.where(kind)[0]
                taken = of_kind[draws[of_kind].argsort(stable=True)[: min(most, left)]]
                left -= len(taken)
                into.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, taken, 1))
            self.count += self.batch_size_per_image - left
        return chosen


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
        self.fg_bg_sampler = KeyedSampler(
            heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction
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

    draws = True
    """Whether training draws anchors, boxes and points, for which ``forward`` takes ``keys``."""
    normalize = "process"
    """``"global"``: losses are means over the anchors, boxes and masks of all processes."""

    def __init__(self, detector: FasterRCNN, mask_head: PointRendMaskHead) -> None:
        old = detector.transform
        transform = PointRendTransform(
            old.min_size, old.max_size, old.image_mean, old.image_std, old.size_divisible, old.fixed_size
        )
        heads = PointRendRoIHeads(detector.roi_heads, mask_head)
        sampler = detector.rpn.fg_bg_sampler
        detector.rpn.fg_bg_sampler = KeyedSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        super().__init__(detector.backbone, detector.rpn, heads, transform)

    def forward(self, images: Sequence[Tensor], targets: Targets | None = None, keys: Tensor | None = None) -> Any:
        """As torchvision's. With ``keys``, int64 of each image, what training draws is a function of them alone."""
        heads = self.roi_heads
        drawing = (self.rpn.fg_bg_sampler, heads.fg_bg_sampler, heads.mask_head)
        for number, part in enumerate(drawing):  # torchvision's forward has no room for them
            part.keys = None if keys is None else len(drawing) * keys + number
        found = super().forward(list(images), targets)
        if not self.training or self.normalize != "global":
            return found
        kinds = (
            ("loss_objectness", "loss_rpn_box_reg"),
            ("loss_classifier", "loss_box_reg"),
            ("loss_mask", "loss_mask_point"),
        )
        shares = _shares([part.count for part in drawing], images[0].device)
        return {name: found[name] * share for names, share in zip(kinds, shares, strict=True) for name in names}

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
        """The objects of ``images`` in evaluation mode: ``boxes``, ``labels`` and ``scores`` of each image, and
        ``masks``, a dictionary of bool ``[N, H, W]``: what the ``stages`` of the mask head say of the same boxes.

        Boxes and masks are of images of ``sizes`` (height, width); ``None``: as they are given.
        """
        if self.training:
            raise RuntimeError("predict needs evaluation mode: call eval() first")
        sizes = [(i.shape[-2], i.shape[-1]) for i in images] if sizes is None else sizes
        batch, _ = self.transform(list(images))
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, proposals, batch.image_sizes)
        head = self.roi_heads.mask_head
        boxes, labels = ([of[key] for of in found] for key in ("boxes", "labels"))
        masks = {
            name: [of["masks"] for of in found] if steps == head.steps else head(features, boxes, labels, steps)
            for name, steps in head.stages.items()
        }
        for image, (of, taken, size) in enumerate(zip(found, batch.image_sizes, sizes, strict=True)):
            of["boxes"] = resize_boxes(of["boxes"], taken, size)
            of["masks"] = {name: paste_masks(logits[image], of["boxes"], size) for name, logits in masks.items()}
        return found


def _shares(counts: Sequence[int], device: torch.device) -> Tensor:
    """The factor by which a mean over each of ``counts`` becomes this process's share of that over all processes."""
    own = torch.tensor(counts, dtype=torch.float32, device=device)
    (total,) = over_processes(own)
    return own / total.clamp(min=1) * process_count()
