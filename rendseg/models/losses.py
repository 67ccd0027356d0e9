"""Losses of the models. N images, C classes.

All take ``logits [N, C, ...]`` and integer ``labels [N, ...]`` and give a scalar in float32 (float64 for float64; half
logits are widened first). Labels equal to ``ignore_index`` take no part. Without any valid label the loss is exactly 0
and its gradient is 0, never NaN. Nothing waits for a GPU.

``normalize="global"`` (several processes) sums what a loss is made of over all processes before it is divided, so that
W processes compute what one would on the summed batch; ``"process"`` is what PyTorch does by itself: each process
takes the mean over its own labels, and gradients are averaged. They differ where processes have different numbers of
valid labels. One process computes the same with both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .options import DiceTerm, FocalTerm, LossTerm, LovaszTerm, OhemTerm

MEANS = ("valid", "all")
NORMALIZE = ("process", "global")


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    mean: str = "valid",
    normalize: str = "process",
) -> Tensor:
    """Cross-entropy.

    ``mean="valid"`` divides the (class-weighted) sum by the summed weights of the labels that are not ``ignore_index``;
    ``mean="all"`` divides it by the number of labels, ignored ones included. With class weights both divide by the
    summed weights, as mmsegmentation does.
    """
    _option(mean, "mean", MEANS)
    logits, labels = widened(logits), labels.long()
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
    valid = labels != ignore_index
    every = None if weights is None else weights[_safe(labels, valid)] * valid
    return _mean(total, valid if every is None else every, mean, normalize, every)


def ohem_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    mean: str = "valid",
    normalize: str = "process",
) -> Tensor:
    """Cross-entropy over hard pixels (online hard example mining, Shrivastava et al. 2016): those whose true class has
    a probability below ``threshold``, and in any case the ``min_kept`` hardest of the batch (with all that tie with the
    last of them; fewer where fewer are valid).

    ``mean="valid"`` divides by the (weighted) number of pixels kept, ``"all"`` by that of all labels. With
    ``normalize="global"`` the hardest are those of all processes.
    """
    _option(mean, "mean", MEANS)
    logits, labels, valid = _prepare(logits, labels, ignore_index)
    nll = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    with torch.no_grad():
        ranked = torch.where(valid, nll, -1.0).flatten()  # ignored pixels come last
        ranked = ranked.topk(min(min_kept, ranked.numel()), sorted=False).values
        if normalize == "global" and process_count() > 1:
            ranked = _gather(ranked, min_kept).topk(min_kept, sorted=False).values
        hardest = ranked.amin() if ranked.numel() else nll.new_zeros(())
        kept = valid & ((nll > -math.log(threshold)) | (nll >= hardest))
        every = None if class_weights is None else class_weights.to(nll.dtype)[_safe(labels, valid)] * valid
        weights = kept.to(nll.dtype) if every is None else every * kept
    return _mean(torch.where(kept, weights * nll, 0.0).sum(), weights, mean, normalize, every)


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Sequence[float] = 1.0,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    mean: str = "valid",
    normalize: str = "process",
) -> Tensor:
    """Focal loss over the softmax: ``-alpha (1 - p)^gamma log p`` of the true class's probability ``p`` (Lin et al.
    2017, eq. 5).

    ``alpha`` is a factor, or one per class; unlike ``class_weights`` it does not take part in the division.
    """
    _option(mean, "mean", MEANS)
    logits, labels, valid = _prepare(logits, labels, ignore_index)
    nll = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    # 1 - p without cancellation; the floor keeps the slope of a fractional power finite at p = 1
    missing = (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny)
    safe = _safe(labels, valid)
    weights = valid.to(nll.dtype) if class_weights is None else class_weights.to(nll.dtype)[safe] * valid
    losses = weights * missing**gamma * nll
    if isinstance(alpha, (int, float)):
        losses = alpha * losses
    else:
        if len(alpha) != logits.shape[1]:
            raise ValueError(f"alpha must hold one factor per class ({logits.shape[1]}), got {len(alpha)}")
        losses = torch.tensor(alpha, dtype=nll.dtype).to(nll.device, non_blocking=True)[safe] * losses
    return _mean(losses.sum(), weights, mean, normalize, None if class_weights is None else weights)


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    smooth: float = 1.0,
    exponent: float = 2.0,
    per_image: bool = False,
    classes: str = "all",
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    normalize: str = "process",
) -> Tensor:
    """One minus the soft Dice coefficient of each class (Milletari et al. 2016, eq. 3), averaged over classes.

    ``(2 sum p y + smooth) / (sum p^exponent + sum y + smooth)`` with the softmax ``p`` and the one-hot label ``y``,
    summed over the batch, or over each image with ``per_image`` and then averaged. ``classes``: ``all``, or ``present``
    for those that occur in the labels. ``class_weights`` weigh the mean over classes.
    """
    _option(classes, "classes", ("all", "present"))
    logits, labels, valid = _prepare(logits, labels, ignore_index)
    truth = _one_hot(labels, valid, logits.shape[1])
    probabilities = logits.softmax(1) * valid.unsqueeze(1)
    dims = -1 if per_image else (0, -1)
    both = torch.where(truth, probabilities, 0.0).sum(dims)
    predicted = (probabilities if exponent == 1 else probabilities**exponent).sum(dims)
    count = truth.sum(dims).to(both.dtype)
    if normalize == "global" and not per_image:
        both, predicted, count = over_processes(both, predicted, count)
    size = predicted + count + smooth
    dice = torch.where(size > 0, (2 * both + smooth) / torch.where(size > 0, size, 1.0), 1.0)
    return _mean_over_classes(1 - dice, count > 0, classes, class_weights)


def lovasz_softmax_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    per_image: bool = False,
    classes: str = "present",
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Lovasz extension of the Jaccard loss (Berman et al. 2018, eq. 11), averaged over classes.

    Over the pixels of the batch, or of each image with ``per_image`` and then averaged. ``classes``: ``present`` for
    those that occur in the labels, or ``all``. ``class_weights`` weigh the mean over classes. Each class is sorted by
    itself; besides the softmax the gradient keeps one number per logit.
    """
    _option(classes, "classes", ("all", "present"))
    logits, labels, valid = _prepare(logits, labels, ignore_index)
    if labels.numel() == 0:
        return logits.sum() * 0
    probabilities = logits.softmax(1)
    if not per_image:
        probabilities = probabilities.transpose(0, 1).flatten(1).unsqueeze(0)
        labels, valid = labels.reshape(1, -1), valid.reshape(1, -1)
    truth = _one_hot(labels, valid, logits.shape[1])
    errors = torch.where(truth, 1 - probabilities, probabilities)
    with torch.no_grad():
        ranked = torch.where(valid.unsqueeze(1), errors, -1.0)  # ignored pixels come last
        slopes = torch.empty_like(errors)
        for c in range(logits.shape[1]):
            slopes[:, c] = _lovasz_slopes(ranked[:, c], truth[:, c])
        slopes = torch.where(valid.unsqueeze(1), slopes, 0.0)
    return _mean_over_classes((errors * slopes).sum(-1), truth.any(-1), classes, class_weights)


