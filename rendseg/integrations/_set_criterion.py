"""The criterion of Mask2Former's repository and of those made from it: MaskDINO and OneFormer.

Their modules bind the point functions by name. Beside those, ``SetCriterion.loss_masks`` and the matcher are replaced
if they compute the same on a small example; the matcher then gets the costs of all layers by one copy to the host,
before the original ``SetCriterion.forward`` asks for them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..nn.mask_criterion import largest_size, match, pair_losses, untraced
from ._masks import index_pairs, index_tensors, where_logits_are
from ._points import bare, fed, own_randomness, patch_sample, patch_selection, same, small
from ._replace import Report, find_module, known, name_subclasses, overridden, replace

PIECES = ("loss_masks", "_get_src_permutation_idx", "_get_tgt_permutation_idx")
_PREPARED = "_rendseg_prepared"


def apply_to(report: Report, package: str, *, matching: bool) -> None:
    """Patch ``package.modeling.criterion`` and ``package.modeling.matcher``.

    ``matching`` says that the costs of the matcher are those of Mask2Former.
    """
    criterion = find_module(report, f"{package}.modeling.criterion")
    matcher = find_module(report, f"{package}.modeling.matcher")
    if criterion is not None:
        _patch_loss_masks(report, criterion)
    if criterion is not None and matcher is not None and matching:
        _patch_matcher(report, criterion, matcher)
    for module in (criterion, matcher):
        if module is not None:
            patch_sample(report, module)
    if criterion is not None:
        patch_selection(report, criterion)


def _example() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    targets = [
        {"labels": torch.tensor([1, 0]), "masks": torch.rand(2, 9, 8, generator=generator) > 0.5},
        {"labels": torch.tensor([2]), "masks": torch.rand(1, 9, 8, generator=generator) > 0.5},
    ]
    return {"pred_logits": torch.randn(2, 4, 4, generator=generator), "pred_masks": small(4)}, targets


def _patch_loss_masks(report: Report, module: ModuleType) -> None:
    kind = getattr(module, "SetCriterion", None)
    takes = ("self", "outputs", "targets", "indices", "num_masks")
    if kind is None or not known(report, kind, "loss_masks", takes=takes):
        return
    original = kind.loss_masks

    def loss_masks(self: Any, outputs: Any, targets: Any, indices: Any, num_masks: Any) -> dict[str, Tensor]:
        if overridden(self, kind, PIECES[1:]):
            return original(self, outputs, targets, indices, num_masks)
        logits = outputs["pred_masks"]
        masks = where_logits_are([target["masks"] for target in targets], logits)
        points = self.num_points, self.oversample_ratio, self.importance_sample_ratio
        pairs = index_pairs(indices, logits.device)
        entropy, dice = pair_losses(logits, masks, pairs, *points, canvas=largest_size(masks))
        return {"loss_mask": entropy.sum() / num_masks, "loss_dice": dice.sum() / num_masks}

    def compute() -> tuple[Tensor, Tensor]:
        outputs, targets = _example()
        indices = [(torch.tensor([3, 0]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([0]))]
        part = bare(kind, num_points=8, oversample_ratio=3.0, importance_sample_ratio=0.75)
        with own_randomness() as draws:
            wanted = original(part, outputs, targets, indices, 3.0)
        with fed(draws), torch.no_grad():
            got = loss_masks(part, outputs, targets, indices, 3.0)
        assert list(got) == list(wanted), f"its losses are {', '.join(wanted)}"
        return torch.stack([*got.values()]), torch.stack([*wanted.values()])

    if same(report, kind, "loss_masks", compute):
        replace(report, kind, "loss_masks", untraced(loss_masks), "no copy of the targets")
    name_subclasses(report, kind, PIECES)


def _costs_of(matcher: Any, layers: Sequence[dict[str, Tensor]], targets: Any) -> list[list[tuple[Tensor, Tensor]]]:
    masks = [layer["pred_masks"] for layer in layers]
    labels = where_logits_are([target["labels"] for target in targets], masks[0])
    assignment = match(
        [layer["pred_logits"] for layer in layers],
        masks,
        pad_sequence(labels, batch_first=True),
        where_logits_are([target["masks"] for target in targets], masks[0]),
        class_weight=matcher.cost_class,
        mask_weight=matcher.cost_mask,
        dice_weight=matcher.cost_dice,
        num_points=matcher.num_points,
    )
    return [index_tensors(layer) for layer in assignment]


def _patch_matcher(report: Report, criterion: ModuleType, module: ModuleType) -> None:
    kind, loss = getattr(module, "HungarianMatcher", None), getattr(criterion, "SetCriterion", None)
    name = "memory_efficient_forward"
    if kind is None or loss is None or not known(report, kind, name, takes=("self", "outputs", "targets")):
        return
    original, names = getattr(kind, name), (name, "forward")

    def memory_efficient_forward(self: Any, outputs: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
        prepared = getattr(self, _PREPARED, {})
        found = prepared.pop(id(outputs["pred_masks"]), None)
        return _costs_of(self, [outputs], targets)[0] if found is None else found

    def compute() -> tuple[Tensor, Tensor]:
        outputs, targets = _example()
        part = bare(kind, num_points=8, cost_class=2.0, cost_mask=5.0, cost_dice=5.0)
        results = []
        for function in (memory_efficient_forward, original):
            with own_randomness():
                indices = function(part, outputs, targets)
            results.append(torch.cat([torch.cat(pair) for pair in indices]))
        return results[0], results[1]

    if not same(report, kind, name, compute):
        return
    why = "one pass over logits and targets; NaN costs come last"
    replace(report, kind, name, untraced(memory_efficient_forward), why)
    name_subclasses(report, kind, names)
    if known(report, loss, "forward", takes=("self", "outputs", "targets")):
        forward = untraced(_forward(loss.forward, kind, names))
        replace(report, loss, "forward", forward, "one copy to the host for all layers")


def _forward(original: Callable[..., Any], kind: type, names: Sequence[str]) -> Callable[..., Any]:
    def forward(self: Any, outputs: Any, targets: Any) -> dict[str, Tensor]:
        if overridden(self.matcher, kind, names):
            return original(self, outputs, targets)
        layers = [outputs, *outputs.get("aux_outputs", ())]
        indices = _costs_of(self.matcher, layers, targets)
        prepared = {id(layer["pred_masks"]): found for layer, found in zip(layers, indices, strict=True)}
        setattr(self.matcher, _PREPARED, prepared)
        try:
            return original(self, outputs, targets)
        finally:
            delattr(self.matcher, _PREPARED)

    return forward
