"""What the kernels of encode share: tiles of codewords and features, the centred codewords, how positions are divided.

Tensors travel with their strides, as tuples that begin with the pointer: a map ``(x, b, d, h, w)``, what is given for
each position and codeword ``(given, b, m, k)``, a matrix ``(codewords, k, d)``. Inside a kernel:

    source  = (x of the image, r, offsets of the positions, stride of channels, which positions exist, channels)
    matrix  = (first element, stride of codewords, stride of channels, codewords, channels)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import VERSION, arch_of, before_sm_90, has_tf32, is_amd, shape_class

# Which op a kernel works for.
ENCODE, SCALED_L2, AGGREGATE = 0, 1, 2
IS_ENCODE = tl.constexpr(ENCODE)
IS_SCALED_L2 = tl.constexpr(SCALED_L2)
IS_AGGREGATE = tl.constexpr(AGGREGATE)

# Sizes that gain nothing from a compilation of their own where they are 1 or a multiple of 16.
SIZES = ["codes", "width", "tiles", "per_chunk", "chunks", "rows"]

TUNED = ("BLOCK_D", "BLOCK_S")  # not the positions, which the chunks are made of
ROWS, BLOCK = 16, 64  # chunks and entries that a program of a reduction takes at a time


@triton.jit
def finite(value):
    """False for infinities and NaN, of which the difference to themselves is NaN."""
    return value - value == 0.0


@triton.jit(do_not_specialize=["codes"])
def _encode_center_kernel(
    codewords,
    grad,
    centered_ptr,
    shift_ptr,
    squares_ptr,
    products_ptr,
    codes,
    channels,
    GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean codeword and what the codewords are beside it; a codeword that is huge or not finite does not move it.

    One program, or with GRAD one for each image, of which the first writes what all share.

    codewords: ``[K, D]`` of any strides (k, d), float16, bfloat16, float32 or float64.
    grad: ``[B, K, D]`` of any strides (b, k, d), the gradient of the result; read with GRAD only.
    centered_ptr: ``[K, D]`` contiguous, float32 or float64, written: c'.
    shift_ptr: ``[D]`` float32 or float64, written: r.
    squares_ptr: ``[K]`` float32 or float64, written: ``||c'||^2``.
    products_ptr: ``[B, K]`` float32 or float64, written with GRAD: ``grad . c'``.
    """
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    codewords_ptr, codewords_k, codewords_d = codewords
    grad_ptr, grad_b, grad_k, grad_d = grad
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    has_code = k < codes
    wide_k = k.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_K,), ACC)
    products = tl.zeros((BLOCK_K,), ACC)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        has_channel = d < channels
        live = has_code[:, None] & has_channel[None, :]
        wide_d = d.to(tl.int64)[None, :]
        at = wide_k * codewords_k + wide_d * codewords_d
        value = tl.load(codewords_ptr + at, mask=live, other=0.0).to(ACC)
        shift = tl.sum(tl.where(tl.abs(value) < 1e15, value, 0.0), axis=0) / codes
        centered = tl.where(live, value - shift[None, :], 0.0)
        squares += tl.sum(centered * centered, axis=1)
        if GRAD:
            at = b * grad_b + wide_k * grad_k + wide_d * grad_d
            products += tl.sum(tl.load(grad_ptr + at, mask=live, other=0.0).to(ACC) * centered, axis=1)
        tl.store(shift_ptr + d, shift, mask=has_channel & (d * 0 + b == 0))
        tl.store(centered_ptr + k[:, None] * channels + d[None, :], centered, mask=live & (k * 0 + b == 0)[:, None])
    tl.store(squares_ptr + k, squares, mask=has_code & (k * 0 + b == 0))
    if GRAD:
        tl.store(products_ptr + b * codes + k, products, mask=has_code)


