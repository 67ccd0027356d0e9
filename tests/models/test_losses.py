from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rendseg.models import (
    LossOptions,
    dice_loss,
    focal_loss,
    lovasz_softmax_loss,
    ohem_loss,
    parse_options,
    segmentation_loss,
)
from rendseg.models.losses import loss_term, weighted_terms
from rendseg.models.options import LOSS_TERMS, DiceTerm, FocalTerm, LossTerm, LovaszTerm, OhemTerm


def by_hand(logits, labels, weights, ignore, mean):
    total, count, number = 0.0, 0.0, 0
    flat = logits.double().flatten(2).transpose(1, 2).reshape(-1, logits.shape[1])
    for row, label in zip(flat.tolist(), labels.flatten().tolist(), strict=True):
        number += 1
        if label == ignore:
            continue
        top = max(row)
        log_sum = top + math.log(sum(math.exp(v - top) for v in row))
        weight = weights[label] if weights else 1.0
        total += weight * (log_sum - row[label])
        count += weight
    return total / (number if mean == "all" and not weights else (count or 1.0))


@pytest.mark.parametrize("mean", ["valid", "all"])
@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5)])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.int16])
def test_equals_the_formula(mean, weights, shape, dtype, label_dtype):
    torch.manual_seed(0)
    logits = (5 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, 3, (shape[0], *shape[2:]))
    labels[torch.rand(labels.shape) < 0.3] = 255
    got = segmentation_loss(
        logits, labels.to(label_dtype), class_weights=None if weights is None else torch.tensor(weights), mean=mean
    )
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.item() == pytest.approx(by_hand(logits, labels, weights, 255, mean), rel=1e-5)


@pytest.mark.parametrize("mean", ["valid", "all"])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
def test_nothing_valid_is_exactly_zero_with_a_graph(mean, weights):
    logits = torch.randn(2, 2, 5, requires_grad=True)
    class_weights = None if weights is None else torch.tensor(weights)
    loss = segmentation_loss(logits, torch.full((2, 5), 7), class_weights=class_weights, ignore_index=7, mean=mean)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_classes_of_weight_zero_give_zero():
    logits = torch.randn(1, 2, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.zeros(1, 3, dtype=torch.long), class_weights=torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_empty_batch_is_zero():
    assert segmentation_loss(torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.long)).item() == 0


@pytest.mark.bad_input
def test_bad_mean():
    with pytest.raises(ValueError, match="mean must be valid or all, got 'sum'"):
        segmentation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), mean="sum")


# ---- the other losses, against plain loops in float64


