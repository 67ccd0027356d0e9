"""torchvision: ``deeplabv3_resnet*`` and ``fcn_resnet*``, a plain state dict."""

from ..registry import IMAGENET, Format, Part, pair
from ..rules import Rule
from ._resnet import PLAIN


def _sequential(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    return pair(theirs, ours, f".{first}", f".{first + 1}")


_AUXILIARY: tuple[Rule, ...] = (
    *_sequential("aux_classifier", "auxiliary.0.convs.0"),
    ("aux_classifier.4.*", "auxiliary.0.classifier.*"),
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
    ),
    backbones=(Part("resnet", "layer1.0.conv1.weight", PLAIN, ("fc.*",)),),
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
