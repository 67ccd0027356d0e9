"""CamVid road scenes (Brostow, Fauqueur and Cipolla 2009) in the layout of the SegNet tutorial.

``ROOT/train/NAME.*`` with ``ROOT/trainannot/NAME.png``, and the same for ``val`` and ``test``. Labels 0 to 10 are
classes, 11 is void and becomes 255.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .base import SegmentationDataset, Split, check_pair
from .images import IGNORE, LabelReader, find_images, read_image
from .options import CamVidOptions, DataError

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


def data_root() -> Path:
    """``$RENDSEG_DATA``, else ``../shared/data`` beside the checkout."""
    return Path(os.environ.get("RENDSEG_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


class CamVid(SegmentationDataset):
    """11 classes; see the module."""

    def __init__(self, options: CamVidOptions, split: Split, augment_seed: int = 0) -> None:
        super().__init__(options, split, list(CLASSES), np.array(list(CLASSES.values()), np.uint8), augment_seed)
        root = Path(options.root).expanduser() if options.root else data_root() / "camvid"
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; put CamVid there, or set data.root or RENDSEG_DATA")
        folder = options.train if split == "train" else options.val
        self._images = find_images(root / folder)
        annotations = root / f"{folder}annot"
        if not annotations.is_dir():
            raise DataError(f"{annotations}: no such folder; it must hold the label maps of {root / folder}")
        self._labels = [annotations / f"{path.stem}.png" for path in self._images]
        for image, label in zip(self._images, self._labels, strict=True):
            if not label.is_file():
                raise DataError(f"{image}: image without label map, {label} is missing; add it or remove the image")
        self._reader = LabelReader(self.num_classes, ignore_values=(11, IGNORE))
        if options.cache:
            self.keep_in_memory()

    def __len__(self) -> int:
        return len(self._images)

    def sample_name(self, index: int) -> str:
        return self._images[index].stem

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = read_image(self._images[index]), self._reader(self._labels[index])
        check_pair(image.shape, label.shape, self._images[index], self._labels[index])
        return image, label
