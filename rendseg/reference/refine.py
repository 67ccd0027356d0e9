"""The inference loop: PointRend (Kirillov et al. 2020), section 3.1. N images, C classes, h w coarse grid, P points.

With ``rois`` the N maps are masks of boxes in B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check
from ._types import checked
from .point_sample import PADDING_MODES, point_sample
from .scatter_points import scatter_points
from .subdivide import countable, label_dtype, subdivide, upsample
from .uncertain_points import cell_centres

Head = Callable[[Tensor, Tensor], Tensor]


def resolve_steps(coarse: Tensor, steps: int | None, output_size: Sequence[int] | None, scale_factor: int) -> int:
    """Number of steps, from ``steps`` or from an ``output_size`` that steps of ``scale_factor`` reach exactly."""
    if (steps is None) == (output_size is None):
        raise ValueError(
            f"exactly one of steps and output_size must be given, got steps={steps}, output_size={output_size}"
        )
    if scale_factor < 2:
        raise ValueError(f"scale_factor must be at least 2, got {scale_factor}")
    if steps is not None:
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        _check_growth(coarse.shape[2], coarse.shape[3], steps, scale_factor)
        return steps
    assert output_size is not None
    if len(output_size) != 2:
        raise ValueError(f"output_size must be (height, width), got {tuple(output_size)}")
    height, width = coarse.shape[2:]
    count = 0
    while height < output_size[0] or width < output_size[1]:
        height, width, count = height * scale_factor, width * scale_factor, count + 1
    if (height, width) != tuple(output_size):
        raise ValueError(
            f"output_size {tuple(output_size)} cannot be reached from {tuple(coarse.shape[2:])} by steps of "
            f"{scale_factor}; the next size that can is {(height, width)}: pad the image, refine, then crop"
        )
    return count


def _check_growth(height: int, width: int, steps: int, scale: int) -> None:
    """Every step must be a map that ``subdivide`` takes."""
    if scale >= 2**31:
        raise ValueError(f"scale_factor must be less than 2^31, got {scale}")
    if height >= 2**31 or width >= 2**31:
        raise ValueError(f"coarse must have H and W below 2^31, got {height} x {width}")
    h, w = height, width
    for step in range(1, steps + 1):
        h, w = h * scale, w * scale
        if not countable(h, w):
            raise ValueError(
                f"steps must give fewer than 2^32 cells, got {steps} steps of {scale} from {height} x {width}: "
                f"step {step} has {h} x {w}"
            )


class Rois(NamedTuple):
    """N boxes ``(x0, y0, x1, y1)`` in ``[0, 1]`` of the feature maps, and the image of each."""

    image_index: Tensor  # [N]
    boxes: Tensor  # [N, 4]

    def place(self, coords: Tensor) -> Tensor:
        """Points ``[N, P, 2]`` of the boxes in the images."""
        lower, upper = self.boxes[:, None, :2], self.boxes[:, None, 2:]
        return lower + coords * (upper - lower)

    def check_with(self, coarse: Tensor) -> None:
        check.index(self.image_index, "image_index", coarse, "coarse", coarse, "coarse")
        check.strided(self.boxes, "boxes")
        if self.boxes.dtype != torch.float32:
            raise TypeError(f"boxes must be float32, got {self.boxes.dtype}")
        count = coarse.shape[0]
        if self.boxes.dim() != 2 or self.boxes.shape[0] != count or self.boxes.shape[1] != 4:
            raise ValueError(
                f"boxes must have shape [N, 4] with N = {count} as in coarse, got {check.shape_of(self.boxes)}"
            )
        check.same_device(self.boxes, "boxes", coarse, "coarse")


class RefineOptions(NamedTuple):
    """How :func:`refine` goes; the names are its arguments."""

    steps: int
    num_points: int
    coarse_source: str
    scale_factor: int
    align_corners: bool
    padding_mode: str
    labels: bool
    class_index: Tensor | None
    class_only: bool
    rois: Rois | None

    def overwrites(self, step: int, cells: int) -> bool:
        """Whether the step after ``step``, which has ``cells``, predicts every cell, and no coarse value is read from
        the map of ``step``: that map is not needed."""
        if self.coarse_source != "original" or step + 1 >= self.steps or not isinstance(cells, int):
            return False
        return self.num_points >= cells * self.scale_factor**2

    def sample(self, point_sample: Callable[..., Tensor], features: Sequence[Tensor], coords: Tensor) -> Tensor:
        """The features ``[N, Cf, P]`` at the points of a step, with ``point_sample`` of any backend."""
        if self.rois is None:
            return point_sample(features, coords, "bilinear", self.padding_mode, False)
        count, points = coords.shape[:2]
        images, image = features[0].shape[0], self.rois.image_index
        flat = self.rois.place(coords).reshape(1, -1, 2)
        # Indexing refuses an image that is not there, on a GPU too.
        out = features[0].new_zeros((images, sum(f.shape[1] for f in features), 1))[image].expand(-1, -1, points)
        for b in range(images):  # every image at all points: which of them are its own is known to the device alone
            sampled = point_sample([f[b : b + 1] for f in features], flat, "bilinear", self.padding_mode, False)
            sampled = sampled.view(sampled.shape[1], count, points).transpose(0, 1)
            out = sampled if images == 1 else torch.where((image == b).view(-1, 1, 1), sampled, out)
        return out

    def of_class(self, values: Tensor) -> Tensor:
        """``[N, C, ...]`` to ``[N, 1, ...]``: the class of each mask."""
        assert self.class_index is not None
        index = self.class_index.view(-1, *[1] * (values.dim() - 1))
        return values.gather(1, index.expand(-1, 1, *values.shape[2:]))

    def check_indices(self, coarse: Tensor, features: Sequence[Tensor]) -> None:
        """Indices on the CPU; a graph that is compiled has no values yet."""
        if torch.compiler.is_compiling():
            return
        if self.rois is not None:
            check.in_range(self.rois.image_index, "image_index", features[0].shape[0], "B")
        if self.class_index is not None:
            check.in_range(self.class_index, "class_index", coarse.shape[1], "C")

    def check_with(self, coarse: Tensor, features: Sequence[Tensor]) -> None:
        check.logits(coarse, "coarse")
        check.num_points(self.num_points)
        check.option(self.coarse_source, "coarse_source", ("original", "current"))
        check.option(self.padding_mode, "padding_mode", PADDING_MODES)
        resolve_steps(coarse, self.steps, None, self.scale_factor)
        if self.labels:
            label_dtype(coarse.shape[1])
            if self.class_index is not None:
                raise ValueError('output must be "logits" or "class" with class_index: labels compare all classes')
        if self.class_only and self.class_index is None:
            raise ValueError('class_index must be given with output="class", got None')
        if self.class_index is not None:
            check.index(self.class_index, "class_index", coarse, "coarse", coarse, "coarse")
        if self.rois is not None:
            self.rois.check_with(coarse)
        if not features:
            raise ValueError("features must hold at least one tensor, got an empty list")
        for i, feature in enumerate(features):
            name = f"features[{i}]"
            check.sampled_map(feature, name)
            like, like_name = (coarse, "coarse") if self.rois is None else (features[0], "features[0]")
            if feature.shape[0] != like.shape[0]:
                raise ValueError(
                    f"{name} must have N = {like.shape[0]} as in {like_name}, got shape {check.shape_of(feature)}"
                )
            if feature.dtype != features[0].dtype:
                raise TypeError(f"{name} must have the dtype of features[0] ({features[0].dtype}), got {feature.dtype}")
            check.same_device(feature, name, coarse, "coarse")
        check.total_channels(features, "features")


class HeadLayers(NamedTuple):
    """A stock point head: linear layers ``weights [O, I]``, ``biases [O]``, ReLU after all but the last.

    The coarse logits are joined to the input of every layer, or of the first alone. The head runs in the dtype of its
    weights.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    coarse_each_layer: bool
    coarse_first: bool

    def predict(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """``fine [N, Cf, P]``, ``coarse [N, C, P]`` to logits ``[N, C, P]``."""

        def join(x: Tensor) -> Tensor:
            return torch.cat((coarse, x) if self.coarse_first else (x, coarse), dim=1)

        coarse = coarse.to(self.weights[0].dtype)
        x = join(fine.to(coarse.dtype))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = join(x.relu()) if self.coarse_each_layer else x.relu()
            x = F.conv1d(x, weight.unsqueeze(-1), bias)
        return x

    def check_with(self, coarse: Tensor, features: Sequence[Tensor]) -> None:
        weights, biases = self.weights, self.biases
        if not weights or len(weights) != len(biases):
            raise ValueError(f"weights and biases must hold one tensor per layer, got {len(weights)} and {len(biases)}")
        classes, dtype = coarse.shape[1], weights[0].dtype
        inputs = sum(f.shape[1] for f in features) + classes
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            check.strided(weight, f"weights[{i}]")
            check.feature_dtype(weight, f"weights[{i}]")
            if weight.dim() != 2 or weight.shape[1] != inputs or weight.shape[0] == 0:
                raise ValueError(f"weights[{i}] must have shape [O, I] with I = {inputs}, got {check.shape_of(weight)}")
            if i + 1 == len(weights) and weight.shape[0] != classes:
                raise ValueError(
                    f"weights[{i}] must have shape [C, I] with C = {classes} as in coarse, got {check.shape_of(weight)}"
                )
            if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"biases[{i}] must have shape [O] with O = {weight.shape[0]}, got {check.shape_of(bias)}"
                )
            if weight.dtype != dtype or bias.dtype != dtype:
                raise TypeError(
                    f"weights[{i}] and biases[{i}] must have the dtype of weights[0] ({dtype}), "
                    f"got {weight.dtype} and {bias.dtype}"
                )
            check.same_device(weight, f"weights[{i}]", coarse, "coarse")
            check.same_device(bias, f"biases[{i}]", coarse, "coarse")
            inputs = weight.shape[0] + (classes if self.coarse_each_layer else 0)
        wide = {t.dtype == torch.float64 for t in (coarse, features[0], weights[0])}
        if len(wide) > 1:
            raise TypeError(
                "coarse, features and weights must all be float64 or none, "
                f"got {coarse.dtype}, {features[0].dtype} and {dtype}"
            )


