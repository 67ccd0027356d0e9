"""The loop of ``refine`` over a namespace of operators: the PyTorch operators, the Triton launchers or the ONNX forms.

``rendseg.reference.refine`` is the definition; here no step of labels stores the upsampled logits. N images, C classes,
P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .reference.refine import Head, RefineOptions, check_head_output, every_cell, every_index
from .reference.subdivide import label_dtype


@dataclass(frozen=True)
class Operators:
    """What the loop calls; with all arguments of the operators of these names."""

    subdivide: Callable[..., tuple[Tensor, Tensor, Tensor]]
    subdivide_labels: Callable[..., tuple[Tensor, Tensor, Tensor]]
    upsample_cells: Callable[[Tensor, Tensor, int, bool], Tensor]
    point_sample: Callable[..., Tensor]
    every_cell: Callable[[Tensor, int, int], Tensor] = every_cell


class Step(NamedTuple):
    """One step before its points are predicted."""

    map: Tensor | None  # upsampled logits, or labels; None where every cell is predicted
    indices: Tensor | None  # [N, P], the cells of the points; None for every cell, in order
    coords: Tensor  # [N, P, 2]
    coarse: Tensor  # [N, C, P], the coarse logits at the points
    size: tuple[int, int]
    labels: bool  # whether this step gives labels


def refine_loop(
    coarse: Tensor,
    features: Sequence[Tensor],
    options: RefineOptions,
    operators: Operators,
    predict: Callable[[Step], Tensor],
) -> Tensor:
    """``predict(step)`` returns the map of a step with its points predicted: logits ``[N, C, H, W]`` or labels."""
    scale, align = options.scale_factor, options.align_corners
    options.check_indices(coarse, features)
    if options.steps == 0:
        if options.class_only:
            return options.of_class(coarse)
        return coarse.argmax(1).to(label_dtype(coarse.shape[1])) if options.labels else coarse.clone()
    # Where the head does not read the map, the map may hold one class.
    alone = options.class_only and options.coarse_source == "original"
    current = options.of_class(coarse) if alone else coarse
    class_index = None if alone else options.class_index
    height, width = coarse.shape[2:]
    for number in range(options.steps):
        labels = options.labels and number + 1 == options.steps
        height, width = height * scale, width * scale
        if options.overwrites(number, height * width):
            continue
        # A symbolic size is not compared: selecting all cells of a small image gives the same result.
        every = isinstance(height, int) and isinstance(width, int) and options.num_points >= height * width
        upsampled = indices = None
        if every:
            coords = operators.every_cell(coarse, height, width)
        else:
            subdivide, rest = (operators.subdivide_labels, ()) if labels else (operators.subdivide, (class_index, True))
            upsampled, indices, coords = subdivide(current, options.num_points, scale, align, *rest)
        if options.coarse_source == "original":
            points = operators.point_sample([coarse], coords, "bilinear", options.padding_mode, False)
        else:  # not read from the upsampled map, which a step of labels does not have; the bits are the same
            cells = every_index(coarse, height * width) if indices is None else indices
            points = operators.upsample_cells(current, cells, scale, align)
        current = predict(Step(upsampled, indices, coords, points, (height, width), labels))
    return options.of_class(current) if options.class_only and not alone else current


def call_head(
    head: Head,
    coarse: Tensor,
    features: Sequence[Tensor],
    options: RefineOptions,
    operators: Operators,
    scatter: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Step], Tensor]:
    """``predict`` of :func:`refine_loop` for any head; ``scatter(logits, indices, values)`` writes points to a map."""

    def predict(step: Step) -> Tensor:
        fine = options.sample(operators.point_sample, features, step.coords)
        values = head(fine, step.coarse)
        check_head_output(values, coarse, step.coords.shape[1])
        values = values.to(coarse.dtype)
        if options.class_only and options.coarse_source == "original":
            values = options.of_class(values)
        if step.labels:
            values = values.argmax(1).to(label_dtype(coarse.shape[1]))
        if step.map is None or step.indices is None:
            return values.reshape(*values.shape[:-1], *step.size)
        if step.labels:
            step.map.flatten(1).scatter_(1, step.indices, values)
            return step.map
        return scatter(step.map, step.indices, values)

    return predict
