"""Every option of the models, typed: the accepted keys of a configuration's ``model`` section and their defaults.

``parse_options`` turns plain mappings (as read from YAML) into these dataclasses; an unknown key is an error that
names the nearest one. ``dataclasses.asdict`` gives the mapping back.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .resnet_stride4 import STRIDE4

T = TypeVar("T")

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


@dataclass(frozen=True)
class SemanticFPNOptions(DecoderOptions):
    """Options of ``semantic_fpn``. ``None`` means: as the PointRend preset says."""

    channels: int = 256
    """Channels of the pyramid, and so of the fine features p2 .. p5."""
    head_channels: int = 128
    """Channels of the scale heads."""
    norm: Literal["bn", "syncbn", "gn", "none"] | None = None
    """Norm of the scale heads. Presets: rendseg bn, detectron2 gn, mmseg syncbn, paddleseg none, deeplab bn."""
    neck_norm: Literal["bn", "syncbn", "gn", "none"] | None = None
    """Norm (and ReLU) of the pyramid's convolutions. Presets: none, paddleseg bn."""
    top_down: Literal["nearest", "bilinear", "bilinear_aligned"] | None = None
    """Upsampling of the top-down path. Presets: nearest, paddleseg bilinear_aligned."""
    align_corners: bool = False
    """Of the upsampling in the scale heads."""
    level_order: Literal["fine_first", "coarse_first"] | None = None
    """``coarse_first`` hands the levels to the scale heads in reversed order, as PaddleSeg does: see
    ``SemanticFPN``."""
    levels: tuple[str, ...] = ("c2", "c3", "c4", "c5")
    """Backbone maps used; ``[c3, c4, c5]`` gives coarse logits of stride 8."""


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
    """Coarse features at inference: from the coarse logits, or from the map refined so far."""
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


