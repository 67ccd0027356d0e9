"""Mask2Former's own repository."""

from ._replace import Report
from ._set_criterion import apply_to


def apply(report: Report) -> None:
    apply_to(report, "mask2former", matching=True)
    report.keep("mask2former_video", "its masks are sampled over frames, which rendseg has no operator for")
