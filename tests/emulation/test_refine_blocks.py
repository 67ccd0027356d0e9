"""How many points refine gives to a block: the time counted in bytes and products decides."""

from __future__ import annotations

import ctypes
import math

import pytest

from tests.emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")

SIZES = (32, 64, 80, 128)
LIMIT = 232448  # what a block of sm_90 may have


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.load("refine_blocks")


def block(
    library: ctypes.CDLL, points: int, classes: int = 19, size: int = 4, processors: int = 132, limit: int = LIMIT
) -> tuple[int, int, int]:
    """Points to a block, its bytes of shared memory, bytes of packed weights."""
    found = (ctypes.c_int64 * 2)()
    numbers = [ctypes.c_int64(n) for n in (size, classes, 256, points)]
    got = library.rendseg_refine_block(*numbers, ctypes.c_int(processors), ctypes.c_int64(limit), found)
    return got, found[0], found[1]


def microseconds(points: int, size: int, processors: int, weights: int, element_size: int) -> float:
    """The weights of every block at 5.5 TB/s for 132 processors, or the products of the busiest processor at 63 % of
    the tensor cores' peak (495 TFLOP/s of tf32, 989 of bfloat16), whichever takes longer.
    """
    blocks = math.ceil(points / size)
    outputs_times_inputs = weights / element_size
    peak = 495e12 if element_size == 4 else 989e12
    products = 2 * outputs_times_inputs * size * math.ceil(blocks / processors) / (0.63 * peak / 132)
    return 1e6 * max(weights * blocks / (5.5e12 * processors / 132), products)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("classes", [1, 19])
@pytest.mark.parametrize("processors", [108, 132])
def test_no_other_size_is_much_faster(library, processors: int, classes: int, element_size: int) -> None:
    """By a count that is not the one of the code: within a fifth of the best, from a few points to many."""
    for points in (1, 300, 1000, 2000, 3000, *range(4096, 70_000, 1733), 129_536):
        chosen, _, weights = block(library, points, classes, element_size, processors)
        times = {size: microseconds(points, size, processors, weights, element_size) for size in SIZES}
        assert times[chosen] <= 1.2 * min(times.values()), (points, chosen, times)


def test_the_workloads(library) -> None:
    """One and two images of Cityscapes, the batch of ADE20K, instance masks; weights as counted by hand."""
    assert block(library, 8192) == (80, 80 * (280 * 4 + 16 + 2 * 32 + 16), (3 * 32 + 3) * 35 * 256)
    assert block(library, 2 * 8192)[0] == 128
    assert block(library, 8192, size=2)[::2] == (80, (3 * 32 + 3) * 18 * 256)
    assert block(library, 16 * 8096, classes=150)[0] == 128
    assert block(library, 100 * 784, classes=1)[0] == 128
    # The sizes of test_block_sizes in test_refine.py.
    assert [block(library, 303, processors=p)[0] for p in (132, 10, 5, 3)] == list(SIZES)


def test_blocks_fit(library) -> None:
    """The largest that the shared memory holds, where the count wants a larger one; 0 where it holds none."""
    for size in (128, 80, 64, 32):
        limit = size * (280 * 4 + 16 + 2 * 32 + 16)
        assert block(library, 10**6, limit=limit)[:2] == (size, limit)
        assert block(library, 10**6, limit=limit - 1)[0] < size
    assert block(library, 10**6, limit=32 * 1216 - 1)[0] == 0
