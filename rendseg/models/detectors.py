"""Detectors with masks. torchvision, whose detectors they are, is imported when one is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .backbones import create_backbone
from .instances import PointRendMaskHead
from .options import BackboneOptions

if TYPE_CHECKING:
    from .rcnn import PointRendRCNN


def pointrend_rcnn(
    backbone: str | BackboneOptions = "resnet50_fpn",
    num_classes: int = 91,
    *,
    mask_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> PointRendRCNN:
    """torchvision's Mask R-CNN with the mask head of PointRend.

    ``backbone`` is ``"resnet50_fpn"`` or ``"resnet50_fpn_v2"`` (torchvision's detectors of these names), or a timm
    network, by name or options, with four stages of strides 4 to 32, to which torchvision's pyramid is added.
    ``num_classes`` counts the background, as in torchvision; ``mask_options`` go to :class:`PointRendMaskHead`, all
    other options to torchvision's function or class (``weights_backbone``, ``min_size``, ``box_detections_per_img``).

    The model is called as torchvision's: in training with images and targets (``boxes``, ``labels``, ``masks``) for a
    dictionary of losses, else for a dictionary per image of ``boxes``, ``labels``, ``scores`` and ``masks``, which are
    bool ``[N, 1, H, W]`` at the size of the image. No map of N x H x W floats is made.
    """
    from torchvision.models import detection

    from .rcnn import PointRendRCNN, TimmFPN

    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, background and a class, got {num_classes}")
    named = {
        "resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
        "resnet50_fpn_v2": detection.fasterrcnn_resnet50_fpn_v2,
    }
    if isinstance(backbone, str) and backbone in named:
        detector = named[backbone](num_classes=num_classes, **{"weights_backbone": None} | options)
    else:
        body = create_backbone(BackboneOptions(name=backbone) if isinstance(backbone, str) else backbone)
        sizes = {"size_divisible": max(32, body.size_divisor)}
        detector = detection.FasterRCNN(TimmFPN(body), num_classes, **sizes | options)
    head = PointRendMaskHead(detector.backbone.out_channels, num_classes - 1, **dict(mask_options or {}))
    return PointRendRCNN(detector, head)
