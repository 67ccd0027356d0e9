"""The CUDA uncertainty, uncertain_points and selection on the CPU: exact, for every seed."""

from __future__ import annotations


import pytest
import torch
from torch import Tensor

from rendseg import reference
from tests.ops.cases_uncertain_points import bad_inputs, logits_cases

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
BAD = {
    f"{op}: {name}": (op, kwargs, exception, pattern)
    for name, op, kwargs, exception, pattern in bad_inputs()
    if op != "sample_uncertain_points"
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
