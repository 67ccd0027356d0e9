"""ASPP and SeparableConvNorm against the same layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.nn import ASPP, SeparableConvNorm, default_rates


def randomise(module):
    """Norms that do something: statistics and affine parameters away from 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return module


def conv(x, m, dilation=1, groups=1, relu=True):
    x = F.conv2d(x, m.weight, m.bias, padding=dilation * (m.weight.shape[-1] // 2), dilation=dilation, groups=groups)
    n = m.norm
    x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
    return x.relu() if relu else x


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("depthwise_relu", [False, True])
@pytest.mark.parametrize(("pool", "kernel"), [(True, 3), (False, 1)])
def test_equals_its_layers(separable, depthwise_relu, pool, kernel):
    torch.manual_seed(0)
    rates = (1, 2, 4)
    aspp = randomise(
        ASPP(
            6,
            8,
            rates,
            separable=separable,
            depthwise_relu=depthwise_relu,
            image_pool=pool,
            project_kernel=kernel,
            dropout=0.5,
        )
    ).eval()
    x = torch.randn(2, 6, 9, 11)
    outputs = [conv(x, aspp.branches[0])]
    for rate, branch in zip(rates, list(aspp.branches)[1:], strict=True):
        if separable:
            y = conv(x, branch.depthwise, rate, 6, depthwise_relu)
            outputs.append(conv(y, branch.pointwise))
        else:
            outputs.append(conv(x, branch, rate))
    if pool:
        y = conv(F.adaptive_avg_pool2d(x, 1), aspp.pool)
        outputs.append(F.interpolate(y, size=(9, 11), mode="bilinear", align_corners=False))
    expected = conv(torch.cat(outputs, 1), aspp.project)
    torch.testing.assert_close(aspp(x), expected, rtol=1e-4, atol=1e-5)


def test_default_rates():
    assert default_rates(16) == (6, 12, 18) and default_rates(8) == (12, 24, 36)
    assert default_rates(32) == (3, 6, 9) and default_rates(4) == (24, 48, 72)


def test_depthwise_weights_keep_the_variance():
    """Kaiming's rule with the fan out of one group: 9 weights leave each channel."""
    torch.manual_seed(0)
    layer = SeparableConvNorm(512, 4, norm="none")
    assert layer.depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


@pytest.mark.bad_input
def test_one_image_in_training():
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="cannot train on 1 image per step: raise train.batch_size"):
        ASPP(4, 4).train()(x)
    with pytest.raises(ValueError, match="cannot train on 1 image"):
        ASPP(4, 4, norm="syncbn").train()(x)
    for allowed in (ASPP(4, 64).eval(), ASPP(4, 64, norm="gn").train(), ASPP(4, 64, image_pool=False).train()):
        assert allowed(x).shape == (1, 64, 5, 5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "in_channels and channels must be at least 1, got 4 and 0"),
        ({"rates": (6, 0)}, r"rates must be at least 1, got \[6, 0\]"),
        ({"project_kernel": 2}, "project_kernel must be 1 or 3, got 2"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ASPP(4, **options)
