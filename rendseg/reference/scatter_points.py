"""Writing refined points back. Shapes: N images, C classes, H W grid, P points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _checks as check
from ._types import checked


def check_indices(indices: Tensor, of: Tensor, of_name: str) -> None:
    check.strided(indices, "indices")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 2 or indices.shape[0] != of.shape[0]:
        raise ValueError(
            f"indices must have shape [N, P] with N = {of.shape[0]} as in {of_name}, got {check.shape_of(indices)}"
        )
    check.same_device(indices, "indices", of, of_name)


def check_scatter_points(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    """The checks of :func:`scatter_points` except that of the range of the indices; shared with the fake kernels."""
    check.logits(logits)
    check_indices(indices, logits, "logits")
    n, c = logits.shape[:2]
    check.strided(values, "values")
    if values.dim() != 3 or tuple(values.shape) != (n, c, indices.shape[1]):
        raise ValueError(
            f"values must have shape [N, C, P] = [{n}, {c}, {indices.shape[1]}] as in logits and indices, "
            f"got {check.shape_of(values)}"
        )
    if values.dtype != logits.dtype:
        raise TypeError(f"values must have the dtype of logits ({logits.dtype}), got {values.dtype}")
    check.same_device(values, "values", logits, "logits")


def _check_range(indices: Tensor, cells: int) -> None:
    if indices.numel() == 0:
        return
    if indices.is_cuda:  # no wait for the device: it asserts
        torch._assert_async(((indices >= 0) & (indices < cells)).all())
    elif not (0 <= int(indices.min()) and int(indices.max()) < cells):
        raise IndexError(
            f"indices must lie in [0, H*W) = [0, {cells}), got values from {int(indices.min())} to {int(indices.max())}"
        )


def _share_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors have an element in common."""
    (begin_a, end_a), (begin_b, end_b) = ((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (a, b))
    return begin_a < end_b and begin_b < end_a


def refuse_overlap(logits: Tensor, *reads: Tensor) -> None:
    """In PyTorch's words, before anything is written."""
    tensors = (logits, *reads)
    if torch.compiler.is_compiling() or any(t.is_meta or type(t) not in (Tensor, Parameter) for t in tensors):
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        return
    overlap = torch._debug_has_internal_overlap
    if overlap(logits) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    for read in reads:
        if logits.numel() and read.numel() and not overlap(logits) and not overlap(read) and _share_bytes(logits, read):
            raise RuntimeError(
                "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single "
                "memory location. Please clone() the tensor before performing the operation."
            )


@checked
def scatter_points(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``out[n, :, indices[n, p]] = values[n, :, p]``, everything else as in ``logits``; out of place."""
    check_scatter_points(logits, indices, values)
    _check_range(indices, logits.shape[2] * logits.shape[3])
    flat = logits.flatten(2)
    out = flat.scatter(2, indices.unsqueeze(1).expand(-1, flat.shape[1], -1), values).view(logits.shape)
    return torch.empty_like(logits).copy_(out)  # in the layout of logits


@checked
def scatter_points_(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The in-place form of :func:`scatter_points`; refuses arguments that share memory with ``logits``."""
    check_scatter_points(logits, indices, values)
    refuse_overlap(logits, values, indices)
    return logits.copy_(scatter_points(logits, indices, values))


def _scatter_points_backward(grad: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``logits`` (zero at the replaced cells) and of ``values`` (gathered)."""
    check.logits(grad, "grad")
    check_indices(indices, grad, "grad")
    _check_range(indices, grad.shape[2] * grad.shape[3])
    flat = grad.flatten(2)
    cells = indices.unsqueeze(1).expand(-1, flat.shape[1], -1)
    rest = torch.empty_like(grad).copy_(flat.scatter(2, cells, 0).view(grad.shape))
    return rest, flat.gather(2, cells)
