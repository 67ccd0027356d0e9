"""``resnet53`` and ``resnet103``: the ResNets of the DeepLab write-ups of PointRend, whose stem keeps the full size.

PointRend (Kirillov et al. 2020), section 5, calls a ResNet-101 whose 7x7 stem is replaced by three 3x3 convolutions
"ResNet-103". The write-ups' code takes the name, but puts one 3x3 convolution of stride 1 there; everything after it,
the max pooling included, is a ResNet-50 or ResNet-101 whose strides are halved. ``resnet53`` and ``resnet103`` are
that; ``resnet53c`` and ``resnet103c`` have the three convolutions (32, 32, 64 channels), of stride 1 too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Name to timm's network of the same stages, and whether its stem has three convolutions.
STRIDE4 = {
    "resnet53": ("resnet50", False),
    "resnet103": ("resnet101", False),
    "resnet53c": ("resnet50c", True),
    "resnet103c": ("resnet101c", True),
}


def create_stride4(name: str, output_stride: int = 4, *, pretrained: bool = False, in_chans: int = 3) -> nn.Module:
    """The ``features_only`` network called ``name``: maps ``c1`` .. ``c5`` of strides 1, 2, 4, 4, 4 (with
    ``output_stride`` 8 or 16: 1, 2, 4, 8, 8 or 16).

    Parameters are called as in timm and torchvision. ``pretrained`` loads timm's weights; a stem of one 3x3
    convolution stays as initialised. Errors: ``ValueError`` for another output stride.
    """
    import timm

    base, deep = STRIDE4[name]
    if output_stride not in (4, 8, 16):
        raise ValueError(f"backbone {name!r} has output stride 4, 8 or 16, got {output_stride}: set output_stride")
    arguments: dict[str, Any] = {"features_only": True, "in_chans": in_chans, "output_stride": 2 * output_stride}
    net = timm.create_model(base, pretrained=pretrained, **arguments)
    if deep:
        net.conv1[0].stride = (1, 1)
    else:
        net.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net
