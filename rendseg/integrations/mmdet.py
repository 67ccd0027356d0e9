"""MMDetection: point sampling and selection of its Mask2Former and PointRend heads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._points import SELECTION, own_randomness, patch_sample, same, small
from ._replace import Report, find_module, known, replace

SAMPLERS = (
    "mmdet.models.dense_heads.mask2former_head",
    "mmdet.models.tracking_heads.mask2former_track_head",
    "mmdet.models.roi_heads.mask_heads.mask_point_head",
    "mmdet.models.roi_heads.point_rend_roi_head",
)
SELECTORS = ("mmdet.models.utils.point_sample", "mmdet.models.utils", *SAMPLERS[:3])
TAKES = ("mask_preds", "labels", "num_points", "oversample_ratio", "importance_sample_ratio")


def apply(report: Report) -> None:
    import mmdet

    report.version = mmdet.__version__
    modules = {name: find_module(report, name) for name in (*SELECTORS, *SAMPLERS)}
    for name in SELECTORS:
        module = modules[name]
        if module is not None:
            patch_labelled_selection(report, module)
    for name in SAMPLERS:
        module = modules[name]
        if module is not None:
            patch_sample(report, module)
    report.keep(
        "mmdet.models.dense_heads.Mask2FormerHead",
        "its assigner, sampler and losses are chosen by the configuration; they run as they are",
    )


def patch_labelled_selection(report: Report, module: ModuleType) -> None:
    """The selection whose uncertainty is that of a class (or of the only channel), not a callback."""
    if not known(report, module, SELECTION, takes=TAKES):
        return
    original = getattr(module, SELECTION)

    def select(
        mask_preds: Tensor,
        labels: Tensor | None,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
        **draws: Any,
    ) -> Tensor:
        classes = None if mask_preds.shape[1] == 1 else labels
        usual = mask_preds.numel() > 0 and num_points > 0 and (classes is not None or mask_preds.shape[1] == 1)
        if not usual:
            return original(mask_preds, labels, num_points, oversample_ratio, importance_sample_ratio)
        ratios = oversample_ratio, importance_sample_ratio
        return ops.sample_uncertain_points(mask_preds, num_points, *ratios, class_index=classes, **draws)

    def compute() -> tuple[Tensor, Tensor]:
        logits, labels = small(3), torch.tensor([2, 0])
        with own_randomness() as draws:
            wanted = original(logits, labels, 8, 3.0, 0.75)
        got = select(logits, labels, 8, 3.0, 0.75, random_coords=torch.cat(draws, 1))
        return got.sort(1).values, wanted.sort(1).values

    if same(report, module, SELECTION, compute):
        replace(report, module, SELECTION, select, "rendseg.ops.sample_uncertain_points")
