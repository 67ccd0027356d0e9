"""How the tests are dealt out to the workers."""

from __future__ import annotations

import pytest

from tests.conftest import dealt


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("count, every", [(100, 9), (101, 200), (16, 1), (250, 4)])
def test_every_worker_begins_with_its_share_of_the_slow(workers: int, count: int, every: int) -> None:
    slow = [item % every == 0 for item in range(count)]
    order = dealt(list(range(count)), slow, workers)
    assert sorted(order) == list(range(count))
    begin, shares = 0, []
    for worker in range(workers):  # as pytest-xdist divides them
        end = begin + (count - begin) // (workers - worker)
        kinds = [slow[item] for item in order[begin:end]]
        assert kinds == sorted(kinds, reverse=True)
        shares.append(sum(kinds))
        begin = end
    assert begin == count and sum(shares) == sum(slow) and max(shares) - min(shares) <= 1
