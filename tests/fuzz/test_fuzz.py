"""2,000 drawn calls of every operator; ``make fuzz`` runs 50,000. And the fuzz notices what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from rendseg import ops, reference
from tests.fuzz import __main__ as fuzz
from tests.fuzz import compare
from tests.fuzz.calls import OPS, draw


def test_every_operator_is_drawn() -> None:
    assert set(OPS) == set(ops.__all__)


@pytest.mark.slow
def test_2000_calls() -> None:
    done = list(fuzz.batches(0, 2000, "compiled"))
    counts = Counter(result for _, result, _ in done)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    assert [seed for seed, _, _ in done] == list(range(2000))
    assert not [each for each in done if each[1] not in compare.GOOD]
    assert counts[compare.EQUAL] > 1000 and counts[compare.REFUSED] > 300 and counts[compare.TIE] < 20


def test_a_seed_is_one_call() -> None:
    assert all(str(draw(seed)) == str(draw(seed)) for seed in range(20))


def _run(change: Any) -> Counter[str]:
    def run(name: str, arguments: dict[str, Any]) -> Any:
        return change(name, getattr(reference, name)(**arguments))

    return Counter(compare.judge(seed, run)[0] for seed in range(90))


def test_wrong_values_and_other_outcomes_are_noticed() -> None:
    def off(name: str, result: Any) -> Any:
        return result + 1 if isinstance(result, torch.Tensor) and name != "scatter_points_" else result

    def refuse(name: str, result: Any) -> Any:
        raise ValueError("two\nlines")

    right = _run(lambda name, result: result)
    assert set(right) == {compare.EQUAL, compare.REFUSED}
    assert _run(off)[compare.WRONG] > 15
    assert _run(refuse)[compare.DIFFERENT] == right[compare.EQUAL]


@pytest.mark.parametrize(
    "then, outcome, words",
    [("os.abort()", fuzz.CRASH, "status -6"), ("time.sleep(600)", fuzz.HANG, "no answer for 1 s")],
    ids=["crash", "hang"],
)
def test_a_process_that_dies_or_hangs(then: str, outcome: str, words: str) -> None:
    program = f"import os, time; print('7\\nrefused\\t', flush=True); print('8', flush=True); {then}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    first, last = fuzz._watched(process, 7, 5, patience=1)
    assert first == (7, compare.REFUSED, "") and last[:2] == (8, outcome) and words in last[2]
