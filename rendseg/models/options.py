"""The options of the models that no single decoder owns: keys of a configuration's ``model`` section, and defaults.

Those of a decoder stand beside it; ``parse.py`` puts them together.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from .._nearest import did_you_mean
from .._options import AtLeastOne, Count, Field, Flag, NonNegative, Options, Share, ShareBelowOne, Whole, read

POINT_RULES = ("area/256", "width/16", "(width/16)^2")
PointRule = Count | Literal["area/256", "width/16", "(width/16)^2"]
Norm = Literal["bn", "syncbn", "gn", "none"]


class BackboneOptions(Options):
    """A timm network that serves ``features_only``, or ``resnet53``, ``resnet103`` (output stride 4). ``None`` means:
    as the PointRend preset says."""

    name: str = "resnet18"
    pretrained: Flag = False
    """Download timm's weights."""
    checkpoint: str | None = None
    """A local file of weights instead; excludes ``pretrained``."""
    output_stride: Count | None = None
    """8, 16 or 32 where the network can; otherwise its own. Default of every preset 32, except paddleseg and deeplab:
    8; of resnet53 and resnet103 always 4."""
    in_chans: Count = 3
    first_dilation: Literal["previous", "full"] = "previous"
    """Dilation of the first block of a dilated ResNet stage: that of the stage before (timm, torchvision,
    mmsegmentation, PyTorch-Encoding) or the stage's own (PaddleSeg)."""
    dilated_shortcut_pool: Flag = True
    """Average pooling in the shortcut of ``resnet*d`` also where dilation replaces the stride (timm); PaddleSeg has
    none there."""
    freeze_norm: Flag | None = None
    """Make BatchNorm a fixed affine layer. ``None``: when the preset says so (detectron2) and weights are
    loaded."""
    output_norm: Flag | None = None
    """LayerNorm on every map. ``None``: yes for Swin and ConvNeXt in the presets mmseg and transformers."""
    pad_before_shift: Flag | None = None
    """Swin: fill a map up to whole windows before it is shifted, not after (timm). ``None``: yes in the presets mmseg
    and transformers."""
    stride_in_1x1: Flag | None = None
    """Bottlenecks of a ResNet stride in their first 1x1 convolution, not in the 3x3 (timm, torchvision). ``None``: yes
    for ResNet-50, 101 and 152 in the preset detectron2, whose weights of MSRA are so; not with ``pretrained``."""


