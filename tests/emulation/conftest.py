"""The CUDA ops on the CPU: see cuda_on_cpu.h."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulation import build

_LOADED: list[build.Emulated] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the sanitizers, which are slow, float16 stands for the same case in bfloat16: one template, one size."""
    if not build.SANITIZE:
        return
    names = {item.nodeid for item in items}
    twice = [
        item for item in items if "bfloat16" in item.nodeid and item.nodeid.replace("bfloat16", "float16") in names
    ]
    config.hook.pytest_deselected(items=twice)
    items[:] = [item for item in items if item not in twice]


@pytest.fixture
def emulated() -> Iterator[build.Emulated]:
    """``emulated.ops.<name>`` runs the CUDA implementation of an op on CPU tensors."""
    cause = build.missing()
    if cause:
        pytest.skip(f"no emulation: {cause}")
    if not _LOADED:  # at most once in a process, which can declare the operators only once
        _LOADED.append(build.Emulated())
    library = _LOADED[0]
    library.seed(0)
    library.device()
    yield library
    library.seed(0)
    library.device()
