"""The criterion against plain PyTorch at the points that it drew, and every edge of its inputs."""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rendseg import ops
from rendseg.nn import MaskCriterion
from rendseg.nn.mask_criterion import assign
from tests.engine.processes import succeed

pytest.importorskip("scipy", reason="needs the package scipy, which solves the assignment")

CLASSES, POINTS = 4, 32


def inputs_of(counts: tuple[int, ...], layers: int = 2, queries: int = 5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(len(counts) + sum(counts))
    images = len(counts)
    return {
        "class_logits": [
            torch.randn(images, queries, CLASSES + 1, generator=g).requires_grad_() for _ in range(layers)
        ],
        "mask_logits": [torch.randn(images, queries, 9, 11, generator=g).requires_grad_() for _ in range(layers)],
        "labels": [torch.randint(CLASSES, (count,), generator=g) for count in counts],
        "masks": [torch.rand(count, 20 + b, 24, generator=g) > 0.5 for b, count in enumerate(counts)],
    }


def sampled(maps: Tensor, coords: Tensor) -> Tensor:
    """``[M, H, W]`` at ``[P, 2]``: ``[M, P]``."""
    return F.grid_sample(maps[None].double(), 2 * coords[None, :, None].double() - 1, align_corners=False)[0, :, :, 0]


def plain_losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = torch.broadcast_tensors(x, y)
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(-1)
    s = x.sigmoid()
    return cross_entropy, 1 - (2 * (s * y).sum(-1) + 1) / (s.sum(-1) + y.sum(-1) + 1)


def cheapest(cost: Tensor) -> list[tuple[int, int]]:
    """Every assignment is tried."""
    queries, targets = cost.shape
    options = itertools.permutations(range(queries), targets)
    best = min(options, key=lambda chosen: float(sum(cost[q, t].detach() for t, q in enumerate(chosen))))
    return sorted((q, t) for t, q in enumerate(best))


def test_against_plain_pytorch() -> None:
    given = inputs_of((3, 0, 2))
    criterion = MaskCriterion(CLASSES, num_points=POINTS, class_weight=1.0, mask_weight=2.0, dice_weight=3.0)
    draws: list[Tensor] = []
    selected: list[tuple[Tensor, Tensor, Tensor]] = []
    rand, select = torch.rand, ops.sample_uncertain_points

    def note_draw(*size: Any, **options: Any) -> Tensor:
        draws.append(rand(*size, **options))
        return draws[-1]

    def note_selection(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        points = select(logits, *args, **options)
        selected.append((points, options["image_index"], options["class_index"]))
        return points

    with mock.patch.object(torch, "rand", note_draw), mock.patch.object(ops, "sample_uncertain_points", note_selection):
        losses = criterion(**given)

    drawn = [points for points in draws if points.shape == (3, POINTS, 2)]
    padded = [F.pad(mask.double(), (0, 0, 0, 22 - mask.shape[1])) for mask in given["masks"]]
    total = torch.zeros((), dtype=torch.float64)
    for layer, (classes, logits) in enumerate(zip(given["class_logits"], given["mask_logits"], strict=True)):
        wanted = torch.full((3, 5), CLASSES)
        entropies, dices, n = [], [], 0
        points, images, queries = selected[layer]
        for b, (labels, masks) in enumerate(zip(given["labels"], padded, strict=True)):
            x, y = sampled(logits[b], drawn[layer][b]), sampled(masks, drawn[layer][b])
            entropy, dice = plain_losses(x[:, None], y)
            for q, t in cheapest(2 * entropy + 3 * dice - classes[b].double().softmax(-1)[:, labels]):
                assert (int(images[n]), int(queries[n])) == (b, q)
                wanted[b, q] = labels[t]
                pair = plain_losses(sampled(logits[b, q : q + 1], points[n]), sampled(masks[t : t + 1], points[n]))
                entropies.append(pair[0])
                dices.append(pair[1])
                n += 1
        weights = torch.ones(CLASSES + 1, dtype=torch.float64)
        weights[-1] = 0.1
        expected = (
            F.cross_entropy(classes.double().flatten(0, 1), wanted.flatten(), weights),
            torch.cat(entropies).sum() / 5,
            torch.cat(dices).sum() / 5,
        )
        for kind, value in zip(losses[1:], expected, strict=True):
            torch.testing.assert_close(kind[layer].double(), value, rtol=1e-5, atol=1e-6)
        total = total + expected[0] + 2 * expected[1] + 3 * expected[2]
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-5, atol=1e-6)
    leaves = given["class_logits"] + given["mask_logits"]
    for a, b in zip(torch.autograd.grad(losses.total, leaves), torch.autograd.grad(total, leaves), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_costs_of_all_layers_go_to_the_host_together() -> None:
    copies = []
    cpu = Tensor.cpu
    with mock.patch.object(Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or cpu(self)):
        MaskCriterion(CLASSES, num_points=POINTS)(**inputs_of((3, 1), layers=4))
    assert copies == [(4, 2, 5, 3)]


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (7, 1)], ids=["no_targets", "an_empty_image", "more_than_queries"])
def test_any_number_of_targets(counts: tuple[int, ...]) -> None:
    given = inputs_of(counts)
    losses = MaskCriterion(CLASSES, num_points=POINTS, no_object_weight=0.0)(**given)
    gradients = torch.autograd.grad(losses.total, given["class_logits"] + given["mask_logits"])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert losses.total.isfinite()
    if not any(counts):
        assert losses.total == 0 and losses.cross_entropy.requires_grad
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_is_matched_last(bad: float) -> None:
    given = inputs_of((4,), layers=1)
    with torch.no_grad():
        given["mask_logits"][0][0, 2] = bad
    chosen = []
    select = ops.sample_uncertain_points

    def note(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        chosen.extend(options["class_index"].tolist())
        return select(logits, *args, **options)

    with mock.patch.object(ops, "sample_uncertain_points", note):
        losses = MaskCriterion(CLASSES, num_points=POINTS)(**given)
    assert chosen == [0, 1, 3, 4]
    assert losses.total.isfinite()


def test_under_torch_compile() -> None:
    criterion = MaskCriterion(CLASSES, num_points=POINTS)
    given, results = inputs_of((3, 0)), []
    for function in (criterion, torch.compile(criterion, backend="eager")):
        torch.manual_seed(0)
        total = function(**given).total
        results.append((total, *torch.autograd.grad(total, given["class_logits"] + given["mask_logits"])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_logits_do_not_overflow_in_the_costs() -> None:
    given = inputs_of((3,), layers=1)
    # A sum of 2048 values of 100 is beyond float16.
    given["mask_logits"] = [logits.detach().mul(100).half().requires_grad_() for logits in given["mask_logits"]]
    given["class_logits"] = [logits.detach().half().requires_grad_() for logits in given["class_logits"]]
    losses = MaskCriterion(CLASSES, num_points=2048)(**given)
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()
    assert torch.autograd.grad(losses.total, given["mask_logits"])[0].dtype == torch.float16


def test_assignment_where_no_cost_is_a_number() -> None:
    costs = torch.full((1, 1, 3, 2), float("nan"))
    costs[0, 0, 1, 1] = 7.0
    query, target = assign(list(costs), [2])[0][0]
    assert dict(zip(target.tolist(), query.tolist(), strict=True))[1] == 1 and len(query) == 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, "one tensor for each of the 2 images"),
        ({"class_logits": []}, "one tensor for each layer"),
        ({"mask_logits": [torch.zeros(2, 5, 9)] * 2}, r"shape \[B, Q, H, W\]"),
        ({"class_logits": [torch.zeros(2, 5, CLASSES)] * 2}, r"shape \[B, Q, K \+ 1\] = \[2, 5, 5\]"),
        ({"labels": [torch.zeros(3, dtype=torch.int64), torch.tensor([CLASSES])]}, r"labels\[1\] must lie in \[0, K\)"),
        ({"labels": [torch.zeros(2, dtype=torch.int64)] * 2}, r"labels\[0\] and masks\[0\] must have shapes"),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCriterion(CLASSES, num_points=POINTS)(**{**inputs_of((3, 1)), **change})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_points": 0}, "num_points must be at least 1"),
        ({"mask_weight": -1.0}, "mask_weight must be at least 0"),
        ({"class_weight": 0, "mask_weight": 0, "dice_weight": 0}, "all zero"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCriterion(**{"num_classes": 2, **options})


def one_rank_without_targets() -> None:
    given = inputs_of((0,) if os.environ["RANK"] == "1" else (3,))
    torch.manual_seed(0)
    losses = MaskCriterion(CLASSES, num_points=POINTS)(**given)
    losses.total.backward()
    mask_gradient = sum(float(logits.grad.abs().sum()) for logits in given["mask_logits"])
    print(float(losses.cross_entropy.sum()), float(losses.dice.sum()), mask_gradient)


def test_masks_are_counted_over_processes() -> None:
    alone = inputs_of((3,))
    torch.manual_seed(0)
    losses = MaskCriterion(CLASSES, num_points=POINTS)(**alone)
    first, second = succeed(one_rank_without_targets, world=2)
    entropy, dice, _ = map(float, first.split())
    # Three masks on two processes are one and a half each, so that the mean of the processes is that of the batch.
    assert (entropy, dice) == pytest.approx(
        (2 * float(losses.cross_entropy.sum()), 2 * float(losses.dice.sum())), rel=1e-5
    )
    assert second.split() == ["0.0", "0.0", "0.0"]
