"""MMSegmentation: the points of PointHead, and the encoding of EncHead. Its Mask2FormerHead is that of MMDetection."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._points import bare, fed, own_randomness, patch_sample, same, small
from ._replace import Report, find_module, known, name_subclasses, overridden, replace


def apply(report: Report) -> None:
    import mmseg

    report.version = mmseg.__version__
    encoding = find_module(report, "mmseg.models.utils.encoding")
    if encoding is not None:
        _patch_encoding(report, encoding)
    head = find_module(report, "mmseg.models.decode_heads.point_head")
    if head is None:
        return
    if getattr(head, "point_sample", None) is None:
        report.keep(f"{head.__name__}.PointHead", "cannot be used without mmcv.ops, which mmcv-lite does not have")
        return
    _patch_points(report, head)
    patch_sample(report, head)
    report.keep("mmseg.models.decode_heads.Mask2FormerHead", 'a subclass of mmdet\'s: use rendseg.patch("mmdet") too')


def _patch_encoding(report: Report, module: ModuleType) -> None:
    kind, pieces = getattr(module, "Encoding", None), ("scaled_l2", "aggregate")
    if kind is None or not known(report, kind, "forward", takes=("self", "x")):
        return
    original = kind.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if overridden(self, kind, pieces) or x.dim() != 4 or x.shape[1] != self.channels:
            return original(self, x)
        return ops.encode(x, self.codewords, self.scale)

    def compute() -> tuple[Tensor, Tensor]:
        with own_randomness():
            layer = kind(6, 4)
            return forward(layer, small(6)), original(layer, small(6))

    if same(report, kind, "forward", compute):
        replace(report, kind, "forward", forward, "rendseg.ops.encode")
    name_subclasses(report, kind, (*pieces, "forward"))


def _patch_points(report: Report, module: ModuleType) -> None:
    kind = module.PointHead
    takes = ("self", "seg_logits", "uncertainty_func", "cfg")
    margin = getattr(module, "calculate_uncertainty", None)
    for name, new in (("get_points_train", _points_train), ("get_points_test", _points_test)):
        if known(report, kind, name, takes=takes) and known(report, module, "calculate_uncertainty"):
            original = getattr(kind, name)
            function = new(original, margin)
            if same(report, kind, name, functools.partial(_compared, kind, margin, original, function)):
                operator = "sample_uncertain_points" if name == "get_points_train" else "uncertain_points"
                replace(report, kind, name, function, f"rendseg.ops.{operator}")
    name_subclasses(report, kind, ("get_points_train", "get_points_test"))


class _Options:
    num_points = subdivision_num_points = 8
    oversample_ratio = 3
    importance_sample_ratio = 0.75


def _compared(kind: type, margin: Any, original: Any, function: Any) -> tuple[Tensor, Tensor]:
    with own_randomness() as draws:
        wanted = original(bare(kind), small(3), margin, _Options)
    with fed(draws) if draws else nullcontext():  # the points of inference are not drawn
        got = function(bare(kind), small(3), margin, _Options)
    results = [r if isinstance(r, Tensor) else torch.cat((r[0].unsqueeze(-1), r[1]), -1) for r in (got, wanted)]
    return results[0].sort(1).values, results[1].sort(1).values


def _points_train(original: Any, margin: Any) -> Any:
    def get_points_train(self: Any, seg_logits: Tensor, uncertainty_func: Any, cfg: Any) -> Tensor:
        if uncertainty_func is not margin or seg_logits.shape[1] < 2:
            return original(self, seg_logits, uncertainty_func, cfg)
        # The original samples without align_corners here, also where the head asks for it.
        return ops.sample_uncertain_points(
            seg_logits, cfg.num_points, cfg.oversample_ratio, cfg.importance_sample_ratio
        )

    return get_points_train


def _points_test(original: Any, margin: Any) -> Any:
    def get_points_test(self: Any, seg_logits: Tensor, uncertainty_func: Any, cfg: Any) -> tuple[Tensor, Tensor]:
        if uncertainty_func is not margin or seg_logits.shape[1] < 2:
            return original(self, seg_logits, uncertainty_func, cfg)
        return ops.uncertain_points(seg_logits, cfg.subdivision_num_points)

    return get_points_test
