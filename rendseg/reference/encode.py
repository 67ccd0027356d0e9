"""Encoding layer: Context Encoding (Zhang et al. 2018), section 3. B images, M positions, D channels, K codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from ._types import checked

Grads = tuple[Tensor, Tensor, Tensor]


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _check_codebook(x: Tensor, channels: int, codewords: Tensor, scale: Tensor | None) -> None:
    check.strided(codewords, "codewords")
    check.rank(codewords, "codewords", "[K, D]", 2)
    check.feature_dtype(codewords, "codewords")
    if codewords.shape[0] == 0:
        raise ValueError(f"codewords must hold at least one codeword, got shape {check.shape_of(codewords)}")
    if codewords.shape[1] != channels:
        raise ValueError(
            f"codewords must have shape [K, D] with D = {channels} as in x, got {check.shape_of(codewords)}"
        )
    check.same_device(codewords, "codewords", x, "x")
    if scale is None:
        return
    check.strided(scale, "scale")
    check.feature_dtype(scale, "scale")
    if scale.dim() != 1 or scale.shape[0] != codewords.shape[0]:
        raise ValueError(
            f"scale must have shape [K] with K = {codewords.shape[0]} as in codewords, got {check.shape_of(scale)}"
        )
    check.same_device(scale, "scale", x, "x")


def _check_positions(x: Tensor) -> None:
    check.strided(x, "x")
    check.rank(x, "x", "[B, M, D]", 3)
    check.feature_dtype(x, "x")


def _check_map(x: Tensor) -> None:
    check.strided(x, "x")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [B, D, H, W] or [B, D, M], got {check.shape_of(x)}")
    check.feature_dtype(x, "x")


def _check_three(tensor: Tensor, name: str, shape: str, wanted: tuple[int, int, int], x: Tensor) -> None:
    check.strided(tensor, name)
    check.feature_dtype(tensor, name)
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must have shape {shape} = {list(wanted)}, got {check.shape_of(tensor)}")
    check.same_device(tensor, name, x, "x")


def _check_scaled_l2(x: Tensor, codewords: Tensor, scale: Tensor, grad: Tensor | None = None) -> None:
    _check_positions(x)
    _check_codebook(x, x.shape[2], codewords, scale)
    if grad is not None:
        _check_three(grad, "grad", "[B, M, K]", (x.shape[0], x.shape[1], codewords.shape[0]), x)


def _check_aggregate(assignment: Tensor, x: Tensor, codewords: Tensor, grad: Tensor | None = None) -> None:
    _check_positions(x)
    _check_codebook(x, x.shape[2], codewords, None)
    _check_three(assignment, "assignment", "[B, M, K]", (x.shape[0], x.shape[1], codewords.shape[0]), x)
    if grad is not None:
        _check_three(grad, "grad", "[B, K, D]", (x.shape[0], codewords.shape[0], x.shape[2]), x)


def _check_encode(x: Tensor, codewords: Tensor, scale: Tensor, grad: Tensor | None = None) -> None:
    _check_map(x)
    _check_codebook(x, x.shape[1], codewords, scale)
    if grad is not None:
        _check_three(grad, "grad", "[B, K, D]", (x.shape[0], codewords.shape[0], x.shape[1]), x)


def _residual(x: Tensor, codewords: Tensor, wide: torch.dtype) -> Tensor:
    """``x[b, m] - codewords[k]``: ``[B, M, K, D]``."""
    return x.to(wide).unsqueeze(2) - codewords.to(wide)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """``values`` with the shape, dtype and memory layout of ``tensor``."""
    return torch.empty_like(tensor).copy_(values.reshape(tensor.shape))


@checked
def scaled_l2(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``scale[k] * ||x[b, m] - codewords[k]||^2``: ``[B, M, D] -> [B, M, K]``."""
    _check_scaled_l2(x, codewords, scale)
    wide = _wide(x, codewords, scale)
    distance = _residual(x, codewords, wide).square().sum(-1)
    return (scale.to(wide) * distance).to(_result_dtype(x, codewords, scale)).contiguous()


