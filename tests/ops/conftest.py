"""Every op test runs on poisoned memory; ``isa`` runs one once for each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from _common import each_isa, poisoned_memory, use_isa


@pytest.fixture(params=each_isa())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that the compiled kernels use; ``"none"`` without the extension."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
