"""Segmentation models: a timm backbone, a decoder, and PointRend around them."""

from .backbones import Backbone, create_backbone
from .build import build_model
from .decoder import Decoder, DecoderOutput
from .losses import segmentation_loss
from .options import (
    PRESETS,
    BackboneOptions,
    DecoderOptions,
    LossOptions,
    ModelOptions,
    PointRendOptions,
    SemanticFPNOptions,
    parse_options,
    pointrend_options,
)
from .pointrend import PointRend
from .registry import build_decoder, decoder_names, register_decoder
from .segmenter import SegmentationOutput, Segmenter
from .semantic_fpn import SemanticFPN
from .unified import UPP, UnifiedPointRend, UnifiedSegmenter, UPPOptions
from .upernet import UPERNET_PRESETS, UPerNet, UPerNetOptions

__all__ = [
    "PRESETS",
    "UPERNET_PRESETS",
    "UPP",
    "Backbone",
    "BackboneOptions",
    "Decoder",
    "DecoderOptions",
    "DecoderOutput",
    "LossOptions",
    "ModelOptions",
    "PointRend",
    "PointRendOptions",
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
    "parse_options",
    "pointrend_options",
    "register_decoder",
    "segmentation_loss",
]
