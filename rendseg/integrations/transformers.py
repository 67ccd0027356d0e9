"""Hugging Face transformers: the criterion of Mask2Former, OneFormer and EoMT, and the mask losses of RF-DETR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import ops
from ..nn.mask_criterion import class_targets, largest_size, match, pair_losses, to_pairs, untraced
from ._masks import index_pairs, index_tensors, sampler, where_logits_are
from ._replace import Report, find_module, known, name_subclasses, overridden, replace

# Model -> the stem of its classes.
MODELS = {
    "mask2former": "Mask2Former",
    "oneformer": "OneFormer",
    "eomt": "Eomt",
    "eomt_dinov3": "EomtDinov3",
    "videomt": "Videomt",
}
# Fingerprints of the sources that rendseg's losses were compared with: transformers 4.46.3, 4.57.1, 5.0.0 and 5.24.0.
SOURCES: dict[str, frozenset[str]] = {
    "sample_point": frozenset({"4a09bd99344ea01b"}),
    "dice_loss": frozenset({"8fa8145700886c94"}),
    "sigmoid_cross_entropy_loss": frozenset({"a72731e0086492f5"}),
    "pair_wise_dice_loss": frozenset({"3fe1f72ace88a0b3"}),
    "pair_wise_sigmoid_cross_entropy_loss": frozenset({"e744915aa4021b31"}),
    "forward": frozenset({"631337bd4b1f1d86", "c7a660857e7c312c"}),
    "loss_labels": frozenset({"0f914e12a1c839ee", "d4a1c0911e6ef08d"}),
    "loss_masks": frozenset({"62760236b04c564f", "ca11ec7aa5309507"}),
    "calculate_uncertainty": frozenset({"0e587fe09cfe9cdd"}),
    "sample_points_using_uncertainty": frozenset({"7d40d183d1da8954"}),
    "_pad_images_to_max_in_batch": frozenset({"707c6092e131ce55", "9c67ad5485293190"}),
    "_get_predictions_permutation_indices": frozenset({"d376afd57bf278b5"}),
    "_get_targets_permutation_indices": frozenset({"aebd1b4bf27f7261"}),
    # Up to 5.0 the matchers differ in what they make of costs that are not finite, and only in that.
    "matcher": frozenset(
        {
            "174f25daf43be641",
            "21101054e3c33386",
            "17674c061b6f260b",
            "c5c756316ff7804a",
            "e03f2022396fa644",
            "e59cbbbf5d30a576",
        }
    ),
    "rf_detr.sample_points_using_uncertainty": frozenset({"794be59db70a0d39"}),
    "rf_detr.dice_loss": frozenset({"a2bfb1a82765f709"}),
    "rf_detr._get_source_permutation_idx": frozenset({"7043759410043d36"}),
    "rf_detr.loss_masks": frozenset({"98e24cf2d3f41d5b"}),
}
FUNCTIONS = (
    "sample_point",
    "dice_loss",
    "sigmoid_cross_entropy_loss",
    "pair_wise_dice_loss",
    "pair_wise_sigmoid_cross_entropy_loss",
)
# What the new loss_masks stands for, and what the new forward stands for besides.
MASK_PIECES = (
    "loss_masks",
    "calculate_uncertainty",
    "sample_points_using_uncertainty",
    "_pad_images_to_max_in_batch",
    "_get_predictions_permutation_indices",
    "_get_targets_permutation_indices",
)
PIECES = ("forward", "loss_labels", *MASK_PIECES)


def apply(report: Report) -> None:
    import transformers

    report.version = transformers.__version__
    for model, stem in MODELS.items():
        module = find_module(report, f"transformers.models.{model}.modeling_{model}")
        if module is not None:
            _patch_model(report, module, stem)
    module = find_module(report, "transformers.loss.loss_rf_detr")
    if module is not None:
        _patch_rf_detr(report, module)


def _known(report: Report, owner: Any, names: Sequence[str]) -> bool:
    # A list, so that the report names every piece that differs.
    return all([known(report, owner, name, sources=SOURCES[name]) for name in names])


def _patch_model(report: Report, module: ModuleType, stem: str) -> None:
    loss, matcher = getattr(module, f"{stem}Loss", None), getattr(module, f"{stem}HungarianMatcher", None)
    if loss is None or matcher is None:
        report.keep(module.__name__, f"has no {stem}Loss or no {stem}HungarianMatcher")
        return
    functions, pieces = _known(report, module, FUNCTIONS), _known(report, loss, PIECES)
    matching = known(report, matcher, "forward", sources=SOURCES["matcher"])
    if functions and pieces and matching:
        original = loss.forward
        forward = _oneformer_forward if stem == "OneFormer" else _forward
        replace(
            report,
            loss,
            "forward",
            untraced(forward(report, loss, matcher, original)),
            "all layers at once, one copy to the host",
        )
    if functions and matching:
        replace(report, matcher, "forward", untraced(_matcher_forward(matcher)), "one pass over logits and targets")
    if functions and pieces:
        replace(report, loss, "loss_masks", untraced(_loss_masks(loss, loss.loss_masks)), "no copy of the targets")
    if functions:
        replace(report, module, "sample_point", _sample_point(module.sample_point), "rendseg.ops.point_sample")
    name_subclasses(report, loss, PIECES)
    name_subclasses(report, matcher, ("forward",))


def _sample_point(original: Callable[..., Any]) -> Callable[..., Any]:
    # Without align_corners, grid_sample takes False.
    sample = sampler(original)

    def sample_point(input_features: Tensor, point_coordinates: Tensor, add_dim: bool = False, **kwargs: Any) -> Tensor:
        if add_dim:
            return original(input_features, point_coordinates, add_dim, **kwargs)
        return sample(input_features, point_coordinates, **kwargs)

    return sample_point


def _matcher_forward(matcher: type) -> Callable[..., Any]:
    def forward(
        self: Any, masks_queries_logits: Tensor, class_queries_logits: Tensor, mask_labels: Any, class_labels: Any
    ) -> list[tuple[Tensor, Tensor]]:
        return index_tensors(_match(self, [(masks_queries_logits, class_queries_logits)], mask_labels, class_labels)[0])

    return forward


def _match(matcher: Any, layers: Sequence[tuple[Tensor, Tensor]], mask_labels: Any, class_labels: Any) -> Any:
    masks, classes = zip(*layers, strict=True)
    return match(
        classes,
        masks,
        _padded(class_labels, masks[0]),
        where_logits_are(list(mask_labels), masks[0]),
        class_weight=matcher.cost_class,
        mask_weight=matcher.cost_mask,
        dice_weight=matcher.cost_dice,
        num_points=matcher.num_points,
    )


def _padded(class_labels: Any, logits: Tensor) -> Tensor:
    return pad_sequence([labels.long() for labels in where_logits_are(list(class_labels), logits)], batch_first=True)


def _loss_masks(loss: type, original: Callable[..., Any]) -> Callable[..., Any]:
    def loss_masks(
        self: Any, masks_queries_logits: Tensor, mask_labels: list[Tensor], indices: Any, num_masks: Any
    ) -> dict[str, Tensor]:
        if overridden(self, loss, MASK_PIECES[1:]):
            return original(self, masks_queries_logits, mask_labels, indices, num_masks)
        pairs = index_pairs(indices, masks_queries_logits.device)
        return _mask_losses(
            self, masks_queries_logits, where_logits_are(mask_labels, masks_queries_logits), pairs, num_masks
        )

    return loss_masks


def _mask_losses(self: Any, logits: Tensor, targets: list[Tensor], pairs: Any, num_masks: Any) -> dict[str, Tensor]:
    points = self.num_points, self.oversample_ratio, self.importance_sample_ratio
    entropy, dice = pair_losses(logits, targets, pairs, *points, canvas=largest_size(targets))
    return {"loss_mask": entropy.sum() / num_masks, "loss_dice": dice.sum() / num_masks}


def _all_losses(
    self: Any,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Any,
    class_labels: Any,
    auxiliary_predictions: Any,
) -> list[dict[str, Tensor]]:
    """The losses of each layer: the last one, then the auxiliary ones."""
    layers = [(masks_queries_logits, class_queries_logits)]
    for layer in auxiliary_predictions or ():
        layers.append((layer["masks_queries_logits"], layer["class_queries_logits"]))
    targets = where_logits_are(list(mask_labels), masks_queries_logits)
    assignment = _match(self.matcher, layers, targets, class_labels)
    padded = _padded(class_labels, masks_queries_logits)
    num_masks = self.get_num_masks(class_labels, device=class_labels[0].device)
    losses = []
    no_object = len(self.empty_weight) - 1
    for (masks, classes), pairs in zip(layers, to_pairs(assignment, masks_queries_logits.device), strict=True):
        wanted = class_targets(pairs, padded, masks.shape[1], no_object)
        classified = F.cross_entropy(classes.transpose(1, 2), wanted, self.empty_weight)
        losses.append({**_mask_losses(self, masks, targets, pairs, num_masks), "loss_cross_entropy": classified})
    return losses


def _joined(losses: list[dict[str, Tensor]], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    first, *auxiliary = losses
    named = {f"{name}_{i}": value for i, layer in enumerate(auxiliary) for name, value in layer.items()}
    return {**first, **extra, **named}


def _keeps_own(report: Report, self: Any, loss: type, matcher: type) -> bool:
    """Whether this object has pieces of its own, so that the original forward must call them."""
    for part, base, names in ((self, loss, PIECES), (self.matcher, matcher, ("forward",))):
        why = overridden(part, base, names)
        if part is not self and (part._forward_hooks or part._forward_pre_hooks):
            why = why or "has a forward hook"
        if why:
            report.keep(f"{type(part).__module__}.{type(part).__qualname__}", f"{why}: its own code runs")
            return True
    return False


def _forward(report: Report, loss: type, matcher: type, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        auxiliary_predictions: Any = None,
    ) -> dict[str, Tensor]:
        args = masks_queries_logits, class_queries_logits, mask_labels, class_labels, auxiliary_predictions
        if _keeps_own(report, self, loss, matcher):
            return original(self, *args)
        return _joined(_all_losses(self, *args), {})

    return forward


def _oneformer_forward(report: Report, loss: type, matcher: type, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        contrastive_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        text_queries: Tensor,
        auxiliary_predictions: Any = None,
        calculate_contrastive_loss: bool = True,
    ) -> dict[str, Tensor]:
        if _keeps_own(report, self, loss, matcher):
            return original(
                self,
                masks_queries_logits,
                class_queries_logits,
                contrastive_queries_logits,
                mask_labels,
                class_labels,
                text_queries,
                auxiliary_predictions,
                calculate_contrastive_loss,
            )
        args = masks_queries_logits, class_queries_logits, mask_labels, class_labels, auxiliary_predictions
        contrastive = calculate_contrastive_loss
        extra = self.loss_contrastive(contrastive_queries_logits, text_queries) if contrastive else {}
        return _joined(_all_losses(self, *args), extra)

    return forward


RF_DETR_FUNCTIONS = ("sample_point", "sample_points_using_uncertainty", "sigmoid_cross_entropy_loss", "dice_loss")
RF_DETR_PIECES = ("_get_source_permutation_idx", "loss_masks")


def _patch_rf_detr(report: Report, module: ModuleType) -> None:
    loss = getattr(module, "RfDetrImageLoss", None)
    if loss is None:
        report.keep(module.__name__, "has no RfDetrImageLoss")
        return
    report.keep(
        f"{module.__name__}.RfDetrHungarianMatcher",
        "boxes and focal classes are in its costs, and its number of points comes from the tensor of boxes "
        "(batch * queries * 4 / 16), probably by mistake; it runs as it is, on the replaced sample_point",
    )
    sources = {name: SOURCES.get(f"rf_detr.{name}", SOURCES.get(name, frozenset())) for name in RF_DETR_FUNCTIONS}
    found = [known(report, module, name, sources=sources[name]) for name in RF_DETR_FUNCTIONS]
    if all(found) and all([known(report, loss, name, sources=SOURCES[f"rf_detr.{name}"]) for name in RF_DETR_PIECES]):
        replace(
            report, loss, "loss_masks", untraced(_rf_detr_loss_masks(loss, loss.loss_masks)), "no copy of the targets"
        )
    if found[0]:
        replace(report, module, "sample_point", _sample_point(module.sample_point), "rendseg.ops.point_sample")
    if all(found[:2]):
        name = "sample_points_using_uncertainty"
        replace(report, module, name, _selection(getattr(module, name)), "rendseg.ops.sample_uncertain_points")
    name_subclasses(report, loss, RF_DETR_PIECES)


def _selection(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_points_using_uncertainty(
        logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
    ) -> Tensor:
        if logits.shape[1] != 1 or num_points < 1:
            return original(logits, num_points, oversample_ratio, importance_sample_ratio)
        return ops.sample_uncertain_points(logits, num_points, oversample_ratio, importance_sample_ratio)

    return sample_points_using_uncertainty


def _rf_detr_loss_masks(loss: type, original: Callable[..., Any]) -> Callable[..., Any]:
    def loss_masks(self: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        logits = outputs.get("pred_masks")
        matched = sum(len(query) for query, _ in indices)
        if logits is None or matched == 0 or overridden(self, loss, RF_DETR_PIECES[:1]):
            return original(self, outputs, targets, indices, num_boxes)
        height, width = logits.shape[-2:]
        masks = where_logits_are([target["masks"] for target in targets], logits)
        pairs = index_pairs(indices, logits.device)
        points = max(height, height * width // self.mask_point_sample_ratio)
        entropy, dice = pair_losses(logits, masks, pairs, points, 3, 0.75, label_mode="nearest")
        return {"loss_mask_ce": entropy.sum() / num_boxes, "loss_mask_dice": dice.sum() / num_boxes}

    return loss_masks
