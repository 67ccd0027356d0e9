"""CamVid road scenes (Brostow, Fauqueur and Cipolla 2009) in the layout of the SegNet tutorial.

``ROOT/train/NAME.*`` with ``ROOT/trainannot/NAME.png``, and the same for ``val`` and ``test``. Labels 0 to 10 are
classes, 11 is void and becomes 255. A split may be made of several folders: ``train: [train, val]``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._options import Flag
from .base import ImageFiles, Split
from .images import IGNORE, LabelReader, dataset_root, find_images
from .options import DataError, DatasetOptions, SplitNames, names_of
from .registry import register_dataset


class CamVidOptions(DatasetOptions):
    """CamVid in the SegNet layout; see :mod:`rendseg.data.camvid`."""

    name: Literal["camvid"] = "camvid"
    root: str | None = None  # null: $RENDSEG_DATA/camvid, else ../shared/data/camvid beside the checkout
    train: SplitNames = "train"  # folder of the images of each split, or several; NAMEannot holds the labels
    val: SplitNames = "val"
    cache: Flag = False  # decode every image once and keep it in memory (train: 250 MB)


CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


@register_dataset(CamVidOptions)
class CamVid(ImageFiles):
    """11 classes; see the module."""

    def __init__(
        self, options: CamVidOptions, split: Split, augment_seed: int = 0, problems: list[str] | None = None
    ) -> None:
        colors = np.array(list(CLASSES.values()), np.uint8)
        super().__init__(options, split, list(CLASSES), colors, augment_seed, problems)
        remedy = "correct the file, or use data.name: folder and map the value in data.class_map (255 ignores it)"
        self._reader = LabelReader(self.num_classes, ignore_values=(11, IGNORE), remedy=remedy)
        root = dataset_root(options.root, "camvid", "CamVid")
        folders = names_of(options.train if split == "train" else options.val)
        for folder in folders:
            with self._part():
                images = find_images(root / folder)
                annotations = root / f"{folder}annot"
                if not annotations.is_dir():
                    raise DataError(f"{annotations}: no such folder; it must hold the label maps of {root / folder}")
                for image in images:
                    name = image.stem if len(folders) == 1 else f"{folder}_{image.stem}"
                    self._add(image, annotations / f"{image.stem}.png", name)
        self._listed(options.cache)
