"""A model from a plain mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .backbones import create_backbone
from .detectors import build_detector
from .options import PointRendRCNNOptions
from .parse import ModelOptions, parse_options
from .pointrend import PointRend
from .registry import build_decoder, model_classes
from .segmenter import Segmenter


def build_model(config: Mapping[str, Any] | ModelOptions | PointRendRCNNOptions, num_classes: int) -> Any:
    """The model that the ``model`` section of a configuration describes: a :class:`Segmenter`, or with the name
    ``pointrend_rcnn`` a :class:`PointRendRCNN`. See ``rendseg.models.options``, the decoders and ``detectors`` for keys
    and defaults.

    Errors: ``ValueError`` for unknown keys (naming the nearest), values and combinations; ``TypeError`` for values of
    the wrong type; those of ``create_backbone``.
    """
    options = parse_options(config)
    if isinstance(options, PointRendRCNNOptions):
        return build_detector(options, num_classes)
    backbone = create_backbone(options.backbone)
    decoder = build_decoder(options.decoder, backbone, num_classes)
    kind = {"segmenter": Segmenter, "pointrend": PointRend, **model_classes(options.decoder.name)}[options.name]
    common: dict[str, Any] = {
        "loss": options.loss,
        "auxiliary": options.auxiliary,
        "channels_last": options.channels_last,
        "pad": options.pad,
    }
    if options.name == "segmenter":
        switches = options.pointrend
        common |= {
            "align_corners": switches.upsample_align_corners,
            "coarse_loss_mean": switches.coarse_loss_mean,
            "coarse_loss_at": switches.coarse_loss_at,
        }
    else:
        common["options"] = options.pointrend
    model = kind(backbone, decoder, **common)
    if options.norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = options.norm_momentum
    return model
