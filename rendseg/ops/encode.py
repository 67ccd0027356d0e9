"""``scaled_l2``, ``aggregate`` and ``encode``: the Encoding layer of Context Encoding (Zhang et al. 2018), section 3.

B images, M = H*W positions, D channels, K codewords. Dtypes are float32, float64, float16 and bfloat16, mixed freely.
The result has the promoted dtype. Arithmetic is float64 where an input is float64, otherwise float32. Each gradient has
the dtype of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference._types import explained
from ..reference.encode import (
    _aggregate_backward,
    _check_aggregate,
    _check_encode,
    _check_scaled_l2,
    _encode_backward,
    _result_dtype,
    _scaled_l2_backward,
)
from ._register import register, use_reference

Grads = tuple[Tensor, Tensor, Tensor]


@explained
def scaled_l2(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Scaled squared distance of each position to each codeword, ``scale[k] * ||x[b, m] - codewords[k]||^2``.

    Args:
        x: features ``[B, M, D]`` with any strides; a transposed view of a feature map is read without a copy.
        codewords: ``[K, D]``, ``K >= 1``.
        scale: ``[K]``; its sign is used as it is.

    Returns:
        ``[B, M, K]`` in the promoted dtype of the three. No tensor of shape ``[B, M, K, D]`` is ever made.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: a dtype that is not floating, or a sparse tensor.
        RuntimeError: tensors on different devices, or a second derivative.

    All three arguments have a first derivative. NaN and infinity spread as in the plain formula. Autocast does not
    change the inputs. Source: Zhang et al., "Context Encoding for Semantic Segmentation", 2018, equation 1.
    """
    if use_reference("scaled_l2", x):
        return reference.scaled_l2(x, codewords, scale)
    return torch.ops.rendseg.scaled_l2(x, codewords, scale)


@explained
def aggregate(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    """Weighted sum of the residuals to each codeword, ``sum_m assignment[b, m, k] * (x[b, m] - codewords[k])``.

    Args:
        assignment: weights ``[B, M, K]``, not necessarily positive or normalised.
        x: features ``[B, M, D]`` with any strides.
        codewords: ``[K, D]``, ``K >= 1``.

    Returns:
        ``[B, K, D]`` in the promoted dtype of the three.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: a dtype that is not floating, or a sparse tensor.
        RuntimeError: tensors on different devices, or a second derivative.

    All three arguments have a first derivative. NaN and infinity spread as in the plain formula. Autocast does not
    change the inputs. Source: the same paper as for ``scaled_l2``, section 3.1.
    """
    if use_reference("aggregate", x):
        return reference.aggregate(assignment, x, codewords)
    return torch.ops.rendseg.aggregate(assignment, x, codewords)


@explained
def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Residual encoding of a feature map, ``aggregate(softmax_k(scaled_l2(x, c, s)), x, c)`` in one pass.

    Args:
        x: features ``[B, D, H, W]`` or ``[B, D, M]``. Contiguous and channels_last maps are read without a copy, and so
            is every other map whose positions are evenly spaced in memory.
        codewords: ``[K, D]``, ``K >= 1``.
        scale: ``[K]``; its sign is used as it is. At the start of training it is drawn from ``U(-1, 0)``.

    Returns:
        ``[B, K, D]`` in the promoted dtype of the three. Half features with float32 codewords are the normal case
        under autocast; the result is then float32.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: a dtype that is not floating, or a sparse tensor.
        RuntimeError: tensors on different devices, or a second derivative.

    Memory: the assignment is never stored; the backward pass reads ``x`` again and computes it a second time. All three
    arguments have a first derivative, also where ``scale`` is 0. A position with a NaN or an infinity makes the whole
    ``[K, D]`` of its image NaN, as the plain formula does. On the CPU the result does not depend on the number of
    threads; between instruction sets it differs by rounding. Autocast does not change the inputs.

    Source: Zhang et al., "Context Encoding for Semantic Segmentation", 2018, section 3.1, equations 1 and 2. The sum
    over positions is not averaged.
    """
    if use_reference("encode", x):
        return reference.encode(x, codewords, scale)
    return torch.ops.rendseg.encode(x, codewords, scale)


# ---- Fake kernels: shapes and dtypes, after the same checks


def _scaled_l2_fake(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    _check_scaled_l2(x, codewords, scale)
    dtype = _result_dtype(x, codewords, scale)
    return x.new_empty((x.shape[0], x.shape[1], codewords.shape[0]), dtype=dtype)


def _scaled_l2_backward_fake(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    _check_scaled_l2(x, codewords, scale, grad)
    return torch.empty_like(x), codewords.new_empty(codewords.shape), scale.new_empty(scale.shape)


def _aggregate_fake(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    _check_aggregate(assignment, x, codewords)
    dtype = _result_dtype(assignment, x, codewords)
    return x.new_empty((x.shape[0], codewords.shape[0], x.shape[2]), dtype=dtype)


def _aggregate_backward_fake(grad: Tensor, assignment: Tensor, x: Tensor, codewords: Tensor) -> Grads:
    _check_aggregate(assignment, x, codewords, grad)
    return torch.empty_like(assignment), torch.empty_like(x), codewords.new_empty(codewords.shape)


def _encode_fake(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    _check_encode(x, codewords, scale)
    dtype = _result_dtype(x, codewords, scale)
    return x.new_empty((x.shape[0], codewords.shape[0], x.shape[1]), dtype=dtype)


def _encode_backward_fake(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    _check_encode(x, codewords, scale, grad)
    return torch.empty_like(x), codewords.new_empty(codewords.shape), scale.new_empty(scale.shape)


# ---- Autograd


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _scaled_l2_grads(ctx: Any, grad: Tensor) -> Grads:
    return torch.ops.rendseg._scaled_l2_backward(grad, *ctx.saved_tensors)


def _aggregate_grads(ctx: Any, grad: Tensor) -> Grads:
    return torch.ops.rendseg._aggregate_backward(grad, *ctx.saved_tensors)


def _encode_grads(ctx: Any, grad: Tensor) -> Grads:
    return torch.ops.rendseg._encode_backward(grad, *ctx.saved_tensors)


def _register_op(name: str, function: Any, backward_function: Any, fake: Any, backward_fake: Any, grads: Any) -> None:
    def no_second_derivative(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f'{name} has no second derivative; rendseg.backend("reference") gives one, as a plain PyTorch formula'
        )

    register(name, reference=function, fake=fake, backward=grads, setup_context=_save)
    register(
        f"_{name}_backward",
        reference=backward_function,
        fake=backward_fake,
        backward=no_second_derivative,
        setup_context=lambda ctx, inputs, output: None,
    )


_register_op(
    "scaled_l2",
    reference.scaled_l2,
    _scaled_l2_backward,
    _scaled_l2_fake,
    _scaled_l2_backward_fake,
    _scaled_l2_grads,
)
_register_op(
    "aggregate",
    reference.aggregate,
    _aggregate_backward,
    _aggregate_fake,
    _aggregate_backward_fake,
    _aggregate_grads,
)
_register_op("encode", reference.encode, _encode_backward, _encode_fake, _encode_backward_fake, _encode_grads)

__all__ = ["aggregate", "encode", "scaled_l2"]
