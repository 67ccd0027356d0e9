"""Segmentation models: a timm backbone, a decoder, and PointRend around them."""

from .backbones import Backbone, create_backbone
from .build import build_model
from .decoder import Decoder, DecoderOutput
from .deeplab import DeepLabV3, DeepLabV3Options, DeepLabV3Plus, DeepLabV3PlusOptions
from .detectors import pointrend_rcnn
from .encnet import ENCNET_PRESETS, ENCNet, ENCNetOptions
from .fcn import FCN, FCNOptions
from .instances import PointRendMaskHead, paste_masks
from .losses import dice_loss, focal_loss, lovasz_softmax_loss, ohem_loss, segmentation_loss
from .options import (
    PRESETS,
    AuxiliaryOptions,
    BackboneOptions,
    DecoderOptions,
    LossOptions,
    MaskOptions,
    PointRendOptions,
    PointRendRCNNOptions,
    pointrend_options,
)
from .parse import ModelOptions, parse_options
from .pointrend import PointRend
from .registry import build_decoder, decoder_names, register_decoder
from .se_loss import presence_targets, se_loss
from .segmenter import SegmentationOutput, Segmenter
from .semantic_fpn import SemanticFPN, SemanticFPNOptions
from .unified import UPP, UnifiedPointRend, UnifiedSegmenter, UPPOptions
from .upernet import UPERNET_PRESETS, UPerNet, UPerNetOptions

__all__ = [
    "ENCNET_PRESETS",
    "FCN",
    "PRESETS",
    "AuxiliaryOptions",
    "UPERNET_PRESETS",
    "UPP",
    "Backbone",
    "BackboneOptions",
    "Decoder",
    "DecoderOptions",
    "DecoderOutput",
    "DeepLabV3",
    "DeepLabV3Options",
    "DeepLabV3Plus",
    "DeepLabV3PlusOptions",
    "ENCNet",
    "ENCNetOptions",
    "FCNOptions",
    "LossOptions",
    "MaskOptions",
    "ModelOptions",
    "PointRend",
    "PointRendMaskHead",
    "PointRendOptions",
    "PointRendRCNNOptions",
    "SegmentationOutput",
    "Segmenter",
    "SemanticFPN",
    "SemanticFPNOptions",
    "UPPOptions",
    "UPerNet",
    "UPerNetOptions",
    "UnifiedPointRend",
    "UnifiedSegmenter",
    "build_decoder",
    "build_model",
    "create_backbone",
    "decoder_names",
    "dice_loss",
    "focal_loss",
    "lovasz_softmax_loss",
    "ohem_loss",
    "parse_options",
    "paste_masks",
    "pointrend_options",
    "pointrend_rcnn",
    "presence_targets",
    "register_decoder",
    "se_loss",
    "segmentation_loss",
]
