"""Faster mask losses in code that already exists: functions of other packages are replaced by those of rendseg.

Nothing of another package is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._replace import Report, undo

if TYPE_CHECKING:
    from torch import nn

# Target -> the packages (or modules at the top) whose code it replaces. Each has a module of that name here.
TARGETS: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "mmdet": ("mmdet",),
    "mmseg": ("mmseg",),
    "detectron2": ("detectron2", "point_rend", "point_sup"),
    "mask2former": ("mask2former", "mask2former_video"),
    "maskdino": ("maskdino",),
    "oneformer": ("oneformer",),
    "rfdetr": ("rfdetr",),
}

_reports: dict[str, Report] = {}


def _targets_of(what: str | nn.Module) -> list[str]:
    if isinstance(what, str):
        if what not in TARGETS:
            raise ValueError(f"patch must be asked for one of {', '.join(TARGETS)}, or for a model, got {what!r}")
        return [what]
    owners = {base.__module__.partition(".")[0] for part in what.modules() for base in type(part).__mro__}
    found = [name for name, packages in TARGETS.items() if owners & set(packages)]
    if not found:
        raise ValueError(
            f"{type(what).__name__} has no module of a package that rendseg knows ({', '.join(TARGETS)}); "
            "use rendseg.nn.MaskCriterion or rendseg.ops in its code instead"
        )
    return found


def _is_there(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def patch(what: str | nn.Module) -> Report:
    """Replace the mask losses of a package by those of rendseg, in place.

    Args:
        what: ``"transformers"``, ``"mmdet"``, ``"mmseg"``, ``"detectron2"``, ``"mask2former"``, ``"maskdino"``,
            ``"oneformer"`` or ``"rfdetr"``; or a model, whose packages are then found by its classes. Classes are
            changed for the whole process, so that a model that exists already computes with the new functions too.

    Returns:
        A report: what was replaced, what was left alone, and why. A second call returns the same report.

    Raises:
        ValueError: an unknown name, or a model of no known package.
        ImportError: the package cannot be imported.
    """
    names = _targets_of(what)
    for name in names:
        if name not in _reports:
            if not any(_is_there(package) for package in TARGETS[name]):
                raise ImportError(f"nothing of {name} can be imported: install it, or put its folder on PYTHONPATH")
            report = Report(name)
            try:
                importlib.import_module(f"{__name__}.{name}").apply(report)
            except BaseException:
                undo(report)
                raise
            _reports[name] = report
    return _reports[names[0]] if len(names) == 1 else Report.joined([_reports[name] for name in names])


def unpatch(what: str | nn.Module | None = None) -> None:
    """Put the original functions back, the very objects. ``None``: those of every package.

    What was replaced once more since is not touched.
    """
    for name in list(_reports) if what is None else _targets_of(what):
        if name in _reports:
            undo(_reports.pop(name))


@contextmanager
def patched(what: str | nn.Module) -> Iterator[Report]:
    """``patch`` within a ``with`` block. What was patched before stays so at its end."""
    before = set(_reports)
    report = patch(what)
    try:
        yield report
    finally:
        for name in set(_targets_of(what)) - before:
            unpatch(name)


__all__ = ["Report", "patch", "patched", "unpatch"]
