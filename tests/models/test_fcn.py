from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.models import FCN, build_model

CHANNELS = {"c1": 3, "c2": 4, "c3": 5, "c4": 6, "c5": 7}
STRIDES = {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 32}


def maps(height, width):
    return {k: torch.randn(2, c, -(-height // STRIDES[k]), -(-width // STRIDES[k])) for k, c in CHANNELS.items()}


def norm_relu(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()


def head(decoder, x):
    y = x
    for layer in decoder.head.convs:
        y = norm_relu(F.conv2d(y, layer.weight, padding=layer.weight.shape[-1] // 2), layer.norm)
    if decoder.head.conv_cat is not None:
        layer = decoder.head.conv_cat
        y = norm_relu(F.conv2d(torch.cat((x, y), 1), layer.weight, padding=layer.weight.shape[-1] // 2), layer.norm)
    return y, F.conv2d(y, decoder.head.classifier.weight, decoder.head.classifier.bias)


@pytest.mark.parametrize("concat", [False, True])
def test_one_level(concat):
    torch.manual_seed(0)
    decoder = FCN(CHANNELS, STRIDES, 5, levels=["c4"], channels=8, concat_input=concat).eval()
    features = maps(37, 50)
    out = decoder(features)
    expected_map, expected = head(decoder, features["c4"])
    torch.testing.assert_close(out.features["decoder"], expected_map)
    torch.testing.assert_close(out.coarse, expected)
    assert decoder.stride == 16 and out.coarse.shape == (2, 5, 3, 4)
    assert decoder.feature_channels == {"decoder": 8} and decoder.feature_strides == {"decoder": 16}


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (36, 52)])
def test_several_levels_side_by_side(align, size):
    """The head of HRNet: all maps at the finest stride, 1x1 convolutions."""
    torch.manual_seed(0)
    levels = ["c2", "c3", "c5"]
    decoder = FCN(
        CHANNELS,
        STRIDES,
        5,
        levels=levels,
        channels=16,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        align_corners=align,
    ).eval()
    features = maps(*size)
    height, width = features["c2"].shape[2:]
    enlarged = []
    for name in levels:
        factor = STRIDES[name] // 4
        target = (height, width) if align else [factor * s for s in features[name].shape[2:]]
        y = F.interpolate(features[name], size=target, mode="bilinear", align_corners=align)
        enlarged.append(y[:, :, :height, :width])
    torch.testing.assert_close(decoder(features).coarse, head(decoder, torch.cat(enlarged, 1))[1])


def test_defaults_are_those_of_mmsegmentation():
    model = build_model({"backbone": {"name": "test_resnet"}, "decoder": {"name": "fcn"}, "name": "segmenter"}, 3)
    fcn = model.decoder.head
    assert [tuple(c.weight.shape) for c in fcn.convs] == [(512, 96, 3, 3), (512, 512, 3, 3)]
    assert fcn.conv_cat.weight.shape == (512, 608, 3, 3) and fcn.dropout.p == 0.1 and model.decoder.stride == 32


@pytest.mark.bad_input
def test_bad_options():
    with pytest.raises(ValueError, match=r"levels must name maps of the backbone \(c1, .*\), got \['c6'\]"):
        FCN(CHANNELS, STRIDES, 3, levels=["c6"])
    with pytest.raises(ValueError, match=r"levels must name maps .* got \[\]"):
        FCN(CHANNELS, STRIDES, 3, levels=[])
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        FCN(CHANNELS, STRIDES, 3, kernel_size=2)
    with pytest.raises(ValueError, match="unknown key model.decoder.level"):
        build_model({"decoder": {"name": "fcn", "level": "c5"}}, 3)