def check_head_output(values: Tensor, coarse: Tensor, points: int) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"head must return a tensor, got {type(values).__name__}")
    wanted = (coarse.shape[0], coarse.shape[1], points)
    if values.dim() != 3 or tuple(values.shape) != wanted:
        raise ValueError(f"head must return logits of shape [N, C, P] = {list(wanted)}, got {check.shape_of(values)}")
    if not values.is_floating_point():
        raise TypeError(f"head must return floating-point logits, got {values.dtype}")


def every_index(coarse: Tensor, cells: int) -> Tensor:
    """``[N, cells]``: 0, 1, ... for each image of ``coarse``."""
    return torch.arange(cells, device=coarse.device).expand(coarse.shape[0], -1)


def every_cell(coarse: Tensor, height: int, width: int) -> Tensor:
    """Centres of all cells of an H x W grid, ``[N, H*W, 2]``."""
    return cell_centres(every_index(coarse, height * width), height, width)


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
    """Subdivide, gather, ``head(fine [N, Cf, P], coarse [N, C, P]) -> [N, C, P]``, scatter, repeat.

    With ``coarse_source="current"`` the coarse values are the selected cells of the step's upsampled map, before the
    scatter. Sampling that map at the points reads these cells, since the points are their centres; reading them
    directly leaves no rounded position between, so a kernel that interpolates as ``subdivide`` does has the same bits.

    With ``rois = (image_index [N], boxes [N, 4])`` point p of mask n reads the features ``[B, Cf, Hf, Wf]`` of image
    ``image_index[n]`` at ``box_min + p * (box_max - box_min)``. With ``class_index`` the uncertainty is that of one
    class, ``-|logit|``; ``output="class"`` returns the logits of that class alone, ``[N, 1, H, W]``. A step that
    recomputes every cell is left out where the next one does so too and the coarse values come from the original map:
    nothing of it would remain.
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
    return refine_steps(coarse, maps, head, options)


def resolve_options(
    coarse: Tensor,
    features: Tensor | Sequence[Tensor],
    steps: int | None,
    output_size: Sequence[int] | None,
    num_points: int,
    coarse_source: str,
    scale_factor: int,
    align_corners: bool,
    padding_mode: str,
    output: str,
    rois: Sequence[Tensor] | None,
    class_index: Tensor | None,
) -> tuple[list[Tensor], RefineOptions]:
    """Checked arguments of :func:`refine`: the maps, and the options."""
    maps = [features] if isinstance(features, Tensor) else list(features)
    check.option(output, "output", ("logits", "labels", "class"))
    check.logits(coarse, "coarse")
    steps = resolve_steps(coarse, steps, output_size, scale_factor)
    if rois is not None and len(rois) != 2:
        raise ValueError(f"rois must be (image_index [N], boxes [N, 4]), got {len(rois)} tensors")
    options = RefineOptions(
        steps,
        num_points,
        coarse_source,
        scale_factor,
        align_corners,
        padding_mode,
        output == "labels",
        class_index,
        output == "class",
        None if rois is None else Rois(*rois),
    )
    options.check_with(coarse, maps)
    return maps, options


def refine_steps(coarse: Tensor, features: Sequence[Tensor], head: Head, options: RefineOptions) -> Tensor:
    """:func:`refine` with its options checked: the definition."""
    _, num_points, coarse_source, scale_factor, align_corners, padding_mode, labels, class_index, *_ = options
    options.check_indices(coarse, features)
    current = coarse.clone()
    height, width = coarse.shape[2:]
    for step in range(options.steps):
        previous = current
        height, width = height * scale_factor, width * scale_factor
        if options.overwrites(step, height * width):
            continue
        every = num_points >= height * width  # every cell is recomputed, so nothing is selected
        if every:
            coords = every_cell(coarse, height, width)
        else:
            fine, indices, coords = subdivide(previous, num_points, scale_factor, align_corners, class_index)
        if coarse_source == "original":
            points = point_sample(coarse, coords, padding_mode=padding_mode)
        elif every:
            points = upsample(previous, scale_factor, align_corners).flatten(2)
        else:
            assert fine is not None
            points = fine.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, fine.shape[1], -1))
        values = head(options.sample(point_sample, features, coords), points)
        check_head_output(values, coarse, coords.shape[1])
        values = values.to(coarse.dtype)
        if every:
            current = values.reshape(*values.shape[:2], height, width)
        else:
            assert fine is not None
            current = scatter_points(fine, indices, values)
    if labels:
        return current.argmax(1).to(label_dtype(coarse.shape[1]))
    return options.of_class(current) if options.class_only else current


def with_flat_arguments(
    function: Callable[[Tensor, Sequence[Tensor], HeadLayers, RefineOptions], Tensor],
) -> Callable[..., Tensor]:
    """``function(coarse, features, head, options)`` with checks and the arguments of ``rendseg::_refine_mlp``."""

    def flat(
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
        class_index: Tensor | None,
        class_only: bool,
        image_index: Tensor | None,
        boxes: Tensor | None,
    ) -> Tensor:
        head = HeadLayers(weights, biases, coarse_each_layer, coarse_first)
        if (image_index is None) != (boxes is None):
            raise ValueError("image_index and boxes must be given together, got one of them")
        rois = None if image_index is None or boxes is None else Rois(image_index, boxes)
        options = RefineOptions(
            steps,
            num_points,
            coarse_source,
            scale_factor,
            align_corners,
            padding_mode,
            labels,
            class_index,
            class_only,
            rois,
        )
        options.check_with(coarse, features)
        head.check_with(coarse, features)
        return function(coarse, features, head, options)

    flat.__name__, flat.__doc__ = function.__name__, function.__doc__
    return flat


def flat_arguments(
    coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions
) -> tuple[Any, ...]:
    """The arguments of ``rendseg::_refine_mlp``: what :func:`with_flat_arguments` takes apart again."""
    *rest, labels, class_index, class_only, rois = options
    joining = (head.coarse_each_layer, head.coarse_first)
    found = (None, None) if rois is None else rois
    return (coarse, features, head.weights, head.biases, *rest, *joining, labels, class_index, class_only, *found)


@with_flat_arguments
def refine_mlp(coarse: Tensor, features: Sequence[Tensor], head: HeadLayers, options: RefineOptions) -> Tensor:
    """:func:`refine` with a stock head."""
    return refine_steps(coarse, features, head.predict, options)
