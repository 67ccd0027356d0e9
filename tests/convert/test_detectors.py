"""Detectors with masks of other frameworks: what they find in images, beside the networks that are made of them.

As in test_forward.py, the forward pass of detectron2 is written in plain functions that make the file too;
torchvision's is its own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="rendseg[train] is not installed")
from torchvision.models.detection import maskrcnn_resnet50_fpn  # noqa: E402
from torchvision.ops import batched_nms, roi_align  # noqa: E402

from rendseg.convert import ConversionError, command, engine  # noqa: E402
from rendseg.convert.source_config import read_config  # noqa: E402
from tests.convert.test_forward import Source, resized, resnet50  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import cases_refine  # noqa: E402

CLASSES, WIDTH = 3, 16
SIZE = (60, 90)
PATH = Path("weights")


def fully(s, x, name, out, scale=1.0):
    """A linear layer with weights that keep the size of numbers, times ``scale``."""
    weight = s.normal(name + ".weight", out, x.shape[1], scale=scale * x.shape[1] ** -0.5)
    return F.linear(x, weight, s.normal(name + ".bias", out, scale=0.1 * scale))


def moved(boxes, deltas, size):
    """Boxes moved by ``(dx, dy, dw, dh)`` and clipped to the image."""
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    centre = centre + deltas[:, :2] * extent
    extent = extent * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    boxes = torch.cat((centre - extent / 2, centre + extent / 2), 1)
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def full(boxes):
    """Those with an area. detectron2 drops the others of its results after the suppression."""
    return ((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(1)


def detectron2(images):
    """Instance PointRend on a ResNet-50 that strides its 1x1 convolutions, for one image."""
    s = Source("backbone.bottom_up.{}", "backbone.bottom_up.{}.norm")
    size = images.shape[2:]
    x = F.pad(images, (0, -size[1] % 32, 0, -size[0] % 32))
    x = F.max_pool2d(s.block(x, "stem.conv1", 64, 7, stride=2), 3, 2, 1)

    def name(stage, block, part):
        return f"res{stage + 1}.{block}." + (part if part == "shortcut" else f"conv{part}")

    maps, pyramid, above = resnet50(s, x, name, stride_in_1x1=True), [], None
    for level in (5, 4, 3, 2):
        y = s.conv(maps[level - 2], f"backbone.fpn_lateral{level}", WIDTH, bias=True)
        above = y if above is None else y + F.interpolate(above, scale_factor=2, mode="nearest")
        pyramid.insert(0, s.conv(above, f"backbone.fpn_output{level}", WIDTH, 3, bias=True))
    pyramid.append(pyramid[-1][..., ::2, ::2])

    rpn = "proposal_generator.rpn_head."
    shapes = (
        ("conv", (WIDTH, WIDTH, 3, 3), (2 / WIDTH / 9) ** 0.5),
        ("objectness_logits", (3, WIDTH, 1, 1), 0.3),
        ("anchor_deltas", (12, WIDTH, 1, 1), 0.05),
    )
    layers = [(s.normal(f"{rpn}{n}.weight", *shape, scale=scale), s.normal(f"{rpn}{n}.bias", shape[0], scale=0.1)) for
              n, shape, scale in shapes]  # fmt: skip
    proposals, scores, levels = [], [], []
    for i, map_ in enumerate(pyramid):
        hidden = F.conv2d(map_, *layers[0], padding=1).relu()
        anchors = []
        for row in range(map_.shape[2]):
            for column in range(map_.shape[3]):
                for ratio in (0.5, 1, 2):
                    x, y, side = column * (4 << i), row * (4 << i), 32 << i
                    w, h = side / ratio**0.5 / 2, side * ratio**0.5 / 2
                    anchors.append([x - w, y - h, x + w, y + h])
        own, deltas = (F.conv2d(hidden, *layer)[0].permute(1, 2, 0) for layer in layers[1:])
        top = own.flatten().topk(min(own.numel(), 40)).indices
        proposals.append(moved(images.new_tensor(anchors)[top], deltas.reshape(-1, 4)[top], size))
        scores.append(own.flatten()[top])
        levels.append(torch.full_like(top, i))
    boxes, keep = torch.cat(proposals), full(torch.cat(proposals))
    boxes, scores, levels = boxes[keep], torch.cat(scores)[keep], torch.cat(levels)[keep]
    boxes = boxes[batched_nms(boxes, scores, levels, 0.7)[:50]]

    extent = boxes[:, 2:] - boxes[:, :2]
    level = (4 + (extent.prod(1).sqrt() / 224).log2()).floor().clamp(2, 5)
    pooled = [
        roi_align(pyramid[int(l) - 2], [box[None]], 7, 0.5 ** int(l), 0, True)
        for box, l in zip(boxes, level, strict=True)  # noqa: E741
    ]
    x = torch.cat(pooled).flatten(1)
    for i in (1, 2):
        x = fully(s, x, f"roi_heads.box_head.fc{i}", 20, 1.4).relu()
    logits = fully(s, x, "roi_heads.box_predictor.cls_score", CLASSES + 1)
    deltas = fully(s, x, "roi_heads.box_predictor.bbox_pred", 4 * CLASSES).unflatten(1, (CLASSES, 4))
    found = logits.softmax(1)[:, :-1]  # the last is the background
    of_class = [moved(boxes, deltas[:, c] / deltas.new_tensor([10, 10, 5, 5]), size) for c in range(CLASSES)]
    keep, label = (found > 0.1).nonzero().unbind(1)
    boxes, scores = torch.stack(of_class, 1)[keep, label], found[keep, label]
    keep = full(boxes)
    boxes, scores, label = boxes[keep], scores[keep], label[keep]
    best = batched_nms(boxes, scores, label, 0.5)[:30]
    boxes, scores, label = boxes[best], scores[best], label[best]

    masks, points = "roi_heads.mask_head.coarse_head.", "roi_heads.mask_head.point_head."
    side = torch.arange(14).double().add(0.5) / 14
    grid = torch.stack((side.repeat(14), side.repeat_interleave(14)), 1)
    area = boxes.new_tensor([4 * pyramid[0].shape[3], 4 * pyramid[0].shape[2]])
    placed = (boxes[:, None, :2] + grid * (boxes[:, None, 2:] - boxes[:, None, :2])) / area
    x = F.grid_sample(pyramid[0].expand(len(boxes), -1, -1, -1), 2 * placed[:, None] - 1, align_corners=False)
    weight = s.normal(masks + "reduce_spatial_dim_conv.weight", 256, WIDTH, 2, 2, scale=(2 / WIDTH / 4) ** 0.5)
    bias = s.normal(masks + "reduce_spatial_dim_conv.bias", 256, scale=0.1)
    x = F.conv2d(x[:, :, 0].unflatten(2, (14, 14)), weight, bias, stride=2).relu().flatten(1)
    for i in (1, 2):
        x = fully(s, x, f"{masks}fc{i}", 12, 1.4).relu()
    coarse = fully(s, x, masks + "prediction", CLASSES * 49).unflatten(1, (CLASSES, 7, 7))
    inputs, head = WIDTH + CLASSES, []
    for layer, out in (("fc1", 10), ("fc2", 10), ("fc3", 10), ("predictor", CLASSES)):
        weight = s.normal(f"{points}{layer}.weight", out, inputs, 1, scale=(2 / inputs) ** 0.5)
        head.append((weight, s.normal(f"{points}{layer}.bias", out, scale=0.1)))
        inputs = out + CLASSES

    def at_points(fine, rough):
        x = torch.cat((fine, rough), 1)
        for layer in head[:-1]:
            x = torch.cat((F.conv1d(x, *layer).relu(), rough), 1)
        return F.conv1d(x, *head[-1])

    rois = torch.zeros(len(boxes), dtype=torch.int64), (boxes / area.repeat(2)).float()
    found = cases_refine.instance_masks(coarse, [pyramid[0]], at_points, rois, label, steps=3, num_points=196)
    return s, {"boxes": boxes, "scores": scores, "labels": label + 1, "logits": found[torch.arange(len(label)), label]}


BASE = """
MODEL:
  RESNETS: {DEPTH: 50}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN: {PRE_NMS_TOPK_TEST: 1000, POST_NMS_TOPK_TEST: 1000}
  ROI_BOX_HEAD: {NUM_FC: 2, POOLER_RESOLUTION: 7}
