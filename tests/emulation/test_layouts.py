"""Where the parts of scratch and shared memory lie, and which kernels of encode fit a GPU: plain numbers."""

from __future__ import annotations

import ctypes

import pytest

from tests.emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")

SM_80, SM_90 = 166_912, 232_448  # bytes of shared memory that a block may have
F16, BF16, F32 = range(3)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.load("layouts")


def numbers(function, *args: int) -> list[int]:
    found = (ctypes.c_int64 * 40)()
    count = function(*args, found)
    return list(found[:count])


def assert_packed(parts: list[int]) -> None:
    """Offset and end of each part, then the size: one after the other from 0 on, no byte between them, none shared."""
    assert parts[0] == 0
    assert parts[1:-1:2] == parts[2::2]


@pytest.mark.parametrize("which", range(7))
def test_shared_memory_has_no_gaps(library, which: int) -> None:
    for steps in (2, 6, 32):
        parts = numbers(library.rendseg_shared_map, which, steps)
        if which in (3, 6):  # weights in the place of the parts of the distances
            assert parts[0] == 0 and parts[1:-2:2] == parts[2:-1:2] and parts[-2] <= parts[-1]
        else:
            assert_packed(parts)
        assert all(offset % 16 == 0 for offset in parts[:-1:2])  # 16-byte copies


def test_the_maps_in_the_headers(library) -> None:
    """The offsets that stand in encode_mma_forward.cuh, encode_mma_backward.cuh and encode_tf32.cuh."""
    forward = numbers(library.rendseg_shared_map, 0, 32)
    assert forward[:11:2] == [0, 32_768, 33_792, 38_912, 39_040, 39_424]
    assert forward[-1] == 39_424 + 2 * 64 * (512 + 8) * 2 + 512 * 4
    assert numbers(library.rendseg_shared_map, 1, 32)[:7:2] == [0, 32_768, 33_792, 38_912]
    assert numbers(library.rendseg_shared_map, 2, 32)[:3:2] == [0, 16_384]
    assert numbers(library.rendseg_shared_map, 4, 32)[:9:2] == [0, 32_768, 33_792, 33_920, 34_304]
    assert numbers(library.rendseg_shared_map, 5, 32)[:13:2] == [0, 32_768, 33_792, 33_920, 34_048, 34_176, 34_560]
    assert numbers(library.rendseg_shared_map, 6, 32)[:5:2] == [0, 8_192, 16_384]


def fit(library, element: int, backward: bool, channels: int, limit: int, last: bool = True) -> tuple[int, ...]:
    steps = -(-channels // 16)
    steps += steps % 2 if element == F32 else 0
    found = (ctypes.c_int64 * 4)()
    library.rendseg_mma_fit(element, backward, last, steps, ctypes.c_int64(limit), found)
    return tuple(found)


def test_what_fits(library) -> None:
    """Positions of a tile, tiles under way, rounds of an exchange."""
    for last in (False, True):
        for element in (F16, BF16):
            assert fit(library, element, False, 512, SM_90, last)[:3] == (64, 2, 1)
            assert fit(library, element, False, 512, SM_80, last)[:3] == (32, 2, 1)
            assert fit(library, element, True, 512, SM_90, last)[:3] == (32, 2, 1)
            assert fit(library, element, True, 512, 210_000, last)[:3] == (32, 2, 2)
            assert fit(library, element, True, 512, SM_80, last)[:3] == (32, 1, 2)
            assert fit(library, element, True, 128, SM_80, last)[:3] == (32, 2, 1)
        assert fit(library, F32, False, 512, SM_90, last)[:3] == (32, 2, 1)
        assert fit(library, F32, False, 512, SM_80, last)[:3] == (32, 1, 1)
        assert fit(library, F32, True, 512, SM_90, last)[:3] == (32, 1, 1)
        assert fit(library, F32, True, 320, SM_80, last)[:3] == (32, 1, 1)
        assert fit(library, F32, True, 352, SM_80, last) == (0, 0, 0, 0)
    # As encode_mma_backward.cuh has it.
    assert fit(library, BF16, True, 512, SM_90, False)[3] == 231_456
    assert fit(library, BF16, True, 512, SM_80, False)[3] == 161_312


@pytest.mark.parametrize("element", [F16, BF16, F32])
@pytest.mark.parametrize("backward", [False, True])
def test_a_fit_needs_its_bytes_and_no_more(library, element: int, backward: bool) -> None:
    """What is chosen fits; a limit of just its bytes chooses the same, one byte less something smaller."""
    for channels in (16, 64, 200, 512):
        limit, seen = SM_90, []
        while (found := fit(library, element, backward, channels, limit))[3] > 0:
            assert found[3] <= limit and fit(library, element, backward, channels, found[3]) == found
            seen.append(found)
            limit = found[3] - 1
        assert limit < seen[-1][3] and len(seen) in (1, 2, 3)


def test_scratch_memory(library) -> None:
    """Parts lie apart, each at a multiple of 256 bytes."""
    for wide in (0, 1):
        batch, positions, channels, codes = 3, 700, 100, 30
        sizes = [ctypes.c_int64(n) for n in (batch, positions, channels, codes)]
        *places, total = numbers(library.rendseg_scratch, wide, *sizes)
        assert places == sorted(set(places)) and all(place % 256 == 0 for place in (*places, total))
        assert total - places[-1] >= 4 * 32 * batch and places[4] - places[3] >= batch * 32 * 112 * 4


def test_memory_of_a_selection(library) -> None:
    small = [ctypes.c_int64(n) for n in (2, 16_384)]
    assert not any(numbers(library.rendseg_select_map, *small))
    images, cells, chunks = 3, 300_000, 37
    zeroed, workspace = [], numbers(library.rendseg_select_map, *(ctypes.c_int64(n) for n in (images, cells)))
    zeroed, workspace = workspace[:7], workspace[7:]
    for parts in (zeroed, workspace):
        assert all(end <= begin for end, begin in zip(parts[1:-1:2], parts[2::2], strict=True))
        assert all(place % 128 == 0 for place in (*parts[:-1:2], parts[-1]))
    assert [end - begin for begin, end in zip(zeroed[:-1:2], zeroed[1::2], strict=True)] == [120, 24_576, 24_576]
    wanted = [8 * images * (chunks + 1), 4 * images * 32_768, 4 * images * 32_768]
    assert [end - begin for begin, end in zip(workspace[:-1:2], workspace[1::2], strict=True)] == wanted
