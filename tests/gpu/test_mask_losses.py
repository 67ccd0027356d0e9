"""mask_losses and mask_costs on a GPU against the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rendseg import _backends, ops, reference

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("mask_losses", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def inputs(dtype: torch.dtype, channels_last: bool, size: int = 40, points: int = 700) -> tuple[Any, ...]:
    """Logits, targets, points of pairs, indices of pairs, points of images."""
    torch.manual_seed(0)
    logits = torch.randn(3, 6, size, size + 3).to(dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    targets = [torch.rand(4, 55, 61) > 0.5, torch.zeros(0, 5, 5), (torch.rand(2, 33, 20) > 0.5).to(torch.uint8)]
    pairs = torch.tensor([[0, 2, 2, 0, 0], [5, 1, 0, 5, 2], [3, 1, 0, 0, 1]])
    return logits, targets, torch.rand(5, points, 2), pairs, torch.rand(3, points, 2)


def on_gpu(value: Any) -> Any:
    return [v.cuda() for v in value] if isinstance(value, list) else value.cuda()


def with_gradient(logits: Tensor, targets: list[Tensor], coords: Tensor, pairs: Tensor, module: Any, **options: Any):
    leaf = logits.detach().requires_grad_()
    losses = torch.stack(module.mask_losses(leaf, targets, coords, *pairs, **options))
    weights = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype, device=losses.device).view(losses.shape)
    return losses.detach(), torch.autograd.grad((weights * losses).sum(), leaf)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("canvas", [None, (64, 64)])
def test_matches_the_reference(canvas: Any, channels_last: bool, dtype: torch.dtype) -> None:
    logits, targets, coords, pairs, shared = inputs(dtype, channels_last)
    options = {"canvas": canvas, "label_mode": "bilinear" if canvas else "nearest"}
    wanted = with_gradient(logits.double(), targets, coords, pairs, reference, **options)
    got = with_gradient(*(on_gpu(t) for t in (logits, targets, coords, pairs)), ops, **options)
    costs = ops.mask_costs(on_gpu(logits), on_gpu(targets), shared.cuda(), **options)
    right = reference.mask_costs(logits.double(), targets, shared, **options)
    for mine, theirs in zip((*got, *costs), (*wanted, *right), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_the_same_every_time_and_in_a_cuda_graph() -> None:
    logits, targets, coords, pairs, shared = (on_gpu(t) for t in inputs(torch.float32, False, 200, 5000))

    def call() -> list[Tensor]:
        return [*with_gradient(logits, targets, coords, pairs, ops), *ops.mask_costs(logits, targets, shared)]

    wanted = call()
    assert all(torch.equal(a, b) for a, b in zip(call(), wanted, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for result in got:
        result.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
