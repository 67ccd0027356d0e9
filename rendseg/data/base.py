"""The data set class that the trainer sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .augment import fit_size, resize_pair, seeded, to_sample, training_transform
from .images import IGNORE, LabelReader, as_rgb, orientation, read_image
from .options import AugmentOptions, DataError

Split = Literal["train", "val"]


@dataclass
class Examined:
    """What :meth:`SegmentationDataset.examine` found: uint8 image [H, W, C] and label [H, W], None where unreadable,
    one line per problem, whether an EXIF tag turns the image, and class, pixels and crowd of its objects, int64 [N, 3],
    where the data set has objects."""

    image: np.ndarray | None
    label: np.ndarray | None
    problems: list[str]
    turned: bool = False
    objects: np.ndarray | None = None


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with label maps. Subclasses give ``__len__``, :meth:`read` and :meth:`sample_name`.

    ``dataset[i]`` is ``{"image": float32 [C_in, H, W], "label": int64 [H, W], "name": str}``: RGB (or BGR, see
    `channel_order`), normalised by `mean` and `std`; classes with 255 for ignored pixels. The split ``train`` is
    augmented; ``val`` is as in the file, or resized to ``val_size``.

    The augmentation of sample `i` depends on (`augment_seed`, epoch, `i`) alone, neither on the number of workers nor
    on what was read before; call :meth:`set_epoch` before iterating over the loader. The epoch lies in shared memory,
    so workers that persist over epochs see it too.

    Attributes:
        num_classes: C.
        class_names: C names.
        palette: uint8 [C, 3] colours for pictures.
        ignore_index: 255.
        channel_order: "rgb" or "bgr", of the samples' images.
        mean, std: of the normalisation, C_in numbers each for values in [0, 1], in `channel_order`.
    """

    ignore_index = IGNORE

    def __init__(
        self,
        options: AugmentOptions,
        split: Split,
        class_names: list[str],
        palette: np.ndarray,
        augment_seed: int = 0,
    ) -> None:
        if split not in ("train", "val"):
            raise DataError(f"split must be 'train' or 'val', got {split!r}")
        self.options = options
        self.split = split
        self.class_names = list(class_names)
        self.num_classes = len(class_names)
        self.palette = np.ascontiguousarray(palette, np.uint8)
        self.mean = options.mean
        self.std = options.std
        self.channel_order = options.channel_order
        self.augment_seed = augment_seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        with suppress(RuntimeError):  # no shared memory: workers of other loaders than ours do not see set_epoch
            self._epoch.share_memory_()
        self._transform = training_transform(options) if split == "train" else None
        self._cache: list[tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image [H, W, C_in] and uint8 label [H, W], as stored."""
        raise NotImplementedError

    def sample_name(self, index: int) -> str:
        """A name that is unique within the split and usable as a file name stem."""
        raise NotImplementedError

    def label(self, index: int) -> np.ndarray:
        """uint8 [H, W], as :meth:`read` has it; data sets of files do without the image."""
        return self.read(index)[1]

    def ignored_values(self, index: int) -> list[int]:
        """The values in the file of a label map that are ignored although no key of the configuration maps them."""
        return []

    @classmethod
    def file_values(cls, options: Any) -> np.ndarray | None:
        """The value of each class in the data set's own label maps, [C], or its colour, uint8 [C, 3], by the options of
        the data set; None: its number."""
        return None

    def examine(self, index: int) -> Examined:
        """Everything that is wrong with the files of an image, where :meth:`read` raises the first."""
        try:
            image, label = self.read(index)
        except DataError as error:
            return Examined(None, None, [str(error)])
        return Examined(image, label, [])

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentations of epoch `epoch`, in this process and in its workers."""
        self._epoch.fill_(epoch)

    def keep_in_memory(self) -> None:
        """Decodes every image now, in this process: forked workers share the memory, spawned ones are sent a copy."""
        self._cache = [self.read(index) for index in range(len(self))]

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        index %= size
        return self._cache[index] if self._cache is not None else self.read(index)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image and its label map (uint8 [H, W]) before augmentation."""
        image, label = self._pair(index)
        return Image.fromarray(as_rgb(image)), label.copy()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, self.epoch)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """``dataset[index]`` as it is in epoch `epoch`, independent of :meth:`set_epoch`: a loader whose workers are
        in different epochs at one time needs it."""
        pixels, classes = self._pair(index)
        index %= len(self)
        if pixels.shape[2] != self.options.channels:
            raise DataError(
                f"{self.sample_name(index)}: the image has {pixels.shape[2]} channels, model.backbone.in_chans is "
                f"{self.options.channels}; set it to {pixels.shape[2]}"
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        label = torch.from_numpy(classes)
        size = None
        if self.split == "val" and self.options.val_size is not None:
            wanted = self.options.val_size
            if self.options.val_keep_ratio:
                wanted = fit_size(label.shape[0], label.shape[1], wanted)
            image, label = resize_pair(image, label, wanted)
        if self._transform is not None:
            size = self.options.crop_size or (label.shape[0], label.shape[1])
            with seeded(self.augment_seed, epoch, index):
                image, label = self._transform(tv_tensors.Image(image), tv_tensors.Mask(label))
        values, target = to_sample(image, label, self.mean, self.std, size, self.channel_order)
        return {"image": values, "label": target, "name": self.sample_name(index)}


def check_pair(image_shape: tuple[int, ...], label_shape: tuple[int, ...], image_path: Any, label_path: Any) -> None:
    """Raises DataError unless the image and its label map have one size."""
    if image_shape[:2] != label_shape[:2]:
        tag = orientation(image_path)
        stored = tag > 4 and image_shape[:2] == label_shape[1::-1]
        remedy = (
            f"the EXIF tag Orientation ({tag}) turns the image: turn the label map too, or set "
            "data.exif_orientation=false if the labels were drawn on the images as they are stored"
            if stored
            else "resize one of them or pair the right files"
        )
        raise DataError(
            f"{label_path}: label map has size {label_shape[1]}x{label_shape[0]}, its image {image_path} "
            f"{image_shape[1]}x{image_shape[0]}; {remedy}"
        )


class ImageFiles(SegmentationDataset):
    """Data sets of image and label files.

    A subclass's constructor calls :meth:`_add` for every pair of files, each part of a split within :meth:`_part`, and
    :meth:`_listed` at the end. What is wrong with one file is an error there and then, or, if `problems` is given, is
    appended to it while the listing goes on (see :func:`rendseg.data.build_dataset`).

    Attributes:
        left_out: how many images `problems` speaks of.
    """

    _reader: LabelReader

    def __init__(
        self,
        options: AugmentOptions,
        split: Split,
        class_names: list[str],
        palette: np.ndarray,
        augment_seed: int = 0,
        problems: list[str] | None = None,
    ) -> None:
        super().__init__(options, split, class_names, palette, augment_seed)
        self._problems = problems
        self._files: list[tuple[Path, Path]] = []
        self._names: list[str] = []
        self._index_of: dict[str, int] = {}
        self.left_out = 0

    def _report(self, message: str) -> None:
        if self._problems is None:
            raise DataError(message)
        self._problems.append(message)

    @contextmanager
    def _part(self) -> Iterator[None]:
        """What the block raises about one part of the split as a whole is reported like what is wrong with a file."""
        try:
            yield
        except DataError as error:
            if self._problems is None:
                raise
            self._problems.append(str(error))

    def _add(self, image: Path, label: Path, name: str, remedy: str = "add it or remove the image") -> None:
        """Adds an image; `remedy` is for a label map that is missing."""
        if not label.is_file():
            problem = f"{image}: image without label map, {label} is missing; {remedy}"
        elif name in self._index_of:
            other = self._files[self._index_of[name]][0]
            problem = (
                f"{image}: is listed twice in the split {self.split}; remove one mention of it"
                if other == image
                else f"{image}: its name {name!r} is that of {other} too; rename or remove one of them"
            )
        else:
            self._index_of[name] = len(self._files)
            self._files.append((image, label))
            self._names.append(name)
            return
        self.left_out += 1
        self._report(problem)

    def _listed(self, cache: bool) -> None:
        """Ends the constructor."""
        self._index_of = {}  # served the listing alone
        if self._problems is not None:
            self._problems = None
        elif cache:
            self.keep_in_memory()

    def __len__(self) -> int:
        return len(self._files)

    def files(self, index: int) -> tuple[Path, Path]:
        """The paths of an image and of its label map."""
        return self._files[index]

    def sample_name(self, index: int) -> str:
        return self._names[index]

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, C_in]."""
        return read_image(self._files[index][0], self.options)

    def read_label(self, index: int) -> np.ndarray:
        """uint8 [H, W]."""
        return self._reader(self._files[index][1], self.options.max_pixels)

    def label(self, index: int) -> np.ndarray:
        return self._cache[index][1] if self._cache is not None else self.read_label(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.read_image(index), self.read_label(index)
        check_pair(image.shape, label.shape, *self._files[index])
        return image, label

    def examine(self, index: int) -> Examined:
        image = label = None
        problems = []
        try:
            image = self.read_image(index)
        except DataError as error:
            problems.append(str(error))
        try:
            label = self.read_label(index)
        except DataError as error:
            problems.append(str(error))
        if image is not None and label is not None:
            try:
                check_pair(image.shape, label.shape, *self._files[index])
            except DataError as error:
                problems.append(str(error))
        turned = image is not None and self.options.exif_orientation and orientation(self._files[index][0]) != 1
        return Examined(image, label, problems, turned)
