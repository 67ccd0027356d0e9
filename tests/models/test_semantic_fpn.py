from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.models import SemanticFPN

CHANNELS = {"c1": 3, "c2": 4, "c3": 5, "c4": 6, "c5": 7}
STRIDES = {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 32}


def maps(height, width, strides=STRIDES, dtype=torch.float64):
    return {
        k: torch.randn(2, c, -(-height // strides[k]), -(-width // strides[k]), dtype=dtype)
        for k, c in CHANNELS.items()
    }


@pytest.mark.parametrize("norm", ["bn", "syncbn", "gn", "none"])
@pytest.mark.parametrize("size", [(64, 96), (60, 100), (4, 4), (36, 52)])
def test_shapes(norm, size):
    decoder = SemanticFPN(CHANNELS, STRIDES, 11, channels=8, head_channels=16, norm=norm).double().eval()
    out = decoder(maps(*size))
    assert decoder.stride == 4 and out.coarse.shape == (2, 11, size[0] // 4, size[1] // 4)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == {
        f"p{i}": (8, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i in (2, 3, 4, 5)
    }
    assert decoder.feature_channels == {"p2": 8, "p3": 8, "p4": 8, "p5": 8}
    assert decoder.feature_strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def test_head_equals_the_definition():
    """One 3x3 convolution, norm and ReLU per doubling, each doubling bilinear; the sum; a 1x1 predictor."""
    torch.manual_seed(0)
    decoder = SemanticFPN(CHANNELS, STRIDES, 3, channels=8, head_channels=6, norm="none").double()
    out = decoder(maps(64, 96))
    total = 0
    for name, doublings in (("p2", 0), ("p3", 1), ("p4", 2), ("p5", 3)):
        x = out.features[name]
        head = getattr(decoder, name)
        for i in range(max(1, doublings)):
            x = F.relu(F.conv2d(x, head[2 * i].weight, head[2 * i].bias, padding=1))
            if doublings:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    expected = F.conv2d(total, decoder.predictor.weight, decoder.predictor.bias)
    torch.testing.assert_close(out.coarse, expected, rtol=1e-12, atol=1e-12)


def test_names_of_parameters():
    decoder = SemanticFPN(CHANNELS, STRIDES, 3, channels=8, head_channels=6, norm="gn")
    names = set(decoder.state_dict())
    assert {
        f"fpn.fpn_{kind}{i}.{p}" for kind in ("lateral", "output") for i in (2, 3, 4, 5) for p in ("weight", "bias")
    } <= names
    assert {f"p5.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "norm.weight", "norm.bias")} <= names
    assert {"predictor.weight", "predictor.bias"} <= names
    assert sum(name.startswith("p2.") for name in names) == 3


@pytest.mark.parametrize("align", [False, True])
def test_dilated_backbone_and_fewer_levels(align):
    strides = {**STRIDES, "c4": 8, "c5": 8}
    decoder = SemanticFPN(CHANNELS, strides, 3, channels=8, head_channels=6, norm="none", align_corners=align).double()
    assert decoder(maps(64, 48, strides)).coarse.shape[2:] == (16, 12)
    decoder = SemanticFPN(
        CHANNELS, STRIDES, 3, channels=8, head_channels=6, levels=["c3", "c4", "c5"], norm="none"
    ).double()
    out = decoder(maps(64, 48))
    assert decoder.stride == 8 and out.coarse.shape[2:] == (8, 6) and list(out.features) == ["p3", "p4", "p5"]


def test_without_the_last_output_convolution():
    decoder = SemanticFPN(CHANNELS, STRIDES, 3, channels=8, head_channels=8, output_last=False)
    features = maps(64, 96, dtype=torch.float32)
    deepest = decoder(features).features["p5"]
    torch.testing.assert_close(deepest, decoder.fpn.fpn_lateral5(features["c5"]))
    assert not [name for name, _ in decoder.named_parameters() if name.startswith("fpn.fpn_output5")]


def test_coarse_first_order():
    """The order of PaddleSeg: the deepest level sets the stride, the finest is enlarged eight times, then reduced."""
    torch.manual_seed(1)
    strides = {**STRIDES, "c4": 8, "c5": 8}
    decoder = SemanticFPN(
        CHANNELS, strides, 3, channels=8, head_channels=6, norm="none", level_order="coarse_first"
    ).double()
    assert decoder.stride == 8 and len(decoder.p2) == 6 and len(decoder.p5) == 1
    out = decoder(maps(32, 48, strides))
    total = 0
    for name, doublings in (("p5", 0), ("p4", 1), ("p3", 2), ("p2", 3)):
        x = out.features[name]
        head = getattr(decoder, name)
        for i in range(max(1, doublings)):
            x = F.relu(F.conv2d(x, head[2 * i].weight, head[2 * i].bias, padding=1))
            if doublings:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + F.interpolate(x, size=(4, 6), mode="bilinear", align_corners=False)
    expected = F.conv2d(total, decoder.predictor.weight, decoder.predictor.bias)
    torch.testing.assert_close(out.coarse, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.bad_input
def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"levels must name maps of the backbone \(c1, c2, c3, c4, c5\), got \['c2', 'c6'\]"
    ):
        SemanticFPN(CHANNELS, STRIDES, 3, levels=["c2", "c6"])
    with pytest.raises(ValueError, match="level_order must be one of fine_first, coarse_first"):
        SemanticFPN(CHANNELS, STRIDES, 3, level_order="up")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SemanticFPN(CHANNELS, STRIDES, 0)
