"""Every public operator under ``backend("triton")``, through autograd and the dispatcher, against the reference.

As in the other files of Triton kernels: on a GPU where there is one, else interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from _triton import DEVICE, TRITON
from torch import Tensor

import rendseg
from rendseg import _backends, ops
from rendseg.nn import PointHead

pytestmark = TRITON
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}
Function = Callable[..., Any]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cells(n: int, size: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(size, generator=generator)[:count] for _ in range(n)]).to(DEVICE)


COORDS = torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
LOGITS, VALUES = tensor(2, 3, 6, 8), tensor(2, 3, 9, seed=3)
X, CODEWORDS, SCALE = tensor(2, 16, 5, 7), tensor(6, 16, seed=4), tensor(6, seed=5)
WEIGHTS = tensor(2, 35, 6, seed=6).softmax(2)
MASKS = [tensor(2, 5, 9, seed=8).to(DEVICE) > 0, (tensor(1, 7, 4, seed=9) > 0).to(DEVICE, torch.uint8)]
PAIRS = torch.tensor([[1, 0], [2, 0], [0, 1]]).to(DEVICE)
# name: (function, tensors that get a gradient)
DIFFERENTIABLE: dict[str, tuple[Function, Sequence[Tensor]]] = {
    "point_sample": (lambda m: ops.point_sample(m, COORDS), [LOGITS]),
    "point_sample, two maps": (lambda m, o: ops.point_sample([m, o], COORDS, padding_mode="border"), [LOGITS, X]),
    "mask_losses": (lambda m: torch.stack(ops.mask_losses(m, MASKS, COORDS, *PAIRS)).to(m.dtype), [LOGITS]),
    "scatter_points": (lambda m, v: ops.scatter_points(m, cells(2, 48, 9), v), [LOGITS, VALUES]),
    "subdivide": (lambda m: ops.subdivide(m, 11)[0], [LOGITS]),
    "encode": (ops.encode, [X, CODEWORDS, SCALE]),
    "scaled_l2": (lambda x, c, s: ops.scaled_l2(x.flatten(2).transpose(1, 2), c, s), [X, CODEWORDS, SCALE]),
    "aggregate": (lambda a, x, c: ops.aggregate(a, x.flatten(2).transpose(1, 2), c), [WEIGHTS, X, CODEWORDS]),
}
EXACT: dict[str, Function] = {
    "uncertainty": lambda: ops.uncertainty(LOGITS.to(DEVICE)),
    "uncertain_points": lambda: ops.uncertain_points(LOGITS.to(DEVICE), 13),
    "subdivide": lambda: ops.subdivide(LOGITS.to(DEVICE), 13),
    "point_labels": lambda: ops.point_labels(torch.arange(96, device=DEVICE).view(2, 6, 8), COORDS),
    "mask_costs": lambda: ops.mask_costs(LOGITS.to(DEVICE), MASKS, COORDS),
    "scatter_points_": lambda: ops.scatter_points_(LOGITS.clone().to(DEVICE), cells(2, 48, 9), VALUES.to(DEVICE)),
}


def with_gradients(function: Function, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [t.clone().to(DEVICE, dtype).requires_grad_() for t in tensors]
    out = function(*inputs)
    grads = torch.autograd.grad(out.float().square().sum(), inputs, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    function, tensors = DIFFERENTIABLE[name]
    with rendseg.backend("reference"):
        wanted = with_gradients(function, tensors, dtype)
    with rendseg.backend("triton"):
        got = with_gradients(function, tensors, dtype)
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype == dtype and mine.device.type == DEVICE
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1))


@pytest.mark.parametrize("name", EXACT)
def test_selections_and_copies(name: str) -> None:
    with rendseg.backend("reference"):
        wanted = EXACT[name]()
    with rendseg.backend("triton"):
        got = EXACT[name]()
    for mine, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_selection_of_training_points() -> None:
    random = torch.rand(2, 30 + 3, 2, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    options = {"oversample_ratio": 3.0, "importance_ratio": 0.7, "random_coords": random}
    with rendseg.backend("reference"):
        wanted = ops.sample_uncertain_points(LOGITS.to(DEVICE), 10, **options)
    with rendseg.backend("triton"):
        torch.testing.assert_close(ops.sample_uncertain_points(LOGITS.to(DEVICE), 10, **options), wanted)
        drawn = ops.sample_uncertain_points(LOGITS.to(DEVICE), 10)
    assert drawn.shape == (2, 10, 2) and bool(((drawn >= 0) & (drawn <= 1)).all())


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_refine(output: str) -> None:
    torch.manual_seed(0)
    head = PointHead(16, 3, 16, 2, init="torch").to(DEVICE).eval()
    coarse, features = 5 * LOGITS.to(DEVICE), tensor(2, 16, 12, 16).to(DEVICE)
    results = []
    for name in ("reference", "triton"):
        with torch.no_grad(), rendseg.backend(name):
            # every cell of the first step, so that a rounding cannot choose other points
            results.append(ops.refine(coarse, features, head, steps=1, num_points=12 * 16, output=output))
    if output == "labels":
        assert (results[0] == results[1]).float().mean() > 0.99
    else:
        torch.testing.assert_close(*results, rtol=0, atol=1e-2)


def test_every_operator_is_served_by_triton() -> None:
    with rendseg.backend("triton"):
        served = {op: _backends.serving(op, DEVICE) for op in _backends.triton_ops()}
    assert set(served.values()) == {"triton"} and len(served) >= 15


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_captured_in_a_cuda_graph_on_another_stream(name: str) -> None:
    function, tensors = DIFFERENTIABLE[name]
    inputs = [t.clone().to(DEVICE).requires_grad_() for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def call() -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    with rendseg.backend("triton"), torch.cuda.stream(stream):
        wanted = [t.detach().clone() for t in call()]
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = call()
        for t in got:
            t.detach().fill_(float("nan"))
        graph.replay()
        stream.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)
