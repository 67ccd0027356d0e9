"""The CUDA uncertainty, uncertain_points and selection on the CPU: exact, for every seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rendseg import reference
from tests.ops.cases_uncertain_points import bad_inputs, logits_cases

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
BAD = {
    f"{op}: {name}": (op, kwargs, exception, pattern)
    for name, op, kwargs, exception, pattern in bad_inputs()
    # Sparse tensors and those of another device come to no kernel of the emulation.
    if op != "sample_uncertain_points" and not name.startswith("sparse") and not name.endswith("elsewhere")
}
SEEDS = 3


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_uncertainty(emulated, case: str) -> None:
    logits, class_index = CASES[case]
    wanted = reference.uncertainty(logits, class_index)
    for seed in range(1 if wanted.numel() > 100_000 else SEEDS):
        emulated.seed(seed)
        assert_same(emulated.ops.uncertainty(logits, class_index), wanted)


@pytest.mark.parametrize("case", CASES)
def test_uncertain_points(emulated, case: str) -> None:
    logits, class_index = CASES[case]
    cells = logits.shape[2] * logits.shape[3]
    counts = {1, 2, cells // 3, cells - 1, cells, cells + 5} if cells < 1000 else {cells // 50}
    for seed, num_points in enumerate(sorted(counts - {0})):
        emulated.seed(seed)
        got = emulated.ops.uncertain_points(logits, num_points, class_index)
        for mine, wanted in zip(got, reference.uncertain_points(logits, num_points, class_index), strict=True):
            assert_same(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [*range(1, 20), 24, 31, 32, 33, 48, 64, 150, 193, 400, 1000])
def test_every_channel_is_seen(emulated, channels: int, dtype: torch.dtype) -> None:
    """The two largest sit at every pair of the channels at both ends and around a part, in both layouts."""
    ends = torch.tensor(sorted({c % channels for c in (0, 1, 2, 7, 8, 95, 96, 191, 192, 383, 384, -2, -1)}))
    first, second = torch.meshgrid(ends, ends, indexing="ij")
    logits = torch.zeros(1, channels, *first.shape, dtype=dtype)
    logits.scatter_add_(1, first[None, None], torch.full((1, 1, *first.shape), 5.0, dtype=dtype))
    logits.scatter_add_(1, second[None, None], torch.full((1, 1, *first.shape), 3.0, dtype=dtype))
    # 5 against 3, or 8 against 0 where both fall on one channel; a single channel holds 8.
    wanted = torch.where(first == second, -8.0, -2.0)[None]
    for seed, layout in enumerate((torch.contiguous_format, torch.channels_last)):
        emulated.seed(seed)
        laid_out = logits.clone(memory_format=layout)
        assert_same(emulated.ops.uncertainty(laid_out), wanted)
        for i, channel in enumerate(ends):
            laid_out[0, channel, i, 0] = math.nan
        spoilt = wanted.clone()
        spoilt[0, :, 0] = math.nan
        assert_same(emulated.ops.uncertainty(laid_out), spoilt)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_maps_that_start_anywhere(emulated, offset: int, dtype: torch.dtype) -> None:
    for shape in ((2, 5, 8, 12), (2, 5, 9, 7), (1, 8, 40, 20)):
        size = torch.Size(shape).numel()
        memory = torch.randn(size + offset, generator=torch.Generator().manual_seed(offset)).to(dtype)
        logits = memory[offset:].view(shape)
        last = memory[offset:].view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        for x in (logits, last, logits[:, 1:4], last[:, 1:4], logits[:, :, 1:], last[:, :, 1:]):
            assert_same(emulated.ops.uncertainty(x), reference.uncertainty(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_part_of_many_channels(emulated, dtype: torch.dtype) -> None:
    """Staged in several pieces, the last of which leaves rows that are not aligned."""
    x = torch.randn(2, 400, 7, 5, generator=torch.Generator().manual_seed(6)).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=layout)
        for part in (laid_out[:, :197], laid_out[:, 8:391], laid_out[:, 3:]):
            assert_same(emulated.ops.uncertainty(part), reference.uncertainty(part))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_maps(emulated, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Ties and NaN in maps of several chunks, of which each image goes another way."""
    logits = torch.randn(3, 3, 130, 150, generator=torch.Generator().manual_seed(4))
    logits[0, :, ::9, ::5] = math.nan
    logits[1] = logits[1].round()
    logits[2] = 0.0
    logits = logits.to(dtype, memory_format=layout)
    for seed, num_points in enumerate((1, 300, 2000, 19499, 19500)):
        emulated.seed(seed)
        got = emulated.ops.uncertain_points(logits, num_points)
        for mine, wanted in zip(got, reference.uncertain_points(logits, num_points), strict=True):
            assert_same(mine, wanted)


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_multiprocessors(emulated, processors: int) -> None:
    logits = torch.randn(2, 3, 140, 120, generator=torch.Generator().manual_seed(5))
    emulated.device(processors)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = logits.contiguous(memory_format=layout)
        indices, _ = emulated.ops.uncertain_points(laid_out, 500)
        assert_same(indices, reference.uncertain_points(logits, 500)[0])


def test_launches(emulated) -> None:
    for size, wanted in (((5, 7), 2), ((128, 128), 2), ((150, 120), 3), ((300, 240), 4)):
        before = emulated.launches()
        emulated.ops.uncertain_points(torch.zeros(2, 3, *size), 9)
        assert emulated.launches() - before == wanted
    before = emulated.launches()
    emulated.ops.uncertainty(torch.zeros(2, 3, 4, 4))
    emulated.ops.uncertain_points(torch.zeros(0, 3, 4, 4), 9)
    assert emulated.launches() - before == 1


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_input(emulated, case: str) -> None:
    op, kwargs, exception, pattern = BAD[case]
    with pytest.raises(exception, match=pattern):
        getattr(emulated.ops, op)(**kwargs)
