"""SemanticFPN: Panoptic Feature Pyramid Networks (Kirillov et al. 2019), section 3.1, semantic segmentation branch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .._options import Count, Flag, filled, read
from ..nn.conv import ConvNorm, make_classifier
from ..nn.fpn import FPN, upsample_to
from .backbones import Backbone
from .decoder import Decoder, DecoderOutput
from .fcn import check_levels
from .options import PRESET_PARTS, DecoderOptions, Norm
from .registry import register_decoder


class SemanticFPNOptions(DecoderOptions):
    """Options of ``semantic_fpn``. ``None`` means: as the PointRend preset says."""

    channels: Count = 256
    """Channels of the pyramid, and so of the fine features p2 .. p5."""
    head_channels: Count = 128
    """Channels of the scale heads."""
    norm: Norm | None = None
    """Norm of the scale heads. Presets: rendseg bn, detectron2 gn, mmseg syncbn, paddleseg none, deeplab bn."""
    neck_norm: Norm | None = None
    """Norm (and ReLU) of the pyramid's convolutions. Presets: none, paddleseg bn."""
    top_down: Literal["nearest", "bilinear", "bilinear_aligned"] | None = None
    """Upsampling of the top-down path. Presets: nearest, paddleseg bilinear_aligned."""
    align_corners: Flag = False
    """Of the upsampling in the scale heads."""
    level_order: Literal["fine_first", "coarse_first"] | None = None
    """``coarse_first`` gives the levels to the scale heads in reverse order, as PaddleSeg does: see
    ``SemanticFPN``."""
    output_last: Flag | None = None
    """An output convolution on the coarsest map of the pyramid. Presets: yes, paddleseg no."""
    levels: tuple[str, ...] = ("c2", "c3", "c4", "c5")
    """Backbone maps used; ``[c3, c4, c5]`` gives coarse logits of stride 8."""


class _Upsample(nn.Module):
    """x2, cropped to ``size`` when one is given."""

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if self.align_corners or size is None:
            size = size or (2 * x.shape[2], 2 * x.shape[3])
            return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
        return upsample_to(x, 2, size)


class SemanticFPN(Decoder):
    """A feature pyramid, one head per level that brings it to the finest stride, their sum, and a 1x1 predictor.

    ``forward(features)`` -> coarse logits ``[N, num_classes, H/s, W/s]`` (``s`` the stride of the finest level, 4 for
    ``c2`` .. ``c5``) and the pyramid's maps ``p2`` .. ``p5``. The head of a level is a 3x3 convolution with ``norm``
    and ReLU for each doubling that it needs (at least one), each followed by a bilinear doubling. Modules are called
    ``fpn`` (``fpn_lateral2``, ``fpn_output2``, ...), ``p2`` .. ``p5`` and ``predictor``. Image sizes need not be
    multiples of the strides. Under autocast the convolutions run in its dtype.
    ``switches`` are fields of ``SemanticFPNOptions``.

    ``level_order="coarse_first"`` reproduces PaddleSeg's PointRend, whose pyramid returns maps from coarse to fine but
    whose heads assume fine to coarse: the coarsest level sets the stride of the logits, and finer levels are enlarged
    even more and then resized down to it. It costs much memory and is there only to run networks trained that way.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: SemanticFPNOptions | None = None,
        **switches: Any,
    ) -> None:
        super().__init__(num_classes)
        s: Any = filled(read(SemanticFPNOptions, switches, start=options), PRESET_PARTS["rendseg"]["decoder"])
        levels, channels, head_channels = s.levels, s.channels, s.head_channels
        check_levels(levels, in_channels, "levels")
        self.levels = tuple(levels)
        self.outputs = tuple("p" + name[1:] for name in levels)
        self.align_corners = s.align_corners
        self.reversed = s.level_order == "coarse_first"
        level_strides = [strides[name] for name in levels]
        self.fpn = FPN(
            [in_channels[name] for name in levels],
            level_strides,
            channels,
            names=[name[1:] for name in levels],
            norm=s.neck_norm,
            top_down=s.top_down,
            output_last=s.output_last,
        )
        self.feature_channels = dict.fromkeys(self.outputs, channels)
        self.feature_strides = dict(zip(self.outputs, level_strides, strict=True))
        ladder = self.outputs[::-1] if self.reversed else self.outputs
        self.stride = self.feature_strides[ladder[0]]
        # PaddleSeg takes the first map that its pyramid returns, which is the deepest.
        self.default_point_features = (ladder[0],)
        if self.reversed:  # the resize to the common size is only in place when every level covers the same area
            self.size_divisor = max(level_strides)
        for i, name in enumerate(ladder):
            # PaddleSeg counts the doublings from the nominal strides 4, 8, 16, 32, not from those of the maps.
            ratio = 2**i if self.reversed else self.feature_strides[name] // self.stride
            doublings = round(math.log2(ratio))
            if 2**doublings != ratio:
                raise ValueError(f"the strides of the levels must differ by powers of two, got {level_strides}")
            modules: list[nn.Module] = []
            width = channels
            for _ in range(max(1, doublings)):
                modules.append(ConvNorm(width, head_channels, 3, norm=s.norm))
                width = head_channels
                if doublings:
                    modules.append(_Upsample(s.align_corners))
            self.add_module(name, nn.Sequential(*modules))
        self.predictor = make_classifier(head_channels, num_classes)

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        maps = dict(zip(self.outputs, self.fpn([features[name] for name in self.levels], self.resizes), strict=True))
        ladder = self.outputs[::-1] if self.reversed else self.outputs
        height, width = maps[ladder[0]].shape[2:]
        total: Tensor | None = None
        for name in ladder:
            x = maps[name]
            stride = self.feature_strides[name] // self.stride
            for module in getattr(self, name):
                if not isinstance(module, _Upsample):
                    x = module(x)
                elif self.reversed or self.resizes:
                    x = module(x)
                else:
                    stride //= 2
                    x = module(x, (-(-height // stride), -(-width // stride)))
            if (self.reversed or self.resizes) and total is not None:
                x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=self.align_corners)
            total = x if total is None else total + x
        assert total is not None
        return DecoderOutput(self.predictor(total), maps, {})


@register_decoder("semantic_fpn", SemanticFPNOptions)
def _build(options: SemanticFPNOptions, backbone: Backbone, num_classes: int) -> SemanticFPN:
    return SemanticFPN(backbone.channels_of, backbone.strides_of, num_classes, options)