def _lovasz_slopes(errors: Tensor, truth: Tensor) -> Tensor:
    """What each of ``errors [G, M]`` counts in the Lovasz extension: how much the Jaccard loss grows when its pixel
    joins those of larger error. The increments are written out, since differences of nearly equal losses would lose
    most of their digits on large images."""
    order = errors.sort(dim=-1, descending=True, stable=True).indices
    hit = truth.gather(-1, order)
    hits = hit.cumsum(-1)
    total = hits[:, -1:]
    seen = torch.arange(errors.shape[-1], device=errors.device)  # pixels before this one
    before = hits - hit.long()
    intersection = (total - before).to(errors.dtype)
    union = (total + seen - before).to(errors.dtype)
    slopes = torch.where(hit, 1 / union, intersection / (union * (union + 1)))
    slopes = torch.where(union == 0, 1.0, slopes)  # the first pixel of a class that does not occur
    return torch.empty_like(slopes).scatter_(-1, order, slopes)


def loss_term(
    term: LossTerm,
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    mean: str = "valid",
    normalize: str = "process",
) -> Tensor:
    """The loss that ``term`` describes, not multiplied by its weight."""
    shared: dict[str, Any] = {"class_weights": class_weights, "ignore_index": ignore_index}
    pixels: dict[str, Any] = {**shared, "mean": mean, "normalize": normalize}
    if isinstance(term, OhemTerm):
        return ohem_loss(logits, labels, threshold=term.threshold, min_kept=term.min_kept, **pixels)
    if isinstance(term, FocalTerm):
        return focal_loss(logits, labels, gamma=term.gamma, alpha=term.alpha, **pixels)
    if isinstance(term, DiceTerm):
        return dice_loss(
            logits,
            labels,
            smooth=term.smooth,
            exponent=term.exponent,
            per_image=term.per_image,
            classes=term.classes,
            normalize=normalize,
            **shared,
        )
    if isinstance(term, LovaszTerm):
        return lovasz_softmax_loss(logits, labels, per_image=term.per_image, classes=term.classes, **shared)
    return segmentation_loss(logits, labels, **pixels)


