"""The inference loop in one call: PointRend (Kirillov et al. 2020), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import _checks as check
from ..reference.refine import Head, check_head_output, check_refine, check_refine_mlp, every_cell, resolve_steps
from ..reference.refine import refine as reference
from ..reference.refine import refine_mlp as reference_mlp
from ..reference.subdivide import label_dtype, upsample_cells
from ._register import has_kernel, register, use_reference
from .point_sample import point_sample
from .scatter_points import scatter_points, scatter_points_

__all__ = ["refine"]


def refine(
    coarse: Tensor,
    features: Tensor | Sequence[Tensor],
    head: Head,
    *,
    steps: int | None = None,
    output_size: Sequence[int] | None = None,
    num_points: int,
    coarse_source: str = "original",
    scale_factor: int = 2,
    align_corners: bool = False,
    padding_mode: str = "zeros",
    output: str = "logits",
) -> Tensor:
    """Refine a coarse prediction: upsample it, predict the most uncertain cells again with a point head, repeat.

    Args:
        coarse: coarse logits ``[N, C, h, w]``; contiguous and channels_last are read in place.
        features: fine feature map ``[N, Cf, Hf, Wf]``, or a list of maps. A list is concatenated over channels.
        head: ``head(fine [N, Cf, P], coarse [N, C, P]) -> logits [N, C, P]``, any callable. With a
            ``rendseg.nn.PointHead`` (or another object whose ``refine_parameters()`` gives its layers) the whole loop
            is one call into the compiled library, if that has a kernel for the device and no gradient is wanted.
        steps: the number of steps. Give this or ``output_size``, not both.
        output_size: the size ``(H, W)`` that whole steps must reach.
        num_points: cells to predict again per step and image. If a step has at most ``num_points`` cells, the head
            predicts all of them and nothing is selected.
        coarse_source: which logits the head sees: ``"original"`` (``coarse``, sampled at the points) or ``"current"``
            (the selected cells of the step's upsampled map, before they are replaced).
        scale_factor: factor of each step, at least 2.
        align_corners: for the upsampling only. Points are cell centres in the half-pixel convention, and features are
            always sampled with ``align_corners=False``.
        padding_mode: of the sampling, ``"zeros"`` or ``"border"``.
        output: ``"logits"``, or ``"labels"`` for the argmax map, which equals
            ``refine(..., output="logits").argmax(1)`` exactly. For labels the full-resolution logits are never
            allocated, unless a head that is called predicts all cells of the last step.

    Returns:
        Logits ``[N, C, H, W]`` in the dtype of ``coarse``, or labels ``[N, H, W]``: uint8 up to 256 classes, else
        int16. The result is never an alias of ``coarse``.

    A NaN logit makes its cell the most uncertain. Logits are differentiable in ``coarse``, ``features`` and the
    parameters of ``head``, through the selected points, not through the selection. Labels are not differentiable.

    Dtypes and autocast: upsampling and selection keep the dtype of ``coarse``. The head runs as it would alone: in the
    autocast dtype if autocast is on. Its output is cast to the dtype of ``coarse``. The one-call form follows the same
    rule: it runs in the dtype of the head's weights, which autocast narrows, and rounds halves after each layer.

    Raises:
        ValueError: a wrong rank, size or option, an ``output_size`` that whole steps do not reach, or a head that
            returns another shape.
        TypeError: unsupported dtypes.
        RuntimeError: tensors on different devices.

    Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    maps = [features] if isinstance(features, Tensor) else list(features)
    check.option(output, "output", ("logits", "labels"))
    labels = output == "labels"
    check_refine(coarse, maps, num_points, coarse_source, padding_mode, labels)
    count = resolve_steps(coarse, steps, output_size, scale_factor)
    if use_reference("subdivide", coarse):
        return reference(
            coarse,
            maps,
            head,
            steps=count,
            num_points=num_points,
            coarse_source=coarse_source,
            scale_factor=scale_factor,
            align_corners=align_corners,
            padding_mode=padding_mode,
            output=output,
        )
    stock = _stock_head(head, coarse, maps, labels)
    if stock is not None:
        with torch.no_grad():
            return torch.ops.rendseg._refine_mlp(
                coarse,
                maps,
                stock["weights"],
                stock["biases"],
                count,
                num_points,
                coarse_source,
                scale_factor,
                align_corners,
                padding_mode,
                stock["coarse_each_layer"],
                stock["coarse_first"],
                labels,
            )
    if labels:
        with torch.no_grad():
            return _loop(
                coarse, maps, head, count, num_points, coarse_source, scale_factor, align_corners, padding_mode, True
            )
    return _loop(coarse, maps, head, count, num_points, coarse_source, scale_factor, align_corners, padding_mode, False)


def _loop(
    coarse: Tensor,
    maps: list[Tensor],
    head: Head,
    steps: int,
    num_points: int,
    coarse_source: str,
    scale_factor: int,
    align_corners: bool,
    padding_mode: str,
    labels: bool,
) -> Tensor:
    """The loop over the operators, for any head."""
    n, classes = coarse.shape[:2]
    if steps == 0:
        return coarse.argmax(1).to(label_dtype(classes)) if labels else coarse.clone()
    current = coarse
    for step in range(steps):
        last = labels and step + 1 == steps
        previous = current
        height, width = previous.shape[2] * scale_factor, previous.shape[3] * scale_factor
        every = num_points >= height * width
        if every:
            coords = every_cell(coarse, height, width)
        elif last:
            label_map, indices, coords = torch.ops.rendseg._subdivide_labels(
                previous, num_points, scale_factor, align_corners
            )
        else:
            fine, indices, coords = torch.ops.rendseg.subdivide(previous, num_points, scale_factor, align_corners)
        if coarse_source == "original":
            points = point_sample(coarse, coords, padding_mode=padding_mode)
        else:  # not read from the upsampled map, which labels never have; the bits are those of that map
            if every:
                indices = torch.arange(height * width, device=coarse.device).expand(n, -1)
            points = upsample_cells(previous, indices, scale_factor, align_corners)
        values = head(point_sample(maps, coords, padding_mode=padding_mode), points)
        check_head_output(values, coarse, coords.shape[1])
        values = values.to(coarse.dtype)
        if last:
            picked = values.argmax(1).to(label_dtype(classes))
            if every:
                return picked.reshape(n, height, width)
            label_map.flatten(1).scatter_(1, indices, picked)
            return label_map
        if every:
            current = values.reshape(n, classes, height, width)
        elif torch.is_grad_enabled() and (fine.requires_grad or values.requires_grad):
            current = scatter_points(fine, indices, values)
        else:
            scatter_points_(fine, indices, values)
            current = fine
    return current


def _stock_head(head: Head, coarse: Tensor, maps: list[Tensor], labels: bool) -> dict[str, Any] | None:
    """The layers of a head that the one-call form can run exactly as calling it would, else ``None``."""
    describe = getattr(head, "refine_parameters", None)
    if describe is None or not has_kernel("_refine_mlp", coarse):
        return None
    stock = describe()
    if stock is None:
        return None
    tensors = [*stock["weights"], *stock["biases"]]
    if not labels and torch.is_grad_enabled() and any(t.requires_grad for t in (coarse, *maps, *tensors)):
        return None
    dtype = tensors[0].dtype
    if any(t.dtype != dtype for t in tensors):
        return None
    wide = torch.float64
    if torch.is_autocast_enabled(coarse.device.type):
        if wide in (dtype, coarse.dtype, maps[0].dtype):  # autocast leaves float64 alone
            return None
        dtype = torch.get_autocast_dtype(coarse.device.type)
        return stock | {key: [t.to(dtype) for t in stock[key]] for key in ("weights", "biases")}
    if maps[0].dtype != dtype or (coarse.dtype == wide) != (dtype == wide):
        return None
    return stock


def _fake(
    coarse: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    steps: int,
    num_points: int,
    coarse_source: str,
    scale_factor: int,
    align_corners: bool,
    padding_mode: str,
    coarse_each_layer: bool,
    coarse_first: bool,
    labels: bool,
) -> Tensor:
    check_refine_mlp(
        coarse,
        features,
        weights,
        biases,
        steps,
        num_points,
        coarse_source,
        scale_factor,
        padding_mode,
        coarse_each_layer,
        labels,
    )
    n, classes, height, width = coarse.shape
    if steps == 0:
        return coarse.new_empty((n, height, width), dtype=label_dtype(classes)) if labels else torch.empty_like(coarse)
    height, width = height * scale_factor**steps, width * scale_factor**steps
    if labels:
        return coarse.new_empty((n, height, width), dtype=label_dtype(classes))
    layout = torch._prims_common.suggest_memory_format(coarse)
    size = (n, classes, height, width)
    return torch.empty(size, dtype=coarse.dtype, device=coarse.device, memory_format=layout)


def _reference_kernel(coarse: Tensor, *rest: Any) -> Tensor:
    out = reference_mlp(coarse, *rest)
    if out.dim() == 3 or rest[3] == 0:
        return out
    return out.contiguous(memory_format=torch._prims_common.suggest_memory_format(coarse))


register("_refine_mlp", reference=_reference_kernel, fake=_fake)
