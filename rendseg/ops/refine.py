"""The inference loop in one call: PointRend (Kirillov et al. 2020), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._refine_loop import Operators, call_head, refine_loop
from ..reference._types import checked
from ..reference.refine import (
    Head,
    HeadLayers,
    RefineOptions,
    flat_arguments,
    refine_steps,
    resolve_options,
    with_flat_arguments,
)
from ..reference.subdivide import label_dtype, upsample_cells
from ._register import has_kernel, register, use_reference
from .point_sample import point_sample
from .scatter_points import scatter_points, scatter_points_

__all__ = ["refine"]


@checked
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
    rois: Sequence[Tensor] | None = None,
    class_index: Tensor | None = None,
) -> Tensor:
    """Refine a coarse prediction: upsample it, predict the most uncertain cells again with a point head, repeat.

    Args:
        coarse: coarse logits ``[N, C, h, w]``; contiguous and channels_last are read in place.
        features: fine feature map ``[N, Cf, Hf, Wf]``, or a list of maps. A list is concatenated over channels. With
            ``rois`` the maps are those of B images, ``[B, Cf, Hf, Wf]``.
        head: ``head(fine [N, Cf, P], coarse [N, C, P]) -> logits [N, C, P]``, any callable. With a
            ``rendseg.nn.PointHead`` (or another object whose ``refine_parameters()`` returns
            ``rendseg.reference.HeadLayers``) the whole loop is one call into the compiled library, if that has a kernel
            for the device and no gradient is wanted.
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
        output: ``"logits"``, ``"class"`` for those of ``class_index`` alone (the same numbers; with
            ``coarse_source="original"`` no map of all classes is made), or ``"labels"`` for the argmax map, which
            equals ``refine(..., output="logits").argmax(1)`` exactly. For labels the full-resolution logits are never
            allocated, unless a head that is called predicts all cells of the last step.
        rois: for masks of objects, ``(image_index, boxes)``: map n of ``coarse`` is the mask of the box ``boxes[n]``,
            ``(x0, y0, x1, y1)`` in ``[0, 1]`` of the feature maps (``[N, 4]`` float32), in image ``image_index[n]``
            (``[N]`` int64). Its point p reads the features at ``box_min + p * (box_max - box_min)``.
        class_index: ``[N]`` int64: map n is refined where the logit of this class is nearest to 0, instead of where
            two classes are nearest to each other. Not with ``output="labels"``.

    Returns:
        Logits ``[N, C, H, W]`` (``[N, 1, H, W]`` of one class) in the dtype of ``coarse``, or labels ``[N, H, W]``:
        uint8 up to 256 classes, else int16. The result is never an alias of ``coarse``.

    A step that predicts every cell is left out where the next one does so too, with ``coarse_source="original"``.

    A NaN logit makes its cell the most uncertain. Logits are differentiable in ``coarse``, ``features`` and the
    parameters of ``head``, through the selected points, not through the selection. Labels are not differentiable.

    Dtypes and autocast: upsampling and selection keep the dtype of ``coarse``. The head runs as it would alone: in the
    autocast dtype if autocast is on. Its output is cast to the dtype of ``coarse``. The one-call form follows the same
    rule: it runs in the dtype of the head's weights, which autocast narrows, and rounds halves after each layer.

    Raises:
        ValueError: a wrong rank, size or option, an ``output_size`` that whole steps do not reach, or a head that
            returns another shape.
        TypeError: unsupported dtypes.
        IndexError: an index of ``rois`` or ``class_index`` out of range (on a GPU: a device assert).
        RuntimeError: tensors on different devices.

    Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    maps, options = resolve_options(
        coarse,
        features,
        steps,
        output_size,
        num_points,
        coarse_source,
        scale_factor,
        align_corners,
        padding_mode,
        output,
        rois,
        class_index,
    )
    if use_reference("subdivide", coarse):
        return refine_steps(coarse, maps, head, options)
    # Without steps the head is not called.
    layers = _stock_layers(head, coarse, maps, options) if options.steps else None
    if layers is not None:
        with torch.no_grad():
            return torch.ops.rendseg._refine_mlp(*flat_arguments(coarse, maps, layers, options))
    predict = call_head(head, coarse, maps, options, _OPERATORS, _scatter)
    if options.labels:
        with torch.no_grad():
            return refine_loop(coarse, maps, options, _OPERATORS, predict)
    return refine_loop(coarse, maps, options, _OPERATORS, predict)


_OPERATORS = Operators(
    subdivide=torch.ops.rendseg.subdivide,
    subdivide_labels=torch.ops.rendseg._subdivide_labels,
    upsample_cells=upsample_cells,
    point_sample=point_sample,
)


def _scatter(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """In place, unless a gradient is wanted."""
    if torch.is_grad_enabled() and (logits.requires_grad or values.requires_grad):
        return scatter_points(logits, indices, values)
    return scatter_points_(logits, indices, values)


def _stock_layers(head: Head, coarse: Tensor, maps: list[Tensor], options: RefineOptions) -> HeadLayers | None:
    """The layers of a head that the one-call form can run exactly as calling it would, else ``None``."""
    describe = getattr(head, "refine_parameters", None)
    layers: HeadLayers | None = None if describe is None or not has_kernel("_refine_mlp", coarse) else describe()
    if layers is None:
        return None
    tensors = [*layers.weights, *layers.biases]
    inputs = (coarse, *maps, *tensors, *(options.rois or ()))
    if not options.labels and torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return None
    dtype, wide = tensors[0].dtype, torch.float64
    if any(t.dtype != dtype for t in tensors):
        return None
    if torch.is_autocast_enabled(coarse.device.type):
        if wide in (dtype, coarse.dtype, maps[0].dtype):  # autocast leaves float64 alone
            return None
        dtype = torch.get_autocast_dtype(coarse.device.type)
        return layers._replace(
            weights=[t.to(dtype) for t in layers.weights], biases=[t.to(dtype) for t in layers.biases]
        )
    if maps[0].dtype != dtype or (coarse.dtype == wide) != (dtype == wide):
        return None
    return layers


def _fake(coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions) -> Tensor:
    n, classes, height, width = coarse.shape
    scale = options.scale_factor**options.steps
    if options.labels:
        return coarse.new_empty((n, height * scale, width * scale), dtype=label_dtype(classes))
    if options.steps == 0 and not options.class_only:
        return torch.empty_like(coarse)
    layout = torch._prims_common.suggest_memory_format(coarse)
    classes = 1 if options.class_only else classes
    size = (n, classes, height * scale, width * scale)
    return torch.empty(size, dtype=coarse.dtype, device=coarse.device, memory_format=layout)


def _reference(coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions) -> Tensor:
    out = refine_steps(coarse, features, head.predict, options)
    if options.labels or (options.steps == 0 and not options.class_only):
        return out
    return out.contiguous(memory_format=torch._prims_common.suggest_memory_format(coarse))


register("_refine_mlp", reference=with_flat_arguments(_reference), fake=with_flat_arguments(_fake))
