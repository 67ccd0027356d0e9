"""MMDetection: the criterion of its Mask2Former head, point sampling and selection there and in PointRend's heads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import ops
from ..nn.mask_criterion import class_targets, match, pair_losses, to_pairs, untraced
from ._points import SELECTION, bare, fed, own_randomness, patch_sample, same, small
from ._replace import Report, find_module, known, name_subclasses, overridden, replace

SAMPLERS = (
    "mmdet.models.dense_heads.mask2former_head",
    "mmdet.models.tracking_heads.mask2former_track_head",
    "mmdet.models.roi_heads.mask_heads.mask_point_head",
    "mmdet.models.roi_heads.point_rend_roi_head",
)
SELECTORS = ("mmdet.models.utils.point_sample", "mmdet.models.utils", *SAMPLERS[:3])
PIECES = ("_loss_by_feat_single", "_get_targets_single", "get_targets")
# What the configuration chooses, and what rendseg computes.
COSTS: dict[str, dict[str, Any]] = {
    "ClassificationCost": {},
    "CrossEntropyLossCost": {"use_sigmoid": True},
    "DiceCost": {"pred_act": True, "naive_dice": True, "eps": 1.0},
}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss_mask": (
        "CrossEntropyLoss",
        {"use_sigmoid": True, "use_mask": False, "reduction": "mean", "class_weight": None, "ignore_index": None},
    ),
    "loss_dice": (
        "DiceLoss",
        {"use_sigmoid": True, "activate": True, "naive_dice": True, "reduction": "mean", "eps": 1.0},
    ),
}
TAKES = ("mask_preds", "labels", "num_points", "oversample_ratio", "importance_sample_ratio")


def apply(report: Report) -> None:
    import mmdet

    report.version = mmdet.__version__
    modules = {name: find_module(report, name) for name in (*SELECTORS, *SAMPLERS)}
    heads = modules[SAMPLERS[0]]
    if heads is not None:
        _patch_head(report, heads)
    for name in SELECTORS:
        module = modules[name]
        if module is not None:
            patch_labelled_selection(report, module)
    for name in SAMPLERS:
        module = modules[name]
        if module is not None:
            patch_sample(report, module)


def _differs(part: Any, package: Any, kind: str, attributes: dict[str, Any]) -> str:
    """Says in what ``part`` is not a ``package.kind`` with these attributes; empty if it is one."""
    if type(part) is not getattr(package, kind, None):
        return f"is a {type(part).__name__} and no {kind}"
    other = [name for name, value in attributes.items() if getattr(part, name, value) != value]
    return f"has {other[0]}={getattr(part, other[0])!r}" if other else ""


def _unusual(head: Any) -> str:
    """Says which part of a head is not that of Mask2Former's configurations; empty if all are."""
    from mmdet.models import losses
    from mmdet.models.task_modules import assigners, samplers

    parts = {
        "assigner": _differs(head.assigner, assigners, "HungarianAssigner", {}),
        "sampler": _differs(head.sampler, samplers, "MaskPseudoSampler", {}),
        **{name: _differs(getattr(head, name), losses, *wanted) for name, wanted in LOSSES.items()},
    }
    costs = head.assigner.match_costs
    names = sorted(type(cost).__name__ for cost in costs)
    if names != sorted(COSTS):
        parts["match_costs"] = f"are {', '.join(names)}"
    else:
        for cost in costs:
            name = type(cost).__name__
            parts[name] = _differs(cost, assigners, name, COSTS[name])
    return "; ".join(f"{name} {why}" for name, why in parts.items() if why)


