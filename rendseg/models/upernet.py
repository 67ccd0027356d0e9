"""UPerNet: Unified Perceptual Parsing for Scene Understanding (Xiao et al. 2018), section 3.1."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._options import Count, Flag, ShareBelowOne, Whole, filled, read
from ..nn.conv import ConvNorm, make_classifier
from ..nn.ppm import PPM
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .fcn import check_levels
from .options import DecoderOptions, Norm
from .registry import register_decoder

UPerNetPreset = Literal["rendseg", "mmseg", "transformers", "csail", "paddleseg", "pytorch_encoding", "deeplab"]


class UPerNetOptions(DecoderOptions):
    """Options of ``upernet``. ``None`` means: as ``preset`` says, see ``UPERNET_PRESETS``."""

    preset: UPerNetPreset = "rendseg"
    """The implementation whose switches fill in what is not given. ``rendseg`` has the layers of ``mmseg``; ``deeplab``
    is the write-up on CamVid with max pooling and 1x1 convolutions. All but ``rendseg`` also decide ``model.pad``,
    ``model.norm_momentum`` and switches of ``model.backbone``, unless ``pointrend.preset`` does."""
    levels: tuple[str, ...] = ("c2", "c3", "c4", "c5")
    """Backbone maps, fine to coarse; the pooling is on the last."""
    channels: Count | None = None
    """Channels of the pyramid, and so of p2 .. p5. 512; pytorch_encoding and deeplab 256."""
    norm: Norm = "bn"
    """Norm after every convolution but the classifier."""
    pool: Literal["avg", "max", "prroi"] | None = None
    """Pooling of the PPM. avg; deeplab max. ``prroi``: Precise RoI pooling, as in the authors' multi-task code."""
    bins: tuple[Count, ...] = (1, 2, 3, 6)
    ppm_channels: Whole | None = None
    """Channels of a branch of the PPM. 512, deeplab 256; 0: those of the last backbone map divided by
    the number of bins (paddleseg, pytorch_encoding)."""
    conv_before_upsample: Flag | None = None
    """Convolve the pooled map and upsample then, or the other way round. true; csail false."""
    ppm_norm_relu: Flag | None = None
    """Norm and ReLU in the branches of the PPM. true; deeplab false."""
    ppm_order: Literal["input_first", "input_last"] | None = None
    """Concatenation in the PPM. input_first; deeplab input_last."""
    bins_descending: Flag | None = None
    """Concatenate the branches in the reverse order of ``bins``. false; paddleseg true."""
    ppm_kernel: Literal[1, 3] | None = None
    """Kernel of the convolution that ends the PPM. 3; deeplab 1."""
    output_kernel: Literal[1, 3] | None = None
    """Kernel of the output convolutions of the pyramid. 3; deeplab 1."""
    top_down_from: Literal["sum", "output"] | None = None
    """What the next finer level adds: the sum, or that sum after the output convolution. sum; deeplab output."""
    top_down_conv: Flag | None = None
    """A plain 1x1 convolution of the upsampled PPM output before it is added. false; deeplab true."""
    fuse_order: Literal["fine_first", "coarse_first"] | None = None
    """Concatenation of the levels. fine_first; pytorch_encoding and deeplab coarse_first."""
    fuse_kernel: Literal[1, 3] | None = None
    """Kernel of the convolution over all levels. 3; deeplab 1."""
    fuse_channels: Count | None = None
    """Its channels, and so of the map ``fused``. 512; deeplab 256."""
    dropout: ShareBelowOne | None = None
    """Before the classifier. rendseg, mmseg and pytorch_encoding 0.1, others 0."""
    dropout_channels: Flag | None = None
    """Drop whole channels. true; pytorch_encoding false."""
    classifier_kernel: Literal[1, 3] | None = None
    """1; deeplab 3."""
    classifier_upsample: Count | None = None
    """Upsample ``fused`` by this factor before the classifier; the coarse logits are finer by it. 1; deeplab
    4."""
    align_corners: Flag | None = None
    """Of every upsampling in the decoder. false; paddleseg, pytorch_encoding and deeplab true. That of the logits to
    the image is ``pointrend.upsample_align_corners``."""


_MMSEG: dict[str, Any] = {
    "channels": 512,
    "pool": "avg",
    "ppm_channels": 512,
    "conv_before_upsample": True,
    "ppm_norm_relu": True,
    "ppm_order": "input_first",
    "bins_descending": False,
    "ppm_kernel": 3,
    "output_kernel": 3,
    "top_down_from": "sum",
    "top_down_conv": False,
    "fuse_order": "fine_first",
    "fuse_kernel": 3,
    "fuse_channels": 512,
    "dropout": 0.1,
    "dropout_channels": True,
    "classifier_kernel": 1,
    "classifier_upsample": 1,
    "align_corners": False,
}
UPERNET_PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "rendseg": _MMSEG,
        "mmseg": _MMSEG,
        "transformers": {**_MMSEG, "dropout": 0.0},
        "csail": {**_MMSEG, "conv_before_upsample": False, "dropout": 0.0},
        "paddleseg": {**_MMSEG, "ppm_channels": 0, "bins_descending": True, "dropout": 0.0, "align_corners": True},
        "pytorch_encoding": {
            **_MMSEG,
            "channels": 256,
            "ppm_channels": 0,
            "fuse_order": "coarse_first",
            "dropout_channels": False,
            "align_corners": True,
        },
        "deeplab": {
            **_MMSEG,
            "channels": 256,
            "pool": "max",
            "ppm_channels": 256,
            "ppm_norm_relu": False,
            "ppm_order": "input_last",
            "ppm_kernel": 1,
            "output_kernel": 1,
            "top_down_from": "output",
            "top_down_conv": True,
            "fuse_order": "coarse_first",
            "fuse_kernel": 1,
            "fuse_channels": 256,
            "dropout": 0.0,
            "classifier_kernel": 3,
            "classifier_upsample": 4,
            "align_corners": True,
        },
    }
)
"""Preset name to every switch that it sets."""


