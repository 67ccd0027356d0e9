"""The words that kernels are written in mean under emulation what CUDA and the PTX ISA say: against torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.load("vocabulary")


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_round_as_in_torch(library, dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    beside = torch.cat([torch.nextafter(every, torch.tensor(float(s))) for s in ("inf", "-inf")])
    ordered = every.unique()
    between = (ordered[1:].double() + ordered[:-1].double()).div(2).float()
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.9, 65520.0, 1e-40, 3e38, -3.4e38]
    )
    given = torch.cat([every, beside, between, special])
    narrowed, widened = torch.empty(given.shape, dtype=dtype), torch.empty_like(given)
    size = ctypes.c_int64(given.numel())
    library.rendseg_round_trip(int(dtype == torch.bfloat16), pointer(given), pointer(narrowed), pointer(widened), size)
    expected = given.to(dtype)
    number = ~given.isnan()
    assert torch.equal(narrowed.view(torch.int16)[number], expected.view(torch.int16)[number])
    assert torch.equal(widened[number], expected.float()[number])
    assert narrowed[~number].isnan().all() and widened[~number].isnan().all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
def test_products_of_fragments(library, kind) -> None:
    """Small integers: every product and sum is exact."""
    generator = torch.Generator().manual_seed(1)
    depth = 8 if kind == "tf32" else 16
    a = torch.randint(-8, 9, (16, depth), generator=generator).float()
    b = torch.randint(-8, 9, (depth, 8), generator=generator).float()
    d = torch.full((16, 8), float("nan"))
    library.rendseg_product(["float16", "bfloat16", "tf32"].index(kind), pointer(a), pointer(b), pointer(d))
    assert torch.equal(d, a @ b)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_scan_and_last_block(library, threads) -> None:
    blocks = 7
    given = torch.randint(-50, 50, (blocks, threads), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    out, totals = torch.empty_like(given), torch.empty(blocks, dtype=torch.int32)
    grand_total, counter = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):  # the counter is left as it was found
        library.rendseg_scan(
            *(pointer(t) for t in (given, out, totals, grand_total, counter)), ctypes.c_int64(blocks), threads
        )
        assert torch.equal(out, (given.cumsum(1) - given).int())
        assert torch.equal(totals, given.sum(1).int())
        assert grand_total.item() == given.sum().item()
        assert counter.item() == 0


def test_no_two_ops_define_one_name() -> None:
    build.build("together")
