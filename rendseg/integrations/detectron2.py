"""detectron2's PointRend and PointSup, in the modules that consume the point functions."""

import importlib
from types import ModuleType

from ._points import patch_sample, patch_selection
from ._replace import Report

# The projects are imported as detectron2.projects.point_rend, or from their folders as point_rend and point_sup.
CONSUMERS = (
    ("point_rend.mask_head", True),
    ("point_rend.semantic_seg", True),
    ("point_sup.mask_head", False),
    ("point_sup.point_utils", False),
)


def apply(report: Report) -> None:
    for path, selects in CONSUMERS:
        names = (f"detectron2.projects.{path}", path)
        found = [module for module in map(imported, names) if module is not None]
        if not found:
            report.keep(names[0], "cannot be imported, and neither can " + path)
        for module in found:
            if hasattr(module, "point_sample"):
                patch_sample(report, module)
            if selects:
                patch_selection(report, module)
    report.keep(
        "point_rend.point_features",
        "its functions serve callbacks that are not known; the modules that import them are changed instead",
    )


def imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
