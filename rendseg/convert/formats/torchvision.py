"""torchvision: ``deeplabv3_resnet*``, ``fcn_resnet*`` and ``maskrcnn_resnet50_fpn*``, a plain state dict."""

from ..registry import IMAGENET, Format, Part, pair
from ..rules import Rule
from ._resnet import PLAIN


def _sequential(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    return pair(theirs, ours, f".{first}", f".{first + 1}")


_AUXILIARY: tuple[Rule, ...] = (
    *_sequential("aux_classifier", "auxiliary.0.convs.0"),
    ("aux_classifier.4.*", "auxiliary.0.classifier.*"),
)

# A detector has torchvision's names here too. Those of its first version come before.
_RCNN: tuple[Rule, ...] = (
    ("backbone.fpn.*", "backbone.fpn.*"),
    ("rpn.*", "rpn.*"),
    ("roi_heads.box_head.*", "roi_heads.box_head.*"),
    ("roi_heads.box_predictor.*", "roi_heads.box_predictor.*"),
)
_OLD: tuple[Rule, ...] = tuple(
    (f"{theirs}.{leaf}", f"{ours}.{leaf}")
    for theirs, ours in (
        ("backbone.fpn.inner_blocks.{i}", "backbone.fpn.inner_blocks.{i}.0"),
        ("backbone.fpn.layer_blocks.{i}", "backbone.fpn.layer_blocks.{i}.0"),
        ("rpn.head.conv", "rpn.head.conv.0.0"),
    )
    for leaf in ("weight", "bias")
)


def _rcnn(name: str, sign: str, rules: tuple[Rule, ...] = ()) -> Part:
    """Mask R-CNN or Faster R-CNN: masks begin anew, with the mask head of PointRend."""
    return Part(
        "maskrcnn",
        sign,
        (*rules, *_RCNN),
        ("roi_heads.mask_head.*", "roi_heads.mask_predictor.*"),
        settings={
            "model.name": "pointrend_rcnn",
            "model.backbone.name": name,
            "model.backbone.output_stride": 32,
            "model.backbone.freeze_norm": name == "resnet50_fpn",
            "model.min_size": 800,
        },
        fresh=("roi_heads.mask_head.*",),
    )


FORMAT = Format(
    models=(
        Part(
            "deeplabv3",
            "classifier.0.convs.0.0.weight",
            (
                *_sequential("classifier.0.convs.4", "decoder.aspp.pool", 1),
                *_sequential("classifier.0.convs.{i}", "decoder.aspp.branches.{i}"),
                *_sequential("classifier.0.project", "decoder.aspp.project"),
                *_sequential("classifier", "decoder.convs.0", 1),
                ("classifier.4.*", "decoder.classifier.*"),
                *_AUXILIARY,
            ),
            settings={
                "model.decoder.name": "deeplabv3",
                "model.decoder.rates": [12, 24, 36],
                "model.decoder.aspp_dropout": 0.5,
                "model.decoder.dropout": 0.0,
            },
        ),
        Part(
            "fcn",
            "classifier.4.weight",
            (
                *_sequential("classifier", "decoder.head.convs.0"),
                ("classifier.4.*", "decoder.head.classifier.*"),
                *_AUXILIARY,
            ),
            settings={"model.decoder.name": "fcn"},
        ),
        _rcnn("resnet50_fpn", "rpn.head.conv.weight", _OLD),
        _rcnn("resnet50_fpn_v2", "rpn.head.conv.1.0.weight"),
        _rcnn("resnet50_fpn", "rpn.head.conv.0.0.weight"),
    ),
    backbones=(
        Part("resnet", "layer1.0.conv1.weight", PLAIN, ("fc.*",)),
        Part("resnet of a detector", "body.layer1.0.conv1.weight", (("body.*", "body.*"),)),
    ),
    prefix="backbone.",
    settings={
        **IMAGENET,
        "model.name": "segmenter",
        "model.pad": "none",
        "model.backbone.output_stride": 8,
        "model.backbone.first_dilation": "previous",
        "model.backbone.stride_in_1x1": False,
        "align_corners": False,
    },
)
