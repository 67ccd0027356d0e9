"""Cityscapes instances (Cordts et al., CVPR 2016): the eight classes whose objects are drawn apart.

``ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` with ``ROOT/gtFine/.../NAME_gtFine_instanceIds.png``, whose values
are the id of a class times 1000 plus the number of the object. A bare id of such a class is a group: a crowd.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .base import Split
from .cityscapes import CLASSES, ENDING, EVALUATED_IDS
from .images import dataset_root, find_images, read_values
from .instances import InstanceFiles, InstanceOptions, Instances
from .options import DataError, SplitNames, names_of
from .registry import register_dataset

NAMES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
IDS = [EVALUATED_IDS[list(CLASSES).index(name)] for name in NAMES]


class CityscapesInstancesOptions(InstanceOptions):
    """Cityscapes instances; see :mod:`rendseg.data.cityscapes_instances`."""

    name: Literal["cityscapes_instances"] = "cityscapes_instances"
    root: str | None = None  # holds leftImg8bit and gtFine; null: $RENDSEG_DATA/cityscapes
    train: SplitNames = "train"
    val: SplitNames = "val"


@register_dataset(CityscapesInstancesOptions)
class CityscapesInstances(InstanceFiles):
    """8 classes; see the module."""

    def __init__(
        self,
        options: CityscapesInstancesOptions,
        split: Split,
        augment_seed: int = 0,
        problems: list[str] | None = None,
    ) -> None:
        colors = np.array([CLASSES[name] for name in NAMES], np.uint8)
        super().__init__(options, split, list(NAMES), colors, augment_seed, problems)
        root = dataset_root(options.root, "cityscapes", "Cityscapes (leftImg8bit and gtFine)")
        for part in names_of(options.train if split == "train" else options.val):
            with self._part():
                folder = root / "leftImg8bit" / part
                paths = [path for path in find_images(folder, recursive=True) if path.stem.endswith(ENDING)]
                if not paths:
                    raise DataError(f"{folder}: no image name ends in {ENDING}; unpack leftImg8bit as it was published")
                for image in paths:
                    name = image.stem.removesuffix(ENDING)
                    city = image.parent.relative_to(folder)
                    self._add(image, root / "gtFine" / part / city / f"{name}_gtFine_instanceIds.png", name)
        self._listed(False)

    def category_id(self, label: int) -> int:
        return IDS[label]

    def instances(self, index: int) -> Instances:
        values = read_values(self.files(index)[1], self.options.max_pixels)
        found = [int(v) for v in np.unique(values) if (v // 1000 if v >= 1000 else v) in IDS]
        return Instances(
            np.array([IDS.index(v // 1000 if v >= 1000 else v) for v in found], np.int64),
            np.array([values == v for v in found], np.uint8).reshape(-1, *values.shape),
            np.array([v < 1000 for v in found], bool),
        )
