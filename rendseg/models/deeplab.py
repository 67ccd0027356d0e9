"""DeepLabV3 (Chen et al. 2017, Rethinking Atrous Convolution) and DeepLabV3+ (Chen et al. 2018, Encoder-Decoder)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._options import Count, Flag, ShareBelowOne, Whole, read
from ..nn.aspp import ASPP, default_rates
from ..nn.conv import ConvNorm, SeparableConvNorm, make_classifier
from ..nn.fpn import upsample_to
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .fcn import check_levels
from .options import DecoderOptions, Norm
from .registry import register_decoder


class DeepLabV3Options(DecoderOptions):
    """Options of ``deeplabv3``. The defaults are mmsegmentation's, except for the 256 channels of the paper;
    torchvision's are ``{project_kernel: 1, aspp_dropout: 0.5, head_convs: 1, dropout: 0}``."""

    name: str = "deeplabv3"
    level: str = "c5"
    """The backbone map that ASPP reads."""
    channels: Count = 256
    rates: tuple[Count, ...] | None = None
    """Atrous rates; ``None``: by the stride of ``level``, 6, 12, 18 at 16 and 12, 24, 36 at 8."""
    image_pool: Flag = True
    """A branch with the mean over the map. Its batch norm needs at least 2 images per step."""
    separable: Flag = False
    """Depthwise separable convolutions in the atrous branches."""
    depthwise_relu: Flag = True
    """A ReLU between depthwise and pointwise convolution; PaddleSeg has none."""
    project_kernel: Literal[1, 3] = 3
    """Of the convolution that joins the branches: 3 (mmsegmentation), 1 (the paper, TensorFlow, torchvision,
    PaddleSeg)."""
    aspp_dropout: ShareBelowOne = 0.0
    """After the joining convolution: torchvision 0.5, PaddleSeg 0.1."""
    head_convs: Whole = 0
    """3x3 convolutions between ASPP and classifier; torchvision 1."""
    dropout: ShareBelowOne = 0.1
    """Of whole channels, before the classifier."""
    norm: Norm = "bn"


class DeepLabV3PlusOptions(DecoderOptions):
    """Options of ``deeplabv3plus``; the defaults are the paper's. mmsegmentation: ``{channels: 512, project_kernel:
    3}``, PaddleSeg: ``{depthwise_relu: false, aspp_dropout: 0.1, dropout: 0}``."""

    name: str = "deeplabv3plus"
    level: str = "c5"
    """The backbone map that ASPP reads."""
    low_level: str = "c2"
    """The finer backbone map of the decoder, whose stride the logits have."""
    low_channels: Count = 48
    """The channels to which a 1x1 convolution brings it."""
    channels: Count = 256
    """Of ASPP and of the decoder's convolutions."""
    rates: tuple[Count, ...] | None = None
    """Atrous rates; ``None``: by the stride of ``level``, 6, 12, 18 at 16 and 12, 24, 36 at 8."""
    image_pool: Flag = True
    """A branch with the mean over the map. Its batch norm needs at least 2 images per step."""
    separable: Flag = True
    """Depthwise separable convolutions in the atrous branches."""
    separable_decoder: Flag = True
    """Depthwise separable convolutions in the decoder."""
    depthwise_relu: Flag = True
    """A ReLU between depthwise and pointwise convolution; PaddleSeg has none."""
    project_kernel: Literal[1, 3] = 1
    """Of the convolution that joins the branches: 1 (the paper, TensorFlow, PaddleSeg), 3 (mmsegmentation)."""
    aspp_dropout: ShareBelowOne = 0.0
    """After the joining convolution: PaddleSeg 0.1."""
    decoder_convs: Whole = 2
    """3x3 convolutions after the two maps are put side by side."""
    dropout: ShareBelowOne = 0.1
    """Of whole channels, before the classifier."""
    norm: Norm = "bn"
    align_corners: Flag = False
    """Of the upsampling of ASPP's output."""


def _aspp(s: Any, in_channels: int, stride: int) -> ASPP:
    return ASPP(
        in_channels,
        s.channels,
        default_rates(stride) if s.rates is None else s.rates,
        norm=s.norm,
        separable=s.separable,
        depthwise_relu=s.depthwise_relu,
        image_pool=s.image_pool,
        project_kernel=s.project_kernel,
        dropout=s.aspp_dropout,
    )


