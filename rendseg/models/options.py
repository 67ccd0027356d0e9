"""The options of the models that belong to no one decoder: keys of a configuration's ``model`` section, and defaults.

Those of a decoder stand beside it; ``parse.py`` puts them together.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .._nearest import did_you_mean
from .typed import parse

PointRule = int | str
POINT_RULES = ("area/256", "width/16", "(width/16)^2")


@dataclass(frozen=True)
class BackboneOptions:
    """A timm network that serves ``features_only``, or ``resnet53``, ``resnet103`` (output stride 4). ``None`` means:
    as the PointRend preset says."""

    name: str = "resnet18"
    pretrained: bool = False
    """Download timm's weights."""
    checkpoint: str | None = None
    """A local file of weights instead; excludes ``pretrained``."""
    output_stride: int | None = None
    """8, 16 or 32 where the network can; otherwise its own. Default of every preset 32, except paddleseg and deeplab:
    8; of resnet53 and resnet103 always 4."""
    in_chans: int = 3
    first_dilation: Literal["previous", "full"] = "previous"
    """Dilation of the first block of a dilated ResNet stage: that of the stage before (timm, torchvision,
    mmsegmentation, PyTorch-Encoding) or the stage's own (PaddleSeg)."""
    dilated_shortcut_pool: bool = True
    """Average pooling in the shortcut of ``resnet*d`` also where dilation replaces the stride (timm); PaddleSeg has
    none there."""
    freeze_norm: bool | None = None
    """Turn BatchNorm into fixed affine layers. ``None``: when the preset says so (detectron2) and weights are
    loaded."""


