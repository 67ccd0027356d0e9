"""Data sets and transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import SegmentationDataset, Split
from .options import (
    AugmentOptions,
    BrodenOptions,
    CamVidOptions,
    ColorJitterOptions,
    DataError,
    DatasetOptions,
    FolderOptions,
    ShapesOptions,
    parse_options,
)

__all__ = [
    "AugmentOptions",
    "BrodenOptions",
    "CamVidOptions",
    "ColorJitterOptions",
    "DataError",
    "DatasetOptions",
    "FolderOptions",
    "SegmentationDataset",
    "ShapesOptions",
    "build_dataset",
    "parse_options",
]


def build_dataset(
    options: Mapping[str, Any] | DatasetOptions, split: Split, *, augment_seed: int = 0
) -> SegmentationDataset:
    """The data set of a ``data:`` section.

    Args:
        options: ``name`` (shapes, camvid, folder or broden) and the keys of :class:`ShapesOptions`,
            :class:`CamVidOptions`, :class:`FolderOptions` or :class:`BrodenOptions`.
        split: ``"train"``, which is augmented, or ``"val"``.
        augment_seed: of the augmentation; the seeds within `options` choose the data instead.

    Raises:
        DataError: unknown key or unusable value, missing folder, no images, image without label map. Unreadable files
            and label values outside the classes are found when they are read (with ``cache: true``, here).
    """
    parsed = parse_options(options)  # type: ignore[arg-type]
    if isinstance(parsed, CamVidOptions):
        from .camvid import CamVid

        return CamVid(parsed, split, augment_seed)
    if isinstance(parsed, FolderOptions):
        from .folder import Folder

        return Folder(parsed, split, augment_seed)
    if isinstance(parsed, BrodenOptions):
        from .broden import Broden

        return Broden(parsed, split, augment_seed)
    from .shapes import Shapes

    return Shapes(parsed, split, augment_seed)