@triton.jit
def at_positions(m, width, stride_h, stride_w, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of positions within an image; FLAT: one stride walks through rows and columns."""
    if FLAT:
        return m.to(INDEX) * stride_w
    else:
        return (m // width).to(INDEX) * stride_h + (m % width).to(INDEX) * stride_w


@triton.jit
def codes_of(matrix, k, d, ACC: tl.constexpr, INDEX: tl.constexpr):
    """A tile ``[K, D]`` of a matrix of codewords, zero beyond its ends."""
    base, stride_k, stride_d, codes, channels = matrix
    live = (k < codes)[:, None] & (d < channels)[None, :]
    at = (k.to(INDEX) * stride_k)[:, None] + (d.to(INDEX) * stride_d)[None, :]
    return tl.load(base + at, mask=live, other=0.0).to(ACC)


@triton.jit
def given_at(given, b, m, k):
    """Where what is given for an image, its positions and codewords lies: ``[M, K]`` pointers."""
    base, stride_b, stride_m, stride_k = given
    return base + b * stride_b + (m.to(tl.int64)[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k)


@triton.jit
def features(source, d):
    """A tile ``[M, D]`` of features without the mean codeword; zero beyond the channels, finite beyond positions."""
    x, shift_ptr, at, stride_d, has_position, channels = source
    has_channel = d < channels
    live = has_position[:, None] & has_channel[None, :]
    value = tl.load(x + at[:, None] + (d.to(at.dtype) * stride_d)[None, :], mask=live, other=0.0)
    return value.to(shift_ptr.dtype.element_ty) - tl.load(shift_ptr + d, mask=has_channel, other=0.0)[None, :]


@triton.jit
def distances(squared_x, squared_c, product):
    """``||x'||^2 - 2 x'.c' + ||c'||^2``: never below zero, and what infinities and NaN make of a sum of squares."""
    base = squared_x[:, None] + squared_c[None, :]
    return tl.where(finite(base), tl.maximum(base - 2.0 * product, 0.0), base)


@triton.jit
def scale_of(scale, k, codes, ACC: tl.constexpr):
    """``[1, K]`` of ``scale``, a pointer and a stride."""
    return tl.load(scale[0] + k * scale[1], mask=k < codes, other=0.0).to(ACC)[None, :]


@triton.jit
def softmax(logits, has_code, live):
    """Over codewords; zero where not live."""
    logits = tl.where(has_code[None, :], logits, -float("inf"))
    weight = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.where(live, weight / tl.sum(weight, axis=1)[:, None], 0.0)


@triton.jit
def add_sums(target, weight, source, k, codes, begun, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr):
    """Adds the sums over a tile of ``weight [M, K]`` times x' to a matrix ``[K, D]``, or begins them there.

    Transposed, so that 64 channels are the rows of a product, as tensor cores of sm_90 want them, and the weights its
    other operand, which lies in shared memory. One stage: features are transposed on their way through registers, which
    keeps loads whole in either layout.
    """
    channels = source[5]
    for start in tl.range(0, channels, BLOCK_S, num_stages=1):
        d = start + tl.arange(0, BLOCK_S)
        values = features(source, d)
        part = tl.dot(tl.trans(values), weight, input_precision=PRECISION, out_dtype=weight.dtype)
        live = (d < channels)[:, None] & (k < codes)[None, :]
        here = target + k[None, :] * channels + d[:, None]
        before = tl.load(here, mask=live & (k * 0 + begun > 0)[None, :], other=0.0)
        tl.store(here, before + part, mask=live)


@triton.jit
def add_total(target, weight, k, has_code, begun):
    """Adds the sums over a tile of ``weight [M, K]`` to ``[K]``, or begins them there; registers are scarcer."""
    before = tl.load(target + k, mask=has_code & (k * 0 + begun > 0), other=0.0)
    tl.store(target + k, before + tl.sum(weight, axis=0), mask=has_code)


# Launchers

_PROGRAMS = 264  # chunks of all images together, at least: two on each multiprocessor of the largest GPUs
_SCRATCH = 1 << 26  # bytes of sums of chunks, at most, where one chunk per image allows it


def precision_of(arch: str, wide: bool) -> str:
    """Three TF32 products for one of float32, where there is TF32; one alone would move logits by as much as 0.1."""
    return "tf32x3" if has_tf32(arch) and not wide else "ieee"


@dataclass(frozen=True)
class _Tile:
    """A tile: positions, channels (of the sums over positions: sum_channels), codewords (all of them, padded)."""

    positions: int
    channels: int
    sum_channels: int
    codes: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.positions,
            "BLOCK_D": self.channels,
            "BLOCK_S": self.sum_channels,
            "BLOCK_K": self.codes,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _tile(channels: int, codes: int, wide: bool, backward: bool, arch: str) -> _Tile:
    """Tile of a shape; arrays of positions x codewords stay in registers, one in forward and three in backward."""
    padded = max(16, triton.next_power_of_2(codes))
    old = VERSION < (3, 9)  # whose code takes more registers
    early = before_sm_90(arch)
    if wide:
        m, d, s, warps, stages = 32, 16, 16, 8 if old else 4, 1
    elif padded <= 32:
        m, d, s, warps, stages = 64, 32, 64, 4, 1 if backward else 2
        if old and backward:
            d, s, warps = (32, 32, 4) if is_amd(arch) else (16, 16, 8)
        elif old and early:
            d = 16
        elif backward and padded == 16 and not is_amd(arch):
            s = 32
    elif padded <= 64:
        m, d, s, warps, stages = (32, 16, 64, 8, 1) if backward else (64, 32, 64, 8, 2)
        if (old and is_amd(arch)) if backward else (old or early):
            m //= 2
        if old and backward and not is_amd(arch):
            s = 32
    elif padded <= 128:
        m, d, s, warps, stages = (16, 32, 32, 8, 1) if backward else (32, 32, 32, 8, 2)
        if old and not backward and not is_amd(arch):
            d = 16
    else:
        m, d, s, warps, stages = 16, 16, 16, 8, 1
        if early and padded > 256 and not backward:
            s = 8
        if early and padded <= 256 and backward and VERSION != (3, 8):
            d = 32  # with 16, Triton 3.7 and 3.9 spill in aggregate, at half the registers; with 32, 3.8 in encode
    if is_amd(arch):  # each of 4 warps may have 512 registers, of 8 half as many
        warps = 4
    most = max(16, triton.next_power_of_2(channels))
    return _Tile(m, min(d, most), min(s, most), padded, warps, stages)


@dataclass(frozen=True)
class Plan:
    """How a kernel over positions divides ``x [B, D, H, W]`` or ``[B, D, M]`` among its programs."""

    images: int
    channels: int
    codes: int
    positions: int
    tile: _Tile
    tiles: int  # of an image
    per_chunk: int  # tiles of a chunk
    chunks: int  # of an image
    precision: str
    key: tuple[Any, ...]  # the shape class, for the tuning

    @classmethod
    def of(cls, op: int, x: Tensor, codes: int, wide: torch.dtype, backward: bool) -> Plan:
        images, channels, positions = *x.shape[:2], x.shape[2:].numel()
        arch, is_wide = arch_of(x.device), wide == torch.float64
        tile = _tile(channels, codes, is_wide, backward, arch)
        divided = _chunks(images, positions, codes, channels, tile, is_wide)
        layout = (x.stride(1) == 1, x.stride(-1) == 1, map_of(x)[2])
        key = (op, x.dtype, *layout, *shape_class(images, positions, channels, codes))
        return cls(images, channels, codes, positions, tile, *divided, precision_of(arch, is_wide), key)


def _chunks(images: int, positions: int, codes: int, channels: int, tile: _Tile, wide: bool) -> tuple[int, int, int]:
    """(tiles of an image, tiles of a chunk, chunks of an image), of the shape alone."""
    tiles = triton.cdiv(positions, tile.positions)
    wanted = triton.cdiv(_PROGRAMS, images)
    wanted = min(wanted, _SCRATCH // (images * codes * max(channels, 1) * (8 if wide else 4)))
    per_chunk = triton.cdiv(tiles, max(1, min(wanted, tiles)))
    return tiles, per_chunk, triton.cdiv(tiles, per_chunk)


def map_of(x: Tensor) -> tuple[tuple[Any, ...], int, bool]:
    """``(x, b, d, h, w)``, the width, and whether one stride walks through all positions."""
    if x.dim() == 3:
        return (x, x.stride(0), x.stride(1), 0, x.stride(2)), max(x.shape[2], 1), True
    height, width = x.shape[2:]
    b, d, h, w = x.stride()
    if width == 1:
        return (x, b, d, 0, h), height, True
    return (x, b, d, h, w), width, height == 1 or h == width * w


def index_of(*tensors: Tensor) -> Any:
    """The integers that count through one image."""
    reach = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    # A tile may reach beyond the last position and channel, where nothing is read.
    return tl.int32 if reach < 2**30 else tl.int64


def with_strides(tensor: Tensor | None, other: Tensor, dims: int) -> tuple[Any, ...]:
    """A tensor and its strides; where there is none, another of no meaning."""
    return (other, *(0,) * dims) if tensor is None else (tensor, *tensor.stride())


def center(codewords: Tensor, wide: torch.dtype, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c', r, ||c'||^2, grad . c') of :func:`_encode_center_kernel`."""
    codes, channels = codewords.shape
    images = 1 if grad is None else grad.shape[0]
    centered, shift, squares, products = (
        torch.empty(shape, dtype=wide, device=codewords.device)
        for shape in ((codes, channels), (channels,), (codes,), (images, codes))
    )
    block_k = triton.next_power_of_2(codes)
    _encode_center_kernel[(images,)](
        with_strides(codewords, codewords, 2),
        with_strides(grad, codewords, 3),
        centered,
        shift,
        squares,
        products,
        codes,
        channels,
        GRAD=grad is not None,
        BLOCK_K=block_k,
        BLOCK_D=max(1, min(triton.next_power_of_2(channels), 4096 // block_k)),
        num_warps=8,
    )
    return centered, shift, squares, products
