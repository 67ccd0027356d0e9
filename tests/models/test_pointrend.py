from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg import ops
from rendseg.models import (
    PRESETS,
    Backbone,
    Decoder,
    DecoderOptions,
    DecoderOutput,
    LossOptions,
    PointRend,
    PointRendOptions,
    SegmentationOutput,
    Segmenter,
    build_model,
    decoder_names,
    register_decoder,
)
from rendseg.nn import PointHead

TINY = {"channels": 16, "head_channels": 16}


def tiny(classes=4, preset="rendseg", name="pointrend", channels_last=True, loss=None, **switches):
    torch.manual_seed(0)
    config = {
        "name": name,
        "decoder": dict(TINY),
        "pointrend": {"preset": preset, "hidden_channels": 16, "inference_points": 60, **switches},
        "channels_last": channels_last,
        "loss": loss or {},
    }
    return build_model(config, classes)


def batch(height=40, width=56, classes=4, count=2):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, height, width, generator=generator)
    labels = torch.randint(0, classes, (count, height, width), generator=generator)
    labels[:, : height // 4] = 255
    return images, labels


# ---- stubs whose answers are known: maps are averages of the image


class PoolNet(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return [self.scale * F.avg_pool2d(x, s, ceil_mode=True) for s in (2, self.stride)]


class PoolDecoder(Decoder):
    """Coarse logits: the image's own channels, averaged."""

    def __init__(self, stride, classes=3):
        super().__init__(classes)
        self.stride = stride
        self.feature_channels, self.feature_strides = {"fine": 3}, {"fine": 2}

    def forward(self, features: Mapping[str, torch.Tensor]) -> DecoderOutput:
        return DecoderOutput(features["c5"], {"fine": features["c4"]}, {})


class Coarse(nn.Module):
    """A head that answers the coarse logits it was given, and keeps its inputs."""

    def forward(self, fine, coarse):
        self.seen = fine, coarse
        return coarse + 0 * fine.sum()


def pool_model(stride, kind=PointRend, head=None, classes=3, **arguments):
    backbone = Backbone(PoolNet(stride), [3, 3], [2, stride])
    if kind is Segmenter:
        return Segmenter(backbone, PoolDecoder(stride), **arguments)
    arguments = {"point_features": ("fine",), **arguments}
    return PointRend(backbone, PoolDecoder(stride), head or Coarse(), **arguments)


# ---- geometry of inference


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1)])
def test_steps_follow_the_stride_and_the_scale_is_right(stride, size):
    """With every cell recomputed from the original coarse logits, refinement is bilinear upsampling by the stride."""
    model = pool_model(stride, inference_points=10**6).eval()
    assert model.steps == int(math.log2(stride)) and model.left_over == 1
    images = torch.randn(2, 3, *size)
    out = model.predict(images)
    padded = F.pad(images, (0, -size[1] % stride, 0, -size[0] % stride))
    coarse = F.avg_pool2d(padded, stride)
    expected = F.interpolate(coarse, scale_factor=stride, mode="bilinear", align_corners=False)[
        ..., : size[0], : size[1]
    ]
    torch.testing.assert_close(out.coarse, coarse)
    torch.testing.assert_close(out.refined, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.upsample(out.coarse, size), expected, rtol=1e-5, atol=1e-5)


def test_steps_that_end_before_the_image_are_upsampled():
    model = pool_model(8, steps=2, inference_points=10**6).eval()
    assert model.left_over == 2
    images = torch.randn(1, 3, 30, 41)
    refined = F.interpolate(F.avg_pool2d(F.pad(images, (0, 7, 0, 2)), 8), scale_factor=4, mode="bilinear")
    expected = F.interpolate(refined, scale_factor=2, mode="bilinear")[..., :30, :41]
    out = model.predict(images)
    torch.testing.assert_close(out.refined, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.predict(images, "labels").labels, out.refined.argmax(1).to(torch.uint8))