@checked
def aggregate(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    """``sum_m assignment[b, m, k] * (x[b, m] - codewords[k])``: ``[B, K, D]``."""
    _check_aggregate(assignment, x, codewords)
    wide = _wide(assignment, x, codewords)
    residual = _residual(x, codewords, wide)
    return (
        (assignment.to(wide).unsqueeze(-1) * residual).sum(1).to(_result_dtype(assignment, x, codewords)).contiguous()
    )


@checked
def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``aggregate(softmax_k(scaled_l2(x, c, s)), x, c)`` of ``x [B, D, H, W]`` or ``[B, D, M]``: ``[B, K, D]``."""
    _check_encode(x, codewords, scale)
    dtype, wide = _result_dtype(x, codewords, scale), _wide(x, codewords, scale)
    positions = x.flatten(2).transpose(1, 2).to(wide)
    codewords, scale = codewords.to(wide), scale.to(wide)
    assignment = scaled_l2(positions, codewords, scale).softmax(-1)
    return aggregate(assignment, positions, codewords).to(dtype)


# The gradients as formulas. r = x - c, d = ||r||^2, l = s d, a = softmax_k(l), E = sum_m a r; `grad` is the result's.


def _scaled_l2_backward(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """Gradients of ``x``, ``codewords`` and ``scale`` from ``grad [B, M, K]``."""
    _check_scaled_l2(x, codewords, scale, grad)
    wide = _wide(grad, x, codewords, scale)
    residual = _residual(x, codewords, wide)
    grad_l = grad.to(wide)
    grad_r = 2 * (scale.to(wide) * grad_l).unsqueeze(-1) * residual  # dl/dr = 2 s r
    grad_s = (grad_l * residual.square().sum(-1)).sum((0, 1))  # dl/ds = d, whatever s is
    return _like(grad_r.sum(2), x), -grad_r.sum((0, 1)).to(codewords.dtype), grad_s.to(scale.dtype)


def _aggregate_backward(grad: Tensor, assignment: Tensor, x: Tensor, codewords: Tensor) -> Grads:
    """Gradients of ``assignment``, ``x`` and ``codewords`` from ``grad [B, K, D]``."""
    _check_aggregate(assignment, x, codewords, grad)
    wide = _wide(grad, assignment, x, codewords)
    grad_e = grad.to(wide).unsqueeze(1)  # [B, 1, K, D]
    grad_a = (grad_e * _residual(x, codewords, wide)).sum(-1)
    grad_r = assignment.to(wide).unsqueeze(-1) * grad_e
    return _like(grad_a, assignment), _like(grad_r.sum(2), x), -grad_r.sum((0, 1)).to(codewords.dtype)


def _encode_backward(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """Gradients of ``x``, ``codewords`` and ``scale`` from ``grad [B, K, D]``; the assignment is computed anew."""
    _check_encode(x, codewords, scale, grad)
    wide = _wide(grad, x, codewords, scale)
    residual = _residual(x.flatten(2).transpose(1, 2), codewords, wide)
    scale_, grad_e = scale.to(wide), grad.to(wide).unsqueeze(1)
    distance = residual.square().sum(-1)
    assignment = (scale_ * distance).softmax(-1)
    grad_a = (grad_e * residual).sum(-1)
    grad_l = assignment * (grad_a - (assignment * grad_a).sum(-1, keepdim=True))
    grad_r = assignment.unsqueeze(-1) * grad_e + 2 * (scale_ * grad_l).unsqueeze(-1) * residual
    grad_x = grad_r.sum(2).transpose(1, 2)
    grad_s = (grad_l * distance).sum((0, 1))
    return _like(grad_x, x), -grad_r.sum((0, 1)).to(codewords.dtype), grad_s.to(scale.dtype)
