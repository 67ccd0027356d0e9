"""FCN: Fully Convolutional Networks (Long et al. 2015) in the form of PSPNet's and mmsegmentation's heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._options import Count, Flag, ShareBelowOne, Whole, read
from ..nn.fcn_head import FCNHead
from ..nn.fpn import upsample_to
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .options import DecoderOptions, Norm
from .registry import register_decoder


class FCNOptions(DecoderOptions):
    """Options of ``fcn``; the defaults are mmsegmentation's."""

    name: str = "fcn"
    levels: tuple[str, ...] = ("c5",)
    """Backbone maps that the head reads. Several are brought to the finest and put side by side: ``[c2, c3, c4, c5]``
    is the head of HRNet."""
    channels: Count = 512
    num_convs: Whole = 2
    kernel_size: Count = 3
    """Of the convolutions; HRNet's head has 1."""
    concat_input: Flag = True
    """One more convolution over input and output of the others."""
    dropout: ShareBelowOne = 0.1
    norm: Norm = "bn"
    align_corners: Flag = False
    """Of the upsampling of several levels."""


def check_levels(names: Sequence[str], in_channels: Mapping[str, int], where: str) -> None:
    """``ValueError`` unless every name is a map of the backbone."""
    unknown = [name for name in names if name not in in_channels]
    if unknown or not names:
        got = list(names) if where.endswith("s") else names[0]
        raise ValueError(f"{where} must name maps of the backbone ({', '.join(in_channels)}), got {got!r}")


class FCN(Decoder):
    """An ``FCNHead`` on one backbone map, or on several side by side.

    ``forward(features)`` -> logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of the finest level) and the map
    ``decoder``: what the classifier reads. ``switches`` are fields of ``FCNOptions``.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: FCNOptions | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s = read(FCNOptions, switches, start=options)
        check_levels(s.levels, in_channels, "levels")
        self.stride = min(strides[name] for name in s.levels)
        self.finest = next(name for name in s.levels if strides[name] == self.stride)
        self.factors = {name: strides[name] // self.stride for name in s.levels}
        self.mode = "bilinear_aligned" if s.align_corners else "bilinear"
        self.head = FCNHead(
            sum(in_channels[name] for name in s.levels),
            s.channels,
            num_classes,
            num_convs=s.num_convs,
            concat_input=s.concat_input,
            dropout=s.dropout,
            norm=s.norm,
            kernel_size=s.kernel_size,
        )
        self.feature_channels = {"decoder": self.head.out_channels}
        self.feature_strides = {"decoder": self.stride}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        height, width = features[self.finest].shape[2:]
        maps = [upsample_to(features[n], f, (height, width), self.mode, self.resizes) for n, f in self.factors.items()]
        x = self.head.features(maps[0] if len(maps) == 1 else torch.cat(maps, 1))
        return DecoderOutput(self.head.classifier(self.head.dropout(x)), {"decoder": x}, {})


@register_decoder("fcn", FCNOptions)
def _build(options: FCNOptions, backbone: Backbone, num_classes: int) -> FCN:
    return FCN(backbone.channels_of, backbone.strides_of, num_classes, options)
