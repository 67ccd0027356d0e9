"""Auxiliary heads: what their losses are, and that nothing but training runs them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.models import build_model, decoder_names
from tests.engine.tiny import narrow


def model(auxiliary, name="pointrend", decoder="semantic_fpn", classes=4, **sections):
    torch.manual_seed(0)
    config = {
        "name": name,
        "backbone": {"name": "test_resnet"},
        "decoder": narrow(decoder),
        "pointrend": {"hidden_channels": 8, "train_points": 16, **sections.pop("pointrend", {})},
        "auxiliary": auxiliary,
        **sections,
    }
    return build_model(config, classes)


def batch(height=40, width=56, classes=4):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, classes, (2, height, width), generator=generator)
    labels[:, : height // 4] = 255
    return torch.randn(2, 3, height, width, generator=generator), labels


def padded(images, labels, net):
    pad = (0, -images.shape[3] % net.size_divisor, 0, -images.shape[2] % net.size_divisor)
    return F.pad(images, pad), F.pad(labels, pad, value=255)


@pytest.mark.parametrize("name", ["pointrend", "segmenter"])
@pytest.mark.parametrize("at", ["image", "coarse"])
def test_the_loss_is_that_of_the_head(name, at):
    heads = [
        {"level": "c4", "channels": 8, "dropout": 0.0, "weight": 0.3},
        {"level": "p3", "channels": 4, "num_convs": 2},
    ]
    net = model(heads, name, pointrend={"coarse_loss_at": at}).eval()  # eval: no dropout, no statistics
    images, labels = batch()
    with torch.no_grad():
        got = net.losses(images, labels)
        images, labels = padded(images, labels, net)
        features = dict(zip(net.backbone.names, net.backbone(images), strict=True))
        features |= net.decoder(features).features
        for i, (level, stride, weight) in enumerate((("c4", 16, 0.3), ("p3", 8, 0.4))):
            logits = net.auxiliary[i](features[level])
            if at == "image":
                size = (logits.shape[2] * stride, logits.shape[3] * stride)
                logits = F.interpolate(logits, size=size, mode="bilinear")[..., : labels.shape[1], : labels.shape[2]]
                targets = labels
            else:
                rows = torch.arange(stride // 2, logits.shape[2] * stride, stride)
                columns = torch.arange(stride // 2, logits.shape[3] * stride, stride)
                whole = F.pad(labels, (0, 64, 0, 64), value=255)
                targets = whole[:, rows][:, :, columns]
            wanted = weight * F.cross_entropy(logits, targets, ignore_index=255)
            torch.testing.assert_close(got[f"loss_aux_{level}"], wanted)
    assert set(got) == {"loss_coarse", "loss_aux_c4", "loss_aux_p3"} | (
        {"loss_point"} if name == "pointrend" else set()
    )


def test_class_weights_terms_and_normalisation_reach_the_head():
    heads = [{"channels": 8, "terms": ["cross_entropy", {"name": "dice", "weight": 0.5}]}]
    net = model(heads, loss={"class_weights": [1, 2, 3, 4]}, pointrend={"coarse_loss_mean": "all"}).eval()
    images, labels = batch()
    with torch.no_grad():
        got = net.losses(images, labels)
        images, labels = padded(images, labels, net)
        logits = net.auxiliary[0](net.backbone(images)[3])
        logits = F.interpolate(logits, scale_factor=16, mode="bilinear")[..., : labels.shape[1], : labels.shape[2]]
        wanted = F.cross_entropy(logits, labels, net.class_weights, ignore_index=255, reduction="mean")
    torch.testing.assert_close(
        got["loss_aux_c4"] if "loss_aux_c4" in got else got["loss_aux_c4_cross_entropy"], 0.4 * wanted
    )
    assert got["loss_aux_c4_dice"] > 0


@pytest.mark.parametrize("decoder", decoder_names())
def test_every_decoder_takes_one_and_every_parameter_learns(decoder):
    net = model([{"channels": 8, "concat_input": True}], decoder=decoder).train()
    sum(net(*batch(64, 64)).values()).backward()
    silent = [name for name, p in net.auxiliary.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent and all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_all_ignored_is_zero_with_a_gradient():
    net = model([{"channels": 8}]).train()
    images, labels = batch()
    losses = net(images, torch.full_like(labels, 255))
    assert losses["loss_aux_c4"].item() == 0
    losses["loss_aux_c4"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.auxiliary.parameters())


@pytest.mark.parametrize("name", ["pointrend", "segmenter"])
def test_prediction_does_not_run_it(name):
    net = model([{"channels": 8}], name).eval()
    net.auxiliary.register_forward_pre_hook(lambda *_: pytest.fail("the auxiliary heads ran"))
    net.auxiliary[0].register_forward_pre_hook(lambda *_: pytest.fail("an auxiliary head ran"))
    images, _ = batch()
    got = net.predict(images, "labels").labels
    plain = model([], name).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("auxiliary")})
    assert torch.equal(got, plain.predict(images, "labels").labels)


@pytest.mark.bad_input
def test_a_level_that_is_no_map():
    with pytest.raises(ValueError, match=r"level of an auxiliary head must be a map .*c4, c5, p2.*, got 'res4'"):
        model([{"level": "res4"}])