@pytest.mark.bad_input
def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 steps of x2 do not fit coarse logits of stride 4"):
        pool_model(4, steps=3)
    with pytest.raises(ValueError, match="coarse logits of stride 6 cannot be doubled to stride 1"):
        pool_model(6)


def test_coarse_stride_resamples_the_logits():
    model = pool_model(4, coarse_stride=8, inference_points=10**6).eval()
    assert model.steps == 3 and model.size_divisor == 8
    images = torch.randn(1, 3, 32, 40)
    coarse = F.interpolate(F.avg_pool2d(images, 4), size=(4, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.predict(images).coarse, coarse)
    assert model.predict(images).refined.shape == (1, 3, 32, 40)


def test_padding_covers_every_sampled_map():
    backbone = Backbone(PoolNet(32), [3, 3], [2, 32])
    decoder = PoolDecoder(4)
    assert PointRend(backbone, decoder, Coarse(), point_features=("fine",)).size_divisor == 4
    assert PointRend(backbone, decoder, Coarse(), point_features=("fine", "c5")).size_divisor == 32
    decoder.size_divisor = 24
    assert PointRend(backbone, decoder, Coarse(), point_features=("fine",)).size_divisor == 24


def test_points_are_relative_to_the_image():
    model = pool_model(4, inference_points=11).eval()
    images = torch.randn(2, 3, 33, 47)
    out = model.predict(images, return_points=True)
    assert [tuple(p.shape) for p in out.points] == [(2, 11, 2), (2, 11, 2)]
    for points, side in zip(out.points, (2, 1), strict=True):  # cell centres of stride 2, then 1
        pixels = points * torch.tensor([47.0, 33.0]) / side - 0.5
        torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
        assert pixels.min() > -1e-3 and (pixels[..., 0].max() < 48 / side) and (pixels[..., 1].max() < 36 / side)
    torch.testing.assert_close(out.refined, model.predict(images).refined)


@pytest.mark.parametrize("source", ["original", "current"])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_inference_switches_against_plain_torch(source, align, padding):
    """One image, every switch of the loop, written out with interpolate, topk and grid_sample."""
    torch.manual_seed(3)
    head = PointHead(3, 3, 8, 1, init="torch")
    model = pool_model(
        4,
        head=head,
        coarse_source=source,
        upsample_align_corners=align,
        padding_mode=padding,
        inference_points=25,
    ).eval()
    images = torch.randn(1, 3, 24, 32)
    coarse, fine = F.avg_pool2d(images, 4), F.avg_pool2d(images, 2)
    current = coarse
    for _ in range(2):
        upsampled = F.interpolate(current, scale_factor=2, mode="bilinear", align_corners=align)
        top = upsampled.topk(2, dim=1).values
        index = (top[:, 1] - top[:, 0]).flatten(1).topk(25, dim=1).indices[0]
        height, width = upsampled.shape[2:]
        grid = (
            torch.stack(((index % width + 0.5) / width, (index // width + 0.5) / height), -1).view(1, -1, 1, 2) * 2 - 1
        )
        sample = {"align_corners": False, "padding_mode": padding}
        with torch.no_grad():
            values = head(
                F.grid_sample(fine, grid, **sample).squeeze(3),
                F.grid_sample(coarse if source == "original" else upsampled, grid, **sample).squeeze(3),
            )
        current = upsampled.clone()
        current.flatten(2)[:, :, index] = values
    torch.testing.assert_close(model.predict(images).refined, current, rtol=1e-4, atol=1e-5)


def test_sampling_align_corners():
    head = Coarse()
    model = pool_model(4, head=head, sampling_align_corners=True, inference_points=10**6).eval()
    images = torch.randn(1, 3, 16, 24)
    model.predict(images)
    y, x = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(24) + 0.5) / 24, indexing="ij")
    grid = torch.stack((x, y), -1).view(1, -1, 1, 2) * 2 - 1
    expected = F.grid_sample(F.avg_pool2d(images, 2), grid, align_corners=True, padding_mode="border").squeeze(3)
    torch.testing.assert_close(head.seen[0], expected, rtol=1e-5, atol=1e-5)


# ---- whole networks


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("size", [(33, 47), (1, 1), (64, 64)])
def test_labels_are_the_argmax_of_the_logits(preset, size):
    model = tiny(preset=preset).eval()
    images = torch.randn(2, 3, *size)
    logits, labels = model.predict(images), model.predict(images, "labels")
    assert logits.refined.shape == (2, 4, *size) and logits.labels is None and logits.points is None
    assert labels.refined is None and labels.labels.dtype == torch.uint8
    assert torch.equal(labels.labels.long(), logits.refined.argmax(1))
    stepwise = model.predict(images, "labels", return_points=True)
    assert torch.equal(stepwise.labels, labels.labels) and len(stepwise.points) == model.steps
    with torch.no_grad():
        assert torch.equal(model(images).refined, logits.refined)


def test_voc_sized_image():
    model = tiny().eval()
    out = model.predict(torch.randn(1, 3, 375, 500))
    assert out.coarse.shape == (1, 4, 94, 125) and out.refined.shape == (1, 4, 375, 500)


def test_refinement_changes_the_chosen_points_only():
    model = tiny().eval()
    images = torch.randn(1, 3, 64, 64)
    out = model.predict(images, return_points=True)
    first = F.interpolate(out.coarse, scale_factor=2, mode="bilinear", align_corners=False)
    final = F.interpolate(first, scale_factor=2, mode="bilinear", align_corners=False)
    changed = ((out.refined - final).abs() > 1e-5).any(1)[0].float()  # implementations may round differently
    # A first-step point moves at most the 4x4 pixels that interpolate from its cell.
    assert 0 < changed.sum() <= 60 * 16 + 60


def test_more_than_256_classes_give_int16():
    assert tiny(classes=300).eval().predict(torch.randn(1, 3, 16, 16), "labels").labels.dtype == torch.int16


@pytest.mark.parametrize("preset", list(PRESETS))
def test_single_class(preset):
    model = tiny(classes=1, preset=preset)
    images, labels = batch(classes=1)
    losses = model(images, labels)
    assert all(v.item() == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert not model.eval().predict(images, "labels").labels.any()


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("at", ["image", "coarse"])
def test_nothing_but_ignored_labels(preset, at):
    model = tiny(preset=preset, coarse_loss_at=at)
    images, labels = batch()
    losses = model(images, torch.full_like(labels, 255))
    assert {k: v.item() for k, v in losses.items()} == {"loss_coarse": 0.0, "loss_point": 0.0}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("preset", list(PRESETS))
def test_gradient_reaches_every_parameter(preset):
    model = tiny(preset=preset)
    images, labels = batch()
    seen = dict.fromkeys((name for name, _ in model.named_parameters()), False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):  # the last norm of a residual block starts at zero, and blocks the first gradient
        sum(model(images, labels).values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            seen[name] |= bool(parameter.grad.any())
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, reached in seen.items() if not reached]


# ---- losses against an independent formula


def cross_entropy(logits, labels, weights, mean, ignore=255):
    """By definition, in float64: log-softmax picked at the label."""
    logits = logits.double().movedim(1, -1)
    valid = labels != ignore
    picked = logits[valid].gather(1, labels[valid][:, None])[:, 0] - logits[valid].logsumexp(1)
    w = (
        torch.ones(logits.shape[-1], dtype=torch.float64)
        if weights is None
        else torch.tensor(weights, dtype=torch.float64)
    )
    w = w[labels[valid]]
    return -(w * picked).sum() / (labels.numel() if mean == "all" else w.sum())


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 3.0)])
@pytest.mark.parametrize("size", [(32, 48), (30, 45)])
def test_losses_equal_the_formula(preset, weights, size, monkeypatch):
    torch.manual_seed(7)
    options = dataclasses.replace(
        PRESETS[preset], point_features=("fine",), train_points=40, steps=None, coarse_stride=None
    )
    head = PointHead(3, 3, 8, options.num_layers, options.coarse_each_layer, options.coarse_first, init="torch")
    loss = LossOptions(coarse_weight=0.5, point_weight=2.0, class_weights=weights)
    model = pool_model(4, head=head, options=options, loss=loss)
    images, labels = batch(*size, classes=3)
    coords = torch.rand(2, 40, 2)
    asked = {}

    def chosen(logits, number, *ratios, **rest):
        asked.update(logits=logits, number=number, ratios=ratios, **rest)
        return coords

    monkeypatch.setattr(ops, "sample_uncertain_points", chosen)
    got = model(images, labels)

    pad = (0, -size[1] % 4, 0, -size[0] % 4)
    images, padded = F.pad(images, pad), F.pad(labels, pad, value=255)
    coarse, fine = F.avg_pool2d(images, 4), F.avg_pool2d(images, 2)
    upsampled = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=options.upsample_align_corners)
    expected = 0.5 * cross_entropy(upsampled, padded, weights, options.coarse_loss_mean)
    assert got["loss_coarse"].item() == pytest.approx(expected.item(), rel=1e-4)

    grid = coords.unsqueeze(2) * 2 - 1
    sample = {"align_corners": False, "padding_mode": options.padding_mode}
    logits = head(F.grid_sample(fine, grid, **sample).squeeze(3), F.grid_sample(coarse, grid, **sample).squeeze(3))
    height, width = padded.shape[1:]
    nearest = (coords[..., 1] * height).long() * width + (coords[..., 0] * width).long()
    expected = 2 * cross_entropy(logits, padded.flatten(1).gather(1, nearest), weights, options.point_loss_mean)
    assert got["loss_point"].item() == pytest.approx(expected.item(), rel=1e-4)

    assert not asked["logits"].requires_grad and asked["number"] == 40 and asked["ratios"] == (3.0, 0.75)
    assert asked["padding_mode"] == options.padding_mode and asked["align_corners"] is False


