"""Pascal VOC 2012 (Everingham et al.), 21 classes, and the labels of SBD (Hariharan et al., ICCV 2011).

VOC lies in ``VOCdevkit/VOC2012``, ``VOC2012`` or ROOT itself: ``ImageSets/Segmentation/{train,val,trainval}.txt``,
``JPEGImages/NAME.jpg`` and ``SegmentationClass/NAME.png``, palette images in which 255 is the border between objects.

The splits ``trainaug`` (10,582 images: those of SBD's train and val and VOC's train that are not in VOC's val) and
``aug`` (``trainaug`` without VOC's train, to be used as ``train: [train, aug]``) come from

* ``SegmentationClassAug/NAME.png`` with ``ImageSets/Segmentation/{trainaug,aug}.txt``, as converted sets have it (a
  line may also be the two paths of image and label), or
* SBD as published, ``benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}``, whose label maps are MATLAB files, read
  by scipy. VOC's own label maps are used where it has them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np

from .._options import Flag
from .base import ImageFiles, Split
from .folder import distinct_colors
from .images import LabelReader, dataset_root, read_list
from .options import DataError, DatasetOptions, SplitNames, names_of
from .registry import register_dataset


class VocOptions(DatasetOptions):
    """Pascal VOC 2012, with the labels of SBD on request; see :mod:`rendseg.data.voc`."""

    name: Literal["voc"] = "voc"
    root: str | None = None  # VOC2012, VOCdevkit or the folder that holds it; null: $RENDSEG_DATA/voc
    sbd: str | None = None  # benchmark_RELEASE of SBD; null: SegmentationClassAug, else benchmark_RELEASE beside VOC
    train: SplitNames = "train"  # a list in ImageSets/Segmentation, or several; trainaug and aug take in SBD's labels
    val: SplitNames = "val"
    cache: Flag = False  # decode every image once and keep it in memory (trainaug: 8 GB)


CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# Names of the two splits and of their lists.
AUGMENTED = {"trainaug": ("trainaug", "train_aug"), "train_aug": ("trainaug", "train_aug"), "aug": ("aug",)}


@register_dataset(VocOptions)
class Voc(ImageFiles):
    """21 classes; see the module."""

    def __init__(
        self, options: VocOptions, split: Split, augment_seed: int = 0, problems: list[str] | None = None
    ) -> None:
        super().__init__(options, split, list(CLASSES), distinct_colors(len(CLASSES)), augment_seed, problems)
        remedy = "fetch the file again, or use data.name: folder with data.class_map for labels of your own"
        self._reader = LabelReader(self.num_classes, remedy=remedy)
        root = dataset_root(options.root, "voc", "Pascal VOC 2012 (VOCdevkit/VOC2012)")
        homes = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
        home = next((path for path in homes if (path / "ImageSets" / "Segmentation").is_dir()), None)
        if home is None:
            raise DataError(
                f"{root}: no ImageSets/Segmentation in it, in VOC2012 or in VOCdevkit/VOC2012; set data.root to where "
                "Pascal VOC 2012 was unpacked"
            )
        self._home, self._lists = home, home / "ImageSets" / "Segmentation"
        for part in names_of(options.train if split == "train" else options.val):
            with self._part():
                if part not in AUGMENTED:
                    self._add_names(self._names_in(self._lists / f"{part}.txt"), "SegmentationClass", part)
                elif options.sbd is None and (home / "SegmentationClassAug").is_dir():
                    lists = [self._lists / f"{name}.txt" for name in AUGMENTED[part]]
                    found = next((path for path in lists if path.is_file()), lists[0])
                    self._add_names(self._names_in(found), "SegmentationClassAug", found.stem)
                else:
                    self._add_sbd(self._find_sbd(options, root), part)
        self._listed(options.cache)

    def _names_in(self, listing: Path) -> list[str]:
        if not listing.is_file():
            known = ", ".join(sorted(path.stem for path in self._lists.glob("*.txt"))) or "nothing"
            raise DataError(f"{listing}: no such list; data.{self.split} may name what is there: {known}")
        return [Path(line.split()[0].replace("\\", "/")).stem for line in read_list(listing, self.split)]

    def _add_names(self, names: list[str], labels: str, part: str) -> None:
        folder = self._home / labels
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; it must hold the label maps of the list {part}")
        for name in names:
            self._add_pair(name, self._home / "JPEGImages" / f"{name}.jpg", folder / f"{name}.png", part)

    def _add_pair(self, name: str, image: Path, label: Path, part: str) -> None:
        if image.is_file():
            self._add(image, label, name, f"add it or take {name} off the list {part}")
        else:
            self.left_out += 1
            self._report(f"{image}: image is missing; add it or take {name} off the list {part}")

    def _find_sbd(self, options: VocOptions, root: Path) -> Path:
        if options.sbd is not None:
            given = root / Path(options.sbd).expanduser()
            places = [given / "benchmark_RELEASE" / "dataset", given / "dataset", given]
        else:
            around = dict.fromkeys((root, self._home, self._home.parent, self._home.parent.parent))
            inner = ("benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset", "SBD/dataset", "VOCaug/dataset")
            places = [folder / name for folder in around for name in inner]
        found = next((path for path in places if (path / "cls").is_dir()), None)
        if found is None:
            wanted = options.sbd or f"{self._home}/SegmentationClassAug or {root}/benchmark_RELEASE/dataset/cls"
            raise DataError(f"{wanted}: no label maps of SBD; put them there or set data.sbd to benchmark_RELEASE")
        if importlib.util.find_spec("scipy") is None:
            raise DataError(
                f"{found / 'cls'}: SBD's label maps are MATLAB files, read by scipy, not installed here: pip install "
                "scipy, or use a converted SegmentationClassAug"
            )
        return found

    def _add_sbd(self, sbd: Path, part: str) -> None:
        train, val = (set(self._names_in(self._lists / f"{name}.txt")) for name in ("train", "val"))
        listed = {name for each in ("train", "val") for name in read_list(sbd / f"{each}.txt", self.split)}
        for name in sorted((listed | train) - val):
            if name not in train:
                image = self._home / "JPEGImages" / f"{name}.jpg"
                image = image if image.is_file() else sbd / "img" / f"{name}.jpg"
                self._add_pair(name, image, sbd / "cls" / f"{name}.mat", "of SBD")
            elif part != "aug":
                self._add_names([name], "SegmentationClass", "train")

    def read_label(self, index: int) -> np.ndarray:
        path = self.files(index)[1]
        return self._reader.translate(read_mat(path), path) if path.suffix == ".mat" else super().read_label(index)


def read_mat(path: Path) -> np.ndarray:
    """The class numbers [H, W] of an SBD label map, ``GTcls.Segmentation`` of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{path}: reading it needs scipy, not installed here: pip install scipy") from error
    if not path.is_file():
        raise DataError(f"{path}: label map is missing; add the file or remove its partner")
    try:
        values = np.asarray(loadmat(str(path), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # scipy raises nearly anything on a damaged file
        reason = " ".join(str(error).replace(str(path), "file").split()) or type(error).__name__
        raise DataError(f"{path}: label map cannot be read as one of SBD ({reason}); fetch the file again") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise DataError(
            f"{path}: GTcls.Segmentation has type {values.dtype} and shape {list(values.shape)}, wanted integers "
            "[H, W]; fetch the file again"
        )
    return values
