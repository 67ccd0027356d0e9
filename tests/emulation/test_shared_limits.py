"""Which kernels may have how much shared memory: threads against a device that refuses what was not permitted."""

from __future__ import annotations

import ctypes

import pytest

from tests.emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")

MOST = 232448  # what a block of sm_90 may have
NUMBERS = ctypes.c_int64 * 6


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = build.load("shared_limits")
    loaded.rendseg_limits_race.restype = loaded.rendseg_limits_refused_once.restype = ctypes.c_int64
    return loaded


def raised(library: ctypes.CDLL, sizes: list[int], at_least: int) -> list[int]:
    """1 where a launch raised the limit, 0 where it did not, -1 where the device refused it."""
    given, found = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(sizes))()
    library.rendseg_limits_sequence(given, ctypes.c_int64(len(sizes)), ctypes.c_int64(at_least), found)
    return list(found)


def test_no_thread_lowers_the_limit_of_another(library) -> None:
    raises = NUMBERS()
    assert library.rendseg_limits_race(8, 400, ctypes.c_int64(MOST), raises) == 0
    assert list(raises) == [1] * 6  # once for each kernel on each device, whoever came first


def test_limits_that_rise_step_by_step(library) -> None:
    """Where a limit is no more than what the launch at hand asks for, later ones raise it, and none is refused."""
    raises = NUMBERS()
    assert library.rendseg_limits_race(8, 400, ctypes.c_int64(0), raises) == 0
    assert all(1 <= n <= 200 for n in raises)


def test_when_the_limit_is_raised(library) -> None:
    small, large = 20 * 1024, 100 * 1024
    assert raised(library, [large, small, large, MOST, small], MOST) == [1, 0, 0, 0, 0]
    # A first launch asks even below 48 KB: static shared memory, which it does not know of, counts as well.
    assert raised(library, [small, small, large, small, large, MOST], 0) == [1, 0, 1, 0, 0, 1]


def test_a_refusal_is_not_remembered(library) -> None:
    assert library.rendseg_limits_refused_once() == 2
