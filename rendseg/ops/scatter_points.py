"""Writing refined points back, PointRend (Kirillov et al. 2020), section 3.1. N images, C classes, P points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._types import explained
from ..reference.scatter_points import _scatter_points_backward as reference_backward
from ..reference.scatter_points import check_indices, check_scatter_points
from ..reference.scatter_points import scatter_points as reference_scatter
from ..reference.scatter_points import scatter_points_ as reference_scatter_
from ._register import impl, register, use_reference

__all__ = ["scatter_points", "scatter_points_"]


@explained
def scatter_points_(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """In place: ``logits[n, :, indices[n, p]] = values[n, :, p]`` over flattened cells; returns ``logits``.

    Args:
        logits: ``[N, C, H, W]``, float16, bfloat16, float32 or float64, with any strides that do not overlap.
        indices: ``[N, P]`` int64 in ``[0, H*W)``, distinct within an image, as selection returns them. If an index
            occurs twice, it is undefined which value is written.
        values: ``[N, C, P]`` in the dtype of ``logits``.

    The gradient of ``logits`` is zero at the replaced cells; that of ``values`` is gathered there. Second derivatives
    work too. As with every in-place operation of PyTorch, a leaf that requires a gradient is an error.

    Autocast: ``values`` are cast to the dtype of ``logits``. Outside autocast another dtype is an error.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: a wrong dtype.
        IndexError: on the CPU, an index outside ``[0, H*W)``; nothing is written then. A GPU asserts on the device.
        RuntimeError: tensors on different devices, ``logits`` that overlap themselves or another argument, or a leaf,
            or a view of one, that requires a gradient.

    Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    if use_reference("scatter_points_", logits):
        return reference_scatter_(logits, indices, _as_logits(logits, values))
    if torch.compiler.is_compiling() and _needs_grad(logits, values):
        return logits.copy_(torch.ops.rendseg.scatter_points(logits, indices, values))
    if torch.is_grad_enabled() and logits.requires_grad and logits._is_view() and logits._base.is_leaf:  # type: ignore[union-attr]
        # PyTorch finds it out only when the points are written.
        raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
    torch.ops.rendseg.scatter_points_(logits, indices, values)
    return logits


@explained
def scatter_points(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The same as ``scatter_points_``, but out of place: a copy of ``logits [N, C, H, W]`` with the points written.

    The result has the layout of ``logits``. Arguments, gradients, autocast, errors and source are those of
    ``scatter_points_``, except that a leaf that requires a gradient is allowed here.
    """
    if use_reference("scatter_points", logits):
        return reference_scatter(logits, indices, _as_logits(logits, values))
    return torch.ops.rendseg.scatter_points(logits, indices, values)


def _as_logits(logits: Tensor, values: Tensor) -> Tensor:
    """``values`` in the dtype of ``logits``, under autocast."""
    autocast = torch.is_autocast_enabled(logits.device.type) and values.is_floating_point()
    return values.to(logits.dtype) if autocast else values


def _needs_grad(logits: Tensor, values: Tensor) -> bool:
    return torch.is_grad_enabled() and (logits.requires_grad or values.requires_grad)


def _fake(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    check_scatter_points(logits, indices, values)
    return torch.empty_like(logits)


def _fake_(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    check_scatter_points(logits, indices, values)


def _fake_backward(grad: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    check_indices(indices, grad, "grad")
    return torch.empty_like(grad), grad.new_empty((*grad.shape[:2], indices.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    rest, gathered = torch.ops.rendseg._scatter_points_backward(grad, *ctx.saved_tensors)
    return rest if ctx.needs_input_grad[0] else None, None, gathered if ctx.needs_input_grad[2] else None


def _setup_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, rest: Tensor, gathered: Tensor) -> tuple[Tensor, None]:
    return torch.ops.rendseg.scatter_points(rest, *ctx.saved_tensors, gathered), None


def _reference_scatter_(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    reference_scatter_(logits, indices, values)


register("scatter_points", reference=reference_scatter, fake=_fake, backward=_backward, setup_context=_setup_context)
register("scatter_points_", reference=_reference_scatter_, fake=_fake_)
register(
    "_scatter_points_backward",
    reference=reference_backward,
    fake=_fake_backward,
    backward=_double_backward,
    setup_context=_setup_backward,
)


class _ScatterInPlace(torch.autograd.Function):
    """The in-place form under autograd; PyTorch's ``register_autograd`` takes no mutation."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        torch.ops.rendseg.scatter_points_(logits, indices, values)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(indices)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        return _backward(ctx, grad)


def _autograd(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    if not _needs_grad(logits, values):
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.rendseg.scatter_points_(logits, indices, values)
    elif torch.compiler.is_compiling():  # tracing knows no in-place Function: the copy is functionalised away
        logits.copy_(torch.ops.rendseg.scatter_points(logits, indices, values))
    else:
        if logits.requires_grad and logits.is_leaf:  # before anything is written, in PyTorch's words
            check_scatter_points(logits, indices, values)
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        _ScatterInPlace.apply(logits, indices, values)


def _bump_version(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.rendseg.scatter_points_(logits, indices, values)
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


def _negative(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    """Views whose memory holds the negative values, as the imaginary part of a conjugate."""
    check_scatter_points(logits, indices, values)
    if logits.is_neg():
        logits, values = torch._neg_view(logits), torch._neg_view(values)
    torch.ops.rendseg.scatter_points_(logits, indices, values.resolve_neg())


impl("scatter_points_", _autograd, "Autograd")
impl("scatter_points_", _negative, "Negative")
impl("scatter_points_", _bump_version, "ADInplaceOrView")


def _autocast(name: str, key: torch._C.DispatchKey) -> Any:
    def kernel(logits: Tensor, indices: Tensor, values: Tensor) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if values.is_floating_point():
                values = values.to(logits.dtype)
            return getattr(torch.ops.rendseg, name)(logits, indices, values)

    return kernel


for _key in ("AutocastCPU", "AutocastCUDA"):
    for _name in ("scatter_points", "scatter_points_"):
        impl(_name, _autocast(_name, getattr(torch._C.DispatchKey, _key)), _key)
