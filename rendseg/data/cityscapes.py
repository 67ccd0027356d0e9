"""Cityscapes (Cordts et al., CVPR 2016), the 19 classes of its benchmark.

``ROOT/leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png`` with
``ROOT/gtFine/.../NAME_gtFine_labelTrainIds.png``, or else ``..._labelIds.png``, whose 34 ids are translated; what the
benchmark does not evaluate becomes 255. The coarse labels lie in ``ROOT/gtCoarse`` in the same way: those of ``train``
are used with ``annotations: gtCoarse``, those of ``train_extra`` whenever that split is named.

The published labels of ``test`` are blank: all ids are ignored ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from .._options import Flag
from .base import ImageFiles, Split
from .images import IGNORE, LabelReader, dataset_root, find_images
from .options import DataError, DatasetOptions, SplitNames, names_of
from .registry import register_dataset


class CityscapesOptions(DatasetOptions):
    """Cityscapes as it is distributed; see :mod:`rendseg.data.cityscapes`."""

    name: Literal["cityscapes"] = "cityscapes"
    root: str | None = None  # holds leftImg8bit and gtFine; null: $RENDSEG_DATA/cityscapes
    train: SplitNames = "train"  # train, val, test or train_extra, or several: [train, val]
    val: SplitNames = "val"
    labels: Literal["auto", "labelIds", "labelTrainIds"] = "auto"  # auto: *_labelTrainIds.png where present
    annotations: Literal["gtFine", "gtCoarse"] = "gtFine"  # of train; train_extra has gtCoarse alone, val keeps gtFine
    cache: Flag = False  # decode every image once and keep it in memory (train: 25 GB)


CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
# Ids of the classes above, in their order; the other ids up to 33 are not evaluated.
EVALUATED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ENDING = "_leftImg8bit"


@register_dataset(CityscapesOptions)
class Cityscapes(ImageFiles):
    """19 classes; see the module."""

    def __init__(
        self,
        options: CityscapesOptions,
        split: Split,
        augment_seed: int = 0,
        problems: list[str] | None = None,
    ) -> None:
        colors = np.array(list(CLASSES.values()), np.uint8)
        super().__init__(options, split, list(CLASSES), colors, augment_seed, problems)
        ids = {value: IGNORE for value in (*range(34), IGNORE)} | {v: c for c, v in enumerate(EVALUATED_IDS)}
        remedy = "fetch the file again, or use data.name: folder with data.class_map for labels of your own"
        self._by_id = LabelReader(self.num_classes, ids, remedy=remedy)
        self._by_train_id = LabelReader(self.num_classes, remedy=remedy)
        root = dataset_root(options.root, "cityscapes", "Cityscapes (leftImg8bit and gtFine)")
        images = root / "leftImg8bit"
        if not images.is_dir():
            raise DataError(f"{images}: no such folder; set data.root to the folder that holds leftImg8bit and gtFine")
        for part in names_of(options.train if split == "train" else options.val):
            coarse = part == "train_extra" or (split == "train" and options.annotations == "gtCoarse")
            with self._part():
                self._add_part(images, root / ("gtCoarse" if coarse else "gtFine"), part, options)
        self._listed(options.cache)

    @classmethod
    def file_values(cls, options: CityscapesOptions) -> np.ndarray:
        return np.array(EVALUATED_IDS)

    def _add_part(self, images: Path, labels: Path, part: str, options: CityscapesOptions) -> None:
        folder = images / part
        if not folder.is_dir():
            known = ", ".join(sorted(p.name for p in images.iterdir() if p.is_dir())) or "nothing"
            raise DataError(f"{folder}: no such folder; data.{self.split} may name what is there: {known}")
        if not (labels / part).is_dir():
            raise DataError(f"{labels / part}: no such folder; it must hold the label maps of {folder}")
        paths = [path for path in find_images(folder, recursive=True) if path.stem.endswith(ENDING)]
        if not paths:
            raise DataError(f"{folder}: no image name ends in {ENDING}; unpack leftImg8bit as it was published")
        for image in paths:
            name = image.stem.removesuffix(ENDING)
            stem = labels / part / image.parent.relative_to(folder) / f"{name}_{labels.name}"
            by_id, by_train_id = (stem.with_name(f"{stem.name}_{kind}.png") for kind in ("labelIds", "labelTrainIds"))
            remedy = "add it or remove the image"
            if options.labels == "labelTrainIds":
                label = by_train_id
                if by_id.is_file():
                    remedy = "set data.labels to auto, or make it with cityscapesscripts (csCreateTrainIdLabelImgs)"
            else:
                label = by_train_id if options.labels == "auto" and by_train_id.is_file() else by_id
            self._add(image, label, name, remedy)

    def read_label(self, index: int) -> np.ndarray:
        path = self.files(index)[1]
        reader = self._by_train_id if path.stem.endswith("_labelTrainIds") else self._by_id
        return reader(path, self.options.max_pixels)