class DeepLabV3(Decoder):
    """ASPP on the last backbone map, ``head_convs`` 3x3 convolutions, dropout, a 1x1 classifier.

    ``forward(features)`` -> logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of ``level``) and the maps ``aspp``
    and ``decoder`` (what the classifier reads). ``switches`` are fields of ``DeepLabV3Options``.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: DeepLabV3Options | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s = read(DeepLabV3Options, switches, start=options)
        check_levels([s.level], in_channels, "level")
        channels = s.channels
        self.level = s.level
        self.stride = strides[s.level]
        self.aspp = _aspp(s, in_channels[s.level], self.stride)
        self.convs = nn.Sequential(*(ConvNorm(channels, channels, 3, norm=s.norm) for _ in range(s.head_convs)))
        self.dropout = nn.Dropout2d(s.dropout)
        self.classifier = make_classifier(channels, num_classes)
        self.feature_channels = {"aspp": channels, "decoder": channels}
        self.feature_strides = {"aspp": self.stride, "decoder": self.stride}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        pyramid = self.aspp(features[self.level])
        x = self.convs(pyramid)
        return DecoderOutput(self.classifier(self.dropout(x)), {"aspp": pyramid, "decoder": x}, {})


class DeepLabV3Plus(Decoder):
    """ASPP on the last backbone map, enlarged and put beside a finer one, ``decoder_convs`` 3x3 convolutions, dropout,
    a 1x1 classifier.

    ``forward(features)`` -> logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of ``low_level``, 4 for ``c2``) and
    the maps ``aspp`` (of the stride of ``level``) and ``decoder`` (what the classifier reads). Modules are called
    ``aspp``, ``low``, ``convs`` and ``classifier``. ``switches`` are fields of ``DeepLabV3PlusOptions``.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: DeepLabV3PlusOptions | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s = read(DeepLabV3PlusOptions, switches, start=options)
        check_levels([s.level], in_channels, "level")
        check_levels([s.low_level], in_channels, "low_level")
        coarse, fine = strides[s.level], strides[s.low_level]
        if coarse % fine:
            raise ValueError(
                f"low_level must be a map of a stride that divides that of level {s.level!r} ({coarse}), got "
                f"{s.low_level!r} of stride {fine}"
            )
        self.level, self.low_level = s.level, s.low_level
        self.stride = fine
        self.factor = coarse // fine
        self.mode = "bilinear_aligned" if s.align_corners else "bilinear"
        self.aspp = _aspp(s, in_channels[s.level], coarse)
        self.low = ConvNorm(in_channels[s.low_level], s.low_channels, 1, norm=s.norm)
        convs: list[nn.Module] = []
        width = s.channels + s.low_channels
        for _ in range(s.decoder_convs):
            if s.separable_decoder:
                convs.append(SeparableConvNorm(width, s.channels, 3, norm=s.norm, depthwise_relu=s.depthwise_relu))
            else:
                convs.append(ConvNorm(width, s.channels, 3, norm=s.norm))
            width = s.channels
        self.convs = nn.Sequential(*convs)
        self.dropout = nn.Dropout2d(s.dropout)
        self.classifier = make_classifier(width, num_classes)
        self.feature_channels = {"aspp": s.channels, "decoder": width}
        self.feature_strides = {"aspp": coarse, "decoder": self.stride}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        pyramid = self.aspp(features[self.level])
        low = self.low(features[self.low_level])
        enlarged = upsample_to(pyramid, self.factor, (low.shape[2], low.shape[3]), self.mode, self.resizes)
        x = self.convs(torch.cat((enlarged, low), 1))
        return DecoderOutput(self.classifier(self.dropout(x)), {"aspp": pyramid, "decoder": x}, {})


@register_decoder("deeplabv3", DeepLabV3Options)
def _build_v3(options: DeepLabV3Options, backbone: Backbone, num_classes: int) -> DeepLabV3:
    return DeepLabV3(backbone.channels_of, backbone.strides_of, num_classes, options)


@register_decoder("deeplabv3plus", DeepLabV3PlusOptions)
def _build_v3plus(options: DeepLabV3PlusOptions, backbone: Backbone, num_classes: int) -> DeepLabV3Plus:
    return DeepLabV3Plus(backbone.channels_of, backbone.strides_of, num_classes, options)