def weighted_terms(
    name: str, weight: float, terms: Sequence[LossTerm], logits: Tensor, labels: Tensor, **shared: Any
) -> dict[str, Tensor]:
    """``{name: loss}`` of a single term, ``{name_<term>: loss, ...}`` of several, all multiplied by their weights;
    ``shared`` as in ``loss_term``."""
    return {
        name if len(terms) == 1 else f"{name}_{term.name}": weight
        * term.weight
        * loss_term(term, logits, labels, **shared)
        for term in terms
    }


# ---- parts


def _option(value: str, name: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


def widened(logits: Tensor) -> Tensor:
    """Half logits in float32; others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _prepare(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, C, P]`` logits, ``[N, P]`` labels, and which of them are valid. On the CPU, where looking is free,
    ``IndexError`` for a label that is no class."""
    logits, labels = widened(logits).flatten(2), labels.long().flatten(1)
    valid = labels != ignore_index
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[valid & ((labels < 0) | (labels >= logits.shape[1]))]
        if wrong.numel():
            raise IndexError(f"labels must lie in [0, {logits.shape[1]}) or be {ignore_index}, got {int(wrong[0])}")
    return logits, labels, valid


def _safe(labels: Tensor, used: Tensor) -> Tensor:
    """Labels that can be used as indices everywhere."""
    return labels.masked_fill(~used, 0)


def _one_hot(labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    """``[N, C, P]`` bool; nothing at ignored positions."""
    return (labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(-1, 1)) & valid.unsqueeze(1)


def _mean(total: Tensor, weights: Tensor, mean: str, normalize: str, every: Tensor | None) -> Tensor:
    """``total`` over the summed ``weights`` of what is kept (``mean="valid"``), or over the number of all labels, whose
    class weights ``every`` are summed up (``"all"``)."""
    _option(normalize, "normalize", NORMALIZE)
    if mean == "all" and every is None:
        count = total.new_full((), weights.numel())
    else:
        count = (every if mean == "all" and every is not None else weights).sum().to(total.dtype)
    if normalize == "global":
        total, count = over_processes(total, count)
    return total / torch.where(count > 0, count, torch.ones_like(count))


def _mean_over_classes(losses: Tensor, present: Tensor, classes: str, class_weights: Tensor | None) -> Tensor:
    """Mean of ``losses [..., C]`` over the classes that count, then over the rest."""
    weights = torch.ones_like(losses) if class_weights is None else class_weights.to(losses.dtype).expand_as(losses)
    if classes == "present":
        weights = weights * present
    count = weights.sum(-1)
    values = (weights * losses).sum(-1) / torch.where(count > 0, count, torch.ones_like(count))
    return values.sum() / max(1, values.numel())


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    """Each of the (equally many) ``values`` summed over all processes.

    DDP and FSDP average gradients over the processes, where the gradient of a function of the sums is their sum: each
    process's own share is therefore counted as often as there are processes.
    """
    world = process_count()
    if world == 1:
        return values
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    dist.all_reduce(flat)
    sums = flat.split([value.numel() for value in values])
    return tuple(
        s.view_as(value) + (world * (value - value.detach()) if value.requires_grad else 0)
        for s, value in zip(sums, values, strict=True)
    )


def _gather(values: Tensor, size: int) -> Tensor:
    """``values`` (at most ``size``, none below -1) of all processes, padded with -1."""
    own = F.pad(values, (0, size - values.numel()), value=-1.0)
    whole = own.new_empty(size * process_count())
    dist.all_gather_into_tensor(whole, own)
    return whole
