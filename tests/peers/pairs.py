"""Networks of other projects beside ours: the same random weights, calibrated batch norms, the same images.

The packages are those of ``pip install -e ".[peers]"``. ``python tests/peers/pairs.py`` prints the whole table, with
ResNet-50 and at three sizes of images; the tests take small ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg import ops
from rendseg.convert.engine import identify
from rendseg.models import Segmenter, build_model

CLASSES, IGNORED = 19, 255
SIZES = ((512, 1024), (341, 500), (129, 257))


class Peer(NamedTuple):
    """A network of another project, and how it is asked."""

    net: nn.Module
    format: str
    """The word for ``rendseg convert --from``."""
    coarse: Callable[[Tensor], Tensor]
    """Images -> coarse logits."""
    logits: Callable[[Tensor], Tensor]
    """Images -> logits at their size."""
    losses: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    """Images, labels, the points of PointRend -> our names and values of the losses."""
    ours: Mapping[str, Any]
    """Our section ``model``."""


# ---- mmsegmentation


def _mmseg() -> Any:
    """Its registry. The package ``mmcv-lite`` lacks the compiled operators, which none of these networks calls."""
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        stub = types.ModuleType("mmcv._ext")
        stub.__getattr__ = lambda name: None  # type: ignore[method-assign]
        sys.modules["mmcv._ext"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.models  # noqa: F401
        from mmseg.registry import MODELS
    return MODELS


def _mmseg_resnet(name: str, dilated: bool, caffe: bool) -> dict[str, Any]:
    """``resnet50c`` and others of timm's names -> the backbone's configuration."""
    style = {"c": "ResNetV1c", "d": "ResNetV1d"}.get(name[-1], "ResNet")
    return {
        "type": style,
        "depth": int(name.strip("resntcd")),
        "norm_cfg": {"type": "BN"},
        "style": "caffe" if caffe else "pytorch",
        "contract_dilation": True,
        "dilations": (1, 1, 2, 4) if dilated else (1, 1, 1, 1),
        "strides": (1, 2, 1, 1) if dilated else (1, 2, 2, 2),
    }


def mmseg(
    decoder: str,
    backbone: str = "resnet18",
    width: int = 32,
    weights: list[float] | None = None,
    caffe: bool = False,
) -> Peer:
    """``caffe``: the backbone strides its 1x1 convolutions."""
    registry = _mmseg()
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    # Basic blocks are not compared dilated: mmsegmentation dilates only the first of their two convolutions.
    swin, dilated = backbone.startswith("swin"), "50" in backbone and decoder in ("encnet", "deeplabv3plus", "fcn")
    if swin:
        encoder = {"type": "SwinTransformer", "embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
        encoder |= {"window_size": 7, "out_indices": (0, 1, 2, 3), "qkv_bias": True, "drop_path_rate": 0.0}
        channels = [96, 192, 384, 768]
    else:
        encoder = _mmseg_resnet(backbone, dilated, caffe)
        channels = [64, 128, 256, 512] if encoder["depth"] < 50 else [256, 512, 1024, 2048]
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0, "class_weight": weights}
    shared = {"num_classes": CLASSES, "norm_cfg": {"type": "BN"}, "align_corners": False, "loss_decode": loss}
    every = {"in_channels": channels, "in_index": [0, 1, 2, 3], "channels": width, **shared}
    last = {"in_channels": channels[3], "in_index": 3, "channels": width, **shared}
    auxiliary = {"type": "FCNHead", "in_channels": channels[2], "in_index": 2, "channels": width, "num_convs": 1}
    auxiliary |= {**shared, "concat_input": False, "loss_decode": {**loss, "loss_weight": 0.4}}
    ours: dict[str, Any] = {
        "name": "segmenter",
        "backbone": {"name": "swin_tiny_patch4_window7_224" if swin else backbone},
        "decoder": {"name": decoder, "norm": "bn"},
        "pointrend": {"preset": "mmseg"},
        "loss": {"class_weights": weights},
        "auxiliary": [{"level": "c4", "channels": width, "norm": "bn"}],
    }
    if caffe:
        ours["backbone"]["stride_in_1x1"] = True
    if dilated:
        ours["backbone"]["output_stride"] = 8
    config: dict[str, Any] = {"type": "EncoderDecoder", "auxiliary_head": auxiliary, "test_cfg": {"mode": "whole"}}
    config |= {"backbone": encoder, "train_cfg": {}}
    if decoder == "upernet":
        config["decode_head"] = {"type": "UPerHead", "pool_scales": (1, 2, 3, 6), **every}
        ours["decoder"] |= {"channels": width, "ppm_channels": width, "fuse_channels": width, "preset": "mmseg"}
    elif decoder == "encnet":
        se = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.2}
        head = {"type": "EncHead", "num_codes": 8, "use_se_loss": True, "add_lateral": False, "loss_se_decode": se}
        config["decode_head"] = {**every, **head, "in_index": [1, 2, 3], "in_channels": channels[1:]}
        ours["decoder"] |= {"channels": width, "num_codes": 8, "aux_channels": width, "preset": "mmseg"}
        del ours["auxiliary"]
    elif decoder == "fcn":
        config["decode_head"] = {"type": "FCNHead", "num_convs": 2, "concat_input": True, **last}
        ours["decoder"] |= {"channels": width}
    elif decoder == "deeplabv3plus":
        rates = (1, 12, 24, 36)
        head = {"type": "DepthwiseSeparableASPPHead", "dilations": rates, "c1_in_channels": channels[0]}
        config["decode_head"] = {**last, **head, "c1_channels": 48}
        ours["decoder"] |= {"channels": width, "project_kernel": 3, "rates": rates[1:]}
    else:
        assert decoder == "semantic_fpn"
        config["type"], config["num_stages"] = "CascadeEncoderDecoder", 2
        config["neck"] = {"type": "FPN", "in_channels": channels, "out_channels": width, "num_outs": 4}
        fpn = {**every, "type": "FPNHead", "feature_strides": [4, 8, 16, 32], "in_channels": [width] * 4}
        point: dict[str, Any] = {
            **shared,
            "norm_cfg": None,
            "type": "PointHead",
            "in_channels": [width],
            "in_index": [0],
            "channels": width,
        }
        point |= {"num_fcs": 3, "coarse_pred_each_layer": True, "dropout_ratio": -1}
        config["decode_head"] = [{**fpn, "dropout_ratio": -1}, point]
        config["train_cfg"] = {"num_points": 2048, "oversample_ratio": 3, "importance_sample_ratio": 0.75}
        config["test_cfg"] |= {"subdivision_steps": 2, "subdivision_num_points": 8196, "scale_factor": 2}
        ours |= {"name": "pointrend", "decoder": {"name": decoder, "channels": width, "head_channels": width}}
        ours["decoder"]["norm"], ours["pointrend"]["hidden_channels"] = "bn", width
        del config["auxiliary_head"], ours["auxiliary"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: Any = registry.build(ConfigDict({**config, "_scope_": "mmseg"}))
    heads = net.decode_head if decoder == "semantic_fpn" else [net.decode_head]

    def coarse(images: Tensor) -> Tensor:
        found = heads[0](net.extract_feat(images))
        return found[0] if isinstance(found, tuple) else found

    def logits(images: Tensor) -> Tensor:
        meta = {"ori_shape": images.shape[2:], "img_shape": images.shape[2:], "pad_shape": images.shape[2:]}
        return net.encode_decode(images, [{**meta, "padding_size": [0] * 4}] * len(images))

    def losses(images: Tensor, labels: Tensor, points: Tensor) -> dict[str, Tensor]:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=y[None])) for y in labels]
        heads[-1].get_points_train = lambda *_, **__: points
        found = net.loss(images, samples)
        names = {
            "decode.loss_ce": "loss_coarse",
            "decode_0.loss_ce": "loss_coarse",
            "decode_1.loss_point": "loss_point",
            "decode_1.pointloss_ce": "loss_point",
            "decode.loss_se": "loss_se",
            "aux.loss_ce": "loss_aux_encnet" if decoder == "encnet" else "loss_aux_c4",
        }
        return {names.get(key, key): value for key, value in found.items() if "acc" not in key}

    return Peer(net, "mmseg", coarse, logits, losses, ours)


# ---- transformers and torchvision


def transformers(backbone: str = "convnext", width: int = 32) -> Peer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    if backbone == "swin":
        encoder: Any = SwinConfig(out_features=stages)
        ours, third = {"name": "swin_tiny_patch4_window7_224"}, 384
    elif backbone == "convnext":
        sizes = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
        encoder = ConvNextConfig(**sizes, layer_scale_init_value=1.0, out_features=stages)
        ours, third = {"name": "convnext_tiny"}, 384
    else:
        encoder = ResNetConfig(out_features=stages)
        ours, third = {"name": "resnet50"}, 1024
    config = UperNetConfig(backbone_config=encoder, hidden_size=width, num_labels=CLASSES, auxiliary_channels=width)
    config.auxiliary_in_channels = third
    net = UperNetForSemanticSegmentation(config)

    def coarse(images: Tensor) -> Tensor:
        return net.decode_head(net.backbone(images).feature_maps)

    def losses(images: Tensor, labels: Tensor, points: Tensor) -> dict[str, Tensor]:
        return {"sum": net(images, labels=labels.masked_fill(labels == 255, config.loss_ignore_index)).loss}

    model = {
        "name": "segmenter",
        "backbone": ours,
        "decoder": {"name": "upernet", "preset": "transformers"},
        "auxiliary": [{"level": "c4", "channels": width, "dropout": 0.0}],
    }
    model["decoder"] |= {"channels": width, "ppm_channels": width, "fuse_channels": width}  # type: ignore[operator]
    return Peer(net, "transformers", coarse, lambda images: net(images).logits, losses, model)


def torchvision(decoder: str = "deeplabv3") -> Peer:
    from torchvision.models import segmentation

    make = segmentation.deeplabv3_resnet50 if decoder == "deeplabv3" else segmentation.fcn_resnet50
    net = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    options = {
        "deeplabv3": {"project_kernel": 1, "aspp_dropout": 0.5, "head_convs": 1, "dropout": 0.0},
        "fcn": {"channels": 512, "num_convs": 1, "concat_input": False},
    }[decoder]
    model = {
        "name": "segmenter",
        "backbone": {"name": "resnet50", "output_stride": 8},
        "decoder": {"name": decoder, **options},
        "auxiliary": [{"level": "c4", "weight": 0.5}],
        "pad": "none",
    }

    def losses(images: Tensor, labels: Tensor, points: Tensor) -> dict[str, Tensor]:
        found = net(images)
        ce = {name: F.cross_entropy(x, labels, ignore_index=IGNORED) for name, x in found.items()}
        return {"loss_coarse": ce["out"], "loss_aux_c4": 0.5 * ce["aux"]}

    def coarse(images: Tensor) -> Tensor:
        return net.classifier(net.backbone(images)["out"])

    return Peer(net, "torchvision", coarse, lambda images: net(images)["out"], losses, model)


# ---- comparison


def images_of(size: tuple[int, int], count: int = 1, seed: int = 0) -> Tensor:
    """Smooth structures under noise."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, size[0] // 16 + 2, size[1] // 16 + 2, generator=generator)
    noise = torch.randn(count, 3, *size, generator=generator)
    return F.interpolate(small, size=size, mode="bilinear", align_corners=True) + 0.1 * noise


