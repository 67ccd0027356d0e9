"""PaddleSeg: ``.pdparams``; the configuration is a YAML file. Linear layers are stored transposed."""

from ..registry import Format, Part, Read, folded, only, pair, separable
from ..rules import TRANSPOSE, Rule
from ._resnet import DILATED


def _paddle(theirs: str, ours: str) -> tuple[Rule, ...]:
    return pair(theirs, ours, "._conv", "._batch_norm")


def _normalize(transforms: object) -> dict[str, object]:
    """``Normalize`` of a list of transforms."""
    found = (
        [t for t in transforms if isinstance(t, dict) and t.get("type") == "Normalize"]
        if isinstance(transforms, list)
        else []
    )
    return found[0] if found else {}


_ASPP: tuple[Rule, ...] = (
    *separable("head.aspp.aspp_blocks.{i}", "decoder.aspp.branches.{i}", folded),
    *folded("head.aspp.aspp_blocks.{i}", "decoder.aspp.branches.{i}"),
    *folded("head.aspp.global_avg_pool.1", "decoder.aspp.pool"),
    *folded("head.aspp.conv_bn_relu", "decoder.aspp.project"),
)
_DEEPLAB = {
    "model.name": "segmenter",
    "model.pointrend.preset": "paddleseg",
    "model.decoder.aspp_dropout": 0.1,
    "model.decoder.dropout": 0.0,
}
_RATES = {"model.decoder.rates": "aspp_ratios without the 1"}
_BLOCK = "net.layer{s+1}.{i}"

