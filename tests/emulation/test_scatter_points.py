"""The CUDA scatter_points on the CPU: indexing for every layout and width, and refusal of bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rendseg import reference

CASES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 11), (3, 19, 4, 6, 24), (1, 2, 9, 1, 0), (0, 2, 3, 3, 4), (1, 30, 20, 20, 77)]


def inputs(n: int, c: int, h: int, w: int, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + p)
    logits = torch.randn(n, c, h, w, generator=generator).to(dtype)
    rows = [torch.randperm(h * w, generator=generator)[:p].sort().values for _ in range(n)]
    indices = torch.stack(rows) if rows else torch.zeros(0, p, dtype=torch.int64)
    return logits, indices, torch.randn(n, c, p, generator=generator).to(dtype)


def as_laid_out(t: Tensor, how: str) -> Tensor:
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "strided":  # every second column of a wider, poisoned map
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(emulated, case, how, dtype) -> None:
    logits, indices, values = inputs(*case, dtype)
    expected = reference.scatter_points(logits, indices, values)
    flat = logits.flatten(2)
    at_points = indices.unsqueeze(1).expand(-1, case[1], -1)
    for seed in range(3):
        emulated.seed(seed)
        ours = as_laid_out(logits, how).clone()
        assert torch.equal(emulated.ops.scatter_points(as_laid_out(logits, how), indices, values), expected)
        emulated.ops.scatter_points_(ours, indices, values)
        assert torch.equal(ours, expected)
        grad_logits, grad_values = emulated.ops._scatter_points_backward(as_laid_out(logits, how), indices)
        assert torch.equal(grad_values, flat.gather(2, at_points))
        assert torch.equal(grad_logits, flat.scatter(2, at_points, 0.0).view_as(logits))


@pytest.mark.bad_input
@pytest.mark.parametrize("index", [-1, 35, 2**40])
def test_an_index_outside_the_map_stops_the_program(emulated, index: int) -> None:
    """By the assert of the device; nothing is written."""
    logits = torch.zeros(1, 1, 5, 7)
    with pytest.raises(RuntimeError, match=r"indices must lie in \[0, H\*W\)"):
        emulated.ops.scatter_points_(logits, torch.tensor([[index]]), torch.ones(1, 1, 1))
    assert not logits.any()


@pytest.mark.bad_input
def test_refuses_what_the_cpu_op_refuses(emulated) -> None:
    logits, indices, values = inputs(2, 3, 5, 7, 11, torch.float32)
    with pytest.raises(ValueError, match=r"values must have shape \[N, C, P\] = \[2, 3, 11\]"):
        emulated.ops.scatter_points(logits, indices, values[:, :2])
    with pytest.raises(TypeError, match="indices must be int64"):
        emulated.ops.scatter_points(logits, indices.int(), values)
