"""Data sets by name: a data set is an options class and a class of images, registered together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .._discover import import_modules
from .options import DatasetOptions

if TYPE_CHECKING:
    from .base import SegmentationDataset

    D = TypeVar("D", bound=type[SegmentationDataset])

_DATASETS: dict[str, tuple[type[DatasetOptions], type[Any]]] = {}


def register_dataset(options: type[DatasetOptions]) -> Callable[[D], D]:
    """Register a class of images under the default of ``options.name``; a decorator.

    The class is called with the options, the split and the seed of the augmentation (and, of ``ImageFiles``, a list of
    problems). The fields of ``options`` are the keys that ``data:`` accepts.
    """
    name = {field.name: field.default for field in dataclasses.fields(options)}.get("name")
    if not isinstance(name, str) or not name:
        raise TypeError(f"{options.__name__} needs a name with a default")
    if name in _DATASETS:
        raise ValueError(f"a data set called {name!r} is registered already")

    def add(kind: D) -> D:
        _DATASETS[name] = (options, kind)
        return kind

    return add


def dataset_names() -> list[str]:
    """The names that ``data.name`` may have."""
    import_modules(__package__)
    return sorted(_DATASETS)


def dataset_entry(name: Any) -> tuple[type[DatasetOptions], type[Any]] | None:
    """The options and the class registered under ``name``; None if there are none."""
    import_modules(__package__)
    return _DATASETS.get(name) if isinstance(name, str) else None
