"""mmdetection's own PointRend of objects beside the network that ``rendseg convert`` makes of its weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from tests.integrations import openmmlab

openmmlab.prepare()
pytest.importorskip("mmdet", reason="needs the package mmdet: pip install -e .[peers]")
from rendseg.cli import main  # noqa: E402
from rendseg.engine.assemble import load_trained  # noqa: E402

NAMES = ("cup", "fork", "knife")


def small(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> tuple[Any, str]:
    """Its network with few channels, with weights at which boxes and masks differ, and its configuration."""
    config = importlib.import_module("mmengine.config").Config
    mmdet = importlib.import_module("mmdet")
    importlib.import_module("mmdet.models")
    # Only torchvision's operators are compiled here; its own is called with the same arguments.
    suppressed = lambda boxes, scores, iou_threshold, offset: nms(boxes, scores, iou_threshold)  # noqa: E731
    monkeypatch.setattr(sys.modules["mmcv._ext"], "nms", suppressed, raising=False)
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "point_rend"
    whole = config.fromfile(folder / "point-rend_r50-caffe_fpn_ms-1x_coco.py")
    model, heads = whole.model, whole.model.roi_head
    model.backbone.update(depth=18, style="pytorch", init_cfg=None)
    model.neck.update(in_channels=[64, 128, 256, 512], out_channels=32)
    model.rpn_head.update(in_channels=32, feat_channels=32)
    heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = 32
    heads.bbox_head.update(in_channels=32, fc_out_channels=40, num_classes=3)
    heads.mask_head.update(in_channels=32, fc_out_channels=24, num_classes=3)
    heads.point_head.update(in_channels=32, fc_channels=16, num_classes=3)
    model.test_cfg.rcnn.update(max_per_img=12, score_thr=0.1)
    model.test_cfg.rpn.update(max_per_img=60)
    text = whole.pretty_text
    heads.bbox_roi_extractor.roi_layer.use_torchvision, model._scope_ = True, "mmdet"
    torch.manual_seed(0)
    network = importlib.import_module("mmdet.registry").MODELS.build(model).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
    heads, rpn = network.roi_head, network.rpn_head
    for layer, scale in (
        (rpn.rpn_cls, 2),
        (rpn.rpn_reg, 0.2),
        (heads.bbox_head.fc_cls, 1),
        (heads.bbox_head.fc_reg, 1),
        (heads.mask_head.fc_logits, 2),
        (heads.point_head.fc_logits, 2),
    ):
        scaled(layer, scale)
    predicted(network, images)
    return network, text


def scaled(layer: Any, scale: float) -> None:
    """At its next call the weights of a layer are multiplied so that its output has this standard deviation."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        factor = scale / output.std()
        module.weight *= factor
        module.bias *= factor
        return output * factor

    handle = layer.register_forward_hook(hook)


def predicted(network: Any, images: Tensor) -> list[dict[str, Tensor]]:
    """What mmdet finds in images that are padded to multiples of 32."""
    structures = importlib.import_module("mmdet.structures")
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (0, -width % 32, 0, -height % 32))
    size = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
    samples = [structures.DetDataSample(metainfo={**size, "batch_input_shape": padded.shape[2:]}) for _ in images]
    with torch.no_grad():
        return [sample.pred_instances for sample in network.predict(padded, samples, rescale=True)]


def test_pointrend_of_mmdet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 100, 150, generator=torch.Generator().manual_seed(1)) * 2
    network, text = small(monkeypatch, images)
    source, made = str(tmp_path / "a.pth"), str(tmp_path / "a.pt")
    meta = {"cfg": text, "dataset_meta": {"classes": NAMES, "palette": [(9, 9, 9), (8, 8, 8), (7, 7, 7)]}}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, source)
    assert main(["convert", source, "--from", "mmdet", "--out", made, "--check"]) == 0
    config, classes, ours, _ = load_trained(made)
    model = config.model
    assert classes["names"] == list(NAMES) and model["min_size"] == 800 and model["max_size"] == 1333
    assert model["mask"]["steps"] == 5 and model["box_detections_per_img"] == 12
    assert config.data["channel_order"] == "bgr" and config.data["mean"][0] * 255 == pytest.approx(103.53)
    ours.transform.min_size = (0,)  # as the other gets them
    with torch.no_grad():
        got = ours(list(images))
    for mine, theirs in zip(got, predicted(network, images), strict=True):
        assert len(mine["boxes"]) == len(theirs.bboxes) > 5
        assert torch.equal(mine["labels"] - 1, theirs.labels) and len(mine["labels"].unique()) > 1
        torch.testing.assert_close(mine["scores"], theirs.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine["boxes"], theirs.bboxes, rtol=1e-4, atol=2e-3)
        masks, wanted = mine["masks"][:, 0], theirs.masks
        differ = int((masks != wanted).sum())
        print(f"mmdet PointRend, {len(masks)} masks of 100 x 150: {differ} of {masks.numel()} pixels differ")
        assert wanted.any() and not wanted.all() and differ <= 1e-4 * masks.numel()
