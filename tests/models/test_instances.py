"""Instance PointRend on torchvision's detectors: the mask head against detectron2's loop, the losses against formulas,
and the whole model on every kind of backbone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import roi_align

from rendseg.models import BackboneOptions, PointRendMaskHead, paste_masks, pointrend_rcnn
from rendseg.models.rcnn import KeyedSampler
from rendseg.nn import mask_labels, roi_point_sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import cases_refine  # noqa: E402

BOXES = [
    torch.tensor([[3.0, 5.0, 41.5, 60.0], [20.0, -4.0, 70.0, 33.3], [0.0, 0.0, 9.0, 90.0]]),
    torch.zeros(0, 4),
    torch.tensor([[10.2, 11.7, 13.0, 15.0]]),
]
LABELS = [torch.tensor([1, 4, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([3])]


def make_head(**options: Any) -> tuple[PointRendMaskHead, dict[str, Tensor]]:
    """Weights at which masks have edges, and the stride-4 map of three images of 96 x 80 pixels."""
    torch.manual_seed(0)
    head = PointRendMaskHead(12, 4, hidden_channels=16, coarse_hidden_channels=32, **options)
    for layer in (head.coarse_head.prediction, head.point_head.predictor):
        torch.nn.init.normal_(layer.weight, std=0.4)
    return head.eval(), {"0": torch.randn(3, 12, 24, 20)}


def test_masks_are_those_of_detectron2() -> None:
    """From 7 to 224 cells a side, 28 x 28 points a step: the logits, and the same pixels in the image."""
    head, features = make_head()
    count = [len(b) for b in BOXES]
    image_index = torch.arange(3).repeat_interleave(torch.tensor(count))
    rois = torch.cat((image_index[:, None].float(), torch.cat(BOXES)), 1)
    placed = torch.cat(BOXES) / torch.tensor([80.0, 96.0, 80.0, 96.0])
    with torch.no_grad():
        got = head(features, BOXES, LABELS)
        # A grid of points is RoIAlign with one sample to a cell, but at the edge of the map, where that does not fade.
        pooled = F.pad(features["0"], (8, 8, 8, 8))
        shifted = torch.cat((rois[:, :1], rois[:, 1:] + 32), 1)
        coarse = head.coarse_head(roi_align(pooled, shifted, 14, 0.25, sampling_ratio=1, aligned=True))
        classes = torch.cat(LABELS) - 1
        wanted = cases_refine.instance_masks(
            coarse, [features["0"]], head.point_head, (image_index, placed), classes, steps=5, num_points=784
        )
    assert [tuple(m.shape) for m in got] == [(n, 224, 224) for n in count]
    wanted = wanted[torch.arange(4), classes]
    # A cell whose uncertainty ties with the threshold to rounding may be chosen on one side alone.
    differs = (torch.cat(got) - wanted).abs() > 1e-3
    assert differs.float().mean() < 1e-4
    for masks, others, boxes in zip(got, wanted.split(count), BOXES, strict=True):
        here, there = paste_masks(masks, boxes, (96, 80)), paste_masks(others, boxes, (96, 80))
        assert torch.equal(here, there) and (not len(boxes) or here.any())


def test_fewer_steps() -> None:
    """None: the coarse masks. Two: every cell of 28 x 28 as the point head has it."""
    head, features = make_head()
    own, classes = torch.arange(4), torch.cat(LABELS) - 1
    with torch.no_grad():
        coarse, grid = (torch.cat(head(features, BOXES, LABELS, steps)) for steps in (0, 2))
        placed = [box / torch.tensor([80.0, 96.0, 80.0, 96.0]) for box in BOXES]
        logits = head.coarse_head(roi_point_sample(features["0"], placed, points(14)).unflatten(2, (14, 14)))
        torch.testing.assert_close(coarse, logits[own, classes])
        fine = roi_point_sample(features["0"], placed, points(28))
        values = F.grid_sample(logits, 2 * points(28)[:, :, None] - 1, align_corners=False)[..., 0]
        torch.testing.assert_close(grid.flatten(1), head.point_head(fine, values)[own, classes], rtol=1e-4, atol=1e-4)
    assert head.stages == {"coarse": 0, "grid": 2, "refined": 5}


def points(side: int) -> Tensor:
    """The centres of a grid, for four boxes."""
    centres = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(1, -1, 2).expand(4, -1, -1)


def test_what_is_drawn_is_a_function_of_the_keys() -> None:
    """Anchors and boxes in torchvision's shares, of each image by itself; and the points of each image's boxes."""
    matched = [torch.randint(-1, 2, (300,)), torch.tensor([-1, 0, 0, 1]), torch.zeros(0, dtype=torch.int64)]
    keys = torch.tensor([5, 2**62, 7])
    sampler = KeyedSampler(64, 0.25)
    sampler.keys = keys
    chosen = sampler(matched)
    torchvisions = BalancedPositiveNegativeSampler(64, 0.25)(matched)
    for of, theirs, kind in zip(chosen, torchvisions, (1, 0), strict=True):
        for image, (mask, other) in enumerate(zip(of, theirs, strict=True)):
            assert mask.sum() == other.sum() and (matched[image][mask > 0] == kind).all()
            sampler.keys = keys[image : image + 1]
            assert torch.equal(sampler(matched[image : image + 1])[1 - kind][0], mask)
    sampler.keys = keys
    sampler(matched)
    assert sampler.count == 67 and not torch.equal(chosen[0][0], torchvisions[0][0])
    head, _ = make_head(train_points=8)
    head.keys = keys
    draws = head._draws([3, 0, 1])
    head.keys = keys[2:]
    assert draws is not None and draws.shape == (4, 26, 2) and torch.equal(head._draws([1]), draws[3:])


def test_pasting() -> None:
    """Against the mask sampled at every pixel of the image; half of a box is inside it, and one is nowhere."""
    torch.manual_seed(1)
    logits = F.interpolate(torch.randn(4, 1, 4, 5), scale_factor=4, mode="bilinear")[:, 0] * 3
    boxes = torch.tensor([[2.3, 1.0, 17.9, 12.5], [-6.0, 5.0, 9.5, 30.0], [4.0, 4.0, 4.0, 9.0], [50.0, 0.0, 60.0, 9.0]])
    got = paste_masks(logits, boxes, (20, 24))
    y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(24) + 0.5, indexing="ij")
    for n in (0, 1, 3):
        left, top, right, bottom = boxes[n]
        grid = torch.stack(((x - left) / (right - left), (y - top) / (bottom - top)), -1) * 2 - 1
        values = F.grid_sample(logits[n][None, None].sigmoid(), grid[None], align_corners=False)
        assert torch.equal(got[n], values[0, 0] >= 0.5)
    assert got[0].any() and got[1].any() and not got[2].any() and not got[3].any() and got.dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_labels_of_masks_are_samples_of_them(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    masks, index, points = (torch.rand(3, 9, 13) > 0.5).to(dtype), torch.tensor([2, 0, 2, 1]), torch.rand(4, 50, 2) * 16
    grid = 2 * points / torch.tensor([13.0, 9.0]) - 1
    wanted = F.grid_sample(masks[index].float()[:, None], grid[:, :, None], align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(mask_labels(masks, index, points - 1e-9), wanted, rtol=1e-4, atol=1e-4)


def test_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """At given points, from the definitions; zeros with a graph where no box has an object."""
    head, features = make_head(train_points=20)
    head.train()
    features["0"].requires_grad_()
    masks = [torch.rand(2, 96, 80) > 0.4, torch.zeros(0, 96, 80, dtype=torch.bool), torch.rand(1, 96, 80) > 0.5]
    index = [torch.tensor([1, 0, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([0])]
    own, boxes, classes = torch.arange(4), torch.cat(BOXES), torch.cat(LABELS) - 1
    coords, asked = torch.rand(4, 20, 2), {}

    def given(coarse: Tensor, *numbers: float, class_index: Tensor, random_coords: None) -> Tensor:
        asked.update(coarse=coarse, numbers=numbers, class_index=class_index)
        return coords

    monkeypatch.setattr("rendseg.models.instances.ops.sample_uncertain_points", given)
    losses = head.losses(features, BOXES, LABELS, masks, index)
    assert asked["numbers"] == (20, 3.0, 0.75) and torch.equal(asked["class_index"], classes)
    coarse = asked["coarse"]
    size = torch.tensor([80.0, 96.0])
    of_objects = torch.cat([m[i] for m, i in zip(masks, index, strict=True)]).float()[:, None]
    wanted = roi_align(of_objects, torch.cat((torch.arange(4.0)[:, None], boxes), 1), 7)[:, 0]
    torch.testing.assert_close(losses["loss_mask"], F.binary_cross_entropy_with_logits(coarse[own, classes], wanted))

    def sample(maps: Tensor, at: Tensor) -> Tensor:
        return F.grid_sample(maps, (2 * at - 1)[:, :, None], align_corners=False)[..., 0]

    placed = (boxes[:, None, :2] + coords * (boxes[:, None, 2:] - boxes[:, None, :2])) / size
    fine = sample(features["0"][torch.tensor([0, 0, 0, 2])], placed)
    logits = head.point_head(fine, sample(coarse, coords))[own, classes]
    expected = F.binary_cross_entropy_with_logits(logits, sample(of_objects, placed)[:, 0])
    torch.testing.assert_close(losses["loss_mask_point"], expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    losses = head.losses(features, BOXES, LABELS, masks, index)
    sum(losses.values()).backward()
    assert features["0"].grad is not None and features["0"].grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    head.zero_grad()
    none = [torch.zeros(0, 4)] * 3
    nothing = head.losses(features, none, [LABELS[1]] * 3, masks, [index[1]] * 3)
    sum(nothing.values()).backward()
    assert all(float(loss.detach()) == 0 for loss in nothing.values()) and all(
        p.grad is not None for p in head.parameters()
    )


SMALL = {
    "min_size": 64,
    "max_size": 96,
    "box_detections_per_img": 3,
    "box_score_thresh": 0.0,
    "box_batch_size_per_image": 8,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
}
MASKS = {"hidden_channels": 16, "coarse_hidden_channels": 16, "steps": 3, "train_points": 9}


@pytest.mark.parametrize(
    "backbone",
    ["resnet50_fpn", "resnet50_fpn_v2", "resnet10t", BackboneOptions(name="convnext_atto", output_norm=True)],
    ids=str,
)
def test_a_detector_with_masks(backbone: str | BackboneOptions) -> None:
    torch.manual_seed(0)
    model = pointrend_rcnn(backbone, 5, mask_options=MASKS, **SMALL)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 48)]
    masks = torch.zeros(2, 50, 70, dtype=torch.uint8)
    masks[0, 10:30, 20:50] = masks[1, 5:40, 40:66] = 1
    targets = [
        {"boxes": torch.tensor([[20.0, 10, 50, 30], [40, 5, 66, 40]]), "labels": torch.tensor([1, 4]), "masks": masks},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 48)},
    ]
    losses = model.train()(images, targets)
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask", "loss_mask_point"
    }  # fmt: skip
    sum(losses.values()).backward()
    head = model.roi_heads.mask_head
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.coarse_head.prediction.parameters())
    with torch.no_grad():
        found = model.eval()(images)
    for image, result in zip(images, found, strict=True):
        count = len(result["boxes"])
        assert 0 < count <= 3 and result["masks"].shape == (count, 1, *image.shape[1:])
        assert result["masks"].dtype == torch.bool and len(result["labels"]) == len(result["scores"]) == count


@pytest.mark.bad_input
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, background and a class, got 1"):
        pointrend_rcnn("resnet10t", 1)
    with pytest.raises(ValueError, match=r"must have stages of strides 4, 8, 16 and 32 .* choose a ResNet"):
        pointrend_rcnn(BackboneOptions(name="resnet10t", output_stride=8), 3)
    with pytest.raises(ValueError, match="train_points must be at least 1, got 0"):
        PointRendMaskHead(4, 2, train_points=0)
    head, features = make_head()
    with pytest.raises(ValueError, match=r"boxes must hold a tensor for each of 3 images, got 2"):
        head(features, BOXES[:2], LABELS[:2])
