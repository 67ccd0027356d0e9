"""A convolution with its norm and activation in one module, plain and depthwise separable; norms by name."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("bn", "syncbn", "gn", "none")


def make_norm(name: str, channels: int) -> nn.Module | None:
    """The norm called ``name`` over ``channels``: ``bn``, ``syncbn``, ``gn`` (32 groups, or the largest that divides),
    ``none``.

    ``syncbn`` is ``torch.nn.SyncBatchNorm``: outside a process group it computes what ``bn`` does, on any device.
    """
    if name == "bn":
        return nn.BatchNorm2d(channels)
    if name == "syncbn":
        return nn.SyncBatchNorm(channels)
    if name == "gn":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    if name == "none":
        return None
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")


class ConvNorm(nn.Conv2d):
    """A convolution of odd ``kernel_size`` that keeps the size at stride 1, then ``norm``, then ReLU when ``relu``.

    Its parameters are ``weight``, ``bias`` and ``norm.*``. By default it has a ``bias`` only without a norm. Weights
    start from Kaiming's normal rule over the fan out (``init="msra"``) or his uniform rule over the fan in
    (``init="xavier"``); the bias starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        norm: str = "none",
        relu: bool = True,
        init: str = "msra",
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
    ) -> None:
        norm_layer = make_norm(norm, out_channels)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=norm_layer is None if bias is None else bias,
        )
        self.norm = norm_layer
        self.relu = relu
        if init == "msra":
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
            if groups > 1:  # PyTorch counts the fan out of all groups together
                self.weight.data.mul_(groups**0.5)
        elif init == "xavier":
            nn.init.kaiming_uniform_(self.weight, a=1)
        else:
            raise ValueError(f"init must be msra or xavier, got {init!r}")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x, inplace=True) if self.relu else x


def make_classifier(in_channels: int, num_classes: int, kernel_size: int = 1) -> nn.Conv2d:
    """The convolution that gives the logits: weights from a normal rule of deviation 0.01, biases of zero."""
    layer = nn.Conv2d(in_channels, num_classes, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class SeparableConvNorm(nn.Module):
    """A depthwise ``kernel_size`` convolution with ``norm`` (and ReLU when ``depthwise_relu``), then a 1x1 convolution
    with ``norm`` and ReLU. The two are called ``depthwise`` and ``pointwise``.

    Source: Chen et al. 2018 (DeepLabV3+), section 3.1. PaddleSeg leaves the first ReLU out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        norm: str = "bn",
        dilation: int = 1,
        depthwise_relu: bool = True,
    ) -> None:
        super().__init__()
        self.depthwise = ConvNorm(
            in_channels,
            in_channels,
            kernel_size,
            norm=norm,
            relu=depthwise_relu,
            dilation=dilation,
            groups=in_channels,
        )
        self.pointwise = ConvNorm(in_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))