def labels_of(size: tuple[int, int], count: int = 1, ignored: float = 0.15) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (count, *size), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < ignored, IGNORED)


@torch.no_grad()
def calibrate(peer: Peer, size: tuple[int, int] = (96, 128)) -> None:
    """Norms with random weights and the statistics of random images; classifiers of random, not tiny, weights."""
    generator = torch.Generator().manual_seed(2)
    for module in peer.net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
            if not isinstance(module, nn.LayerNorm):
                module.momentum = None
                module.reset_running_stats()
    peer.net.train()
    images = images_of(size, 4, seed=3)
    labels = labels_of(size, 4, ignored=0.0)
    peer.losses(images, labels, torch.rand(4, 64, 2, generator=generator))
    peer.net.eval()


def ours_of(peer: Peer) -> Segmenter:
    """Our network, with the weights that ``rendseg convert`` would give it."""
    found = identify(peer.net.state_dict(), peer.format, "the peer").applied.tensors
    model = build_model({**peer.ours, "channels_last": False}, CLASSES).eval()
    lacking = model.load_state_dict(found, strict=False)
    missing = [key for key in lacking.missing_keys if not key.endswith("num_batches_tracked")]
    assert not missing and not lacking.unexpected_keys, (missing[:3], lacking.unexpected_keys[:3])
    return model


