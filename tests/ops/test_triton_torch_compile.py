"""``torch.compile(fullgraph=True)`` of every operator on the Triton kernels, forward and backward; see _triton.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases_refine
import pytest
import torch
from _triton import DEVICE, TRITON, to_device
from torch import Tensor

import rendseg
from rendseg import ops, reference
from rendseg.ops import _triton
from rendseg.ops.schemas import SCHEMAS

pytestmark = TRITON


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


LOGITS, FEATURES, COORDS = random(2, 3, 5, 6), random(2, 7, 4, seed=1), uniform(2, 9, 2)
INDICES = torch.tensor([[3, 0, 29], [7, 8, 9]])
PAIRS = torch.tensor([[0, 1], [2, 0], [1, 0]])
CODES = (random(3, 7, seed=2), -uniform(3))
HEAD = cases_refine.Head(4, 3).to(DEVICE)  # not within what is compiled: older torch cannot trace it
COARSE, MAPS = random(1, 3, 4, 5), random(1, 4, 8, 10)


def labels_of(module: Any, x: Tensor) -> Tensor:
    """``_subdivide_labels``, which only ``refine`` calls."""
    if module is reference:
        return reference.subdivide(x, 4)[0].argmax(1).to(torch.uint8)
    return torch.ops.rendseg._subdivide_labels(x, 4)[0]


def refined(module: Any, coarse: Tensor, features: Tensor) -> Tensor:
    with torch.no_grad():
        return module.refine(coarse, features, HEAD, steps=1, num_points=12)


def written(module: Any, logits: Tensor, values: Tensor) -> Tensor:
    return module.scatter_points_(logits * 1, INDICES.to(logits.device), values)


# Every call as ``(function of a module of operators and tensors, tensors, how many of them take a gradient)``.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "uncertainty": (lambda m, x: m.uncertainty(x), (LOGITS,), 0),
    "uncertain_points": (lambda m, x: m.uncertain_points(x, 4), (LOGITS,), 0),
    "sample_uncertain_points": (
        lambda m, x, r: m.sample_uncertain_points(x, 4, random_coords=r),
        (LOGITS, uniform(2, 13, 2)),
        0,
    ),
    "subdivide": (lambda m, x: m.subdivide(x, 4)[0], (LOGITS,), 1),
    "_subdivide_labels": (labels_of, (LOGITS,), 0),
    "point_sample": (lambda m, x, c: m.point_sample(x, c), (LOGITS, COORDS), 2),
    "point_labels": (lambda m, x, c: m.point_labels(x, c), ((LOGITS[:, 0] * 9).long(), COORDS), 0),
    "mask_losses": (
        lambda m, x, c, t: m.mask_losses(x, [t, t[1:]], c, *PAIRS.to(x.device)),
        (LOGITS, COORDS, random(2, 6, 5) > 0),
        1,
    ),
    "mask_costs": (lambda m, x, c, t: m.mask_costs(x, [t, t[1:]], c), (LOGITS, COORDS, random(2, 6, 5) > 0), 0),
    "scatter_points": (lambda m, x, v: m.scatter_points(x, INDICES.to(x.device), v), (LOGITS, random(2, 3, 3)), 2),
    "scatter_points_": (written, (LOGITS, random(2, 3, 3)), 2),
    "scaled_l2": (lambda m, x, c, s: m.scaled_l2(x, c, s), (FEATURES.transpose(1, 2).contiguous(), *CODES), 3),
    "aggregate": (lambda m, a, x, c: m.aggregate(a, x, c), (uniform(2, 4, 3), random(2, 4, 7), CODES[0]), 3),
    "encode": (lambda m, x, c, s: m.encode(x, c, s), (FEATURES, *CODES), 3),
    "_refine_mlp": (refined, (COARSE, MAPS), 0),
}
# The gradient of an in-place write is that of the copy.
BACKWARD = {op: f"_{op.rstrip('_')}_backward" for op, (_, _, count) in CALLS.items() if count}


def test_every_operator_is_called() -> None:
    assert {*CALLS, *BACKWARD.values()} == {schema.split("(", 1)[0] for schema in SCHEMAS}


def results(function: Callable[..., Any], tensors: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """What ``function`` returns, and the gradients of the first ``count`` tensors."""
    leaves = [t.detach().clone().requires_grad_(i < count) for i, t in enumerate(tensors)]
    out = function(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(out[0].square().sum(), leaves[:count]) if count else ()
    return [t.detach().cpu() for t in (*out, *grads)]


@pytest.mark.parametrize("op", CALLS)
def test_compiles_to_one_graph(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, tensors, count = CALLS[op]
    wanted = results(lambda *t: function(reference, *t), tensors, count)
    launched = []
    launcher = _triton.launcher
    monkeypatch.setattr(_triton, "launcher", lambda name: launched.append(name) or launcher(name))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(ops, *t), fullgraph=True, backend="aot_eager")
    with rendseg.backend("triton"):
        got = results(compiled, to_device(tensors), count)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # A functional graph may write through the copying operator.
    assert op.rstrip("_") in {name.rstrip("_") for name in launched}
    assert not count or BACKWARD[op] in launched
