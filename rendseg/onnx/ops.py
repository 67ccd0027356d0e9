"""The operators in terms that ONNX has: what ``rendseg export --format onnx`` traces in place of ``torch.ops.rendseg``.

They compute what ``rendseg.reference`` computes, with neither loops over data nor checks, for sizes that may be
symbolic. ``TopK`` of ONNX gives equal values to the lowest index, as the operators do. Where they differ:

- a NaN logit makes its cell the most uncertain one, as it should; but which class ``ArgMax`` names where a logit is
  NaN is left open by ONNX (PyTorch names the first NaN);
- ``encode`` and ``scaled_l2`` expand the square, ``|x|^2 - 2 x.c + |c|^2`` about the mean codeword, so that
  ``[B, M, K, D]`` never exists: the last digits differ;
- indices of uncertain points come most uncertain first inside :func:`refine_mlp`, where their order has no effect.

N images, C classes, H W grid, P points; B, M, D, K as in ``rendseg.ops.encode``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._refine_loop import Operators, call_head, refine_loop
from ..ops.schemas import with_defaults
from ..reference.refine import HeadLayers, RefineOptions, every_index, with_flat_arguments
from ..reference.subdivide import label_dtype

# ---- uncertainty and selection


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scores(logits: Tensor, class_index: Tensor | None) -> Tensor:
    """:func:`uncertainty` ``[N, H, W]``, at least float32, with infinity for NaN: it lies above every margin."""
    wide = _wide(logits)
    if class_index is not None:
        index = class_index.view(-1, 1, 1, 1).expand(-1, 1, wide.shape[2], wide.shape[3])
        margin = -wide.gather(1, index).squeeze(1).abs()
        unknown = margin.isnan()
    elif wide.shape[1] == 1:
        margin = -wide.squeeze(1).abs()
        unknown = margin.isnan()
    else:
        top = wide.topk(2, dim=1).values
        margin = top[:, 1] - top[:, 0]
        unknown = wide.isnan().any(1) | margin.isnan()  # inf - inf too
    return torch.where(unknown, torch.full_like(margin, torch.inf), margin)


def uncertainty(logits: Tensor, class_index: Tensor | None) -> Tensor:
    scores = _scores(logits, class_index)
    return torch.where(scores == torch.inf, torch.full_like(scores, torch.nan), scores).float()


def _select(logits: Tensor, num_points: int, class_index: Tensor | None) -> Tensor:
    """Indices ``[N, k]`` of the most uncertain cells, in no order."""
    # float32, as the operators store it: rounding makes ties of what float64 tells apart
    scores = _scores(logits, class_index).float().flatten(1)
    return scores.topk(torch.sym_min(num_points, scores.shape[1]), dim=1, sorted=False).indices


def _whole(value: int, device: torch.device) -> Tensor:
    """A size as a tensor ``[1]``: arithmetic of integer tensors with a symbolic number has no translation."""
    return torch.full((1,), value, dtype=torch.int64, device=device)


def _centres(indices: Tensor, height: int, width: int) -> Tensor:
    down, across = _whole(height, indices.device), _whole(width, indices.device)
    x = torch.remainder(indices, across)
    y = (indices - x).double() / across.double()  # whole: torch.onnx divides integers in float32, inexact above 2^24
    return torch.stack(((x.float() + 0.5) / across.float(), (y.float() + 0.5) / down.float()), dim=-1)


def _every_cell(coarse: Tensor, height: int, width: int) -> Tensor:
    return _centres(every_index(coarse, height * width), height, width)


def uncertain_points(logits: Tensor, num_points: int, class_index: Tensor | None) -> tuple[Tensor, Tensor]:
    indices = _select(logits, num_points, class_index).sort(dim=1).values
    return indices, _centres(indices, logits.shape[2], logits.shape[3])


def _upsample_cells(logits: Tensor, indices: Tensor, scale_factor: int, align_corners: bool) -> Tensor:
    """Read from the upsampled map, of which onnxruntime keeps one of two that are equal."""
    fine = _upsample(logits, scale_factor, align_corners).flatten(2)
    return fine.gather(2, indices.unsqueeze(1).expand(-1, fine.shape[1], -1))


def _upsample(logits: Tensor, scale_factor: int, align_corners: bool) -> Tensor:
    if scale_factor == 1:
        return logits.clone()
    size = (logits.shape[2] * scale_factor, logits.shape[3] * scale_factor)
    return F.interpolate(_wide(logits), size=size, mode="bilinear", align_corners=align_corners).to(logits.dtype)


def subdivide(
    logits: Tensor,
    num_points: int,
    scale_factor: int,
    align_corners: bool,
    class_index: Tensor | None,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fine = _upsample(logits, scale_factor, align_corners)
    return fine if return_logits else logits.new_empty(0), *uncertain_points(fine, num_points, class_index)


def subdivide_labels(
    logits: Tensor, num_points: int, scale_factor: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    fine = _upsample(logits, scale_factor, align_corners)
    return fine.argmax(1).to(label_dtype(logits.shape[1])), *uncertain_points(fine, num_points, None)


# ---- points


def point_sample(
    input: Sequence[Tensor],
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    dtype = torch.float64 if input[0].dtype == torch.float64 else torch.float32
    grid = 2 * coords.to(dtype) - 1
    if padding_mode == "border":
        grid = torch.where(grid.isnan(), torch.full_like(grid, -2), grid)
    if coords.dim() == 3:
        grid = grid.unsqueeze(2)
    sampled = [
        F.grid_sample(m.to(dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners).to(m.dtype)
        for m in input
    ]
    out = sampled[0] if len(sampled) == 1 else torch.cat(sampled, dim=1)
    return out.squeeze(3) if coords.dim() == 3 else out


def scatter_points(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    flat = logits.flatten(2)
    cells = indices.unsqueeze(1).expand(-1, logits.shape[1], -1)
    return flat.scatter(2, cells, values).view(logits.shape)


def scatter_points_(logits: Tensor, indices: Tensor, values: Tensor) -> None:
    logits.copy_(scatter_points(logits, indices, values))


def point_labels(labels: Tensor, coords: Tensor, ignore_index: int) -> Tensor:
    height, width = labels.shape[1:]
    wide = coords.to(torch.float64)
    inside = ((wide >= 0) & (wide <= 1)).all(-1)
    cell = torch.where(inside.unsqueeze(-1), wide, torch.zeros_like(wide))
    x = (cell[..., 0] * width).floor().long().clamp(max=width - 1)
    y = (cell[..., 1] * height).floor().long().clamp(max=height - 1)
    found = labels.flatten(1).long().gather(1, y * width + x)
    return torch.where(inside, found, torch.full_like(found, ignore_index))


def _unordered(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``function`` of the upsampled map with a selection in no order, which has no effect inside refine."""

    def call(
        logits: Tensor,
        num_points: int,
        scale_factor: int,
        align_corners: bool,
        class_index: Tensor | None = None,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fine = _upsample(logits, scale_factor, align_corners)
        indices = _select(fine, num_points, class_index)
        return function(fine), indices, _centres(indices, fine.shape[2], fine.shape[3])

    return call


_OPERATORS = Operators(
    subdivide=_unordered(lambda fine: fine),
    subdivide_labels=_unordered(lambda fine: fine.argmax(1).to(label_dtype(fine.shape[1]))),
    upsample_cells=_upsample_cells,
    point_sample=point_sample,
    every_cell=_every_cell,
)


@with_flat_arguments
def refine_mlp(coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions) -> Tensor:
    return refine_loop(
        coarse,
        features,
        options,
        _OPERATORS,
        call_head(head.predict, coarse, features, options, _OPERATORS, scatter_points),
    )


# ---- encoding


def _promoted(*tensors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result, and that of the arithmetic."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype, torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _distances(x: Tensor, codewords: Tensor) -> Tensor:
    """``||x - c||^2``: ``x [B, M, D]``, ``codewords [K, D]`` -> ``[B, M, K]``."""
    products = torch.matmul(x, codewords.t())
    squares = x.square().sum(-1, keepdim=True) - 2 * products + codewords.square().sum(-1)
    return torch.where(squares < 0, torch.zeros_like(squares), squares)  # not clamp: NaN stays NaN


def scaled_l2(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    dtype, wide = _promoted(x, codewords, scale)
    x, codewords = x.to(wide), codewords.to(wide)
    centre = codewords.mean(0)
    return (scale.to(wide) * _distances(x - centre, codewords - centre)).to(dtype)


def aggregate(assignment: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    dtype, wide = _promoted(assignment, x, codewords)
    assignment, x, codewords = assignment.to(wide), x.to(wide), codewords.to(wide)
    sums = torch.matmul(assignment.transpose(1, 2), x)
    return (sums - assignment.sum(1).unsqueeze(-1) * codewords).to(dtype)


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    dtype, wide = _promoted(x, codewords, scale)
    codewords = codewords.to(wide)
    centre = codewords.mean(0)
    codewords = codewords - centre
    x = x.to(wide).flatten(2).transpose(1, 2) - centre
    assignment = torch.softmax(scale.to(wide) * _distances(x, codewords), dim=-1)
    return aggregate(assignment, x, codewords).to(dtype)


# ---- adaptive pooling: ONNX has none, and torch.onnx translates only sizes that the bins divide


def _bins(size: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of ``size`` cells lie in each of ``bins``: ``[bins, size]`` bool, and the counts ``[bins, 1]``."""
    number = torch.arange(bins, device=device).unsqueeze(1)
    whole = _whole(size, device)
    start = torch.div(number * whole, bins, rounding_mode="floor")
    end = torch.div((number + 1) * whole + bins - 1, bins, rounding_mode="floor")
    cells = torch.arange(size, device=device)
    return (cells >= start) & (cells < end), end - start


def _average(x: Tensor, bins: int) -> Tensor:
    """Means over bins of the last axis."""
    inside, count = _bins(x.shape[-1], bins, x.device)
    return torch.matmul(x, (inside.to(x.dtype) / count.to(x.dtype)).t())


def _largest(x: Tensor, bins: int) -> Tensor:
    """Maxima over bins of the last axis."""
    size = x.shape[-1]
    if isinstance(size, int):
        parts = [x[..., i * size // bins : -(-(i + 1) * size // bins)].amax(-1) for i in range(bins)]
        return torch.stack(parts, dim=-1)
    inside, _ = _bins(size, bins, x.device)
    x = x.unsqueeze(-2)
    return torch.where(inside, x, torch.full_like(x, -torch.inf)).amax(-1)


def _pool(reduce: Callable[[Tensor, int], Tensor], x: Tensor, output_size: Any) -> Tensor:
    size = (output_size, output_size) if isinstance(output_size, int) or output_size is None else output_size
    height, width = size
    if width is not None:
        x = reduce(x, width)
    return x if height is None else reduce(x.transpose(-1, -2), height).transpose(-1, -2)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    if output_size in (1, (1, 1), [1, 1]):
        return input.mean((-2, -1), keepdim=True)
    return _pool(_average, input, output_size)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    if return_indices:
        raise NotImplementedError("adaptive_max_pool2d has no ONNX form that returns indices")
    return _pool(_largest, input, output_size)


# ---- the substitution

_FORMS: dict[str, Callable[..., Any]] = {
    "uncertainty": uncertainty,
    "uncertain_points": uncertain_points,
    "subdivide": subdivide,
    "_subdivide_labels": subdivide_labels,
    "point_sample": point_sample,
    "point_labels": point_labels,
    "scatter_points": scatter_points,
    "scatter_points_": scatter_points_,
    "scaled_l2": scaled_l2,
    "aggregate": aggregate,
    "encode": encode,
    "_refine_mlp": refine_mlp,
}
OPERATORS = {name: with_defaults(name, form) for name, form in _FORMS.items()}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
}


class StandardOps(TorchFunctionMode):
    """``with StandardOps(): torch.export.export(...)`` traces the functions above for ``torch.ops.rendseg`` and for
    adaptive pooling."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._substitute(func)(*args, **(kwargs or {}))

    @staticmethod
    def _substitute(func: Any) -> Callable[..., Any]:
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            space, _, name = str(func).partition(".")
            if space == "rendseg":
                name = name.split(".")[0]
                if name not in OPERATORS:
                    raise NotImplementedError(f"rendseg::{name} has no ONNX form")
                return OPERATORS[name]
            return func
        return _FUNCTIONS.get(func, func) if getattr(func, "__hash__", None) else func
