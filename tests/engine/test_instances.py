"""Models of objects in the trainer: their section of a configuration, training, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rendseg.engine.assemble import build_network, load_trained
from rendseg.engine.checkpoint import save_checkpoint
from rendseg.engine.config import Config, ConfigError, build_config

SIZES: dict[str, Any] = {"fpn_channels": 16, "box_hidden_channels": 16, "anchor_sizes": [8, 16, 32, 64, 128]}
SIZES |= {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20}
MASK = {"hidden_channels": 16, "coarse_hidden_channels": 16, "steps": 3, "train_points": 9}


def content(out: Path | str, **train: Any) -> dict[str, Any]:
    """A detector of 0.2 million parameters on scenes of 64 x 64."""
    return {
        "name": "objects",
        "device": "cpu",
        "model": {"name": "pointrend_rcnn", "backbone": {"name": "test_resnet"}, "mask": MASK, **SIZES},
        "data": {"name": "shapes_instances", "size": [64, 64], "num_images": 10, "num_val_images": 3},
        "train": {
            "iterations": 4,
            "precision": "fp32",
            "batch_size": 2,
            "num_workers": 0,
            "log_every": 1,
            "checkpoint_every": 2,
            "tensorboard": False,
            **train,
        },
        "eval": {"num_workers": 0, "pictures": 1},
        "output": {"dir": str(out)},
    }


def configured(out: Path | str = "", *overrides: str, **train: Any) -> Config:
    return build_config(content(out, **train), overrides)


# --------------------------------------------------------------------------------------------------- configuration


def test_a_checkpoint_of_a_detector_is_loaded_as_it_was(tmp_path: Path) -> None:
    config = configured(tmp_path, "model.backbone.freeze_norm=true", "model.min_size=48")
    assert build_config(config.to_dict()) == config
    network = build_network(config, 7)
    classes = {"names": [f"c{i}" for i in range(7)], "palette": [[0, 0, 0]] * 7, "ignore_index": 255}
    contents = {"config": config.to_dict(), "classes": classes, "model": network.state_dict()}
    save_checkpoint(tmp_path / "a.pt", {**contents, "training": {"progress": {"iteration": 0}}})
    _, _, again, _ = load_trained(tmp_path / "a.pt")
    assert not again.training and again.roi_heads.box_predictor.cls_score.out_features == 8
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in again.modules())
    image = torch.rand(3, 40, 60)
    with torch.no_grad():
        found = again([image])[0]
        torch.testing.assert_close(found, network.eval()([image])[0])
    tensors = again.transform([image])[0]
    assert tensors.image_sizes == [(48, 72)] and found["masks"].shape[1:] == (1, 40, 60)
    inside = tensors.tensors[..., :48, :72]  # as the data has normalised it
    torch.testing.assert_close(inside.mean(), image.mean(), rtol=0.01, atol=0.01)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask.step=3", "unknown key model.mask.step; did you mean 'steps'"),
        ("model.anchor_sizes=[8]", "model.anchor_sizes must be a list of 5"),
        ("model.backbone={name: resnet50_fpn}", "fpn_channels is not for torchvision's 'resnet50_fpn': leave it out"),
    ],
)
def test_bad_sections(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(configured("", override), 7)
