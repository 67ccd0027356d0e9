"""``torch.utils.flop_counter`` counts the operators, and a second import of rendseg works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rendseg import nn, ops
from tests import fresh

REPO = Path(__file__).resolve().parents[2]


def eager_encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """The chain of products that ``encode`` fuses."""
    features = x.flatten(2).transpose(1, 2)
    distance = features.square().sum(-1, keepdim=True) - 2 * features @ codewords.t() + codewords.square().sum(-1)
    assignment = (scale * distance).softmax(-1)
    return assignment.transpose(1, 2) @ features - assignment.sum(1).unsqueeze(-1) * codewords


def test_encode_counts_its_products() -> None:
    x, codewords = torch.randn(2, 8, 5, 7, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    scale = (-torch.rand(3)).requires_grad_()
    one = 2 * (2 * 35 * 8 * 3)  # a product of all positions with all codewords
    counts = []
    for function in (ops.encode, eager_encode):
        with FlopCounterMode(display=False) as forward:
            y = function(x, codewords, scale)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts == [(2 * one, 5 * one), (2 * one, 4 * one)]  # backward computes the assignment again
    distances, assignment = torch.randn(2, 35, 3, requires_grad=True), torch.randn(2, 35, 3, requires_grad=True)
    features = x.flatten(2).transpose(1, 2)
    for name, arguments in {
        "scaled_l2": (features, codewords, scale),
        "aggregate": (assignment, features, codewords),
        "_scaled_l2_backward": (distances, features, codewords, scale),
        "_aggregate_backward": (torch.randn(2, 3, 8), assignment, features, codewords),
    }.items():
        with FlopCounterMode(display=False) as counter:
            getattr(torch.ops.rendseg, name)(*(t.detach() for t in arguments))
        assert counter.get_total_flops() == (2 * one if name.startswith("_") else one), name


@pytest.mark.parametrize("coarse_each_layer", [False, True])
def test_refine_counts_the_layers_of_the_head(coarse_each_layer: bool) -> None:
    head = nn.PointHead(6, 4, 10, coarse_each_layer=coarse_each_layer).eval()
    coarse, features = torch.randn(2, 4, 5, 6), torch.randn(2, 6, 20, 24)
    points = 2 * (120 + 130 + 130)  # 10 x 12 cells, then 130 of them, twice
    layers = (6 + 4) * 10 + 2 * (10 + 4 * coarse_each_layer) * 10 + (10 + 4 * coarse_each_layer) * 4
    stock = head.refine_parameters()
    assert stock is not None
    arguments = (3, 130, "original", 2, False, "zeros", coarse_each_layer, False, False)
    with torch.no_grad(), FlopCounterMode(display=False) as eager:
        ops.refine(coarse, features, head, steps=3, num_points=130)
    with torch.no_grad(), FlopCounterMode(display=False) as fused:
        torch.ops.rendseg._refine_mlp(coarse, [features], stock.weights, stock.biases, *arguments)
    assert eager.get_total_flops() == fused.get_total_flops() == 2 * points * layers


AGAIN = """
import sys, torch
import rendseg.ops
first = rendseg

def run(ops):
    x, c = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    ops.encode(x, c, -torch.rand(2)).sum().backward()
    ops.uncertain_points(x.detach(), 3)

run(first.ops)
for name in [name for name in sys.modules if name.partition(".")[0] == "rendseg"]:
    del sys.modules[name]
import rendseg.ops
assert rendseg is not first and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
run(rendseg.ops)
run(first.ops)
with FlopCounterMode(display=False) as counter:
    rendseg.ops.encode(torch.randn(1, 3, 4), torch.randn(2, 3), torch.rand(2))
assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 2
"""


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_a_second_import(disabled: str) -> None:
    """Notebooks and test runners forget modules; the operators are then registered again."""
    environment = {**os.environ, "RENDSEG_DISABLE_EXTENSION": disabled, "PYTHONPATH": str(REPO)}
    done = fresh.run(AGAIN, environment)
    assert done.returncode == 0, done.stderr


def test_costs_of_masks_count_their_products() -> None:
    """Of 3 queries with 2 and 1 targets, at 7 points, once for each loss."""
    targets = [torch.ones(2, 4, 4), torch.ones(1, 5, 3)]
    with FlopCounterMode(display=False) as counted:
        ops.mask_costs(torch.randn(2, 3, 6, 6), targets, torch.rand(2, 7, 2))
    assert counted.get_total_flops() == 2 * (2 * 3 * 7 * (2 + 1))
