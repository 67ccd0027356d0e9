"""The ``model`` section of a configuration as typed options, with what the presets say filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._nearest import did_you_mean
from .options import (
    LOSS_TERMS,
    PRESET_PARTS,
    AuxiliaryOptions,
    BackboneOptions,
    DecoderOptions,
    DiceTerm,
    FocalTerm,
    LossOptions,
    LossTerm,
    LovaszTerm,
    OhemTerm,
    PointRendOptions,
    check_pointrend,
    preset_switches,
)
from .registry import decoder_options_class
from .resnet_stride4 import STRIDE4
from .typed import mapping, parse


@dataclass(frozen=True)
class ModelOptions:
    """The ``model`` section."""

    name: Literal["pointrend", "segmenter"] = "pointrend"
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    decoder: DecoderOptions = field(default_factory=lambda: decoder_options_class("semantic_fpn")())
    pointrend: PointRendOptions = field(default_factory=PointRendOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    auxiliary: tuple[AuxiliaryOptions, ...] = ()
    channels_last: bool = True


def parse_options(config: Mapping[str, Any] | ModelOptions) -> ModelOptions:
    """The ``model`` section (or a mapping whose only key is ``model``) as resolved :class:`ModelOptions`.

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
    plain = dict(config)
    sections: dict[str, Any] = {}
    if plain.get("pointrend") is not None:
        switches = dict(mapping(plain.pop("pointrend"), "model.pointrend"))
        start = preset_switches(switches.get("preset", "rendseg"), "model.pointrend.preset")
        sections["pointrend"] = parse(PointRendOptions, switches, "model.pointrend", start)
    if plain.get("decoder") is not None:
        values = mapping(plain.pop("decoder"), "model.decoder")
        sections["decoder"] = parse(decoder_options_class(values.get("name", "semantic_fpn")), values, "model.decoder")
    if plain.get("backbone") is not None:
        values = mapping(plain.pop("backbone"), "model.backbone")
        sections["backbone"] = parse(BackboneOptions, values, "model.backbone")
    if plain.get("loss") is not None:
        values = _with_terms(mapping(plain.pop("loss"), "model.loss"), "model.loss")
        sections["loss"] = parse(LossOptions, values, "model.loss")
    if plain.get("auxiliary") is not None:
        sections["auxiliary"] = tuple(
            parse(AuxiliaryOptions, _with_terms(mapping(value, where), where), where)
            for where, value in _items(plain.pop("auxiliary"), "model.auxiliary")
        )
    for name in ("backbone", "decoder", "pointrend", "loss", "auxiliary"):
        if name in plain and plain[name] is None:  # an empty section in YAML
            del plain[name]
    options = dataclasses.replace(parse(ModelOptions, plain, "model"), **sections)
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
        term = {"name": value} if isinstance(value, str) else mapping(value, at)
        name = term.get("name", "cross_entropy")
        if name not in LOSS_TERMS:
            known = ", ".join(LOSS_TERMS)
            raise ValueError(f"{at}.name must be one of {known}, got {name!r}{did_you_mean(name, LOSS_TERMS)}")
        terms.append(parse(LOSS_TERMS[name], term, at))
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