def test_coarse_loss_at_the_coarse_cells():
    model = pool_model(4, coarse_loss_at="coarse", train_points=5)
    images, labels = batch(32, 48, classes=3)
    expected = cross_entropy(F.avg_pool2d(images, 4), labels[:, 2::4, 2::4], None, "valid")
    assert model(images, labels)["loss_coarse"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_changes_no_loss():
    """An odd image gives the losses of the same image padded by the caller with ignored labels."""
    model = tiny()
    images, labels = batch(37, 50)
    torch.manual_seed(1)
    first = model(images, labels)
    torch.manual_seed(1)
    second = model(F.pad(images, (0, 2, 0, 3)), F.pad(labels, (0, 2, 0, 3), value=255))
    assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_label_dtypes(dtype):
    model = tiny()
    images, labels = batch()
    torch.manual_seed(1)
    first = model(images, labels)
    torch.manual_seed(1)
    second = model(images, labels.to(dtype))
    assert all(first[k].item() == second[k].item() for k in first)


def test_point_rule_sees_the_padded_image():
    model = pool_model(4, train_points="area/256", inference_points="width/16")
    head = model.head
    model(*batch(61, 64, classes=3))
    assert head.seen[0].shape == (2, 3, 16)
    model.eval().predict(torch.randn(1, 3, 61, 62))
    assert head.seen[0].shape == (1, 3, 4)


def test_several_point_features():
    model = tiny(point_features=["p2", "p3", "c2"])
    assert model.head.in_channels == 16 + 16 + 64 and model.size_divisor == 8
    images, labels = batch(33, 47)
    sum(model(images, labels).values()).backward()
    assert model.eval().predict(images).refined.shape == (2, 4, 33, 47)


# ---- the rest of the contract


def shallow(preset="rendseg", **switches):
    """A network of 0.4 million parameters, and two images whose labels can be read from them and from the place."""
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "test_resnet"},
        "decoder": dict(TINY),
        "pointrend": {"preset": preset, "hidden_channels": 16, "train_points": 64, **switches},
    }
    images = F.interpolate(batch(4, 6)[0], size=(32, 48), mode="bicubic")
    return build_model(config, 4), images, (images.mean(1) > 0).long() + 2 * (torch.arange(48) > 20).long()


