"""What the op tests share: instruction sets, poisoned memory, the tolerance, thread counts, the ways to call an op."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library

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


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What the CPU's allocator hands out holds junk: NaN (every second half, all of float32), 1.7e308, large integers.

    So a kernel that leaves part of its output unwritten, or takes fresh memory for zeros, gives a wrong result; without
    this it mostly meets zeros from the system or the right values of the call before.
    """
    c10 = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    switch = ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    before, switch.value = switch.value, True
    try:
        yield
    finally:
        switch.value = before


# What sums, a softmax and positions in a map lose in the arithmetic of the kernels, against the largest value. It is
# float64 for float64 tensors, else float32.
ARITHMETIC = {torch.float64: 1e-12, torch.float32: 2e-5}


def close(got: Tensor, wanted: Tensor, compute: torch.dtype, what: str = "result") -> None:
    """Within what the arithmetic in ``compute`` loses and one rounding to the dtype, against the largest value.

    ``wanted`` comes from float64 arithmetic on the same inputs, which are those that were rounded to the dtype.
    """
    assert got.shape == wanted.shape, what
    if wanted.numel() == 0:
        return
    bound = (ARITHMETIC[compute] + torch.finfo(got.dtype).eps) * max(wanted.abs().max().item(), 1e-3)
    error = (got.double() - wanted).abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


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
    """PyTorch's opcheck with every test of it."""
    library.opcheck(op, args, dict(kwargs or {}), **options)


def backends_to_test() -> list[str]:
    """Backends of ``rendseg.backend`` that can be asked for here."""
    return [name for name in ("auto", "cpp", "reference") if name == "auto" or rendseg.backends[name].usable]
