"""Segmentation metrics from integer counts: mIoU, pixel accuracy and boundary IoU.

Everything is a sum of counts over images (int64), so that the result depends neither on the batches nor on how the
images are divided between processes, and one confusion matrix serves all of the area metrics. (torchmetrics has the
matrix, but no boundary IoU of label maps, and its Jaccard index hides which classes were absent; the tests compare
with it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ABSENT = ("skip", "ignore_without_label", "zero", "one")


def _window(values: Tensor, radius: int, dim: int, largest: bool) -> Tensor:
    """Largest (or smallest) value within `radius` along `dim`; positions outside do not count."""
    neutral = 0 if largest else torch.iinfo(values.dtype).max
    shape = list(values.shape)
    shape[dim] = radius
    edge = values.new_full(shape, neutral)
    result = torch.cat([edge, values, edge], dim)
    pick = torch.maximum if largest else torch.minimum
    length, reach = values.shape[dim], 1
    while 2 * reach <= 2 * radius + 1:  # windows of 1, 2, 4, ... cells
        count = result.shape[dim] - reach
        result = pick(result.narrow(dim, 0, count), result.narrow(dim, reach, count))
        reach *= 2
    if reach < 2 * radius + 1:  # two overlapping ones give the rest
        result = pick(result.narrow(dim, 0, length), result.narrow(dim, 2 * radius + 1 - reach, length))
    return result


def boundary_bands(labels: Tensor, ignored: Tensor, distance: int, image_border: bool = True) -> Tensor:
    """Which pixels lie in the inner boundary band of their own class.

    A pixel of class c is in the band if the square of side ``2 * distance + 1`` around it holds a pixel of another
    class: that is the class's mask minus its erosion by `distance` steps of a 3x3 square. As a maximum and a minimum
    over the label map decide it, all classes are done at once. Ignored pixels are in no band and make no boundary.

    Args:
        labels: uint8 or int16 [B, H, W].
        ignored: bool [B, H, W].
        distance: at least 1.
        image_border: whether what lies outside of the image counts as another class (as in Cheng et al.).

    Returns:
        bool [B, H, W].
    """
    height, width = labels.shape[-2:]
    high, low = labels.masked_fill(ignored, 0), labels.masked_fill(ignored, torch.iinfo(labels.dtype).max)
    for dim, side in ((1, height), (2, width)):
        radius = min(distance, side)
        high, low = _window(high, radius, dim, True), _window(low, radius, dim, False)
    band = (high != labels) | (low != labels)
    if image_border:
        for dim, side in ((1, height), (2, width)):
            reach = min(distance, side)
            band.narrow(dim, 0, reach).fill_(True)
            band.narrow(dim, side - reach, reach).fill_(True)
    return band & ~ignored


class SegmentationMetrics:
    """Counts predictions against labels; see :meth:`compute` for the definitions.

    Args:
        num_classes: C, at most 4095.
        ignore_index: label of the pixels that are counted nowhere.
        boundary_ratio: width of the boundary band as a fraction of the image diagonal; it is rounded to whole pixels,
            at least 1. 0.02 is the value of Cheng et al.
        image_border: whether the image border is a boundary of the classes that touch it, as it is in Cheng et al.
        absent: which classes are left out of the means, see :meth:`compute`.

    The counts are plain int64 tensors on the device of the first update: ``confusion`` [C, C] (row: label, column:
    prediction), ``boundary_intersection``, ``boundary_label`` and ``boundary_pred`` [C] (pixels).
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        boundary_ratio: float = 0.02,
        image_border: bool = True,
        absent: str = "skip",
    ) -> None:
        if not 1 <= num_classes <= 4095:
            raise ValueError(f"num_classes must be 1 to 4095, got {num_classes}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index must lie outside 0..{num_classes - 1}, got {ignore_index}")
        if not boundary_ratio > 0:
            raise ValueError(f"boundary_ratio must be positive, got {boundary_ratio}")
        if absent not in ABSENT:
            raise ValueError(f"absent must be one of {', '.join(ABSENT)}, got {absent!r}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.boundary_ratio = boundary_ratio
        self.image_border = image_border
        self.absent = absent
        self.reset()

    _counts = ("confusion", "boundary_intersection", "boundary_label", "boundary_pred")

    def reset(self) -> None:
        """Forgets what was counted."""
        classes = self.num_classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.boundary_intersection = torch.zeros(classes, dtype=torch.int64)
        self.boundary_label = torch.zeros(classes, dtype=torch.int64)
        self.boundary_pred = torch.zeros(classes, dtype=torch.int64)

    def to(self, device: torch.device | str) -> SegmentationMetrics:
        for name in self._counts:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def band_width(self, height: int, width: int) -> int:
        """Width in pixels of the boundary band of an image."""
        return max(1, round(self.boundary_ratio * math.hypot(height, width)))

    @torch.no_grad()
    def update(self, pred_labels: Tensor, labels: Tensor) -> None:
        """Counts a batch.

        Args:
            pred_labels: integer [B, H, W] or [H, W], classes 0 to C - 1 (anything where `labels` is ignored).
            labels: integer, of the same shape and on the same device, with `ignore_index`.

        Raises:
            ValueError: shapes differ, or a value is no class.
            TypeError: not integers.
        """
        if pred_labels.dim() == 2:
            pred_labels = pred_labels[None]
        if labels.dim() == 2:
            labels = labels[None]
        if pred_labels.dim() != 3 or pred_labels.shape != labels.shape:
            raise ValueError(
                "pred_labels and labels must have one shape [B, H, W], "
                f"got {list(pred_labels.shape)} and {list(labels.shape)}"
            )
        for name, tensor in (("pred_labels", pred_labels), ("labels", labels)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise TypeError(f"{name} must be integers, got {tensor.dtype}")
        if labels.numel() == 0:
            return
        classes = self.num_classes
        ignored = labels == self.ignore_index
        maps = []
        for name, tensor in (("pred_labels", pred_labels), ("labels", labels)):
            filled = tensor.masked_fill(ignored, 0)
            low, high = (int(value) for value in filled.aminmax())
            if low < 0 or high >= classes:
                raise ValueError(f"{name} must be 0..{classes - 1}, got {low if low < 0 else high}")
            maps.append(filled.to(torch.uint8 if classes <= 255 else torch.int16))
        guess, truth = maps
        if self.confusion.device != labels.device:
            self.to(labels.device)
        distance = self.band_width(*labels.shape[-2:])
        truth_band = boundary_bands(truth, ignored, distance, self.image_border)
        guess_band = boundary_bands(guess, ignored, distance, self.image_border)
        # One histogram over (label, prediction, in label's band, in prediction's band) holds all counts.
        key = truth.int().mul_(classes).add_(guess).mul_(2).add_(truth_band).mul_(2).add_(guess_band)
        key.masked_fill_(ignored, 4 * classes * classes)
        counts = torch.bincount(key.flatten(), minlength=4 * classes * classes + 1)[:-1].view(classes, classes, 2, 2)
        self.confusion += counts.sum((2, 3))
        self.boundary_label += counts[:, :, 1].sum((1, 2))
        self.boundary_pred += counts[:, :, :, 1].sum((0, 2))
        self.boundary_intersection += counts[:, :, 1, 1].diagonal()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the counts, on the CPU."""
        return {name: getattr(self, name).detach().cpu().clone() for name in self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the counts of a :meth:`state_dict`, on the device in use."""
        self.reset()
        self.merge(state)

    def merge(self, other: SegmentationMetrics | dict[str, Tensor]) -> SegmentationMetrics:
        """Adds the counts of another part of the data."""
        for name in self._counts:
            mine = getattr(self, name)
            theirs = other[name] if isinstance(other, dict) else getattr(other, name)
            if theirs.shape != mine.shape:
                raise ValueError(f"{name} must have shape {list(mine.shape)}, got {list(theirs.shape)}")
            setattr(self, name, mine + theirs.to(mine.device))
        return self

    def reduce(self, accelerator: Any | Callable[[Tensor], Tensor]) -> SegmentationMetrics:
        """Sums the counts over all processes, in place. Call it once, after the last update.

        Args:
            accelerator: an ``accelerate.Accelerator``, or a function that returns the sum over processes of a tensor.
                With NCCL the counts must be on the GPU: they are after an update there, else call :meth:`to`.
        """
        counts = torch.cat([getattr(self, name).flatten() for name in self._counts])
        total = accelerator.reduce(counts, reduction="sum") if hasattr(accelerator, "reduce") else accelerator(counts)
        start = 0
        for name in self._counts:
            mine = getattr(self, name)
            setattr(self, name, total[start : start + mine.numel()].view_as(mine).clone())
            start += mine.numel()
        return self

    def compute(self) -> dict[str, Any]:
        """The metrics of everything counted so far, as plain numbers.

        * ``per_class_iou``: |label and prediction| / |label or prediction| of each class over all valid pixels of the
          data set. ``per_class_accuracy``: its recall, ``per_class_precision``, ``per_class_dice``: 2 |label and
          prediction| / (|label| + |prediction|), which equals the F1 score.
        * ``miou``, ``mean_accuracy``, ``mean_dice``: means over the classes where these are defined.
        * ``pixel_accuracy``: fraction of the valid pixels that are right. ``fw_iou``: mean IoU weighted by the labelled
          pixels. ``kappa``: Cohen's kappa, the agreement beyond chance.
        * ``per_class_boundary_iou``, ``boundary_iou``: the same with each class's mask replaced by its boundary band
          (Cheng, Girshick, Dollar, Berg and Kirillov, "Boundary IoU", CVPR 2021, eq. 3, here on semantic masks): the
          pixels of the mask within d of its edge, d = max(1, round(boundary_ratio * diagonal)) in the chessboard
          distance, which equals d erosions by a 3x3 square. Counts are summed over the images before dividing.
          Ignored pixels belong to no band and their edge is no boundary; the image border is one unless
          `image_border` is False.

        A value that is not defined is None and left out of its mean; when that is so depends on `absent`:

        * ``skip`` (mmsegmentation): where the denominator is 0; an IoU, where a class occurs neither in the labels nor
          in the predictions. A class that is only predicted, or only labelled, has IoU 0 and counts.
        * ``ignore_without_label`` (detectron2): also every value of a class that has no labelled pixel.
        * ``zero`` (PaddleSeg up to 2.8, PyTorch-Encoding): never; instead of 0/0 it is 0, and means are over all
          classes.
        * ``one`` (PaddleSeg after 2.8): never; instead of 0/0 it is 1, and means are over all classes.

        A mean over nothing is nan.
        """
        confusion = self.confusion.cpu().double()
        hit, truth, guess = confusion.diag(), confusion.sum(1), confusion.sum(0)
        iou = self._ratios(hit, truth + guess - hit)
        recall = self._ratios(hit, truth)
        dice = self._ratios(2 * hit, truth + guess)
        touch = self.boundary_intersection.cpu().double()
        edge_truth, edge_guess = self.boundary_label.cpu().double(), self.boundary_pred.cpu().double()
        boundary = self._ratios(touch, edge_truth + edge_guess - touch)
        total = float(confusion.sum())
        weighted = sum(value * share for value, share in zip(iou, truth.tolist(), strict=True) if value is not None)
        right, chance = float(hit.sum()), float((truth * guess).sum())
        return {
            "miou": _mean(iou),
            "pixel_accuracy": right / total if total else math.nan,
            "mean_accuracy": _mean(recall),
            "mean_dice": _mean(dice),
            "fw_iou": weighted / total if total else math.nan,
            "kappa": (total * right - chance) / (total**2 - chance) if total**2 > chance else math.nan,
            "boundary_iou": _mean(boundary),
            "per_class_iou": iou,
            "per_class_accuracy": recall,
            "per_class_precision": self._ratios(hit, guess),
            "per_class_dice": dice,
            "per_class_boundary_iou": boundary,
            "num_pixels": int(total),
        }

    def _ratios(self, part: Tensor, whole: Tensor) -> list[float | None]:
        """part / whole of each class, None where `absent` leaves it out."""
        if self.absent == "ignore_without_label":
            whole = whole.masked_fill(self.confusion.cpu().sum(1) == 0, 0)
        undefined = {"zero": 0.0, "one": 1.0}.get(self.absent)
        return [p / w if w else undefined for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def mean_iou(confusion: Tensor) -> float:
    """mIoU of one confusion matrix [C, C] over the classes that occur; nan if it is empty."""
    confusion = confusion.cpu()  # not every device has float64
    hit = confusion.diag().double()
    union = (confusion.sum(0) + confusion.sum(1)).double() - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def _mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else math.nan
