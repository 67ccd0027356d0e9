from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.models import FCN, Backbone, Segmenter, build_model, create_backbone, parse_options

SMALL = [64, 64, 128, 256, 512]
LARGE = [64, 256, 512, 1024, 2048]


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", SMALL), ("resnet34", SMALL), ("resnet50", LARGE), ("resnet101", LARGE), ("resnet101d", LARGE)],
)
def test_resnets(name, channels):
    backbone = create_backbone(name=name).eval()
    assert backbone.names == ["c1", "c2", "c3", "c4", "c5"]
    assert backbone.channels == channels and backbone.strides == [2, 4, 8, 16, 32] and backbone.size_divisor == 1
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 37, 50))
    sizes = [(19, 25), (10, 13), (5, 7), (3, 4), (2, 2)]
    assert [tuple(m.shape) for m in maps] == [(1, c, *s) for c, s in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize(("stride", "strides"), [(8, [2, 4, 8, 8, 8]), (16, [2, 4, 8, 16, 16])])
def test_output_stride(stride, strides):
    backbone = create_backbone(name="resnet18", output_stride=stride, in_chans=5).eval()
    assert backbone.strides == strides
    with torch.no_grad():
        maps = backbone(torch.randn(1, 5, 64, 64))
    assert [64 // m.shape[2] for m in maps] == strides


def test_network_that_rounds_sizes_down_asks_for_padding():
    backbone = create_backbone(name="convnext_atto", channels_last=True)
    assert backbone.names == ["c2", "c3", "c4", "c5"] and backbone.size_divisor == 32
    assert backbone.net.stem_0.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_maps_are_brought_to_nchw():
    backbone = create_backbone(name="swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_checkpoint_is_loaded_from_a_classifier(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("resnet18", num_classes=7)
    images = torch.randn(1, 3, 32, 32)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, path)
    backbone = create_backbone(name="resnet18", checkpoint=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(backbone(images)[-1], source.eval().forward_features(images))
    grey = create_backbone(name="resnet18", checkpoint=str(path), in_chans=1)
    torch.testing.assert_close(grey.net.conv1.weight, source.conv1.weight.sum(1, keepdim=True))


def test_checkpoint_of_a_network_that_is_flattened(tmp_path):
    source = timm.create_model("convnext_atto")
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    backbone = create_backbone(name="convnext_atto", checkpoint=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.net.stages_3.blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)


def test_safetensors_checkpoint(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = timm.create_model("resnet18", num_classes=2)
    safetensors.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = create_backbone(name="resnet18", checkpoint=str(tmp_path / "weights.safetensors"))
    assert torch.equal(backbone.net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_frozen_norm_does_not_move():
    backbone = create_backbone(name="resnet18", freeze_norm=True).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    before = backbone.net.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 32, 32))
    assert torch.equal(backbone.net.bn1.running_mean, before)


@pytest.mark.bad_input
def test_bad_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        create_backbone(name="resnet18", checkpoint=str(tmp_path / "nowhere.pth"))
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet34").state_dict(), path)
    with pytest.raises(ValueError, match="are of another network: 0 missing"):
        create_backbone(name="resnet18", checkpoint=str(path))
    state = timm.create_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"layer1.0.conv1.weight .* must have shape \[64, 64, 3, 3\], got \[64, 64, 1, 1\]"
    ):
        create_backbone(name="resnet18", checkpoint=str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        create_backbone(name="resnet18", checkpoint=str(path))
    torch.save({"weights": [1, 2]}, path)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        create_backbone(name="resnet18", checkpoint=str(path))


@pytest.mark.bad_input
def test_bad_arguments():
    with pytest.raises(ValueError, match=r"has no network 'resnet18x'; nearest: .*resnet18"):
        create_backbone(name="resnet18x")
    with pytest.raises(ValueError, match="cannot be built with features_only and output_stride 12"):
        create_backbone(name="resnet18", output_stride=12)
    with pytest.raises(ValueError, match="either pretrained or checkpoint"):
        create_backbone(name="resnet18", pretrained=True, checkpoint="x.pth")
    with pytest.raises(ValueError, match=r"images must have shape \[N, 3, H, W\], got \[1, 4, 8, 8\]"):
        create_backbone(name="resnet18")(torch.zeros(1, 4, 8, 8))


@pytest.mark.bad_input
def test_failed_download_says_what_to_do(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("Name or service not known")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        RuntimeError, match=r"weights of 'resnet18' could not be loaded: OSError: Name .*backbone.checkpoint"
    ):
        create_backbone(name="resnet18", pretrained=True)


# ---- maps of networks that work on [N, H, W, C], branches, dilation, stems of stride 1


def test_maps_are_turned_also_where_height_equals_channels():
    """At 384x384 the first map of swin_tiny is 96x96 with 96 channels: shapes alone cannot tell."""
    torch.manual_seed(0)
    backbone = create_backbone(name="swin_tiny_patch4_window7_224").eval()
    image = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        first = backbone(image)[0]
        cropped = backbone(image[:, :, :224, :224])[0]  # windows of 7 cells: inner ones are the same
    assert first.shape == (1, 96, 96, 96)
    torch.testing.assert_close(first[:, :, 7:42, 7:42], cropped[:, :, 7:42, 7:42], rtol=1e-3, atol=1e-3)


def test_swin_takes_any_size_and_always_shifts():
    backbone = create_backbone(name="swin_tiny_patch4_window7_224").eval()
    assert [b.shift_size for b in backbone.net.layers_3.blocks] == [(0, 0), (3, 3)]
    assert backbone.size_divisor == 32  # patches of 4 pixels drop what is left over
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 96, 160))
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 24, 40), (192, 12, 20), (384, 6, 10), (768, 3, 5)]


