"""Encoding layer in Triton. Shapes: B images, M positions, D channels, K codewords.

With r, the mean codeword, taken off both sides, which changes no residual (x' = x - r, c' = c - r):

    ||x - c||^2         = ||x'||^2 - 2 x'.c' + ||c'||^2
    sum_m a (x - c)     = sum_m a x' - c' sum_m a
    dl/dx summed over k = a^T grad + 2 (sum_k s g) x' - 2 (s g)^T c',  g the gradient of the logits

so that all work on D is matrix products, and an offset common to features and codewords costs no digits. What is left
to cancel is the distance of a codeword from the mean: a residual is good to float32 of that distance, not of itself.

A program takes one image and a chunk of its positions, a tile at a time: channels once for the products with the
codewords, then, from the L2 cache, once more for the sums over positions (the gradient: three times). Each chunk sums
into a row ``[K, D]`` of its own, and a second kernel adds the rows in their order: no atomics, the same bits every run.
How positions are cut into chunks depends on the shape alone. Masked codewords (K is padded to a power of two) have
logits of -inf.

Bytes: x is read from memory once, ``B D M`` elements (the gradient writes as many). The rows of the chunks take
``B chunks K D`` of float32 (float64 for float64), written and read once and held below 64 MiB where one chunk per image
allows it; centred codewords ``K D``. Nothing of ``[B, M, K]`` is stored but the result of scaled_l2.

float64 runs the reference where Triton is older than 3.5, which has no products of it.

``_encode_forward.py`` and ``_encode_backward.py`` hold the kernels, ``_encode_common.py`` what they share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rendseg.reference.encode import (
    _aggregate_backward,
    _check_aggregate,
    _check_encode,
    _check_scaled_l2,
    _encode_backward,
    _scaled_l2_backward,
    aggregate,
    encode,
    scaled_l2,
)

from ._common import INTERPRETED, VERSION
from ._encode_backward import backward
from ._encode_common import AGGREGATE, ENCODE, SCALED_L2
from ._encode_forward import forward

Grads = tuple[Tensor, Tensor, Tensor]


def encode_triton(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``rendseg::encode``."""
    _check_encode(x, codewords, scale)
    return forward(ENCODE, x, codewords, scale, None)


def scaled_l2_triton(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """``rendseg::scaled_l2``."""
    _check_scaled_l2(x, codewords, scale)
    return forward(SCALED_L2, x.transpose(1, 2), codewords, scale, None)


def aggregate_triton(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    """``rendseg::aggregate``."""
    _check_aggregate(assignment, x, codewords)
    return forward(AGGREGATE, x.transpose(1, 2), codewords, None, assignment)


def encode_backward_triton(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """``rendseg::_encode_backward``: of x, codewords and scale; the assignment is computed again."""
    _check_encode(x, codewords, scale, grad)
    x_grad = torch.empty_like(x)
    return x_grad, *backward(ENCODE, grad, x, x_grad, codewords, scale, None)


def scaled_l2_backward_triton(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> Grads:
    """``rendseg::_scaled_l2_backward``: of x, codewords and scale."""
    _check_scaled_l2(x, codewords, scale, grad)
    x_grad = torch.empty_like(x)
    return x_grad, *backward(SCALED_L2, None, x.transpose(1, 2), x_grad.transpose(1, 2), codewords, scale, grad)


def aggregate_backward_triton(grad: Tensor, assignment: Tensor, x: Tensor, codewords: Tensor) -> Grads:
    """``rendseg::_aggregate_backward``: of assignment, x and codewords."""
    _check_aggregate(assignment, x, codewords, grad)
    x_grad = torch.empty_like(x)
    positions, target = x.transpose(1, 2), x_grad.transpose(1, 2)
    codewords_grad, assignment_grad = backward(AGGREGATE, grad, positions, target, codewords, None, assignment)
    return assignment_grad, x_grad, codewords_grad


FLOAT64 = INTERPRETED.value or VERSION >= (3, 5)  # before, tl.dot refuses float64


def _where_it_compiles(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def run(*args: Tensor) -> Any:
        wide = not FLOAT64 and any(tensor.dtype == torch.float64 for tensor in args)
        return (reference if wide else kernel)(*args)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "encode": _where_it_compiles(encode_triton, encode),
    "scaled_l2": _where_it_compiles(scaled_l2_triton, scaled_l2),
    "aggregate": _where_it_compiles(aggregate_triton, aggregate),
    "_encode_backward": _where_it_compiles(encode_backward_triton, _encode_backward),
    "_scaled_l2_backward": _where_it_compiles(scaled_l2_backward_triton, _scaled_l2_backward),
    "_aggregate_backward": _where_it_compiles(aggregate_backward_triton, _aggregate_backward),
}
