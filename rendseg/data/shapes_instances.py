"""The scenes of ``shapes`` with their objects apart: what is visible of each."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._options import Count, Positive, Whole
from .base import Split
from .instances import InstanceDataset, InstanceOptions, Instances
from .options import ColorJitterOptions
from .registry import register_dataset
from .shapes import CLASSES, scene


class ShapesInstancesOptions(InstanceOptions):
    """Synthetic scenes; see :mod:`rendseg.data.shapes_instances`. The keys are those of ``shapes``."""

    name: Literal["shapes_instances"] = "shapes_instances"
    size: tuple[Count, Count] = (128, 128)  # [height, width]
    num_images: Count = 4096
    num_val_images: Count = 128
    seed: Whole = 0  # of the scenes
    min_pixels: Count = 16  # smaller visible rests of objects are left out
    scale_range: tuple[Positive, Positive] = (1.0, 1.0)
    color_jitter: ColorJitterOptions | None = None


@register_dataset(ShapesInstancesOptions)
class ShapesInstances(InstanceDataset):
    """Seven classes of shapes; see the module."""

    def __init__(self, options: ShapesInstancesOptions, split: Split, augment_seed: int = 0) -> None:
        colors = np.array(list(CLASSES.values())[1:], np.uint8)
        super().__init__(options, split, list(CLASSES)[1:], colors, augment_seed)
        self._size, self._seed, self._least = options.size, options.seed, options.min_pixels
        self._count = options.num_images if split == "train" else options.num_val_images

    def __len__(self) -> int:
        return self._count

    def sample_name(self, index: int) -> str:
        return f"{self.split}_{index:06d}"

    def image_size(self, index: int) -> tuple[int, int]:
        return self._size

    def read_all(self, index: int) -> tuple[np.ndarray, Instances]:
        numbers = np.zeros(self._size, np.uint8)
        image, label = scene(*self._size, self._seed, 0 if self.split == "train" else 1, index, numbers=numbers)
        found = np.flatnonzero(np.bincount(numbers.ravel())[1:] >= self._least) + 1
        masks = (numbers == found[:, None, None]).astype(np.uint8)
        labels = np.array([label[mask > 0][0] for mask in masks], np.int64) - 1
        return image, Instances(labels, masks, np.zeros(len(found), bool))
