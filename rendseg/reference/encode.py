"""Encoding layer: Context Encoding (Zhang et al. 2018), section 3. B images, M positions, D channels, K codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _check_codebook(x: Tensor, channels: int, codewords: Tensor, scale: Tensor | None) -> None:
    check.rank(codewords, "codewords", "[K, D]", 2)
    check.feature_dtype(codewords, "codewords")
    if codewords.shape[0] == 0:
        raise ValueError(f"codewords must hold at least one codeword, got shape {check.shape_of(codewords)}")
    if codewords.shape[1] != channels:
        raise ValueError(f"codewords must have shape [K, D] with D = {channels} as in x, got {check.shape_of(codewords)}")
    check.same_device(codewords, "codewords", x, "x")
    if scale is not None:
        check.feature_dtype(scale, "scale")
        if scale.dim() != 1 or scale.shape[0] != codewords.shape[0]:
            raise ValueError(
                f"scale must have shape [K] with K = {codewords.shape[0]} as in codewords, got {check.shape_of(scale)}"
            )
        check.same_device(scale, "scale", x, "x")


def _check_x(x: Tensor) -> None:
    check.strided(x, "x")
    check.rank(x, "x", "[B, M, D]", 3)
    check.feature_dtype(x, "x")


def scaled_l2(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``scale[k] * ||x[b, m] - codewords[k]||^2``: ``[B, M, D] -> [B, M, K]``."""
    _check_x(x)
    _check_codebook(x, x.shape[2], codewords, scale)
    wide = _wide(x, codewords, scale)
    residual = x.to(wide).unsqueeze(2) - codewords.to(wide)
    return (scale.to(wide) * residual.square().sum(-1)).to(_result_dtype(x, codewords, scale))


def aggregate(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    """``sum_m assignment[b, m, k] * (x[b, m] - codewords[k])``: ``[B, K, D]``."""
    _check_x(x)
    _check_codebook(x, x.shape[2], codewords, None)
    check.feature_dtype(assignment, "assignment")
    wanted = (x.shape[0], x.shape[1], codewords.shape[0])
    if assignment.dim() != 3 or tuple(assignment.shape) != wanted:
        raise ValueError(f"assignment must have shape [B, M, K] = {list(wanted)}, got {check.shape_of(assignment)}")
    check.same_device(assignment, "assignment", x, "x")
    wide = _wide(x, codewords, assignment)
    residual = x.to(wide).unsqueeze(2) - codewords.to(wide)
    return (assignment.to(wide).unsqueeze(-1) * residual).sum(1).to(_result_dtype(assignment, x, codewords))


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``aggregate(softmax_k(scaled_l2(x, c, s)), x, c)`` of ``x [B, D, H, W]`` or ``[B, D, M]``: ``[B, K, D]``."""
    check.strided(x, "x")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [B, D, H, W] or [B, D, M], got {check.shape_of(x)}")
    check.feature_dtype(x, "x")
    _check_codebook(x, x.shape[1], codewords, scale)
    dtype = _result_dtype(x, codewords, scale)
    wide = _wide(x, codewords, scale)
    positions = x.flatten(2).transpose(1, 2).to(wide)
    codewords, scale = codewords.to(wide), scale.to(wide)
    assignment = scaled_l2(positions, codewords, scale).softmax(-1)
    return aggregate(assignment, positions, codewords).to(dtype)
