"""Data sets of objects, each with a class and a mask."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from .._options import Flag
from .augment import fit_size, resize_pair, seeded, to_sample
from .base import Examined, ImageFiles, SegmentationDataset, check_pair
from .images import IGNORE
from .options import DataError, DatasetOptions

SIZES = (32**2, 96**2)  # pixels: COCO's bounds of small, medium and large objects


class Instances(NamedTuple):
    """The objects of an image, as stored."""

    labels: np.ndarray
    """int64 [N]: classes from 0."""
    masks: np.ndarray
    """uint8 [N, H, W] of 0 and 1."""
    crowd: np.ndarray
    """bool [N]: a region of many objects that were not drawn apart."""


class InstanceOptions(DatasetOptions):
    """What data sets of objects have in common. Images need not have one size, so that ``crop_size`` is optional:
    without it ``short_edge`` and ``base_size`` give whole images."""

    one_size: ClassVar[bool] = False
    category_max_fraction: float = 1.0  # of a crop; there is no such limit with objects
    keep_empty: Flag = False  # train: images without an object too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.category_max_fraction != 1:
            raise ValueError("category_max_fraction is for label maps: leave it out with objects")


class InstanceDataset(SegmentationDataset):
    """Images with objects. Subclasses give ``__len__``, :meth:`read_all` and :meth:`sample_name`.

    ``dataset[i]`` is ``{"image": float32 [C_in, H, W], "target": ..., "name": str, "index": i}``; the target is what
    torchvision's detection models take: ``boxes`` float32 [N, 4] (x0, y0, x1, y1, the sides of the outermost pixels),
    ``labels`` int64 [N] from 1, ``masks`` uint8 [N, H, W], ``iscrowd`` int64 [N], ``area`` float32 [N] (pixels) and
    ``image_id`` int64 []. Objects without a pixel in the image are left out, and in the split ``train`` crowds.

    Images and augmentation are those of :class:`SegmentationDataset`. As a label map (``read``, ``label``) an image has
    the class of the smallest object at each pixel, and 255 where there is none or a crowd.
    """

    def read_all(self, index: int) -> tuple[np.ndarray, Instances]:
        """uint8 image [H, W, C_in] and its objects, as stored."""
        raise NotImplementedError

    def image_id(self, index: int) -> int:
        """The number of the image in detections."""
        return index

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, found = self.read_all(index)
        return image, painted(found)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The objects in COCO's form, for an evaluation, without ``id``."""
        from .rle import encode

        image, found = self.read_all(index)
        return [
            {
                "image_id": self.image_id(index),
                "category_id": self.category_id(int(label)),
                "segmentation": encode(mask),
                "area": int(mask.sum()),
                "bbox": _sides(mask),
                "iscrowd": int(crowd),
            }
            for label, mask, crowd in zip(*found, strict=True)
            if mask.any()
        ]

    def category_id(self, label: int) -> int:
        """The number of the class `label` (from 0) in detections."""
        return label + 1

    @property
    def category_ids(self) -> list[int]:
        """The number of each class in detections."""
        return [self.category_id(label) for label in range(self.num_classes)]

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width, as stored."""
        height, width = self.read_all(index)[0].shape[:2]
        return height, width

    def examine(self, index: int) -> Examined:
        try:
            image, found = self.read_all(index)
        except DataError as error:
            return Examined(None, None, [str(error)])
        objects = np.stack([found.labels, found.masks.sum((1, 2), dtype=np.int64), found.crowd], 1)
        return Examined(image, painted(found), [], objects=objects)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        index %= size
        pixels, found = self.read_all(index)
        image, masks = torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(found.masks)
        if self.split == "val" and self.options.val_size is not None:
            wanted = self.options.val_size
            if self.options.val_keep_ratio:
                wanted = fit_size(masks.shape[1], masks.shape[2], wanted)
            image, masks = resize_pair(image, masks, wanted)
        if self._transform is not None:
            with seeded(self.augment_seed, epoch, index):
                image, masks = self._transform(tv_tensors.Image(image), tv_tensors.Mask(masks))
            masks = masks.as_subclass(Tensor)
        values, _ = to_sample(image, masks.new_zeros(masks.shape[1:]), self.mean, self.std, None, self.channel_order)
        return {
            "image": values,
            "target": self._target(index, found, masks.contiguous()),
            "name": self.sample_name(index),
            "index": index,
        }

    def _target(self, index: int, found: Instances, masks: Tensor) -> dict[str, Tensor]:
        labels, crowd = torch.from_numpy(found.labels) + 1, torch.from_numpy(found.crowd)
        inside = masks > 0
        rows, columns = inside.any(2), inside.any(1)
        kept = rows.any(1) & ~(crowd & (self.split == "train"))
        rows, columns, masks = rows[kept], columns[kept], masks[kept]
        sides = [
            columns.byte().argmax(1),
            rows.byte().argmax(1),
            columns.shape[1] - columns.flip(1).byte().argmax(1),
            rows.shape[1] - rows.flip(1).byte().argmax(1),
        ]
        return {
            "boxes": torch.stack(sides, 1).float(),
            "labels": labels[kept],
            "masks": masks,
            "iscrowd": crowd[kept].long(),
            "area": masks.sum((1, 2)).float(),
            "image_id": torch.tensor(self.image_id(index)),
        }


class InstanceFiles(InstanceDataset, ImageFiles):
    """Objects in files: subclasses list them as :class:`ImageFiles` does, and give :meth:`instances`."""

    def instances(self, index: int) -> Instances:
        """The objects of an image."""
        raise NotImplementedError

    def read_all(self, index: int) -> tuple[np.ndarray, Instances]:
        image, found = self.read_image(index), self.instances(index)
        check_pair(image.shape, found.masks.shape[1:], *self.files(index))
        return image, found

    def label(self, index: int) -> np.ndarray:
        return painted(self.instances(index))


def painted(found: Instances) -> np.ndarray:
    """uint8 [H, W]: the class of the smallest object at each pixel; 255 in crowds and where there is none."""
    result = np.full(found.masks.shape[1:], IGNORE, np.uint8)
    for i in np.argsort(-found.masks.sum((1, 2), dtype=np.int64), kind="stable"):
        if not found.crowd[i]:
            result[found.masks[i] > 0] = found.labels[i]
    return result


def _sides(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