@dataclass(frozen=True)
class DecoderOptions:
    """What every decoder's options have: the name under which it was registered."""

    name: str = "semantic_fpn"

    @classmethod
    def of_tasks(
        cls, classes: Mapping[str, Sequence[str]], object_parts: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """The keys that a data set of several tasks fills in, from the names of its classes by task and the parts of
        its objects; ``None``: the decoder knows the task ``object`` alone."""
        return None


@dataclass(frozen=True)
class PointRendOptions:
    """Every switch in which implementations of PointRend differ. The defaults are the preset ``rendseg``."""

    preset: Literal["rendseg", "detectron2", "mmseg", "paddleseg", "deeplab"] = "rendseg"
    """The preset that filled in what was not given."""
    point_features: tuple[str, ...] | None = None
    """Names of the maps that give fine features: the decoder's (p2 ..) or the backbone's (c1 .. c5); ``None``: the
    decoder's ``default_point_features`` (its finest map, or c2)."""
    coarse_stride: int | None = None
    """Bring the coarse logits to this stride (bilinearly) where the decoder gives another; ``None``: the decoder's."""
    steps: int | None = None
    """Subdivision steps of factor 2; ``None``: down to stride 1. What is left is upsampled bilinearly."""
    train_points: PointRule = 2048
    """A number, or a rule on the (padded) image: ``area/256``, ``width/16``, ``(width/16)^2``."""
    inference_points: PointRule = 8192
    """Points of each step; a number or a rule, as above."""
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75
    coarse_source: Literal["original", "current"] = "original"
    """Coarse features at inference: from the coarse logits, or from the map refined so far and upsampled."""
    coarse_first: bool = False
    """Concatenate (coarse, fine) instead of (fine, coarse)."""
    coarse_each_layer: bool = True
    """Concatenate the coarse logits to the input of every layer of the head, not only the first."""
    num_layers: int = 3
    """Hidden layers of the head; 0 is a single linear layer."""
    hidden_channels: int = 256
    init: Literal["detectron2", "mmseg", "paddleseg", "torch"] = "detectron2"
    """Initialisation of the head, see ``rendseg.nn.PointHead``."""
    upsample_align_corners: bool = False
    """Of the bilinear upsampling of logits, in the coarse loss and in every subdivision step."""
    sampling_align_corners: bool = False
    """Of sampling at points: selection, fine and coarse features."""
    padding_mode: Literal["border", "zeros"] = "border"
    """Of sampling at points. ``zeros`` shrinks logits in the outer half cell, which then look uncertain."""
    point_loss_mean: Literal["valid", "all"] = "valid"
    """Divide the summed loss by the points that are not ignored, or by all."""
    coarse_loss_mean: Literal["valid", "all"] = "valid"
    coarse_loss_at: Literal["image", "coarse"] = "image"
    """Upsample the logits to the labels, or take the labels at the centres of the coarse cells (cheaper)."""


@dataclass(frozen=True)
class LossTerm:
    """One loss of a sum, by name; what each computes is said in ``rendseg.models.losses``."""

    name: str = "cross_entropy"
    weight: float = 1.0


@dataclass(frozen=True)
class OhemTerm(LossTerm):
    """Cross-entropy over hard pixels."""

    name: str = "ohem"
    threshold: float = 0.7
    """Pixels whose true class is less probable are hard."""
    min_kept: int = 100_000
    """At least so many of a batch (of one process) count."""


@dataclass(frozen=True)
class DiceTerm(LossTerm):
    """Dice."""

    name: str = "dice"
    smooth: float = 1.0
    exponent: float = 2.0
    """Of the probabilities in the denominator."""
    per_image: bool = False
    """Of each image, then averaged, rather than of the batch as one."""
    classes: Literal["all", "present"] = "all"
    """Average over all classes or those in the labels."""


@dataclass(frozen=True)
class LovaszTerm(LossTerm):
    """Lovasz-softmax."""

    name: str = "lovasz"
    per_image: bool = False
    classes: Literal["all", "present"] = "present"


@dataclass(frozen=True)
class FocalTerm(LossTerm):
    """Focal loss over the softmax."""

    name: str = "focal"
    gamma: float = 2.0
    alpha: float | tuple[float, ...] = 1.0
    """A factor, or one per class."""


LOSS_TERMS: Mapping[str, type[LossTerm]] = types.MappingProxyType(
    {kind.name: kind for kind in (LossTerm, OhemTerm, DiceTerm, LovaszTerm, FocalTerm)}
)
"""Name of a loss to its options."""


@dataclass(frozen=True)
class LossOptions:
    """The losses and their weights."""

    terms: tuple[LossTerm, ...] = (LossTerm(),)
    """What is summed up over the coarse logits. Points take cross-entropy."""
    coarse_weight: float = 1.0
    point_weight: float = 1.0
    class_weights: tuple[float, ...] | None = None
    """One weight per class, for every loss."""
    ignore_index: int = 255
    normalize: Literal["process", "global"] = "process"
    """With several processes: the mean over each one's own labels, or over those of all processes, which is what one
    process computes on the summed batch."""


@dataclass(frozen=True)
class AuxiliaryOptions:
    """An auxiliary head, used in training only: ``rendseg.nn.FCNHead`` on one named map."""

    level: str = "c4"
    """The backbone's (c1 .. c5) or the decoder's (p2 ..)."""
    channels: int = 256
    num_convs: int = 1
    concat_input: bool = False
    dropout: float = 0.1
    norm: Literal["bn", "syncbn", "gn", "none"] | None = None
    """``None``: the decoder's where it has one, else bn."""
    weight: float = 0.4
    terms: tuple[LossTerm, ...] = (LossTerm(),)
    """As in ``loss``."""


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
    "decoder": {"norm": "bn", "neck_norm": "none", "top_down": "nearest", "level_order": "fine_first"},
}
_PADDLE_DECODER = {"norm": "none", "neck_norm": "bn", "top_down": "bilinear_aligned", "level_order": "coarse_first"}
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


def pointrend_options(preset: str = "rendseg", **switches: Any) -> PointRendOptions:
    """The switches of ``preset`` with any of them overridden; ``ValueError`` for unknown names and values."""
    return parse(PointRendOptions, switches, "pointrend", preset_switches(preset, "preset"))


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


def check_pointrend(options: PointRendOptions, where: str = "pointrend") -> None:
    """Values that the types cannot exclude."""
    for name in ("train_points", "inference_points"):
        rule = getattr(options, name)
        if isinstance(rule, str):
            if rule not in POINT_RULES:
                raise ValueError(f"{where}.{name} must be a number or one of {', '.join(POINT_RULES)}, got {rule!r}")
        elif rule <= 0:
            raise ValueError(f"{where}.{name} must be positive, got {rule}")
    if options.point_features is not None and not options.point_features:
        raise ValueError(f"{where}.point_features must name at least one map")
    if not 1 <= options.oversample_ratio < float("inf"):
        raise ValueError(f"{where}.oversample_ratio must be at least 1 and finite, got {options.oversample_ratio}")
    if not 0 <= options.importance_ratio <= 1:
        raise ValueError(f"{where}.importance_ratio must lie in [0, 1], got {options.importance_ratio}")
    for name, least in (("coarse_stride", 1), ("steps", 0), ("num_layers", 0), ("hidden_channels", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{where}.{name} must be at least {least}, got {value}")