@contextlib.contextmanager
def drawn(points: Tensor) -> Iterator[None]:
    """Training takes these points."""
    with mock.patch.object(ops, "sample_uncertain_points", lambda *_, **__: points):
        yield


class Difference(NamedTuple):
    coarse: float
    refined: float
    labels: float
    """Share of the pixels."""
    loss: float
    """Largest relative difference of one of the losses."""


@torch.no_grad()
def compared(peer: Peer, size: tuple[int, int], ignored: float = 0.15, ours: Segmenter | None = None) -> Difference:
    """The largest differences of logits, relative to the largest logit, and those of labels and losses."""
    ours = ours or ours_of(peer)
    images, labels = images_of(size), labels_of(size, ignored=ignored)
    points = torch.rand(1, 2048, 2, generator=torch.Generator().manual_seed(4))
    out = ours.predict(images)
    assert out.refined is not None
    wanted = peer.logits(images)
    coarse = peer.coarse(images)
    theirs = peer.losses(images, labels, points)
    with drawn(points):
        found = {key: value for key, value in ours.losses(images, labels).items()}
    if "sum" in theirs:
        found = {"sum": torch.stack(list(found.values())).sum()}
    assert found.keys() == theirs.keys(), (list(found), list(theirs))
    return Difference(
        _relative(out.coarse, coarse),
        _relative(out.refined, wanted),
        (out.refined.argmax(1) != wanted.argmax(1)).double().mean().item(),
        max(abs(found[k].item() - theirs[k].item()) / max(abs(theirs[k].item()), 1e-12) for k in theirs),
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


TABLE: dict[str, Callable[[], Peer]] = {
    "mmseg PointRend R-50-v1c": lambda: mmseg("semantic_fpn", "resnet50c", 256),
    "mmseg EncNet R-50-v1c": lambda: mmseg("encnet", "resnet50c", 512),
    "mmseg UPerNet R-50-v1c": lambda: mmseg("upernet", "resnet50c", 512),
    "mmseg UPerNet R-50 (caffe)": lambda: mmseg("upernet", "resnet50", 512, caffe=True),
    "mmseg FCN R-50-v1c": lambda: mmseg("fcn", "resnet50c", 512),
    "mmseg UPerNet R-50-v1d": lambda: mmseg("upernet", "resnet50d", 512),
    "mmseg UPerNet Swin-T": lambda: mmseg("upernet", "swin", 512),
    "mmseg DeepLabV3+ R-50-v1c": lambda: mmseg("deeplabv3plus", "resnet50c", 512),
    "transformers UPerNet ConvNeXt-T": lambda: transformers("convnext", 512),
    "transformers UPerNet Swin-T": lambda: transformers("swin", 512),
    "transformers UPerNet R-50": lambda: transformers("resnet", 512),
    "torchvision DeepLabV3 R-50": lambda: torchvision("deeplabv3"),
    "torchvision FCN R-50": lambda: torchvision("fcn"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    print("| network | image | coarse logits | refined logits | labels | losses | s |")
    print("|---|---|---|---|---|---|---|")
    for name, make in TABLE.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        peer = make()
        calibrate(peer)
        ours = ours_of(peer)
        for size in SIZES:
            began = time.perf_counter()
            found = compared(peer, size, ours=ours)
            seconds = time.perf_counter() - began
            figures = f"{found.coarse:.1e} | {found.refined:.1e} | {100 * found.labels:.4f} % | {found.loss:.1e}"
            print(f"| {name} | {size[0]}x{size[1]} | {figures} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
