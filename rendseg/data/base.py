"""The data set class that the trainer sees."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .augment import seeded, to_sample, training_transform
from .images import IGNORE
from .options import AugmentOptions, DataError

Split = Literal["train", "val"]


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with label maps. Subclasses give ``__len__``, :meth:`read` and :meth:`sample_name`.

    ``dataset[i]`` is ``{"image": float32 [3, H, W], "label": int64 [H, W], "name": str}``: RGB, normalised by `mean`
    and `std`; classes with 255 for ignored pixels. The split ``train`` is augmented; ``val`` is as in the file.

    The augmentation of sample `i` depends on (`augment_seed`, epoch, `i`) alone, neither on the number of workers nor
    on what was read before; call :meth:`set_epoch` before iterating over the loader. The epoch lies in shared memory,
    so workers that persist over epochs see it too.

    Attributes:
        num_classes: C.
        class_names: C names.
        palette: uint8 [C, 3] colours for pictures.
        ignore_index: 255.
        mean, std: of the normalisation, three numbers each for RGB in [0, 1].
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
        self.augment_seed = augment_seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._transform = training_transform(options) if split == "train" else None
        self._cache: list[tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image [H, W, 3] and uint8 label [H, W], as stored."""
        raise NotImplementedError

    def sample_name(self, index: int) -> str:
        """A name that is unique within the split and usable as a file name stem."""
        raise NotImplementedError

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
        return Image.fromarray(image), label.copy()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, self.epoch)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """``dataset[index]`` as it is in epoch `epoch`, whatever :meth:`set_epoch` was told: a loader whose workers are
        in different epochs at one time needs it."""
        pixels, classes = self._pair(index)
        index %= len(self)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        label = torch.from_numpy(classes)
        size = None
        if self._transform is not None:
            size = self.options.crop_size or (label.shape[0], label.shape[1])
            with seeded(self.augment_seed, epoch, index):
                image, label = self._transform(tv_tensors.Image(image), tv_tensors.Mask(label))
        values, target = to_sample(image, label, self.mean, self.std, size)
        return {"image": values, "label": target, "name": self.sample_name(index)}


def check_pair(image_shape: tuple[int, ...], label_shape: tuple[int, ...], image_path: Any, label_path: Any) -> None:
    """Raises DataError unless the image and its label map have one size."""
    if image_shape[:2] != label_shape[:2]:
        raise DataError(
            f"{label_path}: label map has size {label_shape[1]}x{label_shape[0]}, its image {image_path} "
            f"{image_shape[1]}x{image_shape[0]}; resize one of them or pair the right files"
        )
