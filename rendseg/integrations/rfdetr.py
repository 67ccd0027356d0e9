"""RF-DETR: point sampling and selection, with border padding."""

from typing import Any

from ._points import patch_sample, patch_selection
from ._replace import Report, find_module


def apply(report: Report) -> None:
    import rfdetr

    report.version = getattr(rfdetr, "__version__", "")
    criterion: Any = find_module(report, "rfdetr.models.criterion")
    for module in (criterion, find_module(report, "rfdetr.models.matcher")):
        if module is not None:
            patch_sample(report, module, padding_mode="border")
    if criterion is not None:
        patch_selection(report, criterion, padding_mode="border")
    report.keep("rfdetr.models.matcher.HungarianMatcher", "boxes and focal classes are in its costs; it runs as it is")
    report.keep("rfdetr.models.criterion.SetCriterion", "its masks may be factors that are multiplied per image")
