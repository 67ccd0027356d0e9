"""PyTorch-Encoding: a plain state dict (the ``.pth`` in its ``.zip`` files). Its models have no configuration."""

from ..registry import IMAGENET, Format, Part, pair
from ..rules import Rule
from ._resnet import DEEP, PLAIN


def _sequential(theirs: str, ours: str) -> tuple[Rule, ...]:
    return pair(theirs, ours, ".0", ".1")


_AUXILIARY: tuple[Rule, ...] = (
    *_sequential("auxlayer.conv5", "auxiliary.0.convs.0"),
    ("auxlayer.conv5.4.*", "auxiliary.0.classifier.*"),
)
_SEGMENTER = {"model.name": "segmenter", "align_corners": True}
_DILATED = {**_SEGMENTER, "model.backbone.output_stride": 8, "model.backbone.first_dilation": "previous"}

FORMAT = Format(
    models=(
        Part(
            "encnet",
            "head.encmodule.encoding.3.codewords",
            (
                *_sequential("head.conv5", "decoder.bottleneck"),
                *_sequential("head.connect.{i}", "decoder.laterals.{i}"),
                *_sequential("head.fusion", "decoder.fusion"),
                *_sequential("head.encmodule.encoding", "decoder.enc_module.project"),
                ("head.encmodule.encoding.3.*", "decoder.enc_module.encoding.*"),
                ("head.encmodule.encoding.4.*", "decoder.enc_module.norm.*"),
                ("head.encmodule.fc.0.*", "decoder.enc_module.gate.*"),
                ("head.encmodule.selayer.*", "decoder.se_layer.*"),
                ("head.conv6.1.*", "decoder.classifier.*"),
                *_sequential("auxlayer.conv5", "decoder.aux_head.convs.0"),
                ("auxlayer.conv5.4.*", "decoder.aux_head.classifier.*"),
            ),
            settings={**_DILATED, "model.decoder.name": "encnet", "model.decoder.preset": "pytorch_encoding"},
        ),
        Part(
            "upernet",
            "head.extramodule.conv1.0.weight",
            (
                *_sequential("head.extramodule.conv{i+1}", "decoder.ppm.branches.{i}"),
                *_sequential("head.c4conv", "decoder.ppm.fuse"),
                *_sequential("head.fpn_lateral.{i}", "decoder.lateral{i+2}"),
                *_sequential("head.fpn_out.{i}", "decoder.output{i+2}"),
                *_sequential("head.conv5", "decoder.fuse"),
                ("head.conv5.4.*", "decoder.classifier.*"),
            ),
            settings={
                **_SEGMENTER,
                "model.backbone.output_stride": 32,
                "model.decoder.name": "upernet",
                "model.decoder.preset": "pytorch_encoding",
            },
        ),
        Part(
            "deeplabv3",
            "head.aspp.b0.0.weight",
            (
                *pair("head.aspp.b4.gap", "decoder.aspp.pool", ".1", ".2"),
                *_sequential("head.aspp.b{i}", "decoder.aspp.branches.{i}"),
                *_sequential("head.aspp.project", "decoder.aspp.project"),
                *_sequential("head.block", "decoder.convs.0"),
                ("head.block.4.*", "decoder.classifier.*"),
                *_AUXILIARY,
            ),
            settings={
                **_DILATED,
                "model.decoder.name": "deeplabv3",
                "model.decoder.rates": [12, 24, 36],
                "model.decoder.aspp_dropout": 0.5,
            },
        ),
    ),
    backbones=(
        Part("resnet_s", "conv1.0.weight", DEEP, ("fc.*",)),
        Part("resnet", "conv1.weight", PLAIN, ("fc.*",)),
    ),
    prefix="pretrained.",
    settings={
        **IMAGENET,
        "model.pad": "none",
        "model.backbone.stride_in_1x1": False,
        "eval.preset": "pytorch_encoding",
    },
)
