"""From the mapping of a ``data:`` section to its typed options, and to the data set.

An unknown key is an error that names the nearest known one, and every error is one :class:`DataError` line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._nearest import did_you_mean
from .._options import mapping, read
from .base import ImageFiles, SegmentationDataset, Split
from .images import IGNORE
from .options import DataError, DatasetOptions
from .registry import dataset_entry, dataset_names


def parse_options(options: Mapping[str, Any] | DatasetOptions) -> DatasetOptions:
    """The typed options of a ``data:`` section.

    Raises:
        DataError: unknown data set, unknown key (names the nearest) or unusable value (names key, wish and value).
    """
    try:
        options = mapping(options, "data")
        name = options.get("name", "shapes")
        entry = dataset_entry(name)
        if entry is None:
            names = dataset_names()
            hint = did_you_mean(name, names) or f"; known: {', '.join(names)}"
            raise DataError(f"data.name {name!r} is no data set{hint}")
        return read(entry[0], options, "data")
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from None


def linked(model: Any, data: Any) -> tuple[Any, Any]:
    """The sections ``model`` and ``data`` with what both must agree on, given in one of them, in the other too: the
    channels of the images, and the value that is ignored, which a data set of the user's own files may have.

    Raises:
        DataError: they are given in both and differ.
    """
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return model, data
    model, data = dict(model), dict(data)
    backbone = model.get("backbone") or {}
    if not isinstance(backbone, Mapping):
        return model, data
    pair = {"model.backbone.in_chans": backbone.get("in_chans"), "data.channels": data.get("channels")}
    given = [value for value in pair.values() if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        shown = ", ".join(f"{key} is {value}" for key, value in pair.items())
        raise DataError(f"{shown}: they must be equal, set both")
    if given:
        model["backbone"], data["channels"] = {**backbone, "in_chans": given[0]}, given[0]
    loss = model.get("loss")
    ignored = loss.get("ignore_index", IGNORE) if isinstance(loss, Mapping) else IGNORE
    if data.get("name") == "folder" and isinstance(ignored, int) and ignored != IGNORE:
        data.setdefault("ignore_label", [IGNORE, ignored])
        model["loss"] = {**loss, "ignore_index": IGNORE}  # what the data set makes of it
    return model, data


def file_values(options: Any) -> np.ndarray | None:
    """The value of each class in the label maps of the data set of a ``data:`` section, [C], or its colour, [C, 3];
    None: its number."""
    parsed = parse_options(options)
    entry = dataset_entry(parsed.name)
    assert entry is not None
    return entry[1].file_values(parsed)


def build_dataset(
    options: Mapping[str, Any] | DatasetOptions,
    split: Split,
    *,
    augment_seed: int = 0,
    problems: list[str] | None = None,
) -> SegmentationDataset:
    """The data set of a ``data:`` section.

    Args:
        options: ``name`` (see :func:`dataset_names`) and the keys of its options class, such as :class:`FolderOptions`.
        split: ``"train"``, which is augmented, or ``"val"``.
        augment_seed: of the augmentation; the seeds within `options` choose the data instead.
        problems: None: the first image that cannot be used, say for want of a label map, is an error. A list: the
            messages are appended to it, the images left out and nothing is decoded beforehand.

    Raises:
        DataError: unknown key or unusable value, missing folder, no images, image without label map. Unreadable files
            and label values outside the classes are found when they are read (with ``cache: true``, here).
    """
    parsed = parse_options(options)
    entry = dataset_entry(parsed.name)
    assert entry is not None  # or there would be no options
    more = (problems,) if issubclass(entry[1], ImageFiles) else ()
    return entry[1](parsed, split, augment_seed, *more)
