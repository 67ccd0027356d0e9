"""What the op tests share: instruction sets, thread counts, the three ways to call an op, and opcheck."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import rendseg
from rendseg import _extension, reference

ISAS = ("default", "avx2", "avx512")


def each_isa() -> list[str]:
    """Instruction sets of the compiled kernels on this machine, narrowest first; ``["none"]`` without the extension."""
    if not _extension.LOADED:
        return ["none"]
    assert _extension.C is not None
    return list(ISAS[: ISAS.index(_extension.C.widest_isa()) + 1])


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set for a while; ``"none"`` (no extension) does nothing."""
    if name == "none":
        yield
        return
    assert _extension.C is not None
    before = _extension.C.isa()
    _extension.C.set_isa(name)
    try:
        yield
    finally:
        _extension.C.set_isa(before)


@pytest.fixture(params=each_isa())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set. Import this name into the test module to use it."""
    with use_isa(request.param):
        yield request.param


def thread_counts() -> tuple[int, ...]:
    """Thread counts that must agree bit for bit."""
    return (1, 2, 3)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def callers(name: str) -> dict[str, Callable[..., Any]]:
    """The three entrances of an op that must refuse bad input alike."""
    return {
        "reference": getattr(reference, name),
        "torch.ops": getattr(torch.ops.rendseg, name),
        "public": getattr(importlib.import_module("rendseg.ops"), name),
    }


def bad_input_runner(
    name: str, caller: str, kwargs: Mapping[str, Any], exception: type[Exception], pattern: str, **only: Any
) -> None:
    """Assert that one entrance of op ``name`` raises ``exception`` whose text matches ``pattern``."""
    function = callers(name)[caller]
    with pytest.raises(exception, match=pattern):
        function(**kwargs, **only)


def assert_opcheck(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
    """``torch.library.opcheck`` with every test of it."""
    torch.library.opcheck(op, args, dict(kwargs or {}), **options)


def backends_to_test() -> list[str]:
    """Backends of ``rendseg.backend`` that can be asked for here."""
    return [name for name in ("auto", "cpp", "reference") if name == "auto" or rendseg.backends[name].usable]
