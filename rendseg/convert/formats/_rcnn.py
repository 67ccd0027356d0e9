"""What frameworks have in common whose detectors have the background as the last class; ours, as torchvision's, as the
first."""

from typing import Any

import torch
from torch import Tensor

from rendseg.convert.rules import Change


def _without_background(x: Tensor) -> Tensor:
    return x[4:]


def _with_background(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:4]), x))


SCORES = Change(lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0))
"""Rows of classes: the last becomes the first."""
BOXES = Change(_with_background, _without_background)
"""Four rows a class, none of the background there, which nothing reads here."""
SETTINGS: dict[str, Any] = {
    "model.name": "pointrend_rcnn",
    "model.boxes": "detectron2",
    "model.backbone.output_stride": 32,
    "model.backbone.freeze_norm": True,
}
ASKS = {
    "model.mask.steps": "the steps of subdivision",
    "model.mask.subdivision_points": "the points of a step",
    "model.min_size": "the shorter side of images, or null",
}
