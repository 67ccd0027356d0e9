from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.models import PointRend, UPerNet, build_model, parse_options

CHANNELS = {"c1": 3, "c2": 4, "c3": 5, "c4": 6, "c5": 8}
STRIDES = {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 32}


def maps(height, width, strides=STRIDES):
    return {
        k: torch.randn(2, c, -(-height // strides[k]), -(-width // strides[k]), dtype=torch.float64)
        for k, c in CHANNELS.items()
    }


def decoder_of(preset, strides=STRIDES, **switches):
    """The decoder of a preset by way of the options, with random statistics."""

    torch.manual_seed(0)
    decoder = UPerNet(CHANNELS, strides, 3, preset=preset, **switches).double()
    for module in decoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias)
    torch.nn.init.normal_(decoder.classifier.weight)
    torch.nn.init.normal_(decoder.classifier.bias)
    return decoder.eval()


class Plain:
    """The network of a preset from its weights, written down from the descriptions of the implementations."""

    def __init__(self, decoder):
        self.state = decoder.state_dict()

    def cbr(self, x, name, bare=False):
        weight = self.state[f"{name}.weight"]
        x = F.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)
        if bare:
            return x
        norm = [self.state[f"{name}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm))

    def up(self, x, like, align):
        size = like.shape[2:] if isinstance(like, torch.Tensor) else like
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align)

    def mmseg(self, c, align=False, reverse_bins=False, reverse_levels=False, upsample_first=False):
        x = c["c5"]
        branches = []
        for i, bins in enumerate((1, 2, 3, 6)):
            y = F.adaptive_avg_pool2d(x, bins)
            name = f"ppm.branches.{i}"
            y = self.cbr(self.up(y, x, align), name) if upsample_first else self.up(self.cbr(y, name), x, align)
            branches.append(y)
        p5 = self.cbr(torch.cat([x, *(branches[::-1] if reverse_bins else branches)], 1), "ppm.fuse")
        sums, top = {}, p5
        for level in (4, 3, 2):
            lateral = self.cbr(c[f"c{level}"], f"lateral{level}")
            top = lateral + self.up(top, lateral, align)
            sums[level] = top
        p2, p3, p4 = (self.cbr(sums[level], f"output{level}") for level in (2, 3, 4))
        parts = [p2, self.up(p3, p2, align), self.up(p4, p2, align), self.up(p5, p2, align)]
        fused = self.cbr(torch.cat(parts[::-1] if reverse_levels else parts, 1), "fuse")
        return self.cbr(fused, "classifier", bare=True), {"p2": p2, "p3": p3, "p4": p4, "p5": p5, "fused": fused}

    def csail(self, c):
        return self.mmseg(c, upsample_first=True)

    def paddleseg(self, c):
        return self.mmseg(c, align=True, reverse_bins=True)

    def pytorch_encoding(self, c):
        return self.mmseg(c, align=True, reverse_levels=True)

    def deeplab(self, c):
        x = c["c5"]
        parts = [
            self.up(self.cbr(F.adaptive_max_pool2d(x, bins), f"ppm.branches.{i}", bare=True), x, True)
            for i, bins in enumerate((1, 2, 3, 6))
        ]
        p5 = self.cbr(torch.cat([*parts, x], 1), "ppm.fuse")
        p4 = self.cbr(c["c4"], "lateral4") + self.cbr(self.up(p5, c["c4"], True), "top_down", bare=True)
        p4 = self.cbr(p4, "output4")
        p3 = self.cbr(self.up(p4, c["c3"], True) + self.cbr(c["c3"], "lateral3"), "output3")
        p2 = self.cbr(self.up(p3, c["c2"], True) + self.cbr(c["c2"], "lateral2"), "output2")
        fused = self.cbr(
            torch.cat([self.up(p5, p2, True), self.up(p4, p2, True), self.up(p3, p2, True), p2], 1), "fuse"
        )
        large = self.up(fused, [4 * side for side in fused.shape[2:]], True)
        return self.cbr(large, "classifier", bare=True), {"p2": p2, "p3": p3, "p4": p4, "p5": p5, "fused": fused}


SMALL = {"channels": 8, "ppm_channels": 6, "fuse_channels": 10}


@pytest.mark.parametrize("size", [(64, 96), (100, 60)])
@pytest.mark.parametrize("preset", ["mmseg", "csail", "paddleseg", "pytorch_encoding", "deeplab"])
def test_presets_equal_their_descriptions(preset, size):
    decoder = decoder_of(preset, **SMALL)
    features = maps(*size)
    out = decoder(features)
    coarse, expected = getattr(Plain(decoder), preset)(features)
    torch.testing.assert_close(out.coarse, coarse, rtol=1e-10, atol=1e-10)
    assert set(out.features) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.features[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["mmseg", "csail", "paddleseg", "pytorch_encoding", "deeplab"])
def test_widths_and_kernels_of_presets(preset):
    """Shapes of the weights as in the checkpoints of each implementation, for a ResNet-50."""
    channels = {"c2": 256, "c3": 512, "c4": 1024, "c5": 2048}
    strides = {name: STRIDES[name] for name in channels}
    with torch.device("meta"):
        decoder = UPerNet(channels, strides, 150, preset=preset)
    shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    width = {"pytorch_encoding": 256, "deeplab": 256}.get(preset, 512)
    branch = 256 if preset == "deeplab" else 512
    k = 1 if preset == "deeplab" else 3
    assert shapes["ppm.branches.3.weight"] == (branch, 2048, 1, 1)
    assert shapes["ppm.fuse.weight"] == (width, 2048 + 4 * branch, k, k)
    assert shapes["lateral3.weight"] == (width, 512, 1, 1) and shapes["output2.weight"] == (width, width, k, k)
    assert shapes["fuse.weight"] == (256 if preset == "deeplab" else 512, 4 * width, k, k)
    assert shapes["classifier.weight"] == ((150, 256, 3, 3) if preset == "deeplab" else (150, 512, 1, 1))
    assert decoder.stride == (1 if preset == "deeplab" else 4)
    dropout = decoder.dropout
    assert dropout.p == (0.1 if preset in ("mmseg", "pytorch_encoding") else 0)
    assert isinstance(dropout, torch.nn.Dropout2d) == (preset != "pytorch_encoding")


def test_dilated_backbone_and_fewer_levels():
    strides = {**STRIDES, "c4": 8, "c5": 8}
    decoder = decoder_of("paddleseg", strides, **SMALL)
    out = decoder(maps(64, 48, strides))
    assert out.coarse.shape == (2, 3, 16, 12) and out.features["p5"].shape[2:] == (8, 6)
    assert decoder.size_divisor == 8 and decoder.feature_strides == {"p2": 4, "p3": 8, "p4": 8, "p5": 8, "fused": 4}
    decoder = decoder_of("mmseg", levels=("c3", "c5"), **SMALL)
    out = decoder(maps(64, 64))
    assert decoder.stride == 8 and out.coarse.shape[2:] == (8, 8) and set(out.features) == {"p3", "p5", "fused"}
    assert decoder_of("mmseg", levels=("c5",), **SMALL)(maps(64, 64)).coarse.shape[2:] == (2, 2)


def model(preset="mmseg", name="pointrend", **switches):
    return build_model(
        {
            "name": name,
            "pad": "stride",
            "backbone": {"name": "test_resnet"},
            "decoder": {"name": "upernet", "preset": preset, "channels": 8, "fuse_channels": 8, "ppm_channels": 4,
                        **switches},
            "pointrend": {"hidden_channels": 8, "train_points": 32, "inference_points": 32,
                          "point_features": ["p2", "fused"]},
        },
        5,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["mmseg", "deeplab"])
def test_model_trains_and_predicts_any_size(preset):
    torch.manual_seed(2)
    network = model(preset)
    assert isinstance(network, PointRend) and network.size_divisor == 32
    losses = network(torch.randn(2, 3, 37, 53), torch.randint(0, 5, (2, 37, 53)))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters())
    out = network.eval().predict(torch.randn(1, 3, 45, 70), output="labels")
    assert out.labels.shape == (1, 45, 70)
    stride = network.decoder.stride
    assert out.coarse.shape[2:] == (64 // stride, 96 // stride)


def test_ignored_labels_give_zero_with_a_graph():
    network = model(name="segmenter")
    losses = network(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 255))
    total = sum(losses.values())
    assert total.item() == 0
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_options_round_trip():
    import dataclasses

    options = parse_options({"decoder": {"name": "upernet", "preset": "csail", "bins": [1, 4], "norm": "gn"}})
    assert options.decoder.preset == "csail" and options.decoder.bins == (1, 4) and options.decoder.pool is None
    assert parse_options(dataclasses.asdict(options)) == options


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "switches,message",
    [
        (
            {"preset": "mmsegg"},
            r"model.decoder.preset must be one of rendseg, .*, got 'mmsegg'; did you mean 'mmseg'\?",
        ),
        ({"pol": "max"}, r"unknown key model.decoder.pol; did you mean 'pool'\?"),
        ({"levels": ["c2", "c6"]}, r"levels must name maps of the backbone \(c1, .*\), got \['c2', 'c6'\]"),
        ({"levels": ["c3", "c2"]}, r"levels must go from fine to coarse without repetition, got \['c3', 'c2'\]"),
        ({"dropout": 1.0}, r"model.decoder.dropout must lie in \[0, 1\), got 1.0"),
        ({"channels": 0}, "model.decoder.channels must be at least 1, got 0"),
        ({"classifier_upsample": 3}, "classifier_upsample must divide the finest stride 4, got 3"),
        ({"bins": [0]}, r"model.decoder.bins must be at least 1, got \[0\]"),
        ({"fuse_order": "fine"}, "model.decoder.fuse_order must be one of fine_first, coarse_first"),
    ],
)
def test_bad_options(switches, message):
    with pytest.raises(ValueError, match=message):
        model(**switches)
