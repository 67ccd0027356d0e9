"""mask_losses and mask_costs on a GPU against the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cases_mask_losses as cases
import pytest
import torch
from torch import Tensor

import rendseg.ops
from rendseg import _backends, reference

pytestmark = pytest.mark.gpu
NAMES = [name for name, _ in cases.cases()]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("mask_losses", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def on_gpu(value: Any) -> Any:
    """Strides are kept: the layout is part of a case."""
    if isinstance(value, Tensor):
        return value.cuda() if value.is_contiguous() else _strided_copy(value)
    return [on_gpu(v) for v in value] if isinstance(value, list) else value


def _strided_copy(value: Tensor) -> Tensor:
    base = value.untyped_storage()
    flat = torch.empty(0, dtype=value.dtype).set_(base, 0, (len(base) // value.element_size(),))
    return flat.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: on_gpu(value) for name, value in arguments.items()}


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Float32 arithmetic on coordinates moves a point by up to 1e-6 of a cell; halves are rounded once when stored."""
    step = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(got.dtype, 0.0)
    tolerance = 1e-10 if dtype == torch.float64 else 4e-5
    torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=tolerance + step, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    for op, arguments in zip(("mask_losses", "mask_costs"), dict(cases.cases(dtype))[name], strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logits = arguments["logits"].to(wide).requires_grad_(op == "mask_losses")
        wanted = getattr(reference, op)(**{**arguments, "logits": logits})
        given = moved(arguments)
        given["logits"].requires_grad_(op == "mask_losses")
        got = getattr(rendseg.ops, op)(**given)
        for one, other in zip(got, wanted, strict=True):
            close(one.detach(), other.detach(), dtype)
        if op == "mask_losses":
            weights = [cases.normal(len(arguments["image_index"]), seed=s) for s in (1, 2)]
            sum((w.to(v.device, v.dtype) * v).sum() for w, v in zip(weights, got, strict=True)).backward()
            sum((w.to(v.dtype) * v).sum() for w, v in zip(weights, wanted, strict=True)).backward()
            close(given["logits"].grad, logits.grad, dtype)


def test_the_same_bits_and_in_a_graph() -> None:
    logits = cases.normal(2, 20, 64, 64)
    targets = [cases.masks(5, 250, 170, torch.bool), cases.masks(3, 90, 400, torch.uint8)]
    pairs = [(i % 2, (7 * i) % 20, i % 3) for i in range(16)]
    losses = moved(cases.build(logits, targets, pairs, 5000)[0])
    grads = [torch.randn(16, device="cuda") for _ in range(2)]
    names = ("logits", "targets", "coords", "image_index", "query_index", "target_index")

    def backward() -> Tensor:
        arguments = [losses[name] for name in names]
        return torch.ops.rendseg._mask_losses_backward(*grads, *arguments, "bilinear", "zeros", None)

    wanted = backward()
    assert all(torch.equal(backward(), wanted) for _ in range(3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backward()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.bad_input
def test_a_pair_that_does_not_exist_is_a_device_assert() -> None:
    program = (
        "import torch, rendseg.ops\n"
        "zero = torch.zeros(1, dtype=torch.int64).cuda()\n"
        "rendseg.ops.mask_losses(torch.zeros(1, 1, 2, 2).cuda(), [torch.ones(1, 2, 2).cuda()], "
        "torch.rand(1, 4, 2).cuda(), zero, zero, zero + 1)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr
