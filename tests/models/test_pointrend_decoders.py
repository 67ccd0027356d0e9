"""Every decoder under PointRend with every preset and over every family of backbones."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from rendseg.models import PRESETS, build_decoder, build_model, create_backbone
from rendseg.models.registry import decoder_options_class

TINY = {
    "fcn": {"channels": 8},
    "deeplabv3": {"channels": 8},
    "deeplabv3plus": {"channels": 8, "low_channels": 4},
    "encnet": {"channels": 8, "num_codes": 3, "aux_channels": 8, "laterals": ("c3", "c4")},
}
LOSSES = {"encnet": {"loss_se", "loss_aux_encnet"}}


def tiny(decoder, preset="rendseg", stride=None, **rest):
    torch.manual_seed(0)
    return build_model(
        {
            "backbone": {"name": "test_resnet", "output_stride": stride},
            "decoder": {"name": decoder, **TINY[decoder]},
            "pointrend": {"preset": preset, "hidden_channels": 8, "train_points": 40, "inference_points": 50},
            **rest,
        },
        4,
    )


def batch(height=37, width=50):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=generator)
    labels = torch.randint(0, 4, (2, height, width), generator=generator)
    labels[:, :5] = 255
    return images, labels


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("decoder", list(TINY))
def test_trains_a_step_and_predicts(decoder, preset):
    model = tiny(decoder, preset)
    images, labels = batch()
    losses = model(images, labels)
    assert set(losses) == {"loss_coarse", "loss_point"} | LOSSES.get(decoder, set())
    assert all(v.isfinite() and v.item() > 0 for v in losses.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    optimizer.step()
    model.eval()
    out = model.predict(images)
    assert out.refined.shape == (2, 4, 37, 50) and out.refined.isfinite().all()
    assert torch.equal(model.predict(images, "labels").labels.long(), out.refined.argmax(1))
    assert model.point_features == (("c3",) if preset == "deeplab" else ("c2",))
    assert model.options.point_features == model.point_features


@pytest.mark.parametrize("decoder", list(TINY))
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradient_reaches_every_parameter(decoder, precision):
    model = tiny(decoder, stride=16)
    images, labels = batch()
    seen = dict.fromkeys((name for name, _ in model.named_parameters()), False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            losses = model(images, labels)
        assert all(v.dtype == torch.float32 for v in losses.values())
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            seen[name] |= bool(parameter.grad.any())
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, reached in seen.items() if not reached]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = model.eval().predict(images)
    assert out.coarse.dtype == torch.float32 and out.refined.isfinite().all()


@pytest.mark.parametrize("decoder", list(TINY))
def test_only_ignored_labels_give_zero(decoder):
    model = tiny(decoder)
    images, labels = batch()
    losses = model(images, torch.full_like(labels, 255))
    sum(losses.values()).backward()
    assert all(v.item() == 0 for v in losses.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("decoder", "stride", "preset", "steps", "left"),
    [
        ("deeplabv3", 8, "rendseg", 3, 1),
        ("deeplabv3", 16, "rendseg", 4, 1),
        ("deeplabv3", 8, "paddleseg", 2, 2),
        ("deeplabv3", 16, "detectron2", 2, 4),
        ("deeplabv3plus", 16, "detectron2", 2, 1),
        ("encnet", 8, "deeplab", 3, 1),
    ],
)
def test_steps(decoder, stride, preset, steps, left):
    model = tiny(decoder, preset, stride)
    assert (model.steps, model.left_over) == (steps, left)


def test_default_features_of_the_pyramid():
    for preset, name in {"rendseg": "p2", "mmseg": "p2", "paddleseg": "p5", "deeplab": "c3"}.items():
        model = build_model({"backbone": {"name": "test_resnet"}, "pointrend": {"preset": preset}}, 3)
        assert model.point_features == (name,)
    levels = {"levels": ["c3", "c4", "c5"]}
    assert build_model({"backbone": {"name": "test_resnet"}, "decoder": levels}, 3).point_features == ("p3",)


@pytest.mark.parametrize("decoder", list(TINY))
def test_features_of_the_decoder_refine(decoder):
    model = build_model(
        {
            "backbone": {"name": "test_resnet"},
            "decoder": {"name": decoder, **TINY[decoder]},
            "pointrend": {"point_features": ["c2", "decoder"], "inference_points": 50},
        },
        3,
    )
    assert model.head.in_channels == 32 + 8
    assert model.eval().predict(batch()[0]).refined.shape == (2, 3, 37, 50)


@pytest.mark.bad_input
def test_features_that_are_not_there():
    config = {"decoder": {"name": "deeplabv3"}, "backbone": {"name": "test_resnet"}}
    with pytest.raises(ValueError, match=r"\(c1, c2, c3, c4, c5, aspp, decoder\), got \['p2'\]"):
        build_model({**config, "pointrend": {"point_features": ["p2"]}}, 3)


class Coarse(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, features):
        output = self.decoder(features)
        return output.coarse, output.features


@pytest.mark.parametrize("decoder", list(TINY))
def test_export(decoder):
    """A graph of a decoder in evaluation mode, for any number of images."""
    model = tiny(decoder).eval()
    with torch.no_grad():
        features = dict(zip(model.backbone.names, model.backbone(batch(64, 96)[0]), strict=True))
        shapes = {name: {0: torch.export.Dim("batch", max=64)} for name in features}
        program = torch.export.export(Coarse(model.decoder), (features,), dynamic_shapes=(shapes,))
        more = {name: torch.cat((m, m.flip(3), m[:1])) for name, m in features.items()}
        coarse, added = program.module()(more)
        expected = model.decoder(more)
    torch.testing.assert_close(coarse, expected.coarse, rtol=1e-4, atol=1e-5)
    assert set(added) == set(expected.features)


# ---- families of backbones


FAMILIES = {
    "resnet18d": 8,
    "xception41": 16,
    "test_convnext": 16,
    "swin_tiny_patch4_window7_224": 32,
    "hrnet_w18_small": 32,
    "resnet53": 4,
}


@functools.cache
def family(name):
    torch.manual_seed(0)
    return create_backbone(name=name, output_stride=FAMILIES[name]).train()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_backbone_under_every_decoder(name):
    """One training step: maps of the announced shapes, finite losses, a gradient for every parameter."""
    backbone = family(name)
    height, width = (16, 24) if name == "resnet53" else (64, 96)
    images, labels = batch(height, width)
    maps = dict(zip(backbone.names, backbone(images), strict=True))
    for (key, m), channels, stride in zip(maps.items(), backbone.channels, backbone.strides, strict=True):
        assert m.shape == (2, channels, height // stride, width // stride), key
    total = torch.zeros(())
    for decoder_name, options in TINY.items():
        decoder = build_decoder(decoder_options_class(decoder_name)(**options), backbone, 4)
        output = decoder(maps)
        assert output.coarse.shape == (2, 4, height // decoder.stride, width // decoder.stride)
        extra = decoder.extra_losses(output, labels, 255).values()
        total = total + sum(extra, output.coarse.square().mean())
        assert not set(decoder.feature_channels) - set(output.features)
    assert total.isfinite()
    total.backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]
    backbone.zero_grad()


@pytest.mark.parametrize("name", ["test_convnext", "hrnet_w18_small", "swin_tiny_patch4_window7_224"])
def test_odd_image_sizes_are_padded(name):
    model = build_model(
        {
            "backbone": {"name": name, "output_stride": 32},
            "decoder": {"name": "deeplabv3plus", **TINY["deeplabv3plus"]},
            "pointrend": {"hidden_channels": 8, "inference_points": 50},
        },
        4,
    ).eval()
    assert model.size_divisor == 32
    assert model.predict(torch.randn(1, 3, 37, 70)).refined.shape == (1, 4, 37, 70)
