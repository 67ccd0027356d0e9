"""DeepLabV3 (Chen et al. 2017, Rethinking Atrous Convolution) and DeepLabV3+ (Chen et al. 2018, Encoder-Decoder)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.aspp import ASPP, default_rates
from ..nn.conv import ConvNorm, SeparableConvNorm
from ..nn.fpn import upsample_to
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .fcn import check_levels
from .options import DecoderOptions
from .registry import arguments, register_decoder


@dataclass(frozen=True)
class DeepLabV3Options(DecoderOptions):
    """Options of ``deeplabv3``. The defaults are mmsegmentation's, except for the 256 channels of the paper;
    torchvision's are ``{project_kernel: 1, aspp_dropout: 0.5, head_convs: 1, dropout: 0}``."""

    name: str = "deeplabv3"
    level: str = "c5"
    """The backbone map that ASPP reads."""
    channels: int = 256
    rates: tuple[int, ...] | None = None
    """Atrous rates; ``None``: by the stride of ``level``, 6, 12, 18 at 16 and 12, 24, 36 at 8."""
    image_pool: bool = True
    """A branch with the mean over the map. Its batch norm needs at least 2 images per step."""
    separable: bool = False
    """Depthwise separable convolutions in the atrous branches."""
    depthwise_relu: bool = True
    """A ReLU between depthwise and pointwise convolution; PaddleSeg has none."""
    project_kernel: int = 3
    """Of the convolution that joins the branches: 3 (mmsegmentation), 1 (the paper, TensorFlow, torchvision,
    PaddleSeg)."""
    aspp_dropout: float = 0.0
    """After the joining convolution: torchvision 0.5, PaddleSeg 0.1."""
    head_convs: int = 0
    """3x3 convolutions between ASPP and classifier; torchvision 1."""
    dropout: float = 0.1
    """Of whole channels, before the classifier."""
    norm: Literal["bn", "syncbn", "gn", "none"] = "bn"


@dataclass(frozen=True)
class DeepLabV3PlusOptions(DecoderOptions):
    """Options of ``deeplabv3plus``; the defaults are the paper's. mmsegmentation: ``{channels: 512, project_kernel:
    3}``, PaddleSeg: ``{depthwise_relu: false, aspp_dropout: 0.1, dropout: 0}``."""

    name: str = "deeplabv3plus"
    level: str = "c5"
    """The backbone map that ASPP reads."""
    low_level: str = "c2"
    """The finer backbone map of the decoder, whose stride the logits have."""
    low_channels: int = 48
    """The channels to which a 1x1 convolution brings it."""
    channels: int = 256
    """Of ASPP and of the decoder's convolutions."""
    rates: tuple[int, ...] | None = None
    """Atrous rates; ``None``: by the stride of ``level``, 6, 12, 18 at 16 and 12, 24, 36 at 8."""
    image_pool: bool = True
    """A branch with the mean over the map. Its batch norm needs at least 2 images per step."""
    separable: bool = True
    """Depthwise separable convolutions in the atrous branches."""
    separable_decoder: bool = True
    """Depthwise separable convolutions in the decoder."""
    depthwise_relu: bool = True
    """A ReLU between depthwise and pointwise convolution; PaddleSeg has none."""
    project_kernel: int = 1
    """Of the convolution that joins the branches: 1 (the paper, TensorFlow, PaddleSeg), 3 (mmsegmentation)."""
    aspp_dropout: float = 0.0
    """After the joining convolution: PaddleSeg 0.1."""
    decoder_convs: int = 2
    """3x3 convolutions after the two maps are put side by side."""
    dropout: float = 0.1
    """Of whole channels, before the classifier."""
    norm: Literal["bn", "syncbn", "gn", "none"] = "bn"
    align_corners: bool = False
    """Of the enlargement of ASPP's answer."""


