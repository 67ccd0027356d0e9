"""Triton launchers as kernels of the dispatcher; Triton and ``rendseg.kernels`` are imported at the first call."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from .schemas import with_defaults


@cache
def launcher(op: str) -> Callable[..., Any]:
    """The launcher of ``rendseg::<op>``: ``IMPLEMENTATIONS[op]`` of its file in ``kernels/``, with defaults."""
    module = importlib.import_module(f"rendseg.kernels.{_backends.triton_ops()[op]}")
    return with_defaults(op, module.IMPLEMENTATIONS[op])


@cache
def failure() -> str:
    """Why Triton cannot launch a kernel here; empty when it can. Asked once, at the first call."""
    if _backends.interpreted():
        return ""
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # a broken install, no C compiler for the launcher, an unknown GPU
        return f"{type(error).__name__}: {error}"
    return ""


def forced(op: str) -> Callable[..., Any]:
    """``rendseg::<op>`` while ``backend("triton")`` is in force."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _device_of(args):
            return launcher(op)(*args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(missing(op))

    return kernel if op in _backends.triton_ops() else refuse


def or_reference(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """``rendseg::<op>`` on a GPU where no compiled kernel is: Triton, or with one warning the reference."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if failure():
            _warn(failure())
            return reference(*args, **kwargs)
        with _device_of(args):
            return launcher(op)(*args, **kwargs)

    return kernel


def missing(op: str, device: object = "") -> str:
    """The words for an operator that has no Triton kernel, or none for this device."""
    if op not in _backends.triton_ops():
        return f'backend "triton" has no kernel of {op}: none is written. Use set_backend("auto")'
    devices = " or ".join(_backends.backends["triton"].devices)
    return (
        f'backend "triton" has no kernel of {op} for device {device}. '
        f'Use set_backend("auto") or move the tensors to {devices}'
    )


@cache
def _warn(cause: str) -> None:
    warnings.warn(
        f"the operators run on the PyTorch reference, because Triton cannot be used: {cause}. "
        'rendseg.set_backend("reference") silences this; `rendseg doctor` says what is usable',
        RuntimeWarning,
        stacklevel=3,
    )


def first_tensor(args: Sequence[Any]) -> Tensor | None:
    """The tensor whose device is that of the call."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    return first if isinstance(first, Tensor) else None


def _device_of(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    first = first_tensor(args)
    if first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
        return torch.cuda.device(first.device)
    return nullcontext()
