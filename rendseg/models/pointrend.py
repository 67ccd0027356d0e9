"""PointRend around any decoder: PointRend (Kirillov et al. 2020). B images, C classes, H W their size, P points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._options import read
from ..nn.point_head import PointHead
from ..reference.uncertain_points import draw_counts
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput, Targets
from .losses import segmentation_loss
from .options import (
    AuxiliaryOptions,
    LossOptions,
    PointRendOptions,
    num_points,
    pointrend_options,
)
from .segmenter import SegmentationOutput, Segmenter, _argmax

SCALE = 2  # of one subdivision step


class PointRend(Segmenter):
    """Wraps ``decoder`` with training on uncertain points (section 3.2) and refinement at inference (section 3.1).

    ``head`` maps ``(fine [N, Cf, P], coarse [N, C, P]) -> [N, C, P]``; ``None`` makes the ``PointHead`` that the
    options describe. ``options`` is a preset's name or a full set of switches; further keyword arguments override
    single switches.

    ``forward(images, labels)`` -> ``{"loss_coarse", "loss_point", ...}``, scalars, weighted, exactly 0 with a graph
    where every label is ignored; ``forward(images)`` in evaluation mode and ``predict`` ->
    ``SegmentationOutput``, refined to exactly the padded image and cropped (with ``pad="none"``: resized). The number
    of steps follows from the coarse stride (4 -> 1: two of factor 2). Dtypes, sizes and errors as in ``Segmenter``.

    Training draws points from the default generator, or, with ``forward(images, labels, keys [B] int64)``, as a
    function of each image's key alone: see ``draws_of_keys``.
    """

    refines = True
    draws = True

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder,
        head: nn.Module | None = None,
        *,
        options: PointRendOptions | str = "rendseg",
        loss: LossOptions | None = None,
        auxiliary: Sequence[AuxiliaryOptions] = (),
        channels_last: bool = False,
        pad: str | int = "stride",
        **switches: Any,
    ) -> None:
        if isinstance(options, str):
            options = pointrend_options(options, **switches)
        elif switches:
            options = read(PointRendOptions, switches, "pointrend", options)
        super().__init__(
            backbone,
            decoder,
            loss=loss,
            auxiliary=auxiliary,
            align_corners=options.upsample_align_corners,
            coarse_loss_mean=options.coarse_loss_mean,
            coarse_loss_at=options.coarse_loss_at,
            channels_last=channels_last,
            pad=pad,
        )
        self.point_features = options.point_features or decoder.default_point_features
        self.options = dataclasses.replace(options, point_features=self.point_features)
        channels, strides = self.map_channels(), self.map_strides()
        unknown = [name for name in self.point_features if name not in channels]
        if unknown:
            finest = min(channels, key=lambda name: strides[name])
            raise ValueError(
                f"point_features must name maps of the backbone or decoder ({', '.join(channels)}), got {unknown}: "
                f"set point_features to [{finest}], the finest of them"
            )
        self.coarse_stride = options.coarse_stride or decoder.stride
        self.steps = _steps(self.coarse_stride, options.steps)
        self.left_over = self.coarse_stride // SCALE**self.steps  # factor of the final bilinear upsampling
        # Coordinates are relative to the padded image, so every map that is sampled has to cover exactly that.
        sampled = [strides[name] for name in self.point_features]
        self.size_divisor = math.lcm(self.size_divisor, self.coarse_stride, *sampled)
        if head is None:
            head = PointHead(
                sum(channels[name] for name in self.point_features),
                decoder.num_classes,
                options.hidden_channels,
                options.num_layers,
                options.coarse_each_layer,
                options.coarse_first,
                options.init,
            )
        self.head = head

    def _losses(
        self, coarse: Tensor, output: DecoderOutput, maps: Mapping[str, Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        losses = super()._losses(coarse, output, maps, targets)
        labels, keys, _ = targets
        options = self.options
        count = num_points(options.train_points, labels.shape[1], labels.shape[2])
        draws = None
        if keys is not None:
            if keys.shape != labels.shape[:1]:
                raise ValueError(f"keys must have shape [B] = {[len(labels)]}, got {list(keys.shape)}")
            candidates, _, uniform = draw_counts(count, options.oversample_ratio, options.importance_ratio)
            draws = draws_of_keys(keys, candidates + uniform)
        coords = ops.sample_uncertain_points(
            coarse.detach(),
            count,
            options.oversample_ratio,
            options.importance_ratio,
            padding_mode=options.padding_mode,
            align_corners=options.sampling_align_corners,
            random_coords=draws,
        )
        logits = self._point_logits([maps[name] for name in self.point_features], coarse, coords)
        value = segmentation_loss(
            logits,
            ops.point_labels(labels, coords, self.loss.ignore_index),
            class_weights=self.class_weights,
            ignore_index=self.loss.ignore_index,
            mean=options.point_loss_mean,
            normalize=self.loss.normalize,
        )
        losses["loss_point"] = self.loss.point_weight * value
        return losses

    def _point_logits(self, fine: list[Tensor], coarse: Tensor, coords: Tensor) -> Tensor:
        sampling = {"padding_mode": self.options.padding_mode, "align_corners": self.options.sampling_align_corners}
        return self.head(
            ops.point_sample(fine[0] if len(fine) == 1 else fine, coords, **sampling),  # type: ignore[arg-type]
            ops.point_sample(coarse, coords, **sampling),  # type: ignore[arg-type]
        )

    def _segment(
        self,
        images: Tensor,
        decoded: DecoderOutput,
        maps: Mapping[str, Tensor],
        size: tuple[int, int],
        output: str,
        return_points: bool,
    ) -> SegmentationOutput:
        height, width = size
        coarse = self._coarse(decoded, images)
        fine = [maps[name] for name in self.point_features]
        count = num_points(self.options.inference_points, images.shape[2], images.shape[3])
        points: list[Tensor] | None = None
        reached = (coarse.shape[2] * SCALE**self.steps, coarse.shape[3] * SCALE**self.steps)
        fits = reached == size if self.placing.resize else self.left_over == 1
        as_labels = output == "labels" and fits
        if return_points or self.options.sampling_align_corners:
            refined, points = self._refine_stepwise(coarse, fine, count)
            if as_labels:
                refined = _argmax(refined)
            if return_points:
                points = [p * p.new_tensor([images.shape[3] / width, images.shape[2] / height]) for p in points]
            else:
                points = None
        else:
            refined = ops.refine(
                coarse,
                fine if len(fine) > 1 else fine[0],
                self.head,
                steps=self.steps,
                num_points=count,
                coarse_source=self.options.coarse_source,
                scale_factor=SCALE,
                align_corners=self.options.upsample_align_corners,
                padding_mode=self.options.padding_mode,
                output="labels" if as_labels else "logits",
            )
        if as_labels:
            refined = refined[:, :height, :width]
        else:
            refined = self.placing.enlarge(refined, self.left_over, size)
        if output == "labels":
            return SegmentationOutput(coarse, None, refined if as_labels else _argmax(refined), points)
        return SegmentationOutput(coarse, refined, None, points)

    def _refine_stepwise(self, coarse: Tensor, fine: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
        """What ``ops.refine`` computes, one op at a time: where the points, or ``sampling_align_corners``, are asked
        for."""
        current, points = coarse, []
        for _ in range(self.steps):
            enlarged, indices, coords = ops.subdivide(current, count, SCALE, self.options.upsample_align_corners)
            assert enlarged is not None
            source = coarse if self.options.coarse_source == "original" else enlarged
            values = self._point_logits(fine, source, coords)
            current = ops.scatter_points(enlarged, indices, values.to(enlarged.dtype))
            points.append(coords)
        return current, points


def draws_of_keys(keys: Tensor, count: int) -> Tensor:
    """``[B, count, 2]`` float32 uniform in [0, 1): a function of each image's int64 key and the position alone.

    The draws do not depend on how a batch is divided over processes, on earlier draws, or on the device. The
    numbers are 24 bits of a counter hashed twice (the finaliser of Steele et al. 2014, splitmix64); int64 products
    wrap.
    """
    position = torch.arange(2 * count, device=keys.device)
    start = _mix(keys.long())[:, None]
    mixed = _mix(start + position * -7046029254386353131)  # 0x9E3779B97F4A7C15, the golden ratio
    return ((mixed >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(len(keys), count, 2)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _steps(stride: int, steps: int | None) -> int:
    """The number of doublings from ``stride`` to 1, or the checked ``steps``."""
    if steps is None:
        steps = stride.bit_length() - 1
        if 2**steps != stride:
            raise ValueError(
                f"coarse logits of stride {stride} cannot be doubled to stride 1: set coarse_stride to a power of two"
            )
    elif stride % SCALE**steps:
        raise ValueError(
            f"{steps} steps of x{SCALE} do not fit coarse logits of stride {stride}: they would not end at the image"
        )
    return steps