def test_overfitting_a_tiny_batch():
    """Points are drawn evenly: those of uncertain cells lie elsewhere after every step, and so their loss jumps."""
    model, images, labels = shallow(importance_ratio=0, oversample_ratio=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for _ in range(40):
        losses = model(images, labels)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({k: v.item() for k, v in losses.items()})
    for name in ("loss_coarse", "loss_point"):
        first, last = (sum(row[name] for row in rows) / 5 for rows in (history[:5], history[-5:]))
        assert last < 0.6 * first, name


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_losses_change_as_their_gradient_says(preset):
    """A step along the gradient of backbone, decoder or head: wrong where a path to the losses is cut or counted twice.

    In float64, where the step can be so short that it moves no point and passes no kink.
    """
    model, images, labels = shallow(preset)
    model, images = model.double(), images.double()
    with torch.no_grad():
        for parameter in model.parameters():  # no layer that starts at zero and blocks the gradient
            parameter.add_(0.1 * torch.randn_like(parameter))

    def loss():
        torch.manual_seed(1)
        return sum(model(images, labels).values())

    loss().backward()
    for name in ("backbone", "decoder", "head"):
        parameters = list(model.get_submodule(name).parameters())
        slope = sum(p.grad.square().sum() for p in parameters).sqrt()
        ends = []
        with torch.no_grad():
            for step in (1e-7, -2e-7):  # there, and as far to the other side
                for parameter in parameters:
                    parameter.add_(parameter.grad / slope, alpha=step)
                ends.append(loss())
            for parameter in parameters:
                parameter.add_(parameter.grad / slope, alpha=1e-7)
        assert ((ends[0] - ends[1]) / 2e-7).item() == pytest.approx(slope.item(), rel=1e-4), name


def test_deterministic():
    results = []
    for _ in range(2):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(4)
        for _ in range(2):
            sum(model(*batch()).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(([p.detach().clone() for p in model.parameters()], model.eval().predict(batch()[0]).refined))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])


