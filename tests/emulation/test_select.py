"""The CUDA selection on the CPU, on raw keys: exact against a stable sort, for every way that it can take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rendseg.reference.uncertain_points import cell_centres
from tests.emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")

NEVER = 0x7FFFFFFF
SMALL, SINGLE_PASS, TWO_PASSES = (2, 83, 101), (2, 140, 123), (2, 259, 257)  # images, height, width


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.load("select")


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def smallest(keys: Tensor, k: int) -> Tensor:
    return keys.sort(dim=1, stable=True).indices[:, :k].sort(dim=1).values


def histograms_of(keys: Tensor) -> Tensor:
    return torch.stack([torch.bincount(row >> 20, minlength=2048) for row in keys]).int()


def select(
    library: ctypes.CDLL,
    keys: Tensor,
    k: int,
    size: tuple[int, int],
    histograms: Tensor | None,
    bounds: Tensor | None = None,
    limits: Tensor | None = None,
) -> Tensor:
    images, (height, width) = len(keys), size
    narrow = keys.int()
    indices = torch.full((images, k), -1, dtype=torch.int64)
    coords = torch.full((images, k, 2), float("nan"))
    library.rendseg_select(
        pointer(narrow),
        pointer(histograms),
        *sizes(images, height, width, k),
        pointer(bounds),
        pointer(limits),
        pointer(indices),
        pointer(coords),
    )
    assert torch.equal(coords, cell_centres(indices, height, width))
    return indices


def random(low: int, high: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda generator, cells: torch.randint(low, high, (cells,), generator=generator)


def mixed(*parts: tuple[float, int, int]) -> Callable[[torch.Generator, int], Tensor]:
    """Shares of the cells, in random places, with keys of [low, high)."""

    def make(generator: torch.Generator, cells: int) -> Tensor:
        keys = torch.cat(
            [torch.randint(low, high, (int(share * cells),), generator=generator) for share, low, high in parts]
        )
        keys = torch.cat([keys, torch.full((cells - len(keys),), NEVER - 1)])
        return keys[torch.randperm(cells, generator=generator)]

    return make


def runs(*keys: int) -> Callable[[torch.Generator, int], Tensor]:
    """Equal keys side by side."""
    return lambda _, cells: torch.tensor(keys).repeat_interleave(-(-cells // len(keys)))[:cells]


BIN = 700 << 20
MAPS: dict[str, tuple[Callable[[torch.Generator, int], Tensor], tuple[float, ...]]] = {
    # name: keys of an image, shares of the cells to select (0 for one cell)
    "any": (random(0, 2**31 - 1), (0, 0.004, 0.3, 0.9999, 1)),
    "margins": (lambda g, n: torch.randn(n, generator=g).abs().view(torch.int32).long() + 1, (0, 0.004, 0.5, 1)),
    "ties in a bin": (random(BIN, BIN + 5), (0.004, 0.5, 1)),
    "few in the bin": (mixed((0.02, 5, 1000), (0.05, BIN, BIN + 2**20), (0.9, BIN + 2**20, NEVER)), (0.01, 0.04, 0.07)),
    "the whole bin": (mixed((0.5, BIN, BIN + 2**20), (0.5, BIN + 2**20, NEVER)), (0.25, 0.5, 0.500001)),
    "flat": (runs(0), (0, 0.004, 0.7, 1)),
    "flat, never selected": (runs(NEVER), (0.004, 1)),
    "flat but for some": (mixed((0.01, 3, 50), (0.98, BIN + 77, BIN + 78)), (0.005, 0.01, 0.3, 0.995)),
    "crowded": (random(BIN, BIN + 2**20), (0, 0.004, 0.5, 0.999)),
    "crowded, flat in 22 bits": (
        mixed((0.1, BIN, BIN + 512), (0.6, BIN + 512, BIN + 513), (0.3, BIN + 1024, BIN + 4096)),
        (0.05, 0.4, 0.8),
    ),
    "crowded, the whole of 22 bits": (mixed((0.4, BIN, BIN + 512), (0.6, BIN + 512, BIN + 2**20)), (0.2, 0.4)),
    "crowded in 22 bits": (mixed((0.05, 1, 2), (0.9, BIN + 512, BIN + 1024)), (0.02, 0.5)),
    "crowded in 22 bits, ties": (mixed((0.4, BIN + 600, BIN + 601), (0.6, BIN + 900, BIN + 903)), (0.2, 0.7)),
    "runs": (runs(9, BIN, 9, BIN + 2**20, 9, BIN, NEVER), (0.2, 0.5, 0.6)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [SMALL, SINGLE_PASS, TWO_PASSES], ids=str)
def test_selects_what_a_stable_sort_does(library, shape, name: str) -> None:
    images, height, width = shape
    make, shares = MAPS[name]
    generator = torch.Generator().manual_seed(len(name) + width)
    keys = torch.stack([make(generator, height * width) for _ in range(images)])
    for seed, share in enumerate(shares):
        k = max(1, int(share * height * width))
        library.rendseg_emulation_seed(ctypes.c_uint64(seed))
        got = select(library, keys, k, (height, width), histograms_of(keys))
        assert torch.equal(got, smallest(keys, k)), f"k = {k}"


@pytest.mark.parametrize("shape", [SMALL, SINGLE_PASS, (1, 1, 1), (3, 1, 40000), (2, 8192, 3)], ids=str)
def test_counts_for_itself(library, shape) -> None:
    images, height, width = shape
    keys = torch.randint(0, 2**31, (images, height * width), generator=torch.Generator().manual_seed(width))
    k = (height * width + 9) // 10
    got = select(library, keys, k, (height, width), None)
    assert torch.equal(got, smallest(keys, k))


def test_cells_that_are_never_selected_need_no_count(library) -> None:
    images, height, width = SINGLE_PASS
    keys = torch.randint(0, 2040 << 20, (images, height * width), generator=torch.Generator().manual_seed(1))
    keys[:, ::2] = NEVER
    histograms = histograms_of(keys)
    histograms[:, -1] = 0
    for k in (1, 100, height * width // 2):
        assert torch.equal(select(library, keys, k, (height, width), histograms), smallest(keys, k))


@pytest.mark.parametrize("name", ["margins", "flat", "crowded", "crowded in 22 bits, ties", "the whole bin"])
@pytest.mark.parametrize("shape", [(2, 140, 124), (2, 260, 258), (1, 6000, 4)], ids=str)
def test_keys_of_some_gaps(library, shape, name: str) -> None:
    """Gaps with a bound beyond the limit count as never selected, with any keys in their place."""
    images, height, width = shape
    generator = torch.Generator().manual_seed(height)
    keys = torch.stack([MAPS[name][0](generator, height * width) for _ in range(images)])
    bounds = torch.randint(0, 2048, (images, height // 2 + 1, width // 2 + 1), generator=generator)
    bounds[torch.rand(bounds.shape, generator=generator) < 0.3] = 0xFFFF
    limits = torch.randint(200, 1200, (images,), generator=generator)
    given = (bounds == 0xFFFF) | (bounds <= limits[:, None, None])
    rows, columns = (torch.arange(height) + 1) // 2, (torch.arange(width) + 1) // 2
    given = given[:, rows[:, None], columns].flatten(1)
    wanted_keys = keys.where(given, NEVER)
    histograms = histograms_of(wanted_keys)
    histograms[:, -1] = 0  # nobody counts those
    poisoned = keys.where(given, 0)
    narrow = bounds.to(torch.int32).where(bounds < 2**15, bounds - 2**16).to(torch.int16)
    for seed, share in enumerate((0.004, 0.2, 0.3)):
        k = int(share * height * width)
        library.rendseg_emulation_seed(ctypes.c_uint64(seed))
        got = select(library, poisoned, k, (height, width), histograms, narrow, limits.int())
        assert torch.equal(got, smallest(wanted_keys, k)), f"k = {k}"


def test_images_are_apart_and_the_order_of_threads_does_not_matter(library) -> None:
    """Every kind of map side by side, each on another way through the kernels, seed after seed."""
    _, height, width = TWO_PASSES
    generator = torch.Generator().manual_seed(3)
    keys = torch.stack([make(generator, height * width) for make, _ in MAPS.values()])
    histograms = histograms_of(keys)
    k = height * width // 3
    wanted = smallest(keys, k)
    for seed in range(2 if build.SANITIZE else 5):
        library.rendseg_emulation_seed(ctypes.c_uint64(seed))
        assert torch.equal(select(library, keys, k, (height, width), histograms.clone()), wanted)


@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 700, 5000])
def test_within_a_block(library, threads: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for seed, high in enumerate((2**31 - 1, 2**20, 3, 1)):
        keys = torch.randint(0, high, (1, count), generator=generator)
        narrow = keys.int()
        for k in {1, (count + 1) // 2, count}:
            library.rendseg_emulation_seed(ctypes.c_uint64(seed))
            indices = torch.full((1, k), -1, dtype=torch.int64)
            library.rendseg_block_select(pointer(narrow), *sizes(count, k), threads, pointer(indices))
            assert torch.equal(indices, smallest(keys, k))