class DecoderOptions(Options):
    """What every decoder's options have: the name under which it was registered."""

    name: str = "semantic_fpn"

    @classmethod
    def of_tasks(
        cls, classes: Mapping[str, Sequence[str]], object_parts: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """The keys that a data set of several tasks fills in, from the names of its classes by task and the parts of
        its objects; ``None``: the decoder knows the task ``object`` alone."""
        return None


class PointRendOptions(Options):
    """Every switch in which implementations of PointRend differ. The defaults are the preset ``rendseg``."""

    preset: Literal["rendseg", "detectron2", "mmseg", "paddleseg", "deeplab"] = "rendseg"
    """The preset that filled in what was not given."""
    point_features: tuple[str, ...] | None = None
    """Names of the maps that give fine features: the decoder's (p2 ..) or the backbone's (c1 .. c5); ``None``: the
    decoder's ``default_point_features`` (its finest map, or c2)."""
    coarse_stride: Count | None = None
    """Bring the coarse logits to this stride (bilinearly) where the decoder gives another; ``None``: the decoder's."""
    steps: Whole | None = None
    """Subdivision steps of factor 2; ``None``: down to stride 1. What is left is upsampled bilinearly."""
    train_points: PointRule = 2048
    """A number, or a rule on the (padded) image: ``area/256``, ``width/16``, ``(width/16)^2``."""
    inference_points: PointRule = 8192
    """Points of each step; a number or a rule, as above."""
    oversample_ratio: AtLeastOne = 3.0
    importance_ratio: Share = 0.75
    coarse_source: Literal["original", "current"] = "original"
    """Coarse features at inference: from the coarse logits, or from the map refined so far and upsampled."""
    coarse_first: Flag = False
    """Concatenate (coarse, fine) instead of (fine, coarse)."""
    coarse_each_layer: Flag = True
    """Concatenate the coarse logits to the input of every layer of the head, not only the first."""
    num_layers: Whole = 3
    """Hidden layers of the head; 0 is a single linear layer."""
    hidden_channels: Count = 256
    init: Literal["detectron2", "mmseg", "paddleseg", "torch"] = "detectron2"
    """Initialisation of the head, see ``rendseg.nn.PointHead``."""
    upsample_align_corners: Flag = False
    """Of the bilinear upsampling of logits, in the coarse loss and in every subdivision step."""
    sampling_align_corners: Flag = False
    """Of sampling at points: selection, fine and coarse features."""
    padding_mode: Literal["border", "zeros"] = "border"
    """Of sampling at points. ``zeros`` shrinks logits in the outer half cell, which then look uncertain."""
    point_loss_mean: Literal["valid", "all"] = "valid"
    """Divide the summed loss by the points that are not ignored, or by all."""
    coarse_loss_mean: Literal["valid", "all"] = "valid"
    coarse_loss_at: Literal["image", "coarse"] = "image"
    """Upsample the logits to the labels, or take the labels at the centres of the coarse cells (cheaper)."""

    def __post_init__(self) -> None:
        if self.point_features == ():
            raise ValueError("point_features must name at least one map")


class LossTerm(Options):
    """One loss of a sum, by name; what each computes is said in ``rendseg.models.losses``."""

    name: str = "cross_entropy"
    weight: NonNegative = 1.0


class OhemTerm(LossTerm):
    """Cross-entropy over hard pixels."""

    name: str = "ohem"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels whose true class is less probable are hard."""
    min_kept: Count = 100_000
    """The least number of pixels of a batch (of one process) that count."""


class DiceTerm(LossTerm):
    """Dice."""

    name: str = "dice"
    smooth: NonNegative = 1.0
    exponent: AtLeastOne = 2.0
    """Of the probabilities in the denominator."""
    per_image: Flag = False
    """Of each image, then averaged, rather than of the batch as one."""
    classes: Literal["all", "present"] = "all"
    """Average over all classes or those in the labels."""


class LovaszTerm(LossTerm):
    """Lovasz-softmax."""

    name: str = "lovasz"
    per_image: Flag = False
    classes: Literal["all", "present"] = "present"


class FocalTerm(LossTerm):
    """Focal loss over the softmax."""

    name: str = "focal"
    gamma: NonNegative = 2.0
    alpha: NonNegative | tuple[NonNegative, ...] = 1.0
    """A factor, or one per class."""


def check_terms(terms: Sequence[LossTerm]) -> None:
    """``ValueError`` unless there is at least one term, and none twice."""
    if not terms:
        raise ValueError("terms must name at least one loss; null is cross_entropy")
    names = [term.name for term in terms]
    if twice := [name for name in LOSS_TERMS if names.count(name) > 1]:
        raise ValueError(f"terms names {twice[0]} twice")


LOSS_TERMS: Mapping[str, type[LossTerm]] = types.MappingProxyType(
    {kind.name: kind for kind in (LossTerm, OhemTerm, DiceTerm, LovaszTerm, FocalTerm)}
)
"""Name of a loss to its options."""


class LossOptions(Options):
    """The losses and their weights."""

    terms: tuple[LossTerm, ...] = (LossTerm(),)
    """What is summed up over the coarse logits. Points take cross-entropy."""
    coarse_weight: NonNegative = 1.0
    point_weight: NonNegative = 1.0
    class_weights: tuple[float, ...] | None = None
    """One weight per class, for every loss."""
    ignore_index: int = 255
    normalize: Literal["process", "global"] = "process"
    """With several processes: the mean over each one's own labels, or over those of all processes, which is what one
    process computes on the summed batch."""

    def __post_init__(self) -> None:
        check_terms(self.terms)


class AuxiliaryOptions(Options):
    """An auxiliary head, used in training only: ``rendseg.nn.FCNHead`` on one named map."""

    level: str = "c4"
    """The backbone's (c1 .. c5) or the decoder's (p2 ..)."""
    channels: Count = 256
    num_convs: Whole = 1
    concat_input: Flag = False
    dropout: ShareBelowOne = 0.1
    norm: Norm | None = None
    """``None``: the decoder's where it has one, else bn."""
    weight: NonNegative = 0.4
    terms: tuple[LossTerm, ...] = (LossTerm(),)
    """As in ``loss``."""

    def __post_init__(self) -> None:
        check_terms(self.terms)
        if self.concat_input and self.num_convs == 0:
            raise ValueError("concat_input needs num_convs of at least 1")


# Table of presets: what each implementation computes, in the fields of PointRendOptions that differ from the defaults.
# Mistakes of those implementations that change no layout (selection after sorting channels, NaN losses, class weights
# used as indices) are not imitated.
_SWITCHES: dict[str, dict[str, Any]] = {
    # original coarse logits, fine then coarse, coarse logits at every layer, border padding, 8192 points, mean over
    # valid points
    "rendseg": {},
    "detectron2": {"coarse_each_layer": False, "padding_mode": "zeros"},
    "mmseg": {
        "padding_mode": "zeros",
        "init": "mmseg",
        "point_loss_mean": "all",
        "coarse_loss_mean": "all",
        "inference_points": 8196,
        "steps": 2,
    },
    "paddleseg": {
        "coarse_stride": 8,
        "padding_mode": "zeros",
        "init": "paddleseg",
        "inference_points": 8196,
        "steps": 2,
    },
    "deeplab": {
        "point_features": ("c3",),  # its code takes layer2; the write-up says res2, which is c2
        "coarse_source": "current",
        "coarse_first": True,
        "num_layers": 0,
        "init": "torch",
        "upsample_align_corners": True,
        "padding_mode": "zeros",
        "train_points": "width/16",
        "inference_points": 8096,
    },
}
_SWITCHES["detectron2"]["steps"] = 2

PRESETS: Mapping[str, PointRendOptions] = types.MappingProxyType(
    {name: PointRendOptions(preset=name, **switches) for name, switches in _SWITCHES.items()}  # type: ignore[arg-type]
)
"""Preset name to its full set of switches."""

_COMMON: dict[str, dict[str, Any]] = {
    "backbone": {"output_stride": 32, "freeze_norm": False},
    "decoder": {
        "norm": "bn",
        "neck_norm": "none",
        "top_down": "nearest",
        "level_order": "fine_first",
        "output_last": True,
    },
}
_PADDLE_DECODER = {
    "norm": "none",
    "neck_norm": "bn",
    "top_down": "bilinear_aligned",
    "level_order": "coarse_first",
    "output_last": False,
}
PRESET_PARTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = types.MappingProxyType(
    {
        "rendseg": _COMMON,
        "detectron2": {
            "backbone": {**_COMMON["backbone"], "freeze_norm": True},
            "decoder": {**_COMMON["decoder"], "norm": "gn"},
        },
        "mmseg": {"backbone": _COMMON["backbone"], "decoder": {**_COMMON["decoder"], "norm": "syncbn"}},
        "paddleseg": {"backbone": {**_COMMON["backbone"], "output_stride": 8}, "decoder": _PADDLE_DECODER},
        "deeplab": {"backbone": {**_COMMON["backbone"], "output_stride": 8}, "decoder": _COMMON["decoder"]},
    }
)
"""Preset name to the backbone and decoder options it fills in where they are ``None``."""


_UNPADDED: dict[str, Any] = {"pad": "none"}
_NORMED = {"output_norm": "swin_|convnext", "pad_before_shift": "swin_"}
# Preset to keys of `model`, and to switches of `model.backbone` with the names of the networks that they concern.
_AROUND: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "rendseg": ({"pad": "stride"}, {}),
    "deeplab": ({"pad": "stride"}, {}),
    "detectron2": ({"pad": 32}, {"stride_in_1x1": r"resnet(50|101|152)(\.|$)"}),
    "mmseg": (_UNPADDED, _NORMED),
    "transformers": (_UNPADDED, _NORMED),
    "paddleseg": (_UNPADDED, {}),
    "pytorch_encoding": (_UNPADDED, {}),
    "csail": ({**_UNPADDED, "norm_momentum": 0.001}, {}),
}


