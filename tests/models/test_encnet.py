from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.models import ENCNet, build_model, presence_targets, se_loss

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


def conv(x, m):
    x = F.conv2d(x, m.weight, m.bias, padding=m.weight.shape[-1] // 2)
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias).relu()


@pytest.mark.parametrize("laterals", [(), ("c3", "c4")])
@pytest.mark.parametrize("encoding", [False, True])
@pytest.mark.parametrize("align", [False, True])
def test_equals_its_layers(laterals, encoding, align):
    torch.manual_seed(0)
    decoder = randomise(
        ENCNet(CHANNELS, STRIDES, 5, channels=8, num_codes=3, laterals=laterals, encoding=encoding, align_corners=align)
    )
    features = maps(50, 70)
    out = decoder(features)
    x = conv(features["c5"], decoder.bottleneck)
    if laterals:
        sides = [
            F.interpolate(conv(features[n], m), size=(4, 5), mode="bilinear", align_corners=align)
            for n, m in zip(laterals, decoder.laterals, strict=True)
        ]
        x = conv(torch.cat([x, *sides], 1), decoder.fusion)
    if encoding:
        module = decoder.enc_module
        y = conv(x, module.project).flatten(2).transpose(1, 2)
        residuals = y[:, :, None] - module.encoding.codewords
        codes = ((module.encoding.scale * residuals.square().sum(3)).softmax(2)[..., None] * residuals).sum(1)
        codes = F.batch_norm(codes, module.norm.running_mean, module.norm.running_var).relu()
        encoded = codes.mean(1)
        gate = torch.sigmoid(F.linear(encoded, module.gate.weight, module.gate.bias))
        x = (x + x * gate[:, :, None, None]).relu()
        torch.testing.assert_close(out.extra["encoding"], encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.features["decoder"], x, rtol=1e-4, atol=1e-4)
    expected = F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias)
    torch.testing.assert_close(out.coarse, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("align", [False, True])
def test_extra_losses(align):
    torch.manual_seed(0)
    decoder = randomise(
        ENCNet(
            CHANNELS,
            STRIDES,
            5,
            channels=8,
            num_codes=3,
            aux_level="c3",
            aux_channels=4,
            se_weight=0.3,
            aux_weight=0.7,
            align_corners=align,
        )
    )
    features = maps(48, 64)
    labels = torch.randint(0, 5, (2, 48, 64))
    labels[:, :9] = 255
    output = decoder(features)
    losses = decoder.extra_losses(output, labels, 255)
    assert set(losses) == {"loss_se", "loss_aux_encnet"}
    head = decoder.aux_head
    logits = F.conv2d(conv(features["c3"], head.convs[0]), head.classifier.weight, head.classifier.bias)
    logits = F.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=align)
    torch.testing.assert_close(losses["loss_aux_encnet"], 0.7 * F.cross_entropy(logits, labels, ignore_index=255))
    present = torch.stack([torch.histc(y[y != 255].float(), 5, 0, 4) > 0 for y in labels]).float()
    scores = F.linear(output.extra["encoding"], decoder.se_layer.weight, decoder.se_layer.bias).sigmoid()
    torch.testing.assert_close(losses["loss_se"], 0.3 * F.binary_cross_entropy(scores, present))
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    for shared, divisor in (
        ({"mean": "all"}, labels.numel()),
        ({"class_weights": weights}, weights[labels[labels != 255]].sum()),
    ):
        got = decoder.extra_losses(output, labels, 255, **shared)["loss_aux_encnet"]
        total = F.cross_entropy(logits, labels, shared.get("class_weights"), ignore_index=255, reduction="sum")
        torch.testing.assert_close(got, 0.7 * total / divisor)
    zero = decoder.extra_losses(output, torch.full_like(labels, 255), 255)
    assert all(v.item() == 0 and v.requires_grad for v in zero.values())


