"""``pad``: what happens to images whose size is no multiple of the strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rendseg.models import Segmenter, build_model
from rendseg.models.auxiliary import Placing, labels_at_cells

SIZE = (45, 83)
TINY = {"semantic_fpn": {"channels": 8, "head_channels": 8}, "upernet": {"channels": 8, "ppm_channels": 4}}


def model(decoder: str = "semantic_fpn", **rest: object) -> Segmenter:
    torch.manual_seed(0)
    config = {"backbone": {"name": "test_resnet"}, "decoder": {"name": decoder, **TINY.get(decoder, {"channels": 8})}}
    return build_model({"name": "segmenter", "channels_last": False, **config, **rest}, 4).eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (2, *SIZE), generator=generator)
    labels[:, :7] = 255
    return torch.randn(2, 3, *SIZE, generator=generator), labels


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_none_resizes_every_map_and_the_logits() -> None:
    net = model(pad="none")
    images, labels = batch()
    out = net.predict(images)
    maps = net.backbone(images)[1:]
    fpn, heads, above, outputs = net.decoder.fpn, net.decoder, None, []
    for name, x in zip("5432", reversed(maps), strict=True):
        merged = getattr(fpn, f"fpn_lateral{name}")(x)
        if above is not None:
            merged = merged + F.interpolate(above, size=merged.shape[2:], mode="nearest")
        outputs.insert(0, getattr(fpn, f"fpn_output{name}")(merged))
        above = merged
    total = torch.zeros(())
    for level, (name, x) in enumerate(zip("2345", outputs, strict=True)):
        for module in list(getattr(heads, f"p{name}"))[::2] if level else getattr(heads, f"p{name}"):
            x = module(x)
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if level else x
        total = total + resized(x, (12, 21))
    coarse = heads.predictor(total)
    torch.testing.assert_close(out.coarse, coarse)
    torch.testing.assert_close(out.refined, resized(coarse, SIZE))
    torch.testing.assert_close(net.upsample(out.coarse, SIZE), out.refined)
    assert torch.equal(net.predict(images, "labels").labels, out.refined.argmax(1).byte())
    expected = F.cross_entropy(out.refined, labels, ignore_index=255)
    torch.testing.assert_close(net(images, labels)["loss_coarse"], expected)


@pytest.mark.parametrize("decoder", ["semantic_fpn", "upernet", "deeplabv3plus", "encnet", "fcn"])
def test_where_the_strides_divide_the_size_nothing_changes(decoder: str) -> None:
    """And ``none`` runs, forward and with losses, where they do not."""
    images, labels = torch.randn(2, 3, 32, 64), torch.randint(0, 4, (2, 32, 64))
    rest = {"auxiliary": [{"level": "c4", "channels": 4}]}
    nets = [model(decoder, pad=pad, **rest) for pad in ("stride", "none", 64)]
    first, *others = [net(images, labels) for net in nets[:2]]
    assert {k: v.item() for k, v in first.items()} == pytest.approx({k: v.item() for k, v in others[0].items()})
    assert torch.equal(nets[0].predict(images).refined, nets[1].predict(images).refined)
    images, labels = batch()
    losses = nets[1](images, labels)
    assert nets[1].predict(images).refined.shape == (2, 4, *SIZE)
    logits = nets[1].auxiliary[0](nets[1].backbone(images)[3])
    expected = 0.4 * F.cross_entropy(resized(logits, SIZE), labels, ignore_index=255)
    torch.testing.assert_close(losses["loss_aux_c4"], expected)
    padded = F.pad(images, (0, 128 - SIZE[1], 0, 64 - SIZE[0]))
    whole = nets[2].predict(padded).refined[..., : SIZE[0], : SIZE[1]]
    torch.testing.assert_close(nets[2].predict(images).refined, whole)


@pytest.mark.parametrize("steps", [None, 1])
def test_pointrend_refines_and_then_resizes(steps: int | None) -> None:
    """Every cell is predicted again, so that the result is that of the head on the whole grid."""
    net = model(name="pointrend", pad="none", pointrend={"inference_points": 10**6, "steps": steps, "num_layers": 0})
    images, labels = batch()
    out = net.predict(images)
    height, width = out.coarse.shape[2:]
    factor = 2 ** (steps or 2)
    rows, columns = ((torch.arange(n * factor) + 0.5) / (n * factor) for n in (height, width))
    grid = torch.stack(torch.broadcast_tensors(columns, rows[:, None]), -1).expand(2, -1, -1, -1) * 2 - 1
    fine = net.decoder(dict(zip(net.backbone.names, net.backbone(images), strict=True))).features["p2"]
    sampled = [
        F.grid_sample(m, grid, padding_mode="border", align_corners=False).flatten(2) for m in (fine, out.coarse)
    ]
    refined = net.head(*sampled).unflatten(2, (height * factor, width * factor))
    torch.testing.assert_close(out.refined, resized(refined, SIZE))
    assert torch.equal(net.predict(images, "labels").labels, out.refined.argmax(1).byte())
    assert {v.isfinite().item() for v in net(images, labels).values()} == {True}


def test_labels_at_the_centres_of_cells() -> None:
    labels = torch.arange(45).view(1, 45, 1).expand(1, 45, 83)
    centres = [int((i + 0.5) * 45 / 12) for i in range(12)]
    assert labels_at_cells(labels, (12, 21))[0, :, 0].tolist() == centres
    logits, at = Placing("coarse", resize=False).together(torch.zeros(1, 2, 12, 21), labels, 4)
    assert at[0, :, 0].tolist() == [*range(2, 45, 4), 255] and logits.shape[2:] == (12, 21)


def test_norm_momentum_reaches_every_batch_norm() -> None:
    net = model("upernet", norm_momentum=0.25)
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.25}


@pytest.mark.bad_input
def test_what_does_not_go_with_pad_none() -> None:
    config = {"name": "segmenter", "backbone": {"name": "hiera_tiny_224"}, "decoder": {"name": "fcn"}, "pad": "none"}
    with pytest.raises(ValueError, match="pad: none does not go with backbone 'hiera_tiny_224'.*set model.pad to str"):
        build_model(config, 3)
    with pytest.raises((ValueError, TypeError), match="pad must be one of stride, none"):
        model(pad="never")
