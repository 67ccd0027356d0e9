"""FCNHead and the options of ConvNorm against the same layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.nn import ConvNorm, FCNHead


@pytest.mark.parametrize("concat_input", [False, True])
def test_head_is_its_layers_in_order(concat_input: bool) -> None:
    torch.manual_seed(0)
    head = FCNHead(6, 8, 5, num_convs=2, concat_input=concat_input).eval()
    x = torch.randn(2, 6, 7, 9)
    y = x
    for conv in head.convs:
        y = F.relu(F.batch_norm(F.conv2d(y, conv.weight, padding=1), conv.norm.running_mean, conv.norm.running_var))
    if concat_input:
        last = head.conv_cat
        y = F.conv2d(torch.cat([x, y], 1), last.weight, padding=1)
        y = F.relu(F.batch_norm(y, last.norm.running_mean, last.norm.running_var))
    torch.testing.assert_close(head(x), F.conv2d(y, head.classifier.weight, head.classifier.bias))


def test_dropout_takes_whole_channels() -> None:
    torch.manual_seed(0)
    head = FCNHead(32, 4, 3, num_convs=0, dropout=0.5).train()
    torch.nn.init.eye_(head.classifier.weight.data[:, :3, 0, 0])
    out = head(torch.ones(64, 32, 2, 2))
    assert (out.flatten(2).std(2) < 1e-6).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_convs": -1}, "num_convs must be at least 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_convs": 0, "concat_input": True}, "concat_input needs num_convs"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FCNHead(**{"in_channels": 4, "channels": 4, "num_classes": 2, **options})


def test_conv_norm_strides_dilates_and_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 9, 11)
    conv = ConvNorm(6, 6, 3, stride=2, dilation=2, groups=6, relu=False)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, 2, 2, 2, 6))
    assert ConvNorm(6, 4, 3, dilation=3)(x).shape == (1, 4, 9, 11)
