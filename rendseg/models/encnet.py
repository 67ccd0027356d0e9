"""ENCNet: Context Encoding for Semantic Segmentation (Zhang et al. 2018)."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._options import Count, Flag, NonNegative, ShareBelowOne, filled, read
from ..nn.conv import ConvNorm, make_classifier
from ..nn.enc_module import EncModule
from ..nn.fcn_head import FCNHead
from ..nn.fpn import upsample_to
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .fcn import check_levels
from .losses import segmentation_loss, widened
from .options import DecoderOptions, Norm
from .registry import register_decoder
from .se_loss import se_loss


class ENCNetOptions(DecoderOptions):
    """Options of ``encnet``. ``None`` means: as ``preset`` says (see ``ENCNET_PRESETS``)."""

    name: str = "encnet"
    preset: Literal["rendseg", "pytorch_encoding", "mmseg", "paddleseg"] = "rendseg"
    """``rendseg`` has the layers of ``mmseg``. The others also decide ``model.pad``, unless ``pointrend.preset``
    does."""
    level: str = "c5"
    """The backbone map of the 3x3 bottleneck."""
    channels: Count = 512
    laterals: tuple[str, ...] | None = None
    """Backbone maps that are brought to ``channels`` by 1x1 convolutions, resized to ``level`` and fused with it by a
    3x3 convolution; ``[]`` for none. Presets: none, paddleseg c3 and c4."""
    encoding: Flag = True
    """``false`` leaves the whole module out: the bottleneck goes straight to the classifier, and there is no semantic
    encoding loss."""
    num_codes: Count = 32
    project_bias: Flag | None = None
    """A bias in the 1x1 convolution before the encoding. Presets: none, paddleseg yes."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the codes. The paper writes a sum."""
    se_weight: NonNegative = 0.2
    """Weight of the semantic encoding loss; 0 leaves its branch out."""
    aux_weight: NonNegative | None = None
    """Weight of the auxiliary FCN head; 0 leaves it out. Presets: 0.4, pytorch_encoding 0.2."""
    aux_level: str = "c4"
    aux_channels: Count | None = None
    """Presets: 256, paddleseg 512."""
    dropout: ShareBelowOne | None = None
    """Before the classifier. Presets: 0.1, paddleseg 0."""
    dropout_channels: Flag | None = None
    """Drop whole channels instead of single elements. Presets: yes, pytorch_encoding no."""
    align_corners: Flag | None = None
    """Of the resizing of laterals and auxiliary logits. Presets: no, pytorch_encoding yes."""
    norm: Norm = "bn"
    """Of the convolutions. The codes have a batch norm in any case (synchronised with ``syncbn``)."""


_DEFAULTS: dict[str, Any] = {
    "laterals": (),
    "project_bias": False,
    "aux_weight": 0.4,
    "aux_channels": 256,
    "dropout": 0.1,
    "dropout_channels": True,
    "align_corners": False,
}
ENCNET_PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "rendseg": _DEFAULTS,
        "mmseg": _DEFAULTS,
        # The weight is that of its training command; its class has 0.4.
        "pytorch_encoding": {**_DEFAULTS, "aux_weight": 0.2, "dropout_channels": False, "align_corners": True},
        "paddleseg": {
            **_DEFAULTS,
            "laterals": ("c3", "c4"),
            "project_bias": True,
            "aux_channels": 512,
            "dropout": 0.0,
        },
    }
)
"""Preset name to the options that it fills in where they are ``None``."""


