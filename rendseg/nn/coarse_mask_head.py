"""The coarse mask head of instance PointRend (Kirillov et al. 2020), section 4.1. N boxes, C classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CoarseMaskHead(nn.Module):
    """Features of boxes to coarse masks through fully connected layers: ``[N, in_channels, input_size, input_size]`` to
    logits ``[N, num_classes, output_size, output_size]``.

    A 1x1 convolution where ``in_channels`` exceed ``conv_channels``, a 2x2 convolution of stride 2, ``num_layers``
    linear layers of ``hidden_channels``, each with ReLU, and ``prediction``. Names and initial weights are those of
    detectron2: convolutions Kaiming normal over the fan out, linear layers uniform over the fan in, ``prediction``
    N(0, 0.001).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_channels: int = 256,
        hidden_channels: int = 1024,
        num_layers: int = 2,
        input_size: int = 14,
        output_size: int = 7,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 1),
            ("conv_channels", conv_channels, 1),
            ("hidden_channels", hidden_channels, 1),
            ("num_layers", num_layers, 1),
            ("input_size", input_size, 2),
            ("output_size", output_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if input_size % 2:
            raise ValueError(f"input_size must be even, since a convolution halves it, got {input_size}")
        self.in_channels, self.num_classes = in_channels, num_classes
        self.input_size, self.output_size, self.num_layers = input_size, output_size, num_layers
        channels = in_channels
        if in_channels > conv_channels:
            self.reduce_channel_dim_conv = nn.Conv2d(in_channels, conv_channels, 1)
            channels = conv_channels
        self.reduce_spatial_dim_conv = nn.Conv2d(channels, conv_channels, 2, stride=2)
        inputs = conv_channels * (input_size // 2) ** 2
        for i in range(num_layers):
            setattr(self, f"fc{i + 1}", nn.Linear(inputs, hidden_channels))
            inputs = hidden_channels
        self.prediction = nn.Linear(inputs, num_classes * output_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
                if layer is self.prediction:
                    nn.init.normal_(layer.weight, std=0.001)
                elif isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        wanted = (self.in_channels, self.input_size, self.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(f"x must have shape [N, {', '.join(map(str, wanted))}], got {list(x.shape)}")
        if hasattr(self, "reduce_channel_dim_conv"):
            x = F.relu(self.reduce_channel_dim_conv(x))
        x = F.relu(self.reduce_spatial_dim_conv(x)).flatten(1)
        for i in range(self.num_layers):
            x = F.relu(getattr(self, f"fc{i + 1}")(x))
        return self.prediction(x).view(-1, self.num_classes, self.output_size, self.output_size)
