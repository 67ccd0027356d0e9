"""MaskDINO's own repository."""

from ._replace import Report
from ._set_criterion import apply_to


def apply(report: Report) -> None:
    apply_to(report, "maskdino", matching=False)
    report.keep(
        "maskdino.modeling.matcher.HungarianMatcher",
        "boxes and focal classes are in its costs; it runs as it is, on the replaced point_sample",
    )