def test_state_dict_round_trip():
    model = tiny(loss={"class_weights": [1, 2, 3, 4]})
    model(*batch())  # move the running statistics
    other = tiny(loss={"class_weights": [4, 3, 2, 1]})
    nn.init.zeros_(other.head.predictor.weight)
    assert not any("class_weights" in key for key in model.state_dict())  # a setting, not a weight
    other.load_state_dict(model.state_dict(), strict=True)
    images, _ = batch()
    assert torch.equal(model.eval().predict(images).refined, other.eval().predict(images).refined)


def test_names_of_the_top_level():
    assert {key.split(".")[0] for key in tiny().state_dict()} == {"backbone", "decoder", "head"}


def test_bfloat16_autocast():
    model = tiny()
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, labels)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        out, labels = model.predict(images), model.predict(images, "labels")
    assert out.coarse.dtype == torch.float32 and out.refined.isfinite().all()
    assert torch.equal(labels.labels.long(), out.refined.argmax(1))
    exact = model.predict(images).coarse
    assert (out.coarse - exact).abs().max() < 0.1 * exact.abs().max()  # forty layers of 8 significant bits


def test_float64():
    model = tiny().double().eval()
    out = model.predict(batch()[0].double())
    assert out.refined.dtype == torch.float64


def test_channels_last_changes_nothing_but_the_layout():
    images, _ = batch()
    first, second = tiny(channels_last=True).eval(), tiny(channels_last=False).eval()
    assert first.backbone.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(first.predict(images).coarse, second.predict(images).coarse, rtol=1e-3, atol=1e-5)