def around(preset: str, backbone: BackboneOptions) -> tuple[dict[str, Any], dict[str, bool]]:
    """What a preset says outside its own section: keys of ``model`` and of ``model.backbone``, filled in where they are
    ``None``."""
    model, families = _AROUND.get(preset, _AROUND["rendseg"])
    switches = {
        key: key in families and re.match(families[key], backbone.name) is not None
        for key in ("output_norm", "pad_before_shift", "stride_in_1x1")
    }
    if backbone.pretrained:  # timm's weights stride in the 3x3 convolution
        switches["stride_in_1x1"] = False
    return model, switches


def pointrend_options(preset: str = "rendseg", **switches: Any) -> PointRendOptions:
    """The switches of ``preset`` with any of them overridden; ``ValueError`` for unknown names and values."""
    return read(PointRendOptions, switches, "pointrend", preset_switches(preset, "preset"))


def preset_switches(name: Any, where: str) -> PointRendOptions:
    """Every switch of the preset ``name``; ``ValueError`` says where another name stands."""
    if name not in PRESETS:
        names = ", ".join(PRESETS)
        raise ValueError(f"{where} must be one of {names}, got {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def num_points(rule: PointRule, height: int, width: int) -> int:
    """The number that ``rule`` gives for an image of ``height`` by ``width``; at least 1."""
    if isinstance(rule, int):
        return rule
    if rule == "area/256":
        return max(1, height * width // 256)
    if rule == "width/16":
        return max(1, width // 16)
    if rule == "(width/16)^2":
        return max(1, (width // 16) ** 2)
    raise ValueError(f"a rule for the number of points must be one of {', '.join(POINT_RULES)}, got {rule!r}")


class MaskOptions(Options):
    """The arguments of :class:`rendseg.models.PointRendMaskHead`."""

    hidden_channels: Count = 256
    coarse_hidden_channels: Count = 1024
    coarse_size: Count = 7
    """Cells of a side of the coarse masks."""
    train_points: Count = 14**2
    oversample_ratio: AtLeastOne = 3.0
    importance_ratio: Share = 0.75
    steps: Whole = 5
    """Doublings of the coarse mask: five lead from 7 to 224."""
    subdivision_points: Count = 28**2
    """Cells of each step that are predicted again."""


class PointRendRCNNOptions(Options):
    """The ``model`` section of a detector with masks. Keys from ``box_score_thresh`` on are torchvision's."""

    name: Literal["pointrend_rcnn"] = "pointrend_rcnn"
    backbone: BackboneOptions = BackboneOptions()
    """A timm network with stages of strides 4 to 32, or torchvision's ``resnet50_fpn`` or ``resnet50_fpn_v2``."""
    mask: MaskOptions = MaskOptions()
    normalize: Literal["process", "global"] = "process"
    """With several processes: losses are means over what each one has, or over that of all processes."""
    min_size: Count | None = None
    """At inference the shorter side becomes so long. In training images have the size that ``data`` gives them.
    ``None``: images are taken as they are."""
    max_size: Count = 1333
    """With ``min_size``: the longer side is at most so long."""
    anchor_sizes: tuple[Count, Count, Count, Count, Count] = (32, 64, 128, 256, 512)
    """Sides of the anchors on the maps of strides 4, 8, 16, 32 and 64, in shapes 1:2, 1:1 and 2:1."""
    boxes: Literal["torchvision", "detectron2"] = "torchvision"
    """How features of boxes are read and where anchors lie. ``detectron2`` (mmdetection does the same): RoIAlign that
    is aligned, with a sample for each cell of the map; anchors of unrounded sides, the last of which are 64 pixels
    apart."""
    fpn_channels: Count = 256
    """Of the maps of the pyramid; torchvision's detectors have 256."""
    box_hidden_channels: Count = 1024
    """Of the two layers that classify boxes; torchvision's detectors have 1024."""
    checkpoint: str | None = None
    """A checkpoint whose weights training starts from, as of the other models."""
    box_score_thresh: Share = 0.05
    box_nms_thresh: Share = 0.5
    box_detections_per_img: Count = 100
    box_batch_size_per_image: Count = 512
    box_positive_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    rpn_pre_nms_top_n_train: Count = 2000
    rpn_pre_nms_top_n_test: Count = 1000
    rpn_post_nms_top_n_train: Count = 2000
    rpn_post_nms_top_n_test: Count = 1000
    rpn_nms_thresh: Share = 0.7
    rpn_batch_size_per_image: Count = 256
