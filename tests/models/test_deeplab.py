from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.models import DeepLabV3, DeepLabV3Plus, build_model

CHANNELS = {"c1": 3, "c2": 4, "c3": 5, "c4": 6, "c5": 7}
STRIDES = {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 16}


def maps(height, width):
    return {k: torch.randn(2, c, -(-height // STRIDES[k]), -(-width // STRIDES[k])) for k, c in CHANNELS.items()}


def randomise(module):
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module.eval()


def conv(x, m, dilation=1, groups=1):
    pad = dilation * (m.weight.shape[-1] // 2)
    x = F.conv2d(x, m.weight, m.bias, padding=pad, dilation=dilation, groups=groups)
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias).relu()


def separable(x, m, dilation=1):
    return conv(conv(x, m.depthwise, dilation, x.shape[1]), m.pointwise)


def pyramid(aspp, x, rates, atrous):
    outputs = [conv(x, aspp.branches[0])]
    outputs += [atrous(x, aspp.branches[i + 1], rate) for i, rate in enumerate(rates)]
    pooled = conv(x.mean((2, 3), keepdim=True), aspp.pool)
    return conv(torch.cat([*outputs, pooled.expand_as(outputs[0])], 1), aspp.project)


@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("rates", [None, (2, 3)])
def test_v3_equals_its_layers(torchvision, rates):
    torch.manual_seed(0)
    form = {"project_kernel": 1, "aspp_dropout": 0.5, "head_convs": 1, "dropout": 0.0} if torchvision else {}
    decoder = randomise(DeepLabV3(CHANNELS, STRIDES, 5, channels=8, rates=rates, **form))
    features = maps(50, 70)
    out = decoder(features)
    x = pyramid(decoder.aspp, features["c5"], rates or (6, 12, 18), conv)
    torch.testing.assert_close(out.features["aspp"], x, rtol=1e-4, atol=1e-5)
    assert decoder.aspp.project.weight.shape[-1] == (1 if torchvision else 3)
    for layer in decoder.convs:
        x = conv(x, layer)
    assert len(decoder.convs) == int(torchvision)
    torch.testing.assert_close(out.features["decoder"], x, rtol=1e-4, atol=1e-5)
    expected = F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias)
    torch.testing.assert_close(out.coarse, expected, rtol=1e-4, atol=1e-5)
    assert decoder.stride == 16 and out.coarse.shape == (2, 5, 4, 5)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (52, 68)])
@pytest.mark.parametrize("plain", [False, True])
def test_v3plus_equals_its_layers(align, size, plain):
    torch.manual_seed(0)
    decoder = randomise(
        DeepLabV3Plus(
            CHANNELS,
            STRIDES,
            5,
            channels=8,
            low_channels=3,
            align_corners=align,
            separable=not plain,
            separable_decoder=not plain,
        )
    )
    features = maps(*size)
    out = decoder(features)
    atrous = conv if plain else separable
    x = pyramid(decoder.aspp, features["c5"], (6, 12, 18), atrous)
    height, width = features["c2"].shape[2:]
    target = (height, width) if align else (4 * x.shape[2], 4 * x.shape[3])
    x = F.interpolate(x, size=target, mode="bilinear", align_corners=align)[:, :, :height, :width]
    x = torch.cat((x, conv(features["c2"], decoder.low)), 1)
    for layer in decoder.convs:
        x = atrous(x, layer)
    torch.testing.assert_close(out.features["decoder"], x, rtol=1e-4, atol=1e-5)
    expected = F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias)
    torch.testing.assert_close(out.coarse, expected, rtol=1e-4, atol=1e-5)
    assert decoder.stride == 4 and decoder.feature_strides == {"aspp": 16, "decoder": 4}


@pytest.mark.parametrize(("stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_rates_follow_the_output_stride(stride, rates, name):
    config = {"backbone": {"name": "test_resnet", "output_stride": stride}, "decoder": {"name": name, "channels": 4}}
    model = build_model(config, 3)
    assert model.decoder.aspp.rates == rates
    assert model.decoder.stride == (stride if name == "deeplabv3" else 4)
    assert model.steps == {4: 2, 8: 3, 16: 4, 32: 5}[model.decoder.stride]


def test_defaults():
    model = build_model({"backbone": {"name": "test_resnet"}, "decoder": {"name": "deeplabv3plus"}}, 3)
    decoder = model.decoder
    assert decoder.low.weight.shape == (48, 32, 1, 1) and decoder.aspp.project.weight.shape == (256, 1280, 1, 1)
    assert [c.pointwise.weight.shape[0] for c in decoder.convs] == [256, 256] and decoder.dropout.p == 0.1
    assert decoder.aspp.branches[1].depthwise.weight.shape == (96, 1, 3, 3)


@pytest.mark.bad_input
def test_bad_options():
    with pytest.raises(ValueError, match=r"level must name maps of the backbone \(c1, .*\), got 'c9'"):
        DeepLabV3(CHANNELS, STRIDES, 3, level="c9")
    with pytest.raises(ValueError, match=r"low_level must name maps of the backbone .*, got 'p2'"):
        DeepLabV3Plus(CHANNELS, STRIDES, 3, low_level="p2")
    with pytest.raises(ValueError, match=r"divides that of level 'c3' \(8\), got 'c5' of stride 16"):
        DeepLabV3Plus(CHANNELS, STRIDES, 3, level="c3", low_level="c5")
    with pytest.raises(ValueError, match="head_convs must be at least 0, got -1"):
        DeepLabV3(CHANNELS, STRIDES, 3, head_convs=-1)
    with pytest.raises(ValueError, match="low_channels must be at least 1, got 0"):
        DeepLabV3Plus(CHANNELS, STRIDES, 3, low_channels=0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        DeepLabV3(CHANNELS, STRIDES, 3, dropout=1.0)
    with pytest.raises(ValueError, match="rates must be at least 1"):
        DeepLabV3(CHANNELS, STRIDES, 3, rates=[0])
