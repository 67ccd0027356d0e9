"""mmsegmentation: ``.pth`` with ``state_dict`` and ``meta``, in which the configuration stands as text."""

import math

from ..registry import Format, Part, Read, only, pair, separable
from ..rules import POOL_LAST, Rule
from ._openmmlab import BACKBONES, NORMALIZATION

_AUXILIARY: tuple[Rule, ...] = (
    *pair("auxiliary_head.convs.{i}", "auxiliary.0.convs.{i}"),
    *pair("auxiliary_head.conv_cat", "auxiliary.0.conv_cat"),
    ("auxiliary_head.conv_seg.*", "auxiliary.0.classifier.*"),
)
_ASPP: tuple[Rule, ...] = (
    *pair("decode_head.image_pool.1", "decoder.aspp.pool"),
    *separable("decode_head.aspp_modules.{i}", "decoder.aspp.branches.{i}"),
    *pair("decode_head.aspp_modules.{i}", "decoder.aspp.branches.{i}"),
    ("decode_head.bottleneck.conv.weight", "decoder.aspp.project.weight", POOL_LAST),
    *pair("decode_head.bottleneck", "decoder.aspp.project"),
    ("decode_head.conv_seg.*", "decoder.classifier.*"),
)
_FPN: tuple[Rule, ...] = (
    *pair("neck.lateral_convs.{i}", "decoder.fpn.fpn_lateral{i+2}"),
    *pair("neck.fpn_convs.{i}", "decoder.fpn.fpn_output{i+2}"),
)
_SEGMENTER = {"model.name": "segmenter", "model.pointrend.preset": "mmseg"}

MODELS = (
    Part(
        "pointrend",
        "decode_head.1.fc_seg.weight",
        (
            *_FPN,
            *pair("decode_head.0.scale_heads.{i}.{j}", "decoder.p{i+2}.{j}"),
            ("decode_head.0.conv_seg.*", "decoder.predictor.*"),
            ("decode_head.1.fcs.{i}.conv.*", "head.fc{i+1}.*"),
            ("decode_head.1.fc_seg.*", "head.predictor.*"),
            *_AUXILIARY,
        ),
        settings={"model.pointrend.preset": "mmseg", "model.decoder.name": "semantic_fpn"},
        asks={
            "model.pointrend.steps": "test_cfg.subdivision_steps",
            "model.pointrend.inference_points": "test_cfg.subdivision_num_points",
        },
    ),
    Part(
        "semantic_fpn",
        "decode_head.scale_heads.0.0.conv.weight",
        (
            *_FPN,
            *pair("decode_head.scale_heads.{i}.{j}", "decoder.p{i+2}.{j}"),
            ("decode_head.conv_seg.*", "decoder.predictor.*"),
            *_AUXILIARY,
        ),
        settings={**_SEGMENTER, "model.decoder.name": "semantic_fpn"},
    ),
    Part(
        "encnet",
        "decode_head.enc_module.encoding.0.codewords",
        (
            *pair("decode_head.bottleneck", "decoder.bottleneck"),
            *pair("decode_head.lateral_convs.{i}", "decoder.laterals.{i}"),
            *pair("decode_head.fusion", "decoder.fusion"),
            *pair("decode_head.enc_module.encoding_project", "decoder.enc_module.project"),
            ("decode_head.enc_module.encoding.0.*", "decoder.enc_module.encoding.*"),
            ("decode_head.enc_module.encoding.1.*", "decoder.enc_module.norm.*"),
            ("decode_head.enc_module.fc.0.*", "decoder.enc_module.gate.*"),
            ("decode_head.se_layer.*", "decoder.se_layer.*"),
            ("decode_head.conv_seg.*", "decoder.classifier.*"),
            *pair("auxiliary_head.convs.{i}", "decoder.aux_head.convs.{i}"),
            ("auxiliary_head.conv_seg.*", "decoder.aux_head.classifier.*"),
        ),
        settings={**_SEGMENTER, "model.decoder.name": "encnet", "model.decoder.preset": "mmseg"},
    ),
    Part(
        "upernet",
        "decode_head.fpn_bottleneck.conv.weight",
        (
            *pair("decode_head.psp_modules.{i}.1", "decoder.ppm.branches.{i}"),
            *pair("decode_head.bottleneck", "decoder.ppm.fuse"),
            *pair("decode_head.lateral_convs.{i}", "decoder.lateral{i+2}"),
            *pair("decode_head.fpn_convs.{i}", "decoder.output{i+2}"),
            *pair("decode_head.fpn_bottleneck", "decoder.fuse"),
            ("decode_head.conv_seg.*", "decoder.classifier.*"),
            *_AUXILIARY,
        ),
        settings={**_SEGMENTER, "model.decoder.name": "upernet", "model.decoder.preset": "mmseg"},
    ),
    Part(
        "deeplabv3plus",
        "decode_head.c1_bottleneck.conv.weight",
        (
            *_ASPP,
            *pair("decode_head.c1_bottleneck", "decoder.low"),
            *separable("decode_head.sep_bottleneck.{i}", "decoder.convs.{i}"),
            *_AUXILIARY,
        ),
        settings={**_SEGMENTER, "model.decoder.name": "deeplabv3plus"},
        asks={"model.decoder.rates": "decode_head.dilations without the 1"},
    ),
    Part(
        "deeplabv3",
        "decode_head.aspp_modules.0.conv.weight",
        (*_ASPP, *_AUXILIARY),
        settings={**_SEGMENTER, "model.decoder.name": "deeplabv3"},
        asks={"model.decoder.rates": "decode_head.dilations without the 1"},
    ),
    Part(
        "fcn",
        "decode_head.conv_seg.weight",
        (
            *pair("decode_head.convs.{i}", "decoder.head.convs.{i}"),
            *pair("decode_head.conv_cat", "decoder.head.conv_cat"),
            ("decode_head.conv_seg.*", "decoder.head.classifier.*"),
            *_AUXILIARY,
        ),
        settings={**_SEGMENTER, "model.decoder.name": "fcn"},
    ),
)

