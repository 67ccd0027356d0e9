from __future__ import annotations

import math

import pytest
import torch

from rendseg.models import segmentation_loss


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
    return total / (number if mean == "all" else (count or 1.0))


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