def example(shape=(3, 4, 5, 6), ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return logits, labels


def pixels(logits, labels):
    """``[(image, probabilities, label), ...]`` of the pixels that are not ignored."""
    rows = logits.double().flatten(2).transpose(1, 2).numpy()
    found = []
    for n, image in enumerate(rows):
        for row, label in zip(image, labels[n].flatten().tolist(), strict=True):
            if label != 255:
                e = np.exp(row - row.max())
                found.append((n, e / e.sum(), label))
    return found


def ohem_by_hand(logits, labels, threshold, min_kept, weights=None, mean="valid"):
    ranked = sorted((float(p[y]), y) for _, p, y in pixels(logits, labels))
    kept = [(p, y) for i, (p, y) in enumerate(ranked) if i < min_kept or p < threshold]
    if mean == "all":
        count = sum(weights[y] for _, y in ranked) if weights else labels.numel()
    else:
        count = sum(weights[y] if weights else 1.0 for _, y in kept)
    return sum(-(weights[y] if weights else 1.0) * math.log(p) for p, y in kept) / (count or 1.0)


@pytest.mark.parametrize("threshold", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("min_kept", [1, 20, 50, 10**6])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize("mean", ["valid", "all"])
def test_ohem(threshold, min_kept, weights, mean):
    logits, labels = example()
    class_weights = None if weights is None else torch.tensor(weights)
    got = ohem_loss(logits, labels, threshold=threshold, min_kept=min_kept, class_weights=class_weights, mean=mean)
    assert got.item() == pytest.approx(ohem_by_hand(logits, labels, threshold, min_kept, weights, mean), rel=1e-9)


def test_ohem_trains_only_what_is_hard():
    logits = torch.tensor([[[9.0, 0.1, -1.0], [0.0, 0.0, 0.0]]], requires_grad=True)  # p = 0.9999, 0.52, 0.27
    ohem_loss(logits, torch.zeros(1, 3, dtype=torch.long), threshold=0.6, min_kept=1).backward()
    assert (logits.grad[0] != 0).any(0).tolist() == [False, True, True]
    logits.grad = None
    ohem_loss(logits, torch.zeros(1, 3, dtype=torch.long), threshold=0.01, min_kept=1).backward()
    assert (logits.grad[0] != 0).any(0).tolist() == [False, False, True]


def dice_by_hand(logits, labels, smooth, exponent, per_image, classes, weights=None):
    groups = range(logits.shape[0]) if per_image else [None]
    values = []
    for group in groups:
        chosen = [(p, y) for n, p, y in pixels(logits, labels) if group in (n, None)]
        losses, shares = [], []
        for c in range(logits.shape[1]):
            if classes == "present" and c not in [y for _, y in chosen]:
                continue
            both = sum(p[c] for p, y in chosen if y == c)
            size = sum(p[c] ** exponent for p, _ in chosen) + sum(y == c for _, y in chosen)
            losses.append(1 - (2 * both + smooth) / (size + smooth))
            shares.append(weights[c] if weights else 1.0)
        values.append(np.dot(losses, shares) / sum(shares) if losses else 0.0)
    return np.mean(values)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["all", "present"])
def test_dice(smooth, exponent, per_image, classes):
    logits, labels = example()
    labels[labels == 2] = 255  # a class that does not occur
    labels[1] = 1
    options = {"smooth": smooth, "exponent": exponent, "per_image": per_image, "classes": classes}
    assert dice_loss(logits, labels, **options).item() == pytest.approx(
        dice_by_hand(logits, labels, **options), rel=1e-9
    )
    weights = [1.0, 0.5, 2.0, 0.0]
    got = dice_loss(logits, labels, class_weights=torch.tensor(weights), **options)
    if not (per_image and classes == "present"):  # there an image may hold only classes of weight 0
        assert got.item() == pytest.approx(dice_by_hand(logits, labels, weights=weights, **options), rel=1e-9)


def test_dice_of_a_certain_answer_is_one_minus_the_dice_coefficient_of_its_labels():
    """Torchmetrics' Dice of label maps is the limit of large logits."""
    from torchmetrics.segmentation import DiceScore

    _, labels = example(ignored=0)
    _, answer = example(ignored=0, seed=1)
    logits = 1e4 * torch.nn.functional.one_hot(answer, 4).permute(0, 3, 1, 2).double()
    score = DiceScore(4, average="none", input_format="index", aggregation_level="global")
    score.update(answer, labels)
    assert dice_loss(logits, labels, smooth=0.0).item() == pytest.approx(1 - score.compute().mean().item(), rel=1e-6)


def jaccard_loss(wrong, truth):
    """One minus the Jaccard index of a class, given the set of pixels that are wrong."""
    union = len(truth | wrong)
    return 1 - len(truth - wrong) / union if union else 0.0


def lovasz_by_hand(logits, labels, per_image=False, classes="present", weights=None):
    """The definition: errors in falling order, each times what adding its pixel to the wrong ones adds to the loss."""
    groups = range(logits.shape[0]) if per_image else [None]
    values = []
    for group in groups:
        chosen = [(p, y) for n, p, y in pixels(logits, labels) if group in (n, None)]
        losses, shares = [], []
        for c in range(logits.shape[1]):
            truth = {i for i, (_, y) in enumerate(chosen) if y == c}
            if classes == "present" and not truth:
                continue
            errors = [1 - p[c] if y == c else p[c] for p, y in chosen]
            total, wrong = 0.0, set()
            for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
                total += errors[i] * (jaccard_loss(wrong | {i}, truth) - jaccard_loss(wrong, truth))
                wrong = wrong | {i}
            losses.append(total)
            shares.append(weights[c] if weights else 1.0)
        values.append(np.dot(losses, shares) / sum(shares) if losses else 0.0)
    return np.mean(values)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["all", "present"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 1.0]])
def test_lovasz(per_image, classes, weights):
    logits, labels = example((2, 4, 4, 5))
    labels[labels == 2] = 255
    class_weights = None if weights is None else torch.tensor(weights)
    got = lovasz_softmax_loss(logits, labels, per_image=per_image, classes=classes, class_weights=class_weights)
    wanted = lovasz_by_hand(logits, labels, per_image, classes, weights)
    assert got.item() == pytest.approx(wanted, rel=1e-9)


def test_lovasz_of_a_certain_answer_is_one_minus_its_mean_iou():
    from torchmetrics.functional import jaccard_index

    _, labels = example(ignored=0.2)
    _, answer = example(ignored=0, seed=1)
    logits = 1e4 * torch.nn.functional.one_hot(answer, 4).permute(0, 3, 1, 2).double()
    wanted = 1 - jaccard_index(answer, labels, "multiclass", num_classes=4, ignore_index=255).item()
    assert lovasz_softmax_loss(logits, labels).item() == pytest.approx(wanted, rel=1e-6)


