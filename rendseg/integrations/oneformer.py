"""OneFormer's own repository."""

from ._replace import Report
from ._set_criterion import apply_to


def apply(report: Report) -> None:
    apply_to(report, "oneformer", matching=True)