def _patch_head(report: Report, module: ModuleType) -> None:
    kind = getattr(module, "Mask2FormerHead", None)
    takes = ("self", "all_cls_scores", "all_mask_preds", "batch_gt_instances", "batch_img_metas")
    if kind is None or not known(report, kind, "loss_by_feat", takes=takes):
        return
    original = kind.loss_by_feat

    def loss_by_feat(
        self: Any, all_cls_scores: Tensor, all_mask_preds: Tensor, batch_gt_instances: Any, batch_img_metas: Any
    ) -> dict[str, Tensor]:
        why = overridden(self, kind, PIECES) or _unusual(self)
        if why:
            report.keep(f"{type(self).__module__}.{type(self).__qualname__}", f"{why}: its own code runs")
            return original(self, all_cls_scores, all_mask_preds, batch_gt_instances, batch_img_metas)
        return _losses(self, all_cls_scores, all_mask_preds, batch_gt_instances)

    def compute() -> tuple[Tensor, Tensor]:
        head, layers = _example(kind)
        with own_randomness() as draws:
            wanted = original(head, *layers)
        with fed(draws[-2:]), own_randomness():
            got = loss_by_feat(head, *layers)
        assert list(got) == list(wanted), f"its losses are {', '.join(wanted)}"
        return torch.cat([loss.view(1) for loss in got.values()]), torch.cat([loss.view(1) for loss in wanted.values()])

    if same(report, kind, "loss_by_feat", compute):
        replace(report, kind, "loss_by_feat", untraced(loss_by_feat), "all layers at once, one copy to the host")
    name_subclasses(report, kind, ("loss_by_feat", *PIECES))


def _example(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A head with the parts of Mask2Former's configurations, and the arguments of ``loss_by_feat`` for one layer."""
    from mmdet.models.losses import CrossEntropyLoss, DiceLoss
    from mmdet.models.task_modules.assigners import HungarianAssigner
    from mmdet.models.task_modules.samplers import MaskPseudoSampler
    from mmengine.structures import InstanceData

    class_weight = [1.0, 1.0, 1.0, 0.1]
    head = bare(
        kind,
        num_points=8,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        num_queries=4,
        num_classes=3,
        class_weight=class_weight,
        assigner=HungarianAssigner([{"type": name, "weight": 2.0, **chosen} for name, chosen in COSTS.items()]),
        sampler=MaskPseudoSampler(),
        loss_cls=CrossEntropyLoss(class_weight=class_weight, loss_weight=2.0),
        loss_mask=CrossEntropyLoss(use_sigmoid=True, loss_weight=5.0),
        loss_dice=DiceLoss(naive_dice=True, eps=1.0, loss_weight=5.0),
    )
    generator = torch.Generator().manual_seed(0)
    instances = [
        InstanceData(labels=torch.arange(count), masks=(torch.rand(count, 9, 8, generator=generator) > 0.5).long())
        for count in (2, 1)
    ]
    return head, (torch.randn(1, 2, 4, 4, generator=generator), small(4)[None], instances, [{}, {}])


def _losses(head: Any, all_classes: Tensor, all_masks: Tensor, instances: Any) -> dict[str, Tensor]:
    from mmdet.utils import reduce_mean

    classes, masks = list(all_classes), list(all_masks)
    targets, queries = [image.masks for image in instances], all_masks.shape[2]
    padded = pad_sequence([image.labels for image in instances], batch_first=True)
    weight = {type(cost).__name__: cost.weight for cost in head.assigner.match_costs}
    assignment = match(
        classes,
        masks,
        padded,
        targets,
        class_weight=weight["ClassificationCost"],
        mask_weight=weight["CrossEntropyLossCost"],
        dice_weight=weight["DiceCost"],
        num_points=head.num_points,
    )
    # An image without a pair counts as one. The losses of masks have shape [1], as the original's.
    count = sum(max(min(len(target), queries), 1) for target in targets)
    divisor = reduce_mean(all_classes.new_tensor([float(count)])).clamp(min=1)
    of_class = all_classes.new_tensor(head.class_weight)
    layers = []
    for at_classes, at_masks, pairs in zip(classes, masks, to_pairs(assignment, all_masks.device), strict=True):
        wanted = class_targets(pairs, padded, queries, head.num_classes).flatten()
        classified = head.loss_cls(
            at_classes.flatten(0, 1), wanted, torch.ones_like(wanted), avg_factor=of_class[wanted].sum()
        )
        points = head.num_points, head.oversample_ratio, head.importance_sample_ratio
        entropy, dice = pair_losses(at_masks, targets, pairs, *points)
        layers.append(
            {
                "loss_cls": classified,
                "loss_mask": head.loss_mask.loss_weight * entropy.sum() / divisor,
                "loss_dice": head.loss_dice.loss_weight * dice.sum() / divisor,
            }
        )
    named = {f"d{i}.{name}": value for i, layer in enumerate(layers[:-1]) for name, value in layer.items()}
    return {**layers[-1], **named}


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
