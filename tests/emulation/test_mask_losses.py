"""The CUDA mask_losses and mask_costs on the CPU: every case against the reference in float64."""

from __future__ import annotations

from typing import Any

import cases_mask_losses as cases
import pytest
import torch
from torch import Tensor

from rendseg import reference
from rendseg.reference.mask_losses import _mask_losses_backward as reference_backward

SEEDS = (0, 1)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = [name for name, _ in cases.cases()]


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "logits": arguments["logits"].double(), "coords": arguments["coords"].double()}


def same_bits(emulated: Any, op: str, *arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
    """For every order of threads and blocks."""
    results = []
    for seed in SEEDS:
        emulated.seed(seed)
        result = getattr(emulated.ops, op)(*arguments, **keywords)
        results.append(result if isinstance(result, tuple) else (result,))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Float32 arithmetic on coordinates moves a point by up to 1e-6 of a cell; halves are rounded once when stored."""
    step = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(stored, 0.0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert got.dtype == stored and got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance + step, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_losses_costs_and_gradient(emulated: Any, name: str, dtype: torch.dtype) -> None:
    losses, costs = dict(cases.cases(dtype))[name]
    if dtype == torch.float64:
        losses, costs = wide(losses), wide(costs)
    nearest = losses.get("label_mode") == "nearest"  # where float32 chooses the cell, the reference must as well
    result = torch.float64 if dtype == torch.float64 else torch.float32

    def widened(arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "logits": arguments["logits"].to(result)} if nearest else wide(arguments)

    for op, arguments in (("mask_losses", losses), ("mask_costs", costs)):
        got = same_bits(emulated, op, **arguments)
        for one, wanted in zip(got, getattr(reference, op)(**widened(arguments)), strict=True):
            close(one, wanted, dtype, result)
    grads = [cases.normal(len(losses["image_index"]), seed=s).to(result) for s in (1, 2)]
    options = {"label_mode": "bilinear", "padding_mode": "zeros", "canvas": None}
    ordered = [losses[key] for key in ("logits", "targets", "coords", "image_index", "query_index", "target_index")]
    ordered += [losses.get(key, default) for key, default in options.items()]
    (got_grad,) = same_bits(emulated, "_mask_losses_backward", *grads, *ordered)
    widened_losses = widened(losses)
    ordered[0], ordered[2] = widened_losses["logits"], widened_losses["coords"]
    wanted = reference_backward(*(g.to(ordered[0].dtype) for g in grads), *ordered)
    close(got_grad, wanted, dtype, dtype)


def test_more_images_than_one_launch_takes(emulated: Any) -> None:
    logits = cases.normal(35, 2, 5, 6)
    targets = [cases.masks(1 + i % 2, 4, 7, torch.uint8, seed=i) for i in range(35)]
    pairs = [((7 * i) % 35, i % 2, 0) for i in range(40)]
    losses, costs = cases.build(logits, targets, pairs, 9)
    for op, arguments in (("mask_losses", losses), ("mask_costs", costs)):
        before = emulated.launches()
        got = getattr(emulated.ops, op)(**arguments)
        assert emulated.launches() == before + (3 if op == "mask_losses" else 4)
        for one, wanted in zip(got, getattr(reference, op)(**arguments), strict=True):
            torch.testing.assert_close(one, wanted, rtol=2e-5, atol=2e-5)


def test_more_points_than_a_slice_and_queries_than_a_tile(emulated: Any) -> None:
    """4,096 points of a pair and 1,024 of an image are a slice; 512 on 1,024 cells a window; 32 queries a tile."""
    logits = cases.normal(1, 34, 12, 100)
    targets = [cases.masks(33, 40, 50, torch.bool)]
    losses, costs = cases.build(logits, targets, [(0, 33, 32), (0, 1, 0), (0, 33, 3)], 4200)
    costs["coords"] = cases.points(1, 1100)
    for op, arguments in (("mask_losses", losses), ("mask_costs", costs)):
        for one, wanted in zip(
            getattr(emulated.ops, op)(**arguments), getattr(reference, op)(**wide(arguments)), strict=True
        ):
            torch.testing.assert_close(one.double(), wanted, rtol=2e-5, atol=2e-5)
    grads = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, -1.0])]
    ordered = [losses[key] for key in ("logits", "targets", "coords", "image_index", "query_index", "target_index")]
    got = emulated.ops._mask_losses_backward(*grads, *ordered, "bilinear", "zeros", None)
    ordered[0], ordered[2] = ordered[0].double(), ordered[2].double()
    wanted = reference_backward(*(g.double() for g in grads), *ordered, "bilinear", "zeros", None)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_numbers_that_overflow_a_naive_softplus(emulated: Any) -> None:
    logits = torch.tensor([-200.0, 200.0, -1e30, 1e30]).view(1, 4, 1, 1)
    pairs = [(0, q, t) for q in range(4) for t in range(2)]
    losses, _ = cases.build(logits, [torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1)], pairs, 3)
    losses["padding_mode"] = "border"
    cross_entropy, dice = emulated.ops.mask_losses(**losses)
    assert cross_entropy.tolist() == [0, 200, 200, 0, 0, pytest.approx(1e30), pytest.approx(1e30), 0]
    # With s the sigmoid and y the target of each of three points: 1 - (6 s y + 1) / (3 s + 3 y + 1).
    assert dice.tolist() == pytest.approx([0, 0.75, 0.75, 0, 0, 0.75, 0.75, 0])
