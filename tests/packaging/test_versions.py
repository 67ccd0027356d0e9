"""docs/versions.md has a row for each version that `make versions` tries, and keeps what was not tried again."""

from __future__ import annotations

import pytest

from rendseg import _toolchain
from tests.packaging import versions


def test_the_page_has_every_row_and_the_oldest_is_the_minimum() -> None:
    assert versions.ROWS[0] == _toolchain.MIN_TORCH
    lines = [line for line in versions.PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [line.strip("| ").split(" | ") for line in lines[:1]] == [list(versions.COLUMNS)]
    assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {row}" for row in versions.ROWS]


def test_a_row_is_replaced_and_the_others_stay() -> None:
    page = versions.PAGE.read_text()
    changed = versions.with_row(page, "2.11", {"torch": "2.11.9", "nn": "7 passed"})
    (line,) = set(changed.splitlines()) - set(page.splitlines())
    cells = dict(zip(versions.COLUMNS, line.strip("| ").split(" | "), strict=True))
    assert cells.pop("row") == "2.11" and cells.pop("torch") == "2.11.9" and cells.pop("nn") == "7 passed"
    assert set(cells.values()) == {"not run"}
    with pytest.raises(SystemExit, match="0 lines that begin with '| 2.10 |'"):
        versions.with_row(page, "2.10", {})


@pytest.mark.parametrize(
    "status,output,cell",
    [
        (0, "....\n120 passed, 3 skipped in 4.00s\n", "120 passed"),
        (1, "F\n2 failed, 118 passed, 1 error in 4.00s\n", "3 failed, 118 passed"),
        (0, "mIoU 21.0\n", "passed"),
        (2, "rendseg: no such file\n", "failed (exit status 2)"),
        (124, "....", f"stopped after {versions.TIMEOUT} s"),
        (3, "120 passed in 4.00s\nINTERNALERROR\n", "120 passed, exit status 3"),
    ],
)
def test_what_a_cell_says(status: int, output: str, cell: str) -> None:
    assert versions.outcome(status, output) == cell
