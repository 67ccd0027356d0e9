"""What a decoder is: coarse logits and named feature maps. N images, C classes, H W their size (padded), h w that of
the coarse map."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn


class DecoderOutput(NamedTuple):
    """``coarse [N, C, h, w]`` logits; ``features``: named maps; ``extra``: what ``Decoder.extra_losses``
    needs."""

    coarse: Tensor
    features: dict[str, Tensor]
    extra: dict[str, Tensor]


class Targets(NamedTuple):
    """What a training step is measured against."""

    labels: Tensor
    """``[N, H, W]`` int64."""
    keys: Tensor | None = None
    """``[N]`` int64: the points drawn on an image are a function of its key; ``None``: of the default generator."""
    tasks: Mapping[str, Tensor] = MappingProxyType({})
    """Labels of tasks besides ``object``: ``[N, H, W]``, of ``scene`` ``[N]``."""


class Decoder(nn.Module):
    """Base of every decoder that ``rendseg.models.PointRend`` and ``rendseg.models.Segmenter`` wrap.

    A subclass sets ``num_classes``, ``stride`` (of the coarse logits), ``feature_channels`` and ``feature_strides`` (of
    the maps it adds to the backbone's, by name), and, where the decoder needs image sizes that are a multiple of
    something beyond its stride, ``size_divisor``. ``default_point_features`` names the maps of PointRend's fine
    features where a configuration names none. ``resizes`` is set by the model: maps of images that are not padded do
    not fit together, and are resized to the exact size of the finest rather than cropped to it. All parameters take
    part in every training step, or DDP would wait.
    """

    num_classes: int
    stride: int
    size_divisor: int = 1
    resizes: bool = False
    feature_channels: dict[str, int]
    feature_strides: dict[str, int]
    default_point_features: tuple[str, ...] = ("c2",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.feature_channels = {}
        self.feature_strides = {}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        """``features``: the backbone's maps by name."""
        raise NotImplementedError

    def extra_losses(
        self, output: DecoderOutput, labels: Tensor, ignore_index: int, **shared: Any
    ) -> dict[str, Tensor]:
        """Losses of the decoder's own (auxiliary heads, semantic encoding), already weighted; none by default.

        ``labels [N, H, W]`` int64 of the padded image; ``shared``: ``class_weights``, ``mean`` and ``normalize``
        of ``rendseg.models.losses``. Each must be exactly 0, with a graph, when all labels are
        ignored.
        """
        return {}