@pytest.mark.parametrize(
    ("preset", "laterals", "bias", "aux", "weight", "dropout", "align"),
    [
        ("mmseg", 0, False, 256, 0.4, nn.Dropout2d(0.1), False),
        ("pytorch_encoding", 0, False, 256, 0.2, nn.Dropout(0.1), True),
        ("paddleseg", 2, True, 512, 0.4, nn.Dropout2d(0.0), False),
    ],
)
def test_presets(preset, laterals, bias, aux, weight, dropout, align):
    config = {"name": "segmenter", "backbone": {"name": "test_resnet"}}
    decoder = build_model({**config, "decoder": {"name": "encnet", "preset": preset}}, 3).decoder
    assert len(decoder.laterals) == laterals and (decoder.fusion is None) == (laterals == 0)
    assert (decoder.enc_module.project.bias is not None) is bias and decoder.bottleneck.bias is None
    assert decoder.aux_head.out_channels == aux and decoder.aux_weight == weight and decoder.se_weight == 0.2
    assert type(decoder.dropout) is type(dropout) and decoder.dropout.p == dropout.p
    assert decoder.align_corners is align
    assert decoder.enc_module.encoding.codewords.shape == (32, 512) and decoder.enc_module.reduction == "mean"
    given = {"laterals": [], "dropout": 0.3, "aux_weight": 0, "project_bias": False, "channels": 8}
    decoder = build_model({**config, "decoder": {"name": "encnet", "preset": preset, **given}}, 3).decoder
    assert not len(decoder.laterals) and decoder.dropout.p == 0.3 and decoder.aux_head is None
    assert decoder.enc_module.project.bias is None


def test_parts_that_are_switched_off_have_no_parameters():
    bare = ENCNet(CHANNELS, STRIDES, 3, channels=8, encoding=False, aux_weight=0)
    assert {n.split(".")[0] for n, _ in bare.named_parameters()} == {"bottleneck", "classifier"}
    assert bare.extra_losses(bare(maps(32, 32)), torch.zeros(2, 32, 32, dtype=torch.long), 255) == {}
    assert ENCNet(CHANNELS, STRIDES, 3, channels=8, se_weight=0).se_layer is None


# ---- the semantic encoding loss


@pytest.mark.parametrize(
    ("ignore", "dtype"), [(255, torch.int64), (255, torch.uint8), (-1, torch.int64), (0, torch.int32), (0, torch.uint8)]
)
def test_targets_equal_histc(ignore, dtype):
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (4, 3, 5)) * 2
    labels[0, 0] = ignore
    labels[1] = ignore
    expected = torch.stack([torch.histc(y[y != ignore].double(), 12, 0, 11) > 0 for y in labels])
    got = presence_targets(labels.to(dtype), 12, ignore)
    assert got.dtype == torch.float32 and torch.equal(got, expected.float()) and not got[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_se_loss_is_the_mean_over_images_with_labels(dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 6)).to(dtype).requires_grad_()
    labels = torch.randint(0, 4, (3, 5, 5))
    labels[1] = 255
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = se_loss(logits, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    present = torch.stack([(labels[[0, 2]] == c).any(2).any(1) for c in range(6)], 1).double()
    z = logits.detach().double()[[0, 2]]
    expected = -(present * torch.sigmoid(z).log() + (1 - present) * torch.sigmoid(-z).log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert not logits.grad[1].any() and logits.grad[0].all()


def test_se_loss_without_any_label_is_zero_with_a_graph():
    logits = torch.full((2, 3), float("inf"), requires_grad=True)
    loss = se_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 3))
    assert se_loss(torch.zeros(0, 3), torch.zeros(0, 4, 4, dtype=torch.long)).item() == 0


@pytest.mark.bad_input
def test_bad_input():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must have shape \[N, H, W\], got \[4, 4\]"):
        presence_targets(labels[0], 3)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        presence_targets(labels, 0)
    with pytest.raises(TypeError, match="labels must be an integer tensor, got torch.float32"):
        presence_targets(labels.float(), 3)
    with pytest.raises(ValueError, match=r"logits must have shape \[N, C\] with N = 2 as in labels, got \[3, 5\]"):
        se_loss(torch.zeros(3, 5), labels)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "c6"}, r"level must name maps of the backbone \(c1, .*\), got 'c6'"),
        ({"laterals": ["c3", "p4"]}, r"laterals must name maps of the backbone .*, got \['c3', 'p4'\]"),
        ({"aux_level": "x"}, "aux_level must name maps of the backbone .*, got 'x'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"se_weight": -1.0}, "se_weight must be finite and not negative, got -1.0"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ENCNet(CHANNELS, STRIDES, 3, **options)


@pytest.mark.bad_input
def test_unknown_preset():
    with pytest.raises(ValueError, match="model.decoder.preset must be one of .*, got 'mmsegmentation'; did you mean"):
        build_model({"decoder": {"name": "encnet", "preset": "mmsegmentation"}}, 3)
