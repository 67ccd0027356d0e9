"""What the op tests rely on can fail."""

from __future__ import annotations

import pytest
import torch
from _common import close


@pytest.mark.parametrize("count", [1, 7, 1000, 2**20])  # from the caches of the allocator, and from the system
def test_fresh_memory_is_poisoned(count: int) -> None:
    for _ in range(3):
        assert torch.empty(count).isnan().all() and torch.empty_like(torch.zeros(count)).isnan().all()
        assert torch.empty(count, dtype=torch.bfloat16)[1::2].isnan().all()
        assert (torch.empty(count, dtype=torch.float64) > 1e308).all()
        assert (torch.empty(count, dtype=torch.int64) > 2**62).all()
        assert not torch.zeros(count).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_close_refuses_zeros_and_a_wrong_scale(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = torch.linspace(-3, 3, 50, dtype=torch.float64)
    close(wanted.to(dtype), wanted, compute)
    for wrong in (torch.zeros(50), wanted * (1 + 20 * torch.finfo(dtype).eps + 1e-4), wanted * float("nan")):
        with pytest.raises(AssertionError):
            close(wrong.to(dtype), wanted, compute)