DATASETS: {TEST: [coco_2017_val]}
"""
OWN = """
_BASE_: base.yaml
MODEL:
  PIXEL_MEAN: [0, 0, 0]
  RPN: {PRE_NMS_TOPK_TEST: 40, POST_NMS_TOPK_TEST: 50}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.1}
  POINT_HEAD: {SUBDIVISION_STEPS: 3, SUBDIVISION_NUM_POINTS: 196}
TEST: {DETECTIONS_PER_IMAGE: 30}
"""


def converted(tensors, framework, config, given=None):
    found = engine.identify(tensors, framework, PATH)
    command._check_round_trip(found, PATH)
    contents = command._contents(found, [], config, given or {}, PATH)
    return found, contents, command._network(contents, PATH, found.model.fresh)


@torch.no_grad()
def test_detectron2(tmp_path, monkeypatch):
    noise = torch.randn(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))
    images = 2 * resized(noise.double(), SIZE)
    source, wanted = detectron2(images)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "own.yaml").write_text(OWN)
    source.tensors["pixel_mean"] = torch.zeros(3, 1, 1)
    found, contents, network = converted(source.tensors, "detectron2", read_config(tmp_path / "own.yaml"))
    old = {  # the names of its first version
        name.replace("mask_head.point_head", "mask_point_head")
        .replace("mask_head.coarse_head", "mask_coarse_head")
        .replace("coarse_head.fc", "coarse_head.coarse_mask_fc"): value
        for name, value in source.tensors.items()
    }
    again = engine.identify(old, "detectron2", PATH)
    command._check_round_trip(again, PATH)
    assert all(torch.equal(again.applied.tensors[name], value) for name, value in found.applied.tensors.items())
    model, data = contents["config"]["model"], contents["config"]["data"]
    assert (model["min_size"], model["max_size"], model["boxes"]) == (800, 1333, "detectron2")
    assert (data["name"], data["channel_order"], data["mean"]) == ("coco", "bgr", [0, 0, 0])
    network.transform.min_size = (0,)  # as the other gets them
    pasted = []
    monkeypatch.setattr("rendseg.models.rcnn.paste_masks", lambda logits, *args: pasted.append(logits) or logits)
    got = network.double()(list(images))[0]
    assert len(wanted["boxes"]) > 5 and torch.equal(got["labels"], wanted["labels"]) and len(got["labels"].unique()) > 1
    for key in ("boxes", "scores"):
        assert (got[key] - wanted[key]).abs().max() < 1e-6 * wanted[key].abs().max(), key
    # Coordinates of points are float32: a cell that ties with the last chosen may be chosen on one side alone.
    differ = (pasted[0] - wanted["logits"]).abs() > 1e-4
    assert differ.double().mean() < 1e-3 and pasted[0].std() > 0.5


@torch.no_grad()
def test_torchvision():
    """Boxes, classes and scores are those of Mask R-CNN; masks begin with random weights. COCO's rows have gaps."""
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, box_detections_per_img=9).eval()
    theirs.roi_heads.box_predictor.bbox_pred.weight *= 0.1
    state = {}  # names as in the published file
    for name, value in theirs.state_dict().items():
        name = name.replace("head.conv.0.0", "head.conv")
        state[name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "fpn" in name else name] = value
    found, contents, network = converted(state, "torchvision", None, {"data.name": "coco"})
    names, ids = contents["classes"]["names"], contents["classes"]["ids"]
    assert len(names) == 90 and names[:2] == ["person", "bicycle"] and names[11] == "category 12" and ids[-1] == 90
    assert all(name.startswith("roi_heads.mask_") for name in found.applied.dead) and len(found.applied.dead) >= 12
    network.transform.min_size, network.roi_heads.detections_per_img = (64,), 9
    image = torch.rand(3, 64, 90)
    mean, std = (torch.tensor(contents["config"]["data"][key])[:, None, None] for key in ("mean", "std"))
    got, wanted = network([(image - mean) / std])[0], theirs([image])[0]
    assert len(wanted["boxes"]) > 3 and torch.equal(got["labels"], wanted["labels"])
    for key in ("boxes", "scores"):
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-4)