def test_empty_batch():
    out = tiny().eval().predict(torch.zeros(0, 3, 20, 30), "labels")
    assert out.labels.shape == (0, 20, 30)


def test_plain_segmenter_has_the_same_interface():
    model = tiny(name="segmenter")
    assert type(model) is Segmenter and not model.refines and tiny().refines
    images, labels = batch(33, 47)
    losses = model(images, labels)
    assert list(losses) == ["loss_coarse"]
    losses["loss_coarse"].backward()
    assert all(p.grad is not None for p in model.parameters())
    out = model.eval()(images)
    assert isinstance(out, SegmentationOutput)
    upsampled = F.interpolate(out.coarse, scale_factor=4, mode="bilinear", align_corners=False)[..., :33, :47]
    assert torch.equal(out.refined, upsampled)
    assert torch.equal(model.predict(images, "labels").labels.long(), upsampled.argmax(1))
    assert model.predict(images, return_points=True).points == []


def test_distributed_data_parallel(tmp_path):
    """Two steps: the second raises when a parameter took no part in the first."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = tiny()
        wrapped = nn.parallel.DistributedDataParallel(tiny())
        for _ in range(2):
            torch.manual_seed(2)
            sum(wrapped(*batch()).values()).backward()
        torch.manual_seed(2)
        sum(plain(*batch()).values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in wrapped.parameters())


def test_registered_decoder_is_wrapped_by_configuration():
    """A decoder of another kind: stride 8, its own loss, no pyramid; fine features come from the backbone."""

    class Options(DecoderOptions):
        width: int = 8

    class Simple(Decoder):
        def __init__(self, channels, width, classes):
            super().__init__(classes)
            self.stride = 8
            self.body = nn.Conv2d(channels, width, 1)
            self.predictor = nn.Conv2d(width, classes, 1)

        def forward(self, features):
            x = self.body(features["c3"])
            return DecoderOutput(self.predictor(x), {}, {"scene": x.mean((2, 3))})

        def extra_losses(self, output, labels, ignore_index):
            return {"loss_scene": output.extra["scene"].square().mean() * (labels != ignore_index).any()}

    name = "simple_for_test"
    if name not in decoder_names():
        register_decoder(name, Options)(lambda o, backbone, classes: Simple(backbone.channels[2], o.width, classes))
    config = {"decoder": {"name": name, "width": 5}, "pointrend": {"point_features": ["c2"]}}
    model = build_model(config, 4)
    assert model.steps == 3 and model.decoder.body.out_channels == 5 and model.head.in_channels == 64
    images, labels = batch(33, 47)
    assert list(model(images, labels)) == ["loss_coarse", "loss_scene", "loss_point"]
    assert model.eval().predict(images).refined.shape == (2, 4, 33, 47)
    with pytest.raises(ValueError, match="registered already"):
        register_decoder(name, Options)
    with pytest.raises(ValueError, match=r"unknown key model.decoder.widht; did you mean 'width'\?"):
        build_model({"decoder": {"name": name, "widht": 5}}, 4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "labels", "error", "match"),
    [
        (torch.zeros(2, 4, 8, 8), None, ValueError, r"images must have shape \[B, 3, H, W\], got \[2, 4, 8, 8\]"),
        (torch.zeros(3, 8, 8), None, ValueError, r"images must have shape \[B, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), None, ValueError, "images must have at least one pixel"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, TypeError, "images must be floating point, got torch.uint8"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(2, 8, 9, dtype=torch.long),
            ValueError,
            r"labels must have shape \[B, H, W\] = \[2, 8, 8\] as in images, got \[2, 8, 9\]",
        ),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(2, 8, 8),
            TypeError,
            "labels must be an integer tensor, got torch.float32",
        ),
    ],
)
@pytest.mark.parametrize("kind", [Segmenter, PointRend])
def test_bad_input(kind, images, labels, error, match):
    model = pool_model(4, kind).eval()
    with pytest.raises(error, match=match):
        model(images, labels)


@pytest.mark.bad_input
def test_bad_use():
    model = pool_model(4)
    with pytest.raises(ValueError, match="labels are needed in training mode"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="predict needs evaluation mode"):
        model.predict(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="output must be one of logits, labels, got 'mask'"):
        model.eval().predict(torch.zeros(1, 3, 8, 8), "mask")
    with pytest.raises(
        ValueError, match=r"point_features must name maps .*\(c4, c5, fine\), got \['p2'\]: set .* to \[c4\]"
    ):
        pool_model(4, point_features=("p2",))
    with pytest.raises(ValueError, match=r"one weight per class \(3\), got 2"):
        pool_model(4, loss=LossOptions(class_weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match="finite and not negative"):
        pool_model(4, loss=LossOptions(class_weights=(1.0, 2.0, -1.0)))
    with pytest.raises(ValueError, match="unknown key pointrend.stepz; did you mean 'steps'"):
        pool_model(4, stepz=2)


def test_switches_override_given_options():
    model = pool_model(4, options=PointRendOptions(train_points=9, point_features=("fine",)), coarse_source="current")
    assert model.options.train_points == 9 and model.options.coarse_source == "current"


# ---- points drawn by image


def test_draws_of_keys_are_uniform_and_differ():
    from rendseg.models.pointrend import draws_of_keys

    keys = torch.tensor([0, 1, 2, 12345678901234567, -3])
    draws = draws_of_keys(keys, 20_000)
    assert draws.dtype == torch.float32 and draws.shape == (5, 20_000, 2)
    assert draws.min() >= 0 and draws.max() < 1
    for image in draws:  # 100 cells of 200 points: chi-squared with 99 degrees of freedom, mean 99, deviation 14
        cells = (image[:, 0] * 10).long() * 10 + (image[:, 1] * 10).long()
        counts = torch.bincount(cells, minlength=100).double()
        assert 50 < ((counts - 200).square() / 200).sum() < 160
    flat = (draws.reshape(5, -1).double() - 0.5) * 12**0.5
    correlation = flat @ flat.T / flat.shape[1]
    torch.testing.assert_close(correlation, torch.eye(5).double(), rtol=0, atol=0.03)
    lagged = (flat[:, 1:] * flat[:, :-1]).mean(1)
    assert lagged.abs().max() < 0.03
    assert torch.equal(draws_of_keys(keys[2:4], 100), draws[2:4, :100])


def test_splitmix_of_a_known_state():
    """The first outputs of splitmix64 from state 1234567, as published with the generator."""
    from rendseg.models.pointrend import _mix

    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + (i + 1) * golden) % 2**64 for i in range(3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    found = [int(v) % 2**64 for v in _mix(signed)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_points_by_key_do_not_depend_on_the_batch():
    """The losses of a batch are the mean of those of its parts, whatever was drawn before."""
    model = tiny(loss={"normalize": "global"}, train_points=40).eval()
    images, labels = batch()
    keys = torch.tensor([5, 9])
    whole = model(images, labels, keys)["loss_point"]
    torch.rand(7)
    parts = [model(images[i : i + 1], labels[i : i + 1], keys[i : i + 1])["loss_point"] for i in (0, 1)]
    seen = []
    original = ops.point_labels

    def counting(*arguments):
        found = original(*arguments)
        seen.append((found != 255).sum())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "point_labels", counting)
        for i in (0, 1):
            model(images[i : i + 1], labels[i : i + 1], keys[i : i + 1])
    torch.testing.assert_close(whole, (seen[0] * parts[0] + seen[1] * parts[1]) / (seen[0] + seen[1]))
    assert model(images, labels, keys + 1)["loss_point"] != whole
    with pytest.raises(ValueError, match=r"keys must have shape \[B\] = \[2\], got \[1\]"):
        model(images, labels, keys[:1])