def _check_levels(levels: Sequence[str], in_channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
    check_levels(levels, in_channels, "levels")
    if len(set(levels)) < len(levels) or [strides[a] for a in levels] != sorted(strides[a] for a in levels):
        raise ValueError(f"levels must go from fine to coarse without repetition, got {list(levels)}")


class UPerNet(Decoder):
    """Pyramid pooling on the last level, a feature pyramid below it, all levels fused, and a classifier.

    ``forward(features)`` -> coarse logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of the finest level over
    ``classifier_upsample``), and the maps ``p2`` .. ``p5`` (the last is the PPM's output) and ``fused``, which is of
    the finest level's size. Every upsampling is bilinear to the exact size of the finer map; the models pad images to a
    multiple of the largest stride, so that all maps cover the same area.

    ``switches`` are the fields of ``UPerNetOptions``; what is not given is as the preset says. Modules:
    ``ppm``, ``lateral2`` .. and ``output2`` .. (1x1 and 3x3 with norm and ReLU, none for the last level), ``fuse`` and
    ``classifier``; with ``top_down_conv`` also ``top_down``. Under autocast the convolutions run in its dtype.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: UPerNetOptions | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s: Any = read(UPerNetOptions, switches, start=options)
        s = filled(s, UPERNET_PRESETS[s.preset])
        levels: tuple[str, ...] = tuple(s.levels)
        _check_levels(levels, in_channels, strides)
        finest = strides[levels[0]]
        if finest % s.classifier_upsample:
            raise ValueError(f"classifier_upsample must divide the finest stride {finest}, got {s.classifier_upsample}")
        self.levels = levels
        self.outputs = tuple("p" + name[1:] for name in levels)
        self.fuse_order = s.fuse_order
        self.top_down_from = s.top_down_from
        self.classifier_upsample = s.classifier_upsample
        self.align_corners = s.align_corners
        self.stride = finest // s.classifier_upsample
        self.size_divisor = max(strides[name] for name in levels)
        self.default_point_features = (self.outputs[0],)
        self.feature_channels = {**dict.fromkeys(self.outputs, s.channels), "fused": s.fuse_channels}
        self.feature_strides = {
            **{out: strides[name] for out, name in zip(self.outputs, levels, strict=True)},
            "fused": finest,
        }
        deepest = in_channels[levels[-1]]
        self.ppm = PPM(
            deepest,
            s.ppm_channels or max(1, deepest // len(s.bins)),
            s.channels,
            bins=s.bins,
            pool=s.pool,
            conv_before_upsample=s.conv_before_upsample,
            branch_norm_relu=s.ppm_norm_relu,
            order=s.ppm_order,
            bins_descending=s.bins_descending,
            fuse_kernel=s.ppm_kernel,
            align_corners=s.align_corners,
            norm=s.norm,
        )
        for name in levels[:-1]:
            self.add_module(f"lateral{name[1:]}", ConvNorm(in_channels[name], s.channels, 1, norm=s.norm))
            self.add_module(f"output{name[1:]}", ConvNorm(s.channels, s.channels, s.output_kernel, norm=s.norm))
        self.top_down = nn.Conv2d(s.channels, s.channels, 1) if s.top_down_conv and len(levels) > 1 else None
        self.fuse = ConvNorm(len(levels) * s.channels, s.fuse_channels, s.fuse_kernel, norm=s.norm)
        self.dropout = nn.Dropout2d(s.dropout) if s.dropout_channels else nn.Dropout(s.dropout)
        self.classifier: nn.Module = make_classifier(s.fuse_channels, num_classes, s.classifier_kernel)

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        maps = self.pyramid([features[name] for name in self.levels])
        fused = self.fused(maps)
        return DecoderOutput(self.classify(fused), {**dict(zip(self.outputs, maps, strict=True)), "fused": fused}, {})

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps, fine to coarse -> the maps ``p2`` .. ``p5``, all of ``channels``."""
        above = self.ppm(features[-1])
        outputs = [above]
        for i in reversed(range(len(features) - 1)):
            name = self.levels[i][1:]
            lateral = getattr(self, f"lateral{name}")(features[i])
            enlarged = self._resize(above, lateral)
            if self.top_down is not None and i == len(features) - 2:
                enlarged = self.top_down(enlarged)
            above = lateral + enlarged
            outputs.append(getattr(self, f"output{name}")(above))
            if self.top_down_from == "output":
                above = outputs[-1]
        return outputs[::-1]

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """``p2`` .. ``p5`` -> ``[N, fuse_channels, H, W]`` of the finest map's size."""
        parts = [maps[0], *(self._resize(m, maps[0]) for m in maps[1:])]
        return self.fuse(torch.cat(parts if self.fuse_order == "fine_first" else parts[::-1], 1))

    def classify(self, fused: Tensor) -> Tensor:
        """``fused`` -> coarse logits."""
        if self.classifier_upsample > 1:
            size = (fused.shape[2] * self.classifier_upsample, fused.shape[3] * self.classifier_upsample)
            fused = F.interpolate(fused, size=size, mode="bilinear", align_corners=self.align_corners)
        return self.classifier(self.dropout(fused))

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[2], like.shape[3])
        if (x.shape[2], x.shape[3]) == size:
            return x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


@register_decoder("upernet", UPerNetOptions)
def _build(options: UPerNetOptions, backbone: Backbone, num_classes: int) -> UPerNet:
    return UPerNet(backbone.channels_of, backbone.strides_of, num_classes, options)