def _check(dropout: float, **counts: int) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    for name, value in counts.items():
        least = 0 if name.endswith("convs") else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class DeepLabV3(Decoder):
    """ASPP on the last backbone map, ``head_convs`` 3x3 convolutions, dropout, a 1x1 classifier.

    ``forward(features)`` -> logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of ``level``) and the maps ``aspp``
    and ``decoder`` (what the classifier reads).
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        *,
        level: str = "c5",
        channels: int = 256,
        rates: Sequence[int] | None = None,
        image_pool: bool = True,
        separable: bool = False,
        depthwise_relu: bool = True,
        project_kernel: int = 3,
        aspp_dropout: float = 0.0,
        head_convs: int = 0,
        dropout: float = 0.1,
        norm: str = "bn",
    ) -> None:
        super().__init__(num_classes)
        check_levels([level], in_channels, "level")
        _check(dropout, channels=channels, head_convs=head_convs)
        self.level = level
        self.stride = strides[level]
        self.aspp = ASPP(
            in_channels[level],
            channels,
            default_rates(self.stride) if rates is None else rates,
            norm=norm,
            separable=separable,
            depthwise_relu=depthwise_relu,
            image_pool=image_pool,
            project_kernel=project_kernel,
            dropout=aspp_dropout,
        )
        self.convs = nn.Sequential(*(ConvNorm(channels, channels, 3, norm=norm) for _ in range(head_convs)))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)
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
    ``aspp``, ``low``, ``convs`` and ``classifier``.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        *,
        level: str = "c5",
        low_level: str = "c2",
        low_channels: int = 48,
        channels: int = 256,
        rates: Sequence[int] | None = None,
        image_pool: bool = True,
        separable: bool = True,
        separable_decoder: bool = True,
        depthwise_relu: bool = True,
        project_kernel: int = 1,
        aspp_dropout: float = 0.0,
        decoder_convs: int = 2,
        dropout: float = 0.1,
        norm: str = "bn",
        align_corners: bool = False,
    ) -> None:
        super().__init__(num_classes)
        check_levels([level], in_channels, "level")
        check_levels([low_level], in_channels, "low_level")
        _check(dropout, channels=channels, low_channels=low_channels, decoder_convs=decoder_convs)
        if strides[level] % strides[low_level]:
            raise ValueError(
                f"low_level must be a map of a stride that divides that of level {level!r} ({strides[level]}), got "
                f"{low_level!r} of stride {strides[low_level]}"
            )
        self.level, self.low_level = level, low_level
        self.stride = strides[low_level]
        self.factor = strides[level] // self.stride
        self.mode = "bilinear_aligned" if align_corners else "bilinear"
        self.aspp = ASPP(
            in_channels[level],
            channels,
            default_rates(strides[level]) if rates is None else rates,
            norm=norm,
            separable=separable,
            depthwise_relu=depthwise_relu,
            image_pool=image_pool,
            project_kernel=project_kernel,
            dropout=aspp_dropout,
        )
        self.low = ConvNorm(in_channels[low_level], low_channels, 1, norm=norm)
        convs: list[nn.Module] = []
        width = channels + low_channels
        for _ in range(decoder_convs):
            if separable_decoder:
                convs.append(SeparableConvNorm(width, channels, 3, norm=norm, depthwise_relu=depthwise_relu))
            else:
                convs.append(ConvNorm(width, channels, 3, norm=norm))
            width = channels
        self.convs = nn.Sequential(*convs)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(width, num_classes)
        self.feature_channels = {"aspp": channels, "decoder": width}
        self.feature_strides = {"aspp": strides[level], "decoder": self.stride}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        pyramid = self.aspp(features[self.level])
        low = self.low(features[self.low_level])
        enlarged = upsample_to(pyramid, self.factor, (low.shape[2], low.shape[3]), self.mode)
        x = self.convs(torch.cat((enlarged, low), 1))
        return DecoderOutput(self.classifier(self.dropout(x)), {"aspp": pyramid, "decoder": x}, {})


@register_decoder("deeplabv3", DeepLabV3Options)
def _build_v3(options: DeepLabV3Options, backbone: Backbone, num_classes: int) -> DeepLabV3:
    return DeepLabV3(backbone.channels_of, backbone.strides_of, num_classes, **arguments(options))


@register_decoder("deeplabv3plus", DeepLabV3PlusOptions)
def _build_v3plus(options: DeepLabV3PlusOptions, backbone: Backbone, num_classes: int) -> DeepLabV3Plus:
    return DeepLabV3Plus(backbone.channels_of, backbone.strides_of, num_classes, **arguments(options))
