"""Feature pyramid: Feature Pyramid Networks (Lin et al. 2017), section 3. N images, H W size of the finest map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ConvNorm

TOP_DOWN = ("nearest", "bilinear", "bilinear_aligned")


def upsample_to(x: Tensor, factor: int, size: tuple[int, int], mode: str = "bilinear", resize: bool = False) -> Tensor:
    """``x`` enlarged exactly ``factor`` times, then cropped right and below to ``size`` (height, width).

    If the size of an image is not a multiple of ``2s``, its map of stride ``2s`` reaches beyond that of stride ``s``.
    Cropping keeps every cell at its place; resizing to ``size`` stretches the map. ``resize`` does so nevertheless, and
    so does ``mode="bilinear_aligned"``: bilinear with ``align_corners=True``.
    """
    aligned: dict[str, Any] = {} if mode == "nearest" else {"align_corners": mode == "bilinear_aligned"}
    mode = mode.removesuffix("_aligned")
    if resize or aligned.get("align_corners"):
        return F.interpolate(x, size=size, mode=mode, **aligned)
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode=mode, **aligned)
    if x.shape[2] < size[0] or x.shape[3] < size[1]:
        raise ValueError(
            f"a feature map enlarged {factor} times gives {tuple(x.shape[2:])}, smaller than the finer map {size}: "
            "pad the image to a multiple of the largest stride"
        )
    return x[:, :, : size[0], : size[1]]


class FPN(nn.Module):
    """Feature pyramid: maps ``[N, Ci, Hi, Wi]`` -> maps ``[N, channels, Hi, Wi]``.

    Each map goes through a lateral 1x1 convolution, gets the enlarged next coarser level added, and goes through a 3x3
    output convolution; with ``output_last=False`` the coarsest does not. ``resize`` of ``forward`` is that of
    ``upsample_to``.

    ``in_channels`` and ``strides`` go from fine to coarse; level ``i`` has the modules ``fpn_lateral{names[i]}`` and
    ``fpn_output{names[i]}``. Strides may repeat (dilated backbones). Under autocast the convolutions run in its dtype.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        channels: int = 256,
        *,
        names: Sequence[str] = ("2", "3", "4", "5"),
        norm: str = "none",
        top_down: str = "nearest",
        output_last: bool = True,
    ) -> None:
        super().__init__()
        if top_down not in TOP_DOWN:
            raise ValueError(f"top_down must be one of {', '.join(TOP_DOWN)}, got {top_down!r}")
        if not len(in_channels) == len(strides) == len(names) or not in_channels:
            raise ValueError(
                f"in_channels, strides and names must have the same length, at least 1, got {len(in_channels)}, "
                f"{len(strides)} and {len(names)}"
            )
        self.names = tuple(names)
        self.strides = tuple(strides)
        self.top_down = top_down
        self.factors = []
        for fine, coarse in zip(strides, strides[1:], strict=False):
            if coarse % fine:
                raise ValueError(f"every stride must divide the next, got {list(strides)}")
            self.factors.append(coarse // fine)
        relu = norm != "none"
        for name, channels_in in zip(names, in_channels, strict=True):
            self.add_module(
                f"fpn_lateral{name}", ConvNorm(channels_in, channels, 1, norm=norm, relu=relu, init="xavier")
            )
            if output_last or name != names[-1]:
                output = ConvNorm(channels, channels, 3, norm=norm, relu=relu, init="xavier")
                self.add_module(f"fpn_output{name}", output)
        self.output_last = output_last

    def forward(self, features: Sequence[Tensor], resize: bool = False) -> list[Tensor]:
        if len(features) != len(self.names):
            raise ValueError(f"features must hold {len(self.names)} maps, got {len(features)}")
        outputs: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(features))):
            merged = getattr(self, f"fpn_lateral{self.names[i]}")(features[i])
            if above is not None:
                size = (merged.shape[2], merged.shape[3])
                merged = merged + upsample_to(above, self.factors[i], size, self.top_down, resize)
            last = above is None and not self.output_last
            outputs.append(merged if last else getattr(self, f"fpn_output{self.names[i]}")(merged))
            above = merged
        return outputs[::-1]
