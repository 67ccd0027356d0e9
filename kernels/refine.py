"""The inference loop with a stock point head: PointRend (Kirillov et al. 2020), section 3.1.

Shapes: N images, C classes, P points of an image, ``I`` inputs and ``O`` outputs of a layer. A step is ``subdivide``,
one ``point_sample`` of the features and one of the coarse logits (``"current"``: the selected cells, interpolated once
more), then a launch per layer of the head: a program makes ``BLOCK_P`` points by ``BLOCK_O`` outputs in chunks of
``BLOCK_K`` inputs, and the last layer writes into the map.

Triton cannot index registers, so what lies between two layers goes through memory. It is small (points times width,
which a GPU's L2 mostly holds) and written by one launch and read by the next, which orders the two on every GPU without
a barrier of our own. The coarse logits are a second operand of each layer, so nothing is ever concatenated.

Every sum runs over its inputs in an order that the shapes fix, and every cell is written once: no atomics, the same
bits every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rendseg._refine_loop import Operators, Step, refine_loop
from rendseg.reference.refine import HeadLayers, RefineOptions, flat_arguments, refine_steps, with_flat_arguments
from rendseg.reference.subdivide import label_dtype

from ._bilinear import EXACT
from ._common import (
    INTERPRETED,
    VERSION,
    arch_of,
    before_sm_90,
    check_grid,
    has_tf32,
    launch_tuned,
    narrow,
    on_device,
    shape_class,
    wins,
)
from .point_sample import point_sample_triton
from .subdivide import subdivide_labels_triton, subdivide_triton, upsample_cells_triton


@triton.jit
def _add_product(
    total,
    x,
    weight,
    inputs,
    x_k,
    w_i,
    has_point,
    has_output,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total + x @ weight`` over ``inputs`` inputs; ``x`` points at rows ``[P, 1]``, ``weight`` at columns ``[1, O]``.

    Whatever lies outside is zero in both factors, so that no NaN comes of it.
    """
    T: tl.constexpr = weight.dtype.element_ty
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        has_input = k < inputs
        k = k.to(tl.int64)
        a = tl.load(x + k[None, :] * x_k, mask=has_point[:, None] & has_input[None, :], other=0.0)
        if PACKED:  # without a mask along the outputs a load takes several of them
            b = tl.load(weight + k[:, None] * w_i, mask=has_input[:, None], other=0.0)
        else:
            b = tl.load(weight + k[:, None] * w_i, mask=has_input[:, None] & has_output[None, :], other=0.0)
        if a.dtype != T:
            a = narrow(a.to(tl.float32), T)
        if (
            INTERPRETED and T == tl.bfloat16
        ):  # the interpreter multiplies the bits; in float32 the products are the same
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _layer(
    operands,
    strides,
    sizes,
    n,
    p,
    o,
    outputs,
    JOINED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Outputs ``o`` at points ``p`` of image ``n``, rounded to the dtype of the head, as float32."""
    x, coarse, weight, coarse_weight, bias = operands
    x_strides, coarse_strides, weight_strides = strides
    points, inputs, classes = sizes
    T: tl.constexpr = weight.dtype.element_ty
    has_point = p < points
    has_output = o < outputs
    row = p.to(tl.int64)[:, None]
    column = o.to(tl.int64)[None, :] * weight_strides[0]
    w_i = weight_strides[1]
    total = tl.zeros([p.shape[0], o.shape[0]], tl.float32)
    x += n * x_strides[0] + row * x_strides[2]
    k = x_strides[1]
    total = _add_product(total, x, weight + column, inputs, k, w_i, has_point, has_output, PACKED, PRECISION, BLOCK_K)
    if JOINED:
        x = coarse + (n * coarse_strides[0] + row * coarse_strides[2])
        w = coarse_weight + column
        k = coarse_strides[1]
        total = _add_product(total, x, w, classes, k, w_i, has_point, has_output, PACKED, PRECISION, BLOCK_K)
    total += tl.load(bias + o, mask=has_output, other=0.0).to(tl.float32)[None, :]
    return narrow(total, T).to(tl.float32)


@triton.jit
def _cells_of(indices, n, p, points, INDEXED: tl.constexpr):
    """The cells of points, or the points themselves."""
    cell = p.to(tl.int64)
    if INDEXED:
        cell = tl.load(indices + n * points + p, mask=p < points, other=0)
    return cell


@triton.jit
def _refine_layer_kernel(
    operands,
    indices,
    out,
    sizes,
    outputs,
    strides,
    out_strides,
    JOINED: tl.constexpr,
    PACKED: tl.constexpr,
    RELU: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One layer of the head on every point, to a buffer or, as the last of the head, into the cells of the logits.

    operands, with strides of x, coarse and both weights, and sizes (points, inputs, classes):
        x: [N, I, P] of any strides, float32, float16 or bfloat16. coarse: [N, C, P] likewise, read if JOINED.
        weight: [O, I] float32, float16 or bfloat16, any strides; if PACKED, readable and zero up to whole tiles of
        outputs. coarse_weight: [O, C] of the same dtype and strides, likewise; read if JOINED.
        bias: [O] of the same dtype, contiguous.
    indices: [N, P] int64 contiguous, the cells of the points; read if INDEXED.
    out: [N, O, cells] floating, any strides, written at the cells, or at the points without INDEXED.
    """
    points = sizes[0]
    program = tl.program_id(0)
    o_tiles = tl.cdiv(outputs, BLOCK_O)
    p_tiles = tl.cdiv(points, BLOCK_P)
    o = program % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    p = program // o_tiles % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (program // o_tiles // p_tiles).to(tl.int64)
    value = _layer(operands, strides, sizes, n, p, o, outputs, JOINED, PACKED, PRECISION, BLOCK_K)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # keeps NaN, as torch.relu
    cell = _cells_of(indices, n, p, points, INDEXED)
    at = n * out_strides[0] + cell[:, None] * out_strides[2] + o.to(tl.int64)[None, :] * out_strides[1]
    mask = (p < points)[:, None] & (o < outputs)[None, :]
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _refine_labels_kernel(
    operands,
    indices,
    out,
    sizes,
    strides,
    out_n,
    JOINED: tl.constexpr,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The last layer of the head, of which only the argmax is kept: the lowest class on ties, the first NaN over all.

    operands, sizes, strides, indices: as in the layer kernel; coarse gives the dtype of the logits.
    out: [N, cells] uint8 or int16, written at the cells, or at the points without INDEXED.
    """
    points, classes = sizes[0], sizes[2]
    LOGITS: tl.constexpr = operands[1].dtype.element_ty
    program = tl.program_id(0)
    p_tiles = tl.cdiv(points, BLOCK_P)
    p = program % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (program // p_tiles).to(tl.int64)
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, classes, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        value = _layer(operands, strides, sizes, n, p, o, classes, JOINED, PACKED, PRECISION, BLOCK_K)
        value = narrow(value, LOGITS).to(tl.float32)
        value = tl.where((o < classes)[None, :], value, float("-inf"))
        unknown = value != value
        any_unknown = tl.max(unknown.to(tl.int32), 1) > 0
        known = tl.where(unknown, float("-inf"), value)
        top = tl.max(known, 1)
        won = tl.where(any_unknown[:, None], unknown, known == top[:, None])
        winner = tl.min(tl.where(won, o[None, :], 0x7FFFFFFF), 1)
        top = tl.where(any_unknown, float("nan"), top)
        later = wins(top, best)
        best = tl.where(later, top, best)
        label = tl.where(later, winner, label)
    cell = _cells_of(indices, n, p, points, INDEXED)
    tl.store(out + n * out_n + cell, label.to(out.dtype.element_ty), mask=p < points)


def _tile(outputs: int, half: bool, arch: str, labels: bool = False) -> dict[str, int]:
    """Configuration by shape class: points, outputs and inputs of a tile, warps and stages of the loads.

    The argmax takes half the outputs at a time, because it keeps its own tiles of them in registers. Before sm_90 the
    operands of a product lie in registers: three products of TF32, of a layer, take half the inputs. There a layer of
    logits with Triton 3.6, and the argmax of half types with 3.7, have one load fewer under way; they spill otherwise.
    """
    widest = (128 if half else 64) // (2 if labels else 1)
    block_o = min(widest, max(16, triton.next_power_of_2(outputs)))
    block_k = 64 if half else 16 if before_sm_90(arch) and not labels else 32
    stages = 3
    if before_sm_90(arch) and (
        (VERSION < (3, 7) and not half and not labels and outputs % 16) or (VERSION == (3, 7) and half and labels)
    ):
        stages = 2
    return {"BLOCK_P": 64, "BLOCK_O": block_o, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages}


_TUNED = ("BLOCK_P", "BLOCK_K")  # not the outputs, which the weights are padded for


def _precision(arch: str, dtype: torch.dtype) -> str:
    """How products of float32 are made: in tf32 only where PyTorch lets the convolutions of a head that is called."""
    if dtype != torch.float32 or not has_tf32(arch):
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    allowed = cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32  # PyTorch 2.8
    return "tf32" if allowed else "tf32x3"


def _launch(
    kernel: Any, arguments: tuple[Any, ...], blocks: int, points: int, options: dict[str, Any], tile: dict[str, int]
) -> None:
    """A program for every tile of points of every block of outputs and image."""
    kernel[(check_grid(blocks * triton.cdiv(points, tile["BLOCK_P"])),)](*arguments, **options, **tile, **EXACT)


class _Head:
    """The layers, and how they are launched."""

    def __init__(self, head: HeadLayers, classes: int) -> None:
        weights, biases, coarse_each_layer, coarse_first = head
        self.classes = classes
        self.half = weights[0].dtype != torch.float32
        self.arch = arch_of(weights[0].device)
        self.precision = _precision(self.arch, weights[0].dtype)
        self.layers = []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            joined = coarse_each_layer or i == 0
            weight = weight.detach()
            outputs = weight.shape[0]
            if self.half:
                # Rows of odd lengths, as with 19 classes, start anywhere: by whole columns a load takes several values.
                weight = F.pad(weight.t(), (0, -outputs % _tile(outputs, True, self.arch)["BLOCK_O"])).contiguous().t()
            inputs = weight.shape[1] - (classes if joined else 0)
            hidden = weight.narrow(1, classes if joined and coarse_first else 0, inputs)
            points = weight.narrow(1, 0 if coarse_first else inputs, classes) if joined else hidden
            self.layers.append((hidden, points, bias.detach().contiguous(), joined, outputs))

    def __call__(self, x: Tensor, coarse: Tensor, indices: Tensor | None, out: Tensor) -> None:
        """Features ``x [N, I, P]`` and ``coarse [N, C, P]`` to the cells of ``out``: logits or labels."""
        images, _, points = x.shape
        labels = not out.is_floating_point()
        cell_indices = coarse if indices is None else indices
        for i, (weight, coarse_weight, bias, joined, outputs) in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            inputs = weight.shape[1]
            tile = _tile(outputs, self.half, self.arch, last and labels)
            options = {"JOINED": joined, "PACKED": self.half, "INDEXED": last and indices is not None}
            options |= {"PRECISION": self.precision}
            operands, sizes = (x, coarse, weight, coarse_weight, bias), (points, inputs, self.classes)
            strides = (x.stride(), coarse.stride(), weight.stride())
            key = (x.dtype, weight.dtype, self.precision, joined, last, *shape_class(images, points, inputs, outputs))
            if last and labels:
                arguments = (operands, cell_indices, out, sizes, strides, out.stride(0))
                launch = functools.partial(_launch, _refine_labels_kernel, arguments, images, points, options)
                launch_tuned("refine_labels", key, tile, _TUNED, x.device, launch)
                return
            if last:
                target, to = out, (out.stride(0), out.stride(1), _cell_stride(out))
            else:  # the outputs of a point side by side, as the next layer reads them
                target = torch.empty((images, points, outputs), dtype=weight.dtype, device=x.device).transpose(1, 2)
                to = target.stride()
            layer = (operands, cell_indices, target, sizes, outputs, strides, to)
            blocks = images * triton.cdiv(outputs, tile["BLOCK_O"])
            options |= {"RELU": not last}
            launch = functools.partial(_launch, _refine_layer_kernel, layer, blocks, points, options)
            launch_tuned("refine_layer", key, tile, _TUNED, x.device, launch)
            x = target


def _cell_stride(logits: Tensor) -> int:
    """From one cell to the next of ``logits[N, C, H, W]``, contiguous or channels_last."""
    height, width = logits.shape[2:]
    return logits.stride(3) if width > 1 else logits.stride(2) if height > 1 else 1


_OPERATORS = Operators(
    subdivide=subdivide_triton,
    subdivide_labels=subdivide_labels_triton,
    upsample_cells=upsample_cells_triton,
    point_sample=point_sample_triton,
)


@with_flat_arguments
def refine_mlp_triton(coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions) -> Tensor:
    """``rendseg::_refine_mlp``: logits ``[N, C, H, W]`` in the layout of ``coarse``, or labels ``[N, H, W]``.

    For labels the logits of the last step are never stored. float64 runs the reference, operator by operator. The maps
    hold every class, also where one is asked for.
    """
    if options.class_only:
        whole = options._replace(class_only=False)
        return options.of_class(refine_mlp_triton(*flat_arguments(coarse, features, head, whole)))
    coarse = coarse.detach()
    features = [feature.detach() for feature in features]
    layout = torch._prims_common.suggest_memory_format(coarse)
    if coarse.dtype == torch.float64:
        out = refine_steps(coarse, features, head.predict, options)
        return out if options.labels or not options.steps else out.contiguous(memory_format=layout)
    with on_device(coarse):
        layers = _Head(head, coarse.shape[1])

        def predict(step: Step) -> Tensor:
            out, size = step.map, (coarse.shape[0], *step.size)
            if out is None and step.labels:
                out = coarse.new_empty(size, dtype=label_dtype(coarse.shape[1]))
            elif out is None:
                size = (*coarse.shape[:2], *step.size)
                out = torch.empty(size, dtype=coarse.dtype, device=coarse.device, memory_format=layout)
            if coarse.shape[0] > 0:
                fine = options.sample(point_sample_triton, features, step.coords)
                layers(fine, step.coarse, step.indices, out)
            return out

        return refine_loop(coarse, features, options, _OPERATORS, predict)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"_refine_mlp": refine_mlp_triton}