@dataclass(frozen=True)
class ModelOptions:
    """The ``model`` section."""

    name: Literal["pointrend", "segmenter"] = "pointrend"
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    decoder: DecoderOptions = field(default_factory=SemanticFPNOptions)
    pointrend: PointRendOptions = field(default_factory=PointRendOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    auxiliary: tuple[AuxiliaryOptions, ...] = ()
    channels_last: bool = True


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
    return _parse(PointRendOptions, switches, "pointrend", _preset(preset, "preset"))


def _preset(name: Any, where: str) -> PointRendOptions:
    if name not in PRESETS:
        names = ", ".join(PRESETS)
        raise ValueError(f"{where} must be one of {names}, got {name!r}{_nearest(str(name), PRESETS)}")
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


def parse_options(config: Mapping[str, Any] | ModelOptions) -> ModelOptions:
    """The ``model`` section (or a mapping whose only key is ``model``) as resolved ``ModelOptions``.

    Values left ``None`` are filled in from the preset. Parsing ``dataclasses.asdict`` of the result gives an equal
    result. Errors: ``ValueError`` for an unknown key (naming the nearest) or value, ``TypeError`` for a value of the
    wrong type.
    """
    if isinstance(config, ModelOptions):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise TypeError(f"model must be a mapping, got {type(config).__name__}")
    if set(config) == {"model"}:
        config = config["model"]
        if not isinstance(config, Mapping):
            raise TypeError(f"model must be a mapping, got {type(config).__name__}")
    from .registry import decoder_options_class

    plain = dict(config)
    sections: dict[str, Any] = {}
    if plain.get("pointrend") is not None:
        switches = dict(_mapping(plain.pop("pointrend"), "model.pointrend"))
        start = _preset(switches.get("preset", "rendseg"), "model.pointrend.preset")
        sections["pointrend"] = _parse(PointRendOptions, switches, "model.pointrend", start)
    if plain.get("decoder") is not None:
        values = _mapping(plain.pop("decoder"), "model.decoder")
        sections["decoder"] = _parse(decoder_options_class(values.get("name", "semantic_fpn")), values, "model.decoder")
    if plain.get("backbone") is not None:
        values = _mapping(plain.pop("backbone"), "model.backbone")
        sections["backbone"] = _parse(BackboneOptions, values, "model.backbone")
    if plain.get("loss") is not None:
        values = _with_terms(_mapping(plain.pop("loss"), "model.loss"), "model.loss")
        sections["loss"] = _parse(LossOptions, values, "model.loss")
    if plain.get("auxiliary") is not None:
        sections["auxiliary"] = tuple(
            _parse(AuxiliaryOptions, _with_terms(_mapping(value, where), where), where)
            for where, value in _items(plain.pop("auxiliary"), "model.auxiliary")
        )
    for name in ("backbone", "decoder", "pointrend", "loss", "auxiliary"):
        if name in plain and plain[name] is None:  # an empty section in YAML
            del plain[name]
    options = dataclasses.replace(_parse(ModelOptions, plain, "model"), **sections)
    check_pointrend(options.pointrend, "model.pointrend")
    for key in ("coarse_weight", "point_weight"):
        _not_negative(getattr(options.loss, key), f"model.loss.{key}")
    _check_terms(options.loss.terms, "model.loss", options.loss.normalize)
    _check_auxiliary(options.auxiliary, options.loss.normalize)
    return _fill(options)


def _not_negative(value: float, where: str) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{where} must be finite and not negative, got {value}")


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    """``(where, item)`` of a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where} must be a list, got {type(value).__name__}")
    return [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def _with_terms(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` with its ``terms`` (mappings, or names alone) read into their classes."""
    plain = dict(values)
    if "terms" not in plain:
        return plain
    if plain["terms"] is None:
        del plain["terms"]
        return plain
    terms = []
    for at, value in _items(plain["terms"], f"{where}.terms"):
        term = {"name": value} if isinstance(value, str) else _mapping(value, at)
        name = term.get("name", "cross_entropy")
        if name not in LOSS_TERMS:
            known = ", ".join(LOSS_TERMS)
            raise ValueError(f"{at}.name must be one of {known}, got {name!r}{_nearest(str(name), LOSS_TERMS)}")
        terms.append(_parse(LOSS_TERMS[name], term, at))
    return {**plain, "terms": tuple(terms)}


def _check_terms(terms: tuple[LossTerm, ...], where: str, normalize: str) -> None:
    """Values that the types cannot exclude."""
    if not terms:
        raise ValueError(f"{where}.terms must name at least one loss; null is cross_entropy")
    for i, term in enumerate(terms):
        at = f"{where}.terms[{i}]"
        if term.name in [other.name for other in terms[:i]]:
            raise ValueError(f"{where}.terms names {term.name} twice")
        _not_negative(term.weight, f"{at}.weight")
        if isinstance(term, OhemTerm):
            if not 0 < term.threshold <= 1:
                raise ValueError(f"{at}.threshold must lie in (0, 1], got {term.threshold}")
            if term.min_kept < 1:
                raise ValueError(f"{at}.min_kept must be at least 1, got {term.min_kept}")
        if isinstance(term, DiceTerm):
            _not_negative(term.smooth, f"{at}.smooth")
            if not 1 <= term.exponent < float("inf"):
                raise ValueError(f"{at}.exponent must be at least 1 and finite, got {term.exponent}")
        if isinstance(term, FocalTerm):
            _not_negative(term.gamma, f"{at}.gamma")
            for factor in term.alpha if isinstance(term.alpha, tuple) else (term.alpha,):
                _not_negative(factor, f"{at}.alpha")
        if isinstance(term, LovaszTerm) and normalize == "global" and not term.per_image:
            raise ValueError(
                f"{at}: lovasz sorts the pixels of one process, so that model.loss.normalize: global needs "
                "per_image: true"
            )


def _check_auxiliary(heads: tuple[AuxiliaryOptions, ...], normalize: str) -> None:
    for i, head in enumerate(heads):
        where = f"model.auxiliary[{i}]"
        if head.level in [other.level for other in heads[:i]]:
            raise ValueError(f"model.auxiliary has two heads on {head.level}")
        for name, least in (("channels", 1), ("num_convs", 0)):
            if getattr(head, name) < least:
                raise ValueError(f"{where}.{name} must be at least {least}, got {getattr(head, name)}")
        if not 0 <= head.dropout < 1:
            raise ValueError(f"{where}.dropout must lie in [0, 1), got {head.dropout}")
        if head.concat_input and head.num_convs == 0:
            raise ValueError(f"{where}.concat_input needs num_convs of at least 1")
        _not_negative(head.weight, f"{where}.weight")
        _check_terms(head.terms, where, normalize)


def _fill(options: ModelOptions) -> ModelOptions:
    parts = PRESET_PARTS[options.pointrend.preset]
    backbone = options.backbone
    if backbone.output_stride is None:
        stride = 4 if backbone.name in STRIDE4 else parts["backbone"]["output_stride"]
        backbone = dataclasses.replace(backbone, output_stride=stride)
    if backbone.freeze_norm is None:
        loaded = backbone.pretrained or backbone.checkpoint is not None
        backbone = dataclasses.replace(backbone, freeze_norm=parts["backbone"]["freeze_norm"] and loaded)
    decoder = options.decoder
    missing = {
        key: value
        for key, value in parts["decoder"].items()
        if key in {f.name for f in dataclasses.fields(decoder)} and getattr(decoder, key) is None
    }
    decoder = dataclasses.replace(decoder, **missing)
    norm = getattr(decoder, "norm", None)
    heads = tuple(
        head if head.norm is not None else dataclasses.replace(head, norm="bn" if norm in (None, "none") else norm)
        for head in options.auxiliary
    )
    return dataclasses.replace(options, backbone=backbone, decoder=decoder, auxiliary=heads)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parse(kind: type[T], values: Mapping[str, Any], where: str, start: T | None = None) -> T:
    """``kind`` (or the instance ``start``) with ``values`` set, each checked against the type of its field."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown key {where}.{key}{_nearest(str(key), known)} (known keys: {', '.join(known)})")
        parsed[key] = _convert(value, hints[key], f"{where}.{key}")
    return dataclasses.replace(start, **parsed) if start is not None else kind(**parsed)  # type: ignore[type-var]


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "null"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(
        hint, getattr(hint, "__name__", "?")
    )


def _convert(value: Any, hint: Any, where: str) -> Any:
    accepted, result = _accept(value, hint)
    if accepted:
        return result
    literal = any(typing.get_origin(h) is Literal for h in (hint, *typing.get_args(hint)))
    near = _nearest(value, _choices(hint)) if literal and isinstance(value, str) else ""
    error = ValueError if literal and isinstance(value, str) else TypeError
    raise error(f"{where} must be {_describe(hint)}, got {value!r}{near}")


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(a) for a in typing.get_args(hint)]
    return [c for a in typing.get_args(hint) for c in _choices(a)]


def _accept(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args and not isinstance(value, bool), value
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            accepted, result = _accept(value, arg)
            if accepted:
                return True, result
        return False, None
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            return False, None
        items = [_accept(v, args[0]) for v in value]
        return all(a for a, _ in items), tuple(r for _, r in items)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), float(value) if _is_number(
            value
        ) else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint)), value
    return isinstance(value, hint), value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