FORMAT = Format(
    MODELS,
    BACKBONES,
    prefix="backbone.",
    settings={"model.pad": "none", "eval.preset": "mmseg"},
    asks={"data.mean": "--normalize", "align_corners": "true or false"},
    reads=(
        Read("model.backbone.strides", "model.backbone.output_stride", lambda s: 4 * math.prod(s), (1, 2, 2, 2)),
        Read(
            "model.backbone.contract_dilation",
            "model.backbone.first_dilation",
            {True: "previous", False: "full"},
            False,
        ),
        Read("model.backbone.style", "model.backbone.stride_in_1x1", {"pytorch": False, "caffe": True}, "pytorch"),
        Read("model.backbone.multi_grid", "", only(None, [1, 1, 1], what="backbone.multi_grid")),
        Read(
            "model.decode_head.out_channels",
            "",
            lambda n: only(None, what="decode_head.out_channels")(n if n == 1 else None),
        ),
        Read("model.decode_head.align_corners", "align_corners", None, False),
        Read("model.decode_head.pool_scales", "model.decoder.bins", list, (1, 2, 3, 6)),
        Read("model.decode_head.dilations", "model.decoder.rates", lambda d: [r for r in d if r > 1], (1, 6, 12, 18)),
        Read("model.auxiliary_head.loss_decode.loss_weight", "auxiliary_weight"),
        Read("model.test_cfg.subdivision_steps", "model.pointrend.steps"),
        Read("model.test_cfg.subdivision_num_points", "model.pointrend.inference_points"),
        Read("model.test_cfg.scale_factor", "", only(2, what="test_cfg.scale_factor")),
        Read("model.test_cfg.crop_size", "eval.window", list),
        Read("model.test_cfg.stride", "eval.window_stride", list),
        *NORMALIZATION,
    ),
)
