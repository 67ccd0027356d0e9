"""Detectors with masks. torchvision, whose detectors they are, is imported when one is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._options import field_names
from .backbones import create_backbone, load_backbone_weights
from .instances import PointRendMaskHead
from .options import BackboneOptions, PointRendRCNNOptions

if TYPE_CHECKING:
    from torch import nn

    from .rcnn import PointRendRCNN

_TORCHVISION = ("resnet50_fpn", "resnet50_fpn_v2")


def build_detector(options: PointRendRCNNOptions, num_classes: int) -> PointRendRCNN:
    """The model of a configuration, for images that are normalised already; ``num_classes`` without background."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    backbone, hidden = options.backbone, options.box_hidden_channels
    named = backbone.name in _TORCHVISION
    if named and (other := _not_torchvision(options)):
        raise ValueError(f"{other} is not for torchvision's {backbone.name!r}: leave it out, or name a network of timm")
    sizes = {
        key: getattr(options, key)
        for key in field_names(options)
        if key.startswith(("box_", "rpn_", "max_")) and key != "box_hidden_channels"
    }
    model = pointrend_rcnn(
        backbone.name if named else backbone,
        num_classes + 1,
        mask_options=dataclasses.asdict(options.mask),  # type: ignore[call-overload]
        image_mean=[0.0] * backbone.in_chans,
        image_std=[1.0] * backbone.in_chans,
        fpn_channels=options.fpn_channels,
        min_size=options.min_size or 0,
        **sizes,
    )
    if hidden != 1024:
        model.roi_heads.box_head = TwoMLPHead(options.fpn_channels * 7**2, hidden)
        model.roi_heads.box_predictor = FastRCNNPredictor(hidden, num_classes + 1)
    shapes = ((0.5, 1.0, 2.0),) * len(options.anchor_sizes)
    sides = tuple((side,) for side in options.anchor_sizes)
    if options.boxes == "detectron2":
        from .rcnn import AlignedRoIPool, UnroundedAnchors

        model.roi_heads.box_roi_pool = AlignedRoIPool()
        model.rpn.anchor_generator = UnroundedAnchors(sides, shapes)
    else:
        model.rpn.anchor_generator = AnchorGenerator(sides, shapes)
    model.transform.resizes_in_training = False
    model.normalize = options.normalize
    if named:
        _load_torchvision(model.backbone.body, backbone)
    return model


def _not_torchvision(options: PointRendRCNNOptions) -> str | None:
    """The first key that torchvision's detectors have no choice of and that is not as they have it."""
    usual = PointRendRCNNOptions()
    if other := [k for k in ("fpn_channels", "box_hidden_channels") if getattr(options, k) != getattr(usual, k)]:
        return other[0]
    backbone, fixed = options.backbone, {"output_stride": 32, "output_norm": False, "pad_before_shift": False}
    chosen = {k: getattr(backbone, k) for k in ("name", "pretrained", "checkpoint", "freeze_norm")}
    plain = BackboneOptions(**chosen, **fixed, stride_in_1x1=False)  # type: ignore[arg-type]
    other = [k for k in field_names(plain) if getattr(plain, k) != getattr(backbone, k)]
    return f"backbone.{other[0]}" if other else None


def _load_torchvision(body: nn.Module, options: BackboneOptions) -> None:
    """Weights of ImageNet, and their norms fixed, in the ResNet of one of torchvision's detectors."""
    from timm.layers import freeze_batch_norm_2d
    from torchvision.models import get_model

    if options.pretrained:
        try:
            weights = get_model("resnet50", weights="DEFAULT").state_dict()
        except Exception as error:  # noqa: BLE001 - the hub raises many kinds
            raise RuntimeError(
                f"torchvision's weights of ResNet-50 could not be loaded: {type(error).__name__}: {error}. Without a "
                "network, set backbone.checkpoint to a local file of weights, or backbone.pretrained to false"
            ) from error
        body.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
    if options.checkpoint is not None:
        load_backbone_weights(body, options.checkpoint)
    if options.freeze_norm:
        freeze_batch_norm_2d(body)


def pointrend_rcnn(
    backbone: str | BackboneOptions = "resnet50_fpn",
    num_classes: int = 91,
    *,
    mask_options: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    **options: Any,
) -> PointRendRCNN:
    """torchvision's Mask R-CNN with the mask head of PointRend.

    ``backbone`` is ``"resnet50_fpn"`` or ``"resnet50_fpn_v2"`` (torchvision's detectors of these names), or a timm
    network, by name or options, with four stages of strides 4 to 32, to which torchvision's pyramid of
    ``fpn_channels`` is added. ``num_classes`` counts the background, as in torchvision; ``mask_options`` go to
    :class:`PointRendMaskHead`, all other options to torchvision's function or class (``weights_backbone``,
    ``min_size``, ``box_detections_per_img``).

    The model is called as torchvision's: in training with images and targets (``boxes``, ``labels``, ``masks``) for a
    dictionary of losses, else for a dictionary per image of ``boxes``, ``labels``, ``scores`` and ``masks``, which are
    bool ``[N, 1, H, W]`` at the size of the image. No map of N x H x W floats is made.
    """
    from torchvision.models import detection

    from .rcnn import PointRendRCNN, TimmFPN

    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, background and a class, got {num_classes}")
    if isinstance(backbone, str) and backbone in _TORCHVISION:
        create = getattr(detection, f"fasterrcnn_{backbone}")
        detector = create(num_classes=num_classes, **{"weights_backbone": None} | options)
    else:
        body = create_backbone(BackboneOptions(name=backbone) if isinstance(backbone, str) else backbone)
        sizes = {"size_divisible": max(32, body.size_divisor)}
        detector = detection.FasterRCNN(TimmFPN(body, fpn_channels), num_classes, **sizes | options)
    head = PointRendMaskHead(detector.backbone.out_channels, num_classes - 1, **dict(mask_options or {}))
    return PointRendRCNN(detector, head)
