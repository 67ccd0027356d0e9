"""A configuration and a network that train in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg.engine.config import Config, build_config
from rendseg.models.registry import decoder_options_class


def tiny_content(out: Path | str, **train: Any) -> dict[str, Any]:
    """PointRend with a network of 0.4 million parameters on scenes of 32 x 32."""
    return {
        "name": "tiny",
        "device": "cpu",
        "model": {
            "backbone": {"name": "test_resnet"},
            "decoder": {"channels": 16, "head_channels": 16},
            "pointrend": {"hidden_channels": 16, "train_points": 64, "inference_points": 64},
        },
        "data": {"name": "shapes", "size": [32, 32], "num_images": 10, "num_val_images": 3, "scale_range": [1.0, 1.5]},
        "train": {
            "iterations": 8,
            "precision": "fp32",
            "batch_size": 4,
            "optimizer": {"lr": 0.02},
            "schedule": {"warmup_iterations": 2},
            "num_workers": 0,
            "log_every": 3,
            "checkpoint_every": 4,
            "tensorboard": False,
            **train,
        },
        "eval": {"num_workers": 0, "pictures": 1},
        "output": {"dir": str(out)},
    }


def tiny_config(out: Path | str, *overrides: str, **train: Any) -> Config:
    return build_config(tiny_content(out, **train), overrides)


def narrow(decoder: str) -> dict[str, Any]:
    """The section of a decoder with few channels."""
    fields = dataclasses.fields(decoder_options_class(decoder))
    small = {
        f.name: 16
        for f in fields
        if "channels" in f.name and any(word in str(f.type) for word in ("int", "Count", "Whole"))
    }
    return {"name": decoder, **small}


class TinyNet(nn.Module):
    """No batch norm and no random points, so that a batch's gradient is the mean of its parts' gradients."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss_coarse": F.cross_entropy(self.head(self.backbone(images).relu()), labels)}

    def predict(self, images: Tensor, output: str = "logits", return_points: bool = False) -> SimpleNamespace:
        logits = self.head(self.backbone(images).relu())
        return SimpleNamespace(coarse=logits, refined=logits, labels=logits.argmax(1), points=None)

    def upsample(self, coarse: Tensor, size: Any) -> Tensor:
        return coarse


def tiny_network(config: Config, num_classes: int, initialise: bool = True) -> TinyNet:
    """Stands in for ``build_network``."""
    torch.manual_seed(7)
    return TinyNet(num_classes)
