"""The CUDA ops on the CPU: see cuda_on_cpu.h."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest

from tests.emulation import build

_LOADED: list[build.Emulated] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the sanitizers, which are slow, float16 stands for the same case in bfloat16 (one template, one size), and
    of many cases of one test a tenth is run, chosen by their names. ``RENDSEG_SANITIZE_ALL=1`` runs every one.
    """
    if not build.SANITIZE or os.environ.get("RENDSEG_SANITIZE_ALL") == "1":
        return
    names = {item.nodeid for item in items}
    kept: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "bfloat16" not in item.nodeid or item.nodeid.replace("bfloat16", "float16") not in names:
            kept.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = set()
    for cases in kept.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.rpartition("::")[2].encode()))
        chosen |= {item.nodeid for item in cases[: max(4, -(-len(cases) // 10))]}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]


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