def test_branches_that_are_not_used_get_zeros():
    backbone = create_backbone(name="hrnet_w18_small").train()
    backbone(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
    grads = {n: p.grad for n, p in backbone.named_parameters()}
    assert all(g is not None for g in grads.values())
    assert not grads["net.incre_modules.0.0.conv1.weight"].any() and grads["net.conv1.weight"].any()


def dilations(backbone, block):
    return [getattr(stage[0], block).dilation[0] for stage in (backbone.net.layer3, backbone.net.layer4)]


@pytest.mark.parametrize(("name", "conv"), [("resnet18d", "conv1"), ("resnet50d", "conv2")])
def test_first_dilation_and_shortcut_pool(name, conv):
    """Output stride 8: stages dilated by 2 and 4."""
    timms = create_backbone(name=name, output_stride=8)
    assert dilations(timms, conv) == [1, 2]
    assert isinstance(timms.net.layer3[0].downsample[0], nn.AvgPool2d)
    paddles = create_backbone(name=name, output_stride=8, first_dilation="full", dilated_shortcut_pool=False).eval()
    assert dilations(paddles, conv) == [2, 4]
    assert [type(s[0].downsample[0]) for s in (paddles.net.layer3, paddles.net.layer4)] == [nn.Identity] * 2
    assert isinstance(paddles.net.layer2[0].downsample[0], nn.AvgPool2d)  # stride 2
    assert timms.state_dict().keys() == paddles.state_dict().keys()
    with torch.no_grad():
        assert paddles(torch.randn(1, 3, 37, 50))[-1].shape[2:] == (5, 7)


@pytest.mark.parametrize(("name", "deep"), [("resnet53", False), ("resnet53c", True)])
def test_stem_of_stride_1(name, deep):
    """ResNet-50 as torchvision writes it, with a stem of stride 1 and the last two stages dilated."""
    torchvision = pytest.importorskip("torchvision")
    backbone = create_backbone(name=name).eval()
    assert backbone.strides == [1, 2, 4, 4, 4] and backbone.channels == LARGE and backbone.size_divisor == 1
    assert backbone.net.conv1[0].stride == (1, 1) if deep else backbone.net.conv1.kernel_size == (3, 3)
    images = torch.randn(1, 3, 19, 26)
    with torch.no_grad():
        maps = backbone(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(19, 26), (10, 13), (5, 7), (5, 7), (5, 7)]
    if deep:
        return
    other = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    other.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    other.load_state_dict(backbone.net.state_dict(), strict=False)
    with torch.no_grad():
        x = other.relu(other.bn1(other.conv1(images)))
        for wanted, stage in zip(maps, (None, other.layer1, other.layer2, other.layer3, other.layer4), strict=True):
            x = x if stage is None else stage(other.maxpool(x) if stage is other.layer1 else x)
            torch.testing.assert_close(wanted, x, rtol=1e-3, atol=1e-4)


def test_stride_4_by_configuration():
    options = parse_options({"backbone": {"name": "resnet103"}, "pointrend": {"preset": "deeplab"}})
    assert options.backbone.output_stride == 4
    assert create_backbone(name="resnet53", output_stride=8).strides == [1, 2, 4, 8, 8]


@pytest.mark.bad_input
def test_output_strides_that_a_network_does_not_have():
    with pytest.raises(ValueError, match="'resnet53' has output stride 4, 8 or 16, got 32: set output_stride"):
        create_backbone(name="resnet53", output_stride=32)
    with pytest.raises(ValueError, match="output_stride 8: .*set backbone.output_stride to 32, its own"):
        create_backbone(name="swin_tiny_patch4_window7_224", output_stride=8)
    with pytest.raises(ValueError, match="set backbone.output_stride to 32"):
        create_backbone(name="hrnet_w18_small", output_stride=8)
    with pytest.raises(ValueError, match="apply to ResNets only, got 'test_convnext'"):
        create_backbone(name="test_convnext", output_stride=8, first_dilation="full")


# ---- networks of one image size, and layouts


class Sized(nn.Module):
    """Maps of strides 4 and 8; images whose sides do not please ``takes`` are refused, as timm's networks do."""

    def __init__(self, takes):
        super().__init__()
        self.takes, self.conv = takes, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        if not self.takes(*x.shape[2:]):
            raise AssertionError(f"Input height ({x.shape[2]}) doesn't match model (64).")
        return [self.conv(x[:, :, ::step, ::step]) for step in (4, 8)]


def sized(takes):
    return Backbone(Sized(takes), [4, 4], [4, 8], native=64, name="sized")


def test_windows_decide_the_padding():
    backbone = sized(lambda height, width: height % 64 == width % 64 == 0)
    assert (backbone.size_divisor, backbone.fixed) == (64, False)
    assert sized(lambda height, width: height % 8 == width % 8 == 0).size_divisor == 8
    assert sized(lambda height, width: True).size_divisor == 1
    model = Segmenter(backbone, FCN(backbone.channels_of, backbone.strides_of, 3, channels=4)).eval()
    assert model(torch.randn(1, 3, 40, 70)).refined.shape == (1, 3, 40, 70)


@pytest.mark.bad_input
def test_a_network_of_one_size():
    backbone = sized(lambda height, width: height == width == 64)
    model = Segmenter(backbone, FCN(backbone.channels_of, backbone.strides_of, 3, channels=4)).eval()
    assert model(torch.randn(1, 3, 40, 60)).refined.shape == (1, 3, 40, 60)
    wanted = r"'sized' takes images of 64 x 64 alone, got 64 x 128: set data.crop_size=\[64,64\] and eval.window=64"
    with pytest.raises(ValueError, match=wanted):
        model(torch.randn(1, 3, 40, 70))
    with pytest.raises(ValueError, match="'sized' was made for images of 64 x 64 and cannot segment them"):
        sized(lambda height, width: False)


def test_a_vision_transformer_builds_at_its_own_stride():
    model = build_model({"name": "segmenter", "backbone": {"name": "test_vit", "output_stride": 16},
                         "decoder": {"name": "fcn", "channels": 4}}, 3).eval()  # fmt: skip
    assert set(model.backbone.strides) == {16}
    assert model(torch.randn(1, 3, 50, 70)).refined.shape == (1, 3, 50, 70)
    for stride in (32, 8):
        with pytest.raises(ValueError, match=f"output.stride.*{stride}: .*set backbone.output_stride to 16"):
            create_backbone(name="test_vit", output_stride=stride)


def test_strided_points_of_the_image_never_run_in_channels_last():
    """PyTorch's CPU kernels write out of bounds there."""
    options = {"name": "segmenter", "backbone": {"name": "repvgg_a0"}, "decoder": {"name": "fcn", "channels": 4}}
    model = build_model(options, 3)
    stems = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels == 3]
    assert len(stems) == 1 and stems[0].stride == (2, 2)
    seen = []
    stems[0].register_forward_pre_hook(lambda module, inputs: seen.extend([*inputs, module.weight]))
    sum(model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64).long()).values()).backward()
    assert [tuple(t.stride())[1] for t in seen] == [64 * 64, 1]
    other = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 48)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


