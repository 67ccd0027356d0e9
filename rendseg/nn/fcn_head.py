"""The head of a fully convolutional network: Long et al. 2015; as an auxiliary head, Zhao et al. 2017, section 3.3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conv import ConvNorm, make_classifier


class FCNHead(nn.Module):
    """``[N, in_channels, H, W]`` -> logits ``[N, num_classes, H, W]``.

    It has ``num_convs`` convolutions of ``kernel_size`` with ``norm`` and ReLU, called ``convs.0`` ..; dropout of whole
    channels; and the 1x1 ``classifier``. With ``concat_input`` one more convolution, ``conv_cat``, reads their output
    concatenated with the input. ``num_convs=0`` leaves only dropout and classifier. ``features`` returns the maps
    before dropout, with ``out_channels`` channels. Under autocast the convolutions run in its dtype.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
        norm: str = "bn",
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("num_classes", num_classes, 1),
            ("num_convs", num_convs, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if concat_input and num_convs == 0:
            raise ValueError("concat_input needs num_convs of at least 1")
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(ConvNorm(a, b, kernel_size, norm=norm) for a, b in zip(widths, widths[1:], strict=False))
        )
        self.conv_cat = ConvNorm(in_channels + channels, channels, kernel_size, norm=norm) if concat_input else None
        self.out_channels = widths[-1]
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = make_classifier(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The maps ``[N, out_channels, H, W]`` that dropout and classifier read."""
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat((x, y), 1))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x)))
