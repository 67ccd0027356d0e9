from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from rendseg.models import create_backbone

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
    with pytest.raises(ValueError, match="cannot be read as weights"):
        create_backbone(name="resnet18", checkpoint=str(path))
    torch.save({"weights": [1, 2]}, path)
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
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
