"""scatter_points on a GPU against the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import rendseg.ops
from rendseg import _backends, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("scatter_points", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def inputs(n: int, c: int, h: int, w: int, p: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(n, c, h, w).to(dtype)
    indices = (
        torch.stack([torch.randperm(h * w)[:p].sort().values for _ in range(n)]) if n else torch.zeros(0, p).long()
    )
    return logits, indices, torch.randn(n, c, p).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [(2, 19, 65, 33, 200), (1, 1, 3, 3, 9), (0, 4, 5, 5, 3), (2, 3, 4, 4, 0)], ids=str)
def test_matches_the_reference(case, channels_last: bool, dtype: torch.dtype) -> None:
    logits, indices, values = inputs(*case, dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    expected = reference.scatter_points(logits, indices, values)
    out = torch.ops.rendseg.scatter_points(logits.cuda(), indices.cuda(), values.cuda())
    assert torch.equal(out.cpu(), expected)
    mine = logits.cuda()
    torch.ops.rendseg.scatter_points_(mine, indices.cuda(), values.cuda())
    assert torch.equal(mine.cpu(), expected)
    grad_logits, grad_values = torch.ops.rendseg._scatter_points_backward(logits.cuda(), indices.cuda())
    at_points = indices.unsqueeze(1).expand(-1, case[1], -1)
    assert torch.equal(grad_values.cpu(), logits.flatten(2).gather(2, at_points))
    assert torch.equal(grad_logits.cpu(), logits.flatten(2).scatter(2, at_points, 0.0).view_as(logits))


def test_other_stream_and_graph() -> None:
    logits, indices, values = (t.cuda() for t in inputs(2, 5, 31, 17, 64, torch.float32))
    expected = reference.scatter_points(logits.cpu(), indices.cpu(), values.cpu())
    rendseg.ops.scatter_points(logits, indices, values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.rendseg.scatter_points(logits, indices, values)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), expected)


@pytest.mark.bad_input
def test_an_index_outside_the_map_is_a_device_assert() -> None:
    program = (
        "import torch, rendseg.ops\n"
        "torch.ops.rendseg.scatter_points(torch.zeros(1, 1, 2, 2).cuda(), torch.tensor([[4]]).cuda(), "
        "torch.ones(1, 1, 1).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr
