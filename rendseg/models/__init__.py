"""Segmentation models: a timm backbone, a decoder, and PointRend around them."""

from .backbones import Backbone, create_backbone
from .build import build_model
from .decoder import Decoder, DecoderOutput
from .losses import dice_loss, focal_loss, lovasz_softmax_loss, ohem_loss, segmentation_loss
from .options import (
    PRESETS,
    AuxiliaryOptions,
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

__all__ = [
    "PRESETS",
    "AuxiliaryOptions",
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
    "build_decoder",
    "build_model",
    "create_backbone",
    "decoder_names",
    "dice_loss",
    "focal_loss",
    "lovasz_softmax_loss",
    "ohem_loss",
    "parse_options",
    "pointrend_options",
    "register_decoder",
    "segmentation_loss",
]