def test_lovasz_of_many_pixels_in_float32():
    """The increments of the Jaccard loss, 1e-6 here, are not differences of rounded numbers."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 2, 400_000), torch.randint(0, 2, (1, 400_000))
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    lovasz_softmax_loss(narrow, labels).backward()
    lovasz_softmax_loss(wide, labels).backward()
    same = (narrow.grad - wide.grad).abs() < 1e-4 * wide.grad.abs() + 1e-10
    assert same.double().mean() > 0.99  # but for pixels that change places in the order


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [1.0, 0.25, (1.0, 2.0, 0.5, 0.0)])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 0.5]])
def test_focal(gamma, alpha, weights):
    logits, labels = example()
    factor = (lambda y: alpha) if isinstance(alpha, float) else alpha.__getitem__
    w = weights or [1.0] * 4
    found = pixels(logits, labels)
    total = sum(-factor(y) * w[y] * (1 - p[y]) ** gamma * math.log(p[y]) for _, p, y in found)
    valid = sum(w[y] for *_, y in found)
    for mean, count in (("valid", valid), ("all", labels.numel() if weights is None else valid)):
        got = focal_loss(
            logits,
            labels,
            gamma=gamma,
            alpha=alpha,
            mean=mean,
            class_weights=None if weights is None else torch.tensor(weights),
        )
        assert got.item() == pytest.approx(total / count, rel=1e-9)


TERMS = [
    LossTerm(),
    OhemTerm(min_kept=10),
    DiceTerm(),
    DiceTerm(smooth=0.0, exponent=1.0, per_image=True, classes="present"),
    LovaszTerm(),
    LovaszTerm(per_image=True, classes="all"),
    FocalTerm(gamma=0.5),
    FocalTerm(alpha=(1.0, 2.0, 3.0)),
]
NAMES = [f"{i}-{term.name}" for i, term in enumerate(TERMS)]


def test_every_loss_is_tested_below():
    assert {term.name for term in TERMS} == set(LOSS_TERMS)


@pytest.mark.gradcheck
@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_gradient(term):
    logits, labels = example((2, 3, 2, 4), ignored=0.2)
    weights = torch.tensor([1.0, 0.5, 2.0])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_term(term, x, labels, class_weights=weights), logits)
    loss_term(term, logits, labels).backward()
    assert not logits.grad.transpose(0, 1)[:, labels == 255].any()


@pytest.mark.parametrize("normalize", ["process", "global"])
@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_every_loss_of_nothing_is_exactly_zero_with_a_graph(term, normalize):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    ignored = torch.full((2, 4, 5), 255)
    loss = loss_term(term, logits, ignored, normalize=normalize)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    empty = torch.zeros(0, 3, 4, 5, requires_grad=True)
    assert loss_term(term, empty, ignored[:0], normalize=normalize).item() == 0


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_every_loss_of_one_class_is_zero(term):
    if isinstance(term, FocalTerm) and isinstance(term.alpha, tuple):
        term = FocalTerm(alpha=(2.0,))
    logits = torch.randn(2, 1, 4, 5, requires_grad=True)
    labels = torch.zeros(2, 4, 5, dtype=torch.long)
    labels[0, 0] = 255
    loss = loss_term(term, logits, labels)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_every_loss_of_extreme_logits_is_finite(term):
    """Certain, certainly wrong, and a class that is ruled out by -inf (and is nowhere the label)."""
    logits = torch.tensor([[[1e4, 1e4, 0.0], [-1e4, -1e4, 0.0], [-math.inf, 0.0, 1.0]]], requires_grad=True)
    loss = loss_term(term, logits, torch.tensor([[0, 1, 255]]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_is_float32_under_autocast(term, dtype):
    logits, labels = example((2, 3, 4, 5))
    half = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_term(term, half, labels.to(torch.uint8))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(loss_term(term, half.double(), labels).item(), rel=2e-5)


def test_terms_are_weighted_and_named():
    logits, labels = example((2, 3, 4, 5))
    terms = parse_options({"loss": {"terms": [{"name": "dice", "weight": 0.5}, "lovasz"]}}).loss.terms
    got = weighted_terms("loss_coarse", 2.0, terms, logits, labels)
    assert {k: v.item() for k, v in got.items()} == pytest.approx(
        {
            "loss_coarse_dice": dice_loss(logits, labels).item(),
            "loss_coarse_lovasz": 2 * lovasz_softmax_loss(logits, labels).item(),
        }
    )
    assert list(weighted_terms("loss_coarse", 2.0, LossOptions().terms, logits, labels)) == ["loss_coarse"]


@pytest.mark.bad_input
@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_a_label_that_is_no_class(term):
    with pytest.raises(IndexError, match="Target 7 is out of bounds|labels must lie in .0, 3. or be 255, got 7"):
        loss_term(term, torch.randn(1, 3, 2), torch.tensor([[0, 7]]))


@pytest.mark.bad_input
def test_bad_options():
    logits, labels = example((2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"alpha must hold one factor per class \(3\), got 2"):
        focal_loss(logits, labels, alpha=(1.0, 2.0))
    with pytest.raises(ValueError, match="classes must be all or present, got 'some'"):
        dice_loss(logits, labels, classes="some")
    with pytest.raises(ValueError, match="normalize must be process or global, got 'world'"):
        segmentation_loss(logits, labels, normalize="world")