# ---- switches that change a network after it was made


def test_stride_in_1x1():
    torch.manual_seed(0)
    plain, moved = (create_backbone(name="resnet26", stride_in_1x1=on).eval() for on in (False, True))
    for block in plain.net.layer2:
        torch.nn.init.ones_(block.bn3.weight)  # it begins at zero
    moved.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 40, 56)
    block, start = moved.net.layer2[0], moved(x)[1]
    y = block.bn1(F.conv2d(start, block.conv1.weight, stride=2)).relu()
    y = block.bn2(F.conv2d(y, block.conv2.weight, padding=1)).relu()
    y = block.bn3(F.conv2d(y, block.conv3.weight)) + block.downsample(start)
    torch.testing.assert_close(moved(x)[2], moved.net.layer2[1](y.relu()))
    assert not torch.allclose(plain(x)[2], moved(x)[2])


def test_output_norm():
    torch.manual_seed(0)
    plain, normed = (create_backbone(name="test_convnext", output_norm=on).eval() for on in (False, True))
    normed.net.load_state_dict(plain.net.state_dict())
    for norm in normed.output_norms:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 64, 96)
    for norm, before, after in zip(normed.output_norms, plain(x), normed(x), strict=True):
        mean, var = before.mean(1, keepdim=True), before.var(1, unbiased=False, keepdim=True)
        wanted = (before - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(after, wanted)


def test_pad_before_shift():
    """A map filled up by hand to whole windows needs no padding, so that timm's own block then shifts it as wanted."""
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    padded = create_backbone(name=name, pad_before_shift=True).eval()
    block = padded.net.layers_0.blocks[1]
    assert block.shift_size == (3, 3)
    x = torch.randn(1, 9, 17, 96)
    from timm.models.swin_transformer import SwinTransformerBlock

    wanted = SwinTransformerBlock._attn(block, F.pad(x, (0, 0, 0, 4, 0, 5)))[:, :9, :17]
    torch.testing.assert_close(block._attn(x), wanted)
    assert not torch.allclose(SwinTransformerBlock._attn(block, x), wanted, atol=1e-3)
    assert padded.any_size and [m.shape[2:] for m in padded(torch.randn(1, 3, 33, 65))][0] == (9, 17)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "switch", "words"),
    [
        ("resnet18", "stride_in_1x1", "applies to ResNets with bottlenecks only"),
        ("resnet18", "pad_before_shift", "applies to Swin Transformers only"),
        ("resnet18", "output_norm", "is for networks with layer norms"),
    ],
)
def test_switches_that_a_network_has_not(name, switch, words):
    with pytest.raises(ValueError, match=f"backbone.{switch} {words}"):
        create_backbone(name=name, **{switch: True})
