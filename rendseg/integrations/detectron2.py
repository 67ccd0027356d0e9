"""detectron2's PointRend and PointSup, in the modules that consume the point functions."""

from ._points import patch_sample, patch_selection
from ._replace import Report, find_module

# The projects are imported as detectron2.projects.point_rend, or from their folders as point_rend and point_sup.
CONSUMERS = (
    ("point_rend.mask_head", True),
    ("point_rend.semantic_seg", True),
    ("point_sup.mask_head", False),
    ("point_sup.point_utils", False),
)


def apply(report: Report) -> None:
    for path, selects in CONSUMERS:
        for name in (f"detectron2.projects.{path}", path):
            module = find_module(report, name)
            if module is None:
                continue
            if hasattr(module, "point_sample"):
                patch_sample(report, module)
            if selects:
                patch_selection(report, module)
    report.keep(
        "point_rend.point_features",
        "its functions serve callbacks that are not known; the modules that import them are changed instead",
    )
