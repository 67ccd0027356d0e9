"""Backbone and decoder as a segmentation model, without point refinement. B images, C classes, H W their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .auxiliary import AuxiliaryHeads, Placing
from .backbones import Backbone, strided_points, to_channels_last
from .decoder import Decoder, DecoderOutput, Targets
from .losses import weighted_terms, widened
from .options import AuxiliaryOptions, LossOptions


class SegmentationOutput(NamedTuple):
    """What a model returns in evaluation mode.

    coarse
        ``[B, C, h, w]`` logits of the (padded) image; ``Segmenter.upsample`` brings them to the image.
    refined
        ``[B, C, H, W]`` logits of the image (of a plain ``Segmenter``: the coarse ones, upsampled); ``None`` with
        ``output="labels"``.
    labels
        ``[B, H, W]`` uint8 (int16 beyond 256 classes) with ``output="labels"``, else ``None``.
    points
        with ``return_points``: one ``[B, P, 2]`` per subdivision step, ``(x, y)`` relative to the image (a point in the
        padding lies above 1); else ``None``.
    """

    coarse: Tensor
    refined: Tensor | None = None
    labels: Tensor | None = None
    points: list[Tensor] | None = None


class Segmenter(nn.Module):
    """A backbone and a decoder; logits are upsampled bilinearly.

    ``forward(images [B, C_in, H, W], labels [B, H, W])`` -> ``{"loss_coarse": scalar, ...}`` (weighted: their sum is
    the objective; ``loss_coarse_<term>`` where ``loss`` has several terms, ``loss_aux_<level>`` of the ``auxiliary``
    heads, which only training runs); ``forward(images)`` in evaluation mode -> ``SegmentationOutput``.

    Any image size. ``pad="stride"``: images are padded with zeros (labels with ``ignore_index``) right and below as the
    network needs, results are cropped back, and every cell keeps its place. A number: to a multiple of it too.
    ``pad="none"``: nothing is padded; maps are resized to the exact size of the next finer one and logits to that of
    the image, which stretches them where the stride does not divide the size.

    Dtypes: floating images, integer labels. Under autocast the network runs in its dtype; logits are widened to float32
    before upsampling, losses and selection. Errors: ``ValueError`` and ``TypeError`` for shapes and dtypes that do not
    fit.
    """

    refines = False
    """Whether the model refines points: whether ``refined`` is more than the upsampled ``coarse``."""
    draws = False
    """Whether training draws points, for which ``forward`` takes ``keys``."""

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder,
        *,
        loss: LossOptions | None = None,
        auxiliary: Sequence[AuxiliaryOptions] = (),
        align_corners: bool = False,
        coarse_loss_mean: str = "valid",
        coarse_loss_at: str = "image",
        channels_last: bool = False,
        pad: str | int = "stride",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.num_classes = decoder.num_classes
        self.loss = loss or LossOptions()
        self.align_corners = align_corners
        self.coarse_loss_mean = coarse_loss_mean
        self.placing = Placing(coarse_loss_at, align_corners, pad == "none", self.loss.ignore_index)
        self.channels_last = channels_last
        self.coarse_stride = decoder.stride
        self.class_weights: Tensor | None
        weights = self.loss.class_weights
        if weights is not None:
            if len(weights) != self.num_classes:
                raise ValueError(
                    f"class_weights must hold one weight per class ({self.num_classes}), got {len(weights)}"
                )
            if not all(0 <= w < math.inf for w in weights):
                raise ValueError(f"class_weights must be finite and not negative, got {list(weights)}")
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        self.size_divisor = math.lcm(self.coarse_stride, decoder.size_divisor, backbone.size_divisor)
        if pad == "none":
            if not backbone.any_size:
                raise ValueError(
                    f"pad: none does not go with backbone {backbone.name!r}, which takes multiples of "
                    f"{backbone.size_divisor} alone: set model.pad to stride"
                )
            decoder.resizes = True
        elif isinstance(pad, int):
            self.size_divisor = math.lcm(self.size_divisor, pad)
        elif pad != "stride":
            raise ValueError(f"pad must be stride, none or a number, got {pad!r}")
        channels, strides = self.map_channels(), self.map_strides()
        self.auxiliary = AuxiliaryHeads(auxiliary, channels, strides, self.num_classes)
        if channels_last:
            to_channels_last(self)
        self._plain_on_cpu = bool(strided_points(backbone))

    def map_channels(self) -> dict[str, int]:
        """Channels of every named map: the backbone's and the decoder's."""
        return {**self.backbone.channels_of, **self.decoder.feature_channels}

    def map_strides(self) -> dict[str, int]:
        """Strides of every named map."""
        return {**self.backbone.strides_of, **self.decoder.feature_strides}

    def forward(
        self, images: Tensor, labels: Tensor | None = None, keys: Tensor | None = None
    ) -> dict[str, Tensor] | SegmentationOutput:
        if labels is not None:
            return self.losses(images, labels, keys)
        if self.training:
            raise ValueError("labels are needed in training mode; call eval() to predict")
        return self._predict(images, "logits", False)

    @torch.no_grad()
    def predict(self, images: Tensor, output: str = "logits", return_points: bool = False) -> SegmentationOutput:
        """Segment ``images [B, C_in, H, W]`` without gradients.

        ``output="labels"`` gives the label map and never allocates full-size logits where the steps reach stride 1; it
        equals the argmax of ``output="logits"``. Errors: ``RuntimeError`` in training mode.
        """
        self._need_evaluation_mode()
        if output not in ("logits", "labels"):
            raise ValueError(f"output must be one of logits, labels, got {output!r}")
        return self._predict(images, output, return_points)

    def losses(self, images: Tensor, labels: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """The training losses; call the model itself, so that DDP sees it."""
        targets = self._targets(images, labels, keys)
        images = self._pad(images)
        output, maps = self._features(images)
        return self._losses(self._coarse(output, images), output, maps, targets)

    def upsample(self, coarse: Tensor, size: Sequence[int]) -> Tensor:
        """Coarse logits ``[B, C, h, w]`` at the ``size`` (height, width) of the image."""
        return self.placing.enlarge(coarse, self.coarse_stride, (size[0], size[1]))

    # ---- parts

    def _losses(
        self, coarse: Tensor, output: DecoderOutput, maps: Mapping[str, Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        labels = targets.labels
        shared: dict[str, Any] = {
            "class_weights": self.class_weights,
            "ignore_index": self.loss.ignore_index,
            "mean": self.coarse_loss_mean,
            "normalize": self.loss.normalize,
        }
        logits, at = self.placing.together(coarse, labels, self.coarse_stride)
        losses = weighted_terms("loss_coarse", self.loss.coarse_weight, self.loss.terms, logits, at, **shared)
        losses |= self.auxiliary.losses(maps, labels, self.placing, **shared)
        return losses | self._extra_losses(output, targets, shared)

    def _extra_losses(self, output: DecoderOutput, targets: Targets, shared: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.decoder.extra_losses(output, targets.labels, **shared)

    def _predict(self, images: Tensor, output: str, return_points: bool) -> SegmentationOutput:
        size = (images.shape[-2], images.shape[-1])
        images = self._pad(images)
        return self._segment(images, *self._features(images), size, output, return_points)

    def _segment(
        self,
        images: Tensor,
        decoded: DecoderOutput,
        maps: Mapping[str, Tensor],
        size: tuple[int, int],
        output: str,
        return_points: bool,
    ) -> SegmentationOutput:
        """From the features of (padded) images to logits or labels of ``size``."""
        coarse = self._coarse(decoded, images)
        logits = self.upsample(coarse, size)
        points: list[Tensor] | None = [] if return_points else None
        if output == "labels":
            return SegmentationOutput(coarse, None, _argmax(logits), points)
        return SegmentationOutput(coarse, logits, None, points)

    def _features(self, images: Tensor) -> tuple[DecoderOutput, dict[str, Tensor]]:
        """The decoder's output, and every named map: the backbone's and the decoder's."""
        maps = dict(zip(self.backbone.names, self.backbone(images), strict=True))
        output = self.decoder(maps)
        return output, {**maps, **output.features}

    def _coarse(self, output: DecoderOutput, images: Tensor) -> Tensor:
        """The coarse logits in float32 (float64), of exactly the padded size over the coarse stride; of images that are
        not padded, as the decoder gives them, unless the coarse stride is another."""
        coarse = widened(output.coarse)
        if self.placing.resize and self.coarse_stride == self.decoder.stride:
            return coarse.contiguous()
        size = (-(-images.shape[2] // self.coarse_stride), -(-images.shape[3] // self.coarse_stride))
        if tuple(coarse.shape[2:]) != size:
            coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=self.align_corners)
        # The softmax over channels and the selection read planes; reordering is cheap here, before upsampling.
        return coarse.contiguous()

    def _need_evaluation_mode(self) -> None:
        if self.training:
            raise RuntimeError("predict needs evaluation mode: call eval() first")

    def _targets(self, images: Tensor, labels: Tensor, keys: Tensor | None) -> Targets:
        """What was given, checked, and of the padded image."""
        return Targets(self._pad_labels(self._check_labels(images, labels)), keys)

    def _check_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() != 3 or labels.shape[0] != images.shape[0] or labels.shape[1:] != images.shape[2:]:
            wanted = [images.shape[0], *images.shape[2:]]
            raise ValueError(f"labels must have shape [B, H, W] = {wanted} as in images, got {list(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be an integer tensor, got {labels.dtype}")
        return labels.long()

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Right and below, to a multiple of ``size_divisor``."""
        if self.placing.resize:
            return (0, 0, 0, 0)
        return (0, -width % self.size_divisor, 0, -height % self.size_divisor)

    def _pad_labels(self, labels: Tensor) -> Tensor:
        pad = self._padding(*labels.shape[-2:])
        return F.pad(labels, pad, value=self.loss.ignore_index) if any(pad) else labels

    def _pad(self, images: Tensor) -> Tensor:
        """Padded images."""
        if images.dim() != 4 or images.shape[1] != self.backbone.in_chans:
            raise ValueError(f"images must have shape [B, {self.backbone.in_chans}, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point, got {images.dtype}")
        height, width = images.shape[2:]
        if height == 0 or width == 0:
            raise ValueError(f"images must have at least one pixel, got shape {list(images.shape)}")
        pad = self._padding(height, width)
        if any(pad):
            images = F.pad(images, pad)
        if not self.channels_last:
            return images
        plain = self._plain_on_cpu and images.device.type == "cpu"
        return images.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