class ENCNet(Decoder):
    """A 3x3 bottleneck, optionally fused with laterals, an ``EncModule``, dropout and a 1x1 classifier.

    ``forward(features)`` -> logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of ``level``) and the map
    ``decoder`` ``[N, channels, H/s, W/s]``: what the classifier reads, gated. ``extra_losses`` adds ``loss_se``
    (the semantic encoding loss, on a linear layer of the encoding) and ``loss_aux_encnet`` (cross-entropy of an
    ``FCNHead`` on ``aux_level``); their heads run only there, so prediction does not pay for them. Modules are called
    ``bottleneck``, ``laterals``, ``fusion``, ``enc_module``, ``se_layer``, ``classifier`` and ``aux_head``.
    ``switches`` are fields of ``ENCNetOptions``.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: ENCNetOptions | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s: Any = read(ENCNetOptions, switches, start=options)
        s = filled(s, ENCNET_PRESETS[s.preset])
        check_levels([s.level], in_channels, "level")
        if s.laterals:
            check_levels(s.laterals, in_channels, "laterals")
        channels, norm = s.channels, s.norm
        self.level = s.level
        self.stride = strides[s.level]
        self.lateral_levels = tuple(s.laterals)
        self.align_corners = s.align_corners
        self.se_weight = s.se_weight if s.encoding else 0.0
        self.aux_weight = s.aux_weight
        self.aux_level = s.aux_level
        self.bottleneck = ConvNorm(in_channels[s.level], channels, 3, norm=norm)
        self.laterals = nn.ModuleList(ConvNorm(in_channels[name], channels, 1, norm=norm) for name in s.laterals)
        self.fusion = ConvNorm(channels * (1 + len(s.laterals)), channels, 3, norm=norm) if s.laterals else None
        self.enc_module = (
            EncModule(channels, s.num_codes, norm=norm, project_bias=s.project_bias, reduction=s.reduction)
            if s.encoding
            else None
        )
        self.se_layer = nn.Linear(channels, num_classes) if self.se_weight else None
        self.dropout = nn.Dropout2d(s.dropout) if s.dropout_channels else nn.Dropout(s.dropout)
        self.classifier = make_classifier(channels, num_classes)
        self.aux_head: FCNHead | None = None
        if s.aux_weight:
            check_levels([s.aux_level], in_channels, "aux_level")
            self.aux_stride = strides[s.aux_level]
            self.aux_head = FCNHead(in_channels[s.aux_level], s.aux_channels, num_classes, norm=norm)
        self.feature_channels = {"decoder": channels}
        self.feature_strides = {"decoder": self.stride}

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        x = self.bottleneck(features[self.level])
        if self.fusion is not None:
            maps = [x]
            for name, lateral in zip(self.lateral_levels, self.laterals, strict=True):
                y = lateral(features[name])
                if y.shape[2:] != x.shape[2:]:
                    y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=self.align_corners)
                maps.append(y)
            x = self.fusion(torch.cat(maps, 1))
        extra: dict[str, Tensor] = {}
        if self.enc_module is not None:
            x, encoding = self.enc_module(x)
            if self.se_layer is not None:
                extra["encoding"] = encoding
        if self.aux_head is not None:
            extra["aux"] = features[self.aux_level]
        return DecoderOutput(self.classifier(self.dropout(x)), {"decoder": x}, extra)

    def extra_losses(
        self, output: DecoderOutput, labels: Tensor, ignore_index: int, **shared: Any
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.se_layer is not None:
            logits = self.se_layer(output.extra["encoding"])
            losses["loss_se"] = self.se_weight * se_loss(logits, labels, ignore_index)
        if self.aux_head is not None:
            logits = widened(self.aux_head(output.extra["aux"]))
            size, mode = (labels.shape[1], labels.shape[2]), "bilinear_aligned" if self.align_corners else "bilinear"
            logits = upsample_to(logits, self.aux_stride, size, mode, self.resizes)
            value = segmentation_loss(logits, labels, ignore_index=ignore_index, **shared)
            losses["loss_aux_encnet"] = self.aux_weight * value
        return losses


@register_decoder("encnet", ENCNetOptions)
def _build(options: ENCNetOptions, backbone: Backbone, num_classes: int) -> ENCNet:
    return ENCNet(backbone.channels_of, backbone.strides_of, num_classes, options)