FORMAT = Format(
    models=(
        Part(
            "pointrend",
            "pointhead.fc_seg.weight",
            (
                *folded("neck.lateral_convs.{i}", "decoder.fpn.fpn_lateral{i+2}", ".0", ".1"),
                *folded("neck.fpn_out.{i}.0", "decoder.fpn.fpn_output{i+2}"),
                ("fpnhead.scale_heads.{i}.{j}._conv.*", "decoder.p{5-i}.{j}.*"),
                ("fpnhead.conv_seg.*", "decoder.predictor.*"),
                ("pointhead.fcs.{i}._conv.*", "head.fc{i+1}.*"),
                ("pointhead.fc_seg.*", "head.predictor.*"),
            ),
            # The deepest map is used as the neck finds it.
            ("neck.fpn_out.3.*", "pointhead.subdivision_num_points"),
            {
                "model.pointrend.preset": "paddleseg",
                "model.decoder.name": "semantic_fpn",
                "model.decoder.output_last": False,
            },
        ),
        Part(
            "encnet",
            "enc_module.encoding.0.codewords",
            (
                *folded("bottleneck", "decoder.bottleneck"),
                *folded("lateral_convs.{i}", "decoder.laterals.{i}"),
                *folded("fusion", "decoder.fusion"),
                *_paddle("enc_module.encoding_project", "decoder.enc_module.project"),
                ("enc_module.encoding.0.*", "decoder.enc_module.encoding.*"),
                ("enc_module.encoding.1.*", "decoder.enc_module.norm.*"),
                ("enc_module.fc.0.weight", "decoder.enc_module.gate.weight", TRANSPOSE),
                ("enc_module.fc.0.bias", "decoder.enc_module.gate.bias"),
                ("se_layer.weight", "decoder.se_layer.weight", TRANSPOSE),
                ("se_layer.bias", "decoder.se_layer.bias"),
                ("head.*", "decoder.classifier.*"),
                *folded("fcn_head.conv_bn_relu", "decoder.aux_head.convs.0"),
                ("fcn_head.conv.*", "decoder.aux_head.classifier.*"),
            ),
            settings={
                "model.name": "segmenter",
                "model.pointrend.preset": "paddleseg",
                "model.decoder.name": "encnet",
                "model.decoder.preset": "paddleseg",
                "align_corners": False,
            },
        ),
        Part(
            "upernet",
            "head.fpn_bottleneck._conv.weight",
            (
                *folded("head.ppm.stages.{i}.1", "decoder.ppm.branches.{i}"),
                *folded("head.ppm.conv_bn_relu2", "decoder.ppm.fuse"),
                *folded("head.lateral_convs.{i}", "decoder.lateral{i+2}", ".0", ".1"),
                *folded("head.fpn_convs.{i}.0", "decoder.output{i+2}"),
                *folded("head.fpn_bottleneck", "decoder.fuse"),
                ("head.conv_seg.*", "decoder.classifier.*"),
                *folded("head.dsn.0", "auxiliary.0.convs.0"),
                ("head.dsn.2.*", "auxiliary.0.classifier.*"),
            ),
            ("head.conv_last.*",),
            {
                "model.name": "segmenter",
                "model.pointrend.preset": "paddleseg",
                "model.decoder.name": "upernet",
                "model.decoder.preset": "paddleseg",
                "model.decoder.align_corners": True,
                "align_corners": False,
            },
        ),
        Part(
            "deeplabv3plus",
            "head.decoder.conv.weight",
            (
                *_ASPP,
                *folded("head.decoder.conv_bn_relu1", "decoder.low"),
                *separable("head.decoder.conv_bn_relu2", "decoder.convs.0", folded),
                *separable("head.decoder.conv_bn_relu3", "decoder.convs.1", folded),
                ("head.decoder.conv.*", "decoder.classifier.*"),
            ),
            settings={**_DEEPLAB, "model.decoder.name": "deeplabv3plus", "model.decoder.depthwise_relu": False},
            asks=_RATES,
        ),
        Part(
            "deeplabv3",
            "head.cls.weight",
            (*_ASPP, ("head.cls.*", "decoder.classifier.*")),
            settings={**_DEEPLAB, "model.decoder.name": "deeplabv3"},
            asks=_RATES,
        ),
    ),
    backbones=(
        Part(
            "resnet_vd",
            "bb_0_0.conv0._conv.weight",
            (
                ("conv1_1._conv.*", "net.conv1.0.*"),
                ("conv1_1._batch_norm.*", "net.conv1.1.*"),
                ("conv1_2._conv.*", "net.conv1.3.*"),
                ("conv1_2._batch_norm.*", "net.conv1.4.*"),
                ("conv1_3._conv.*", "net.conv1.6.*"),
                ("conv1_3._batch_norm.*", "net.bn1.*"),
                ("bb_{s}_{i}.short._conv.*", f"{_BLOCK}.downsample.1.*"),
                ("bb_{s}_{i}.short._batch_norm.*", f"{_BLOCK}.downsample.2.*"),
                ("bb_{s}_{i}.conv{k}._conv.*", f"{_BLOCK}.conv{{k+1}}.*"),
                ("bb_{s}_{i}.conv{k}._batch_norm.*", f"{_BLOCK}.bn{{k+1}}.*"),
            ),
            ("out.*", "fc.*"),
            {
                "model.backbone.first_dilation": "full",
                "model.backbone.dilated_shortcut_pool": False,
                "model.backbone.stride_in_1x1": False,
            },
            {"model.backbone.output_stride": DILATED["model.backbone.output_stride"]},
        ),
    ),
    prefix="backbone.",
    leaves={"_mean": "running_mean", "_variance": "running_var"},
    settings={"model.pad": "none", "eval.preset": "paddleseg"},
    asks={"data.mean": "--normalize", "align_corners": "true or false"},
    reads=(
        Read("model.backbone.output_stride", "model.backbone.output_stride", None, 8),
        Read("model.backbone.multi_grid", "", only([1, 1, 1], what="backbone.multi_grid"), [1, 1, 1]),
        Read("model.align_corners", "align_corners", None, False),
        Read("model.aspp_ratios", "model.decoder.rates", lambda d: [r for r in d if r > 1], (1, 6, 12, 18)),
        Read("model.point_subdivision_steps", "model.pointrend.steps"),
        Read("model.point_subdivision_num_points", "model.pointrend.inference_points"),
        Read("val_dataset.transforms", "data.mean", lambda t: _normalize(t).get("mean", [0.5] * 3)),
        Read("val_dataset.transforms", "data.std", lambda t: _normalize(t).get("std", [0.5] * 3)),
    ),
)