@pytest.mark.bad_input
def test_what_cannot_be_expressed(tmp_path):
    state = {"proposal_generator.rpn_head.conv.weight": torch.zeros(4, 4, 3, 3)}
    state |= {"roi_heads.mask_head.point_head.predictor.weight": torch.zeros(3, 9, 1)}
    state |= {"backbone.bottom_up.res2.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    for text, message in (
        ("MODEL: {ROI_BOX_HEAD: {POOLER_TYPE: ROIAlign}}", "MODEL.ROI_BOX_HEAD.POOLER_TYPE 'ROIAlign' cannot be expr"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [[32, 64]]}}", r"SIZES is \[\[32, 64\]\], which is not known here"),
        ("MODEL: {POINT_HEAD: {IN_FEATURES: [p2, p3]}}", "MODEL.POINT_HEAD.IN_FEATURES .* cannot be expressed"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConversionError, match=message):
            engine.configure(engine.identify(state, "detectron2", PATH), read_config(tmp_path / "x.yaml"), {}, PATH)
    more = {**state, "roi_heads.mask_head.more": torch.zeros(1)}
    with pytest.raises(ConversionError, match="1 tensors have no place in the pointrend_rcnn of detectron2, first"):
        engine.identify(more, "detectron2", PATH)
    with pytest.raises(ConversionError, match=r"leaves open model.mask.steps .*; model.min_size .*--config FILE"):
        engine.configure(
            engine.identify(state, "detectron2", PATH), None, {"data.mean": [0], "model.backbone.name": "x"}, PATH
        )
