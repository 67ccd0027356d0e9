"""Data sets and transforms."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .base import ImageFiles, SegmentationDataset, Split
from .options import (
    Ade20kOptions,
    AugmentOptions,
    BrodenOptions,
    CamVidOptions,
    CityscapesOptions,
    ColorJitterOptions,
    DataError,
    DatasetOptions,
    FolderOptions,
    PhotometricOptions,
    ShapesOptions,
    VocOptions,
    parse_options,
)

__all__ = [
    "Ade20kOptions",
    "AugmentOptions",
    "BrodenOptions",
    "CamVidOptions",
    "CityscapesOptions",
    "ColorJitterOptions",
    "DataError",
    "DatasetOptions",
    "FolderOptions",
    "PhotometricOptions",
    "SegmentationDataset",
    "ShapesOptions",
    "VocOptions",
    "build_dataset",
    "parse_options",
]

# data.name -> module of this package and class, imported when asked for
_HOMES = {
    "shapes": ("shapes", "Shapes"),
    "camvid": ("camvid", "CamVid"),
    "cityscapes": ("cityscapes", "Cityscapes"),
    "ade20k": ("ade20k", "Ade20k"),
    "voc": ("voc", "Voc"),
    "folder": ("folder", "Folder"),
    "broden": ("broden", "Broden"),
}


def build_dataset(
    options: Mapping[str, Any] | DatasetOptions,
    split: Split,
    *,
    augment_seed: int = 0,
    problems: list[str] | None = None,
) -> SegmentationDataset:
    """The data set of a ``data:`` section.

    Args:
        options: ``name`` (shapes, camvid, cityscapes, ade20k, voc, broden or folder) and the keys of its options class,
            such as :class:`FolderOptions`.
        split: ``"train"``, which is augmented, or ``"val"``.
        augment_seed: of the augmentation; the seeds within `options` choose the data instead.
        problems: None: the first image that cannot be used, say for want of a label map, is an error. A list: the
            messages are appended to it, the images left out and nothing is decoded beforehand.

    Raises:
        DataError: unknown key or unusable value, missing folder, no images, image without label map. Unreadable files
            and label values outside the classes are found when they are read (with ``cache: true``, here).
    """
    parsed = parse_options(options)  # type: ignore[arg-type]
    module, name = _HOMES[parsed.name]
    kind = getattr(import_module(f".{module}", __name__), name)
    if issubclass(kind, ImageFiles):
        return kind(parsed, split, augment_seed, problems)
    return kind(parsed, split, augment_seed)
