"""The ``model`` section of a configuration as typed options, with what the presets say filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from .._nearest import did_you_mean
from .._options import Count, Field, Flag, Options, field_names, filled, mapping, read
from .options import (
    LOSS_TERMS,
    PRESET_PARTS,
    AuxiliaryOptions,
    BackboneOptions,
    DecoderOptions,
    LossOptions,
    LossTerm,
    LovaszTerm,
    MaskOptions,
    PointRendOptions,
    PointRendRCNNOptions,
    around,
    preset_switches,
)
from .registry import decoder_options_class
from .resnet_stride4 import STRIDE4


class ModelOptions(Options):
    """The ``model`` section."""

    name: Literal["pointrend", "segmenter", "pointrend_rcnn"] = "pointrend"
    backbone: BackboneOptions = BackboneOptions()
    decoder: DecoderOptions = dataclasses.field(default_factory=lambda: decoder_options_class("semantic_fpn")())
    pointrend: PointRendOptions = PointRendOptions()
    loss: LossOptions = LossOptions()
    auxiliary: tuple[AuxiliaryOptions, ...] = ()
    pad: Literal["stride", "none"] | Count | None = None
    """Fill images up, right and below, to what the strides need (``stride``), or to a multiple of a number too; or
    ``none``: maps are resized to the exact size of the next finer one, and logits to that of the image. ``None``: as
    ``pointrend.preset`` says, or, where that is rendseg, ``decoder.preset``."""
    norm_momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of the running statistics of every batch norm. ``None``: csail 0.001, else as the layers have it."""
    checkpoint: str | None = None
    """A checkpoint (of a run, or converted) whose weights training starts from. A classifier of another number of
    classes keeps its random weights."""
    channels_last: Flag = True


def parse_options(
    config: Mapping[str, Any] | ModelOptions | PointRendRCNNOptions,
) -> ModelOptions | PointRendRCNNOptions:
    """The ``model`` section (or a mapping whose only key is ``model``) as resolved :class:`ModelOptions`, or, with the
    name ``pointrend_rcnn``, :class:`PointRendRCNNOptions`.

    Values left ``None`` are filled in from the preset. Parsing ``dataclasses.asdict`` of the result gives an equal
    result. Errors: ``ValueError`` for an unknown key (naming the nearest) or value, ``TypeError`` for a value of the
    wrong type.
    """
    plain = mapping(config, "model")
    if set(plain) == {"model"}:
        plain = mapping(plain["model"], "model")
    if plain.get("name") == "pointrend_rcnn":
        return _fill_detector(
            read(PointRendRCNNOptions, _parsed(plain, {"backbone": _backbone, "mask": _mask}), "model")
        )
    sections = {"backbone": _backbone, "decoder": _decoder, "pointrend": _pointrend, "loss": _loss, "auxiliary": _heads}
    options = read(ModelOptions, _parsed(plain, sections), "model")
    if options.loss.normalize == "global":
        _check_global(options.loss.terms, "model.loss")
        for i, head in enumerate(options.auxiliary):
            _check_global(head.terms, f"model.auxiliary[{i}]")
    return _fill(options)


def _parsed(plain: Mapping[str, Any], sections: Mapping[str, Callable[[Any, str], Any]]) -> dict[str, Any]:
    """``plain`` with its sections read."""
    # an empty section in YAML is None
    values = {key: value for key, value in plain.items() if key not in sections or value is not None}
    return values | {key: parse(values[key], f"model.{key}") for key, parse in sections.items() if key in values}


def _mask(value: Any, where: str) -> MaskOptions:
    return read(MaskOptions, value, where)


def _backbone(value: Any, where: str) -> BackboneOptions:
    return read(BackboneOptions, value, where)


def _decoder(value: Any, where: str) -> DecoderOptions:
    return read(decoder_options_class(mapping(value, where).get("name", "semantic_fpn")), value, where)


def _pointrend(value: Any, where: str) -> PointRendOptions:
    preset = mapping(value, where).get("preset", "rendseg")
    return read(PointRendOptions, value, where, preset_switches(preset, f"{where}.preset"))


def _loss(value: Any, where: str) -> LossOptions:
    return read(LossOptions, _with_terms(value, where), where)


def _heads(value: Any, where: str) -> tuple[AuxiliaryOptions, ...]:
    heads = tuple(read(AuxiliaryOptions, _with_terms(item, at), at) for at, item in _items(value, where))
    levels = [head.level for head in heads]
    if twice := [level for level in levels if levels.count(level) > 1]:
        raise ValueError(f"{where} has two heads on {twice[0]}")
    return heads


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    """``(where, item)`` of a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where} must be a list, got {type(value).__name__}")
    return [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def _with_terms(value: Any, where: str) -> dict[str, Any]:
    """``value`` with its ``terms`` (mappings, or names alone) read into their classes."""
    plain = dict(mapping(value, where))
    if plain.get("terms") is None:
        plain.pop("terms", None)
        return plain
    terms = []
    for at, item in _items(plain["terms"], f"{where}.terms"):
        term = {"name": item} if isinstance(item, str) else mapping(item, at)
        name = term.get("name", "cross_entropy")
        if name not in LOSS_TERMS:
            known = ", ".join(LOSS_TERMS)
            raise ValueError(f"{at}.name must be one of {known}, got {name!r}{did_you_mean(name, LOSS_TERMS)}")
        terms.append(read(LOSS_TERMS[name], term, at))
    return {**plain, "terms": tuple(terms)}


def _check_global(terms: Sequence[LossTerm], where: str) -> None:
    for i, term in enumerate(terms):
        if isinstance(term, LovaszTerm) and not term.per_image:
            raise ValueError(
                f"{where}.terms[{i}]: lovasz sorts the pixels of one process, so that model.loss.normalize: global "
                "needs per_image: true"
            )


def _fill_detector(options: PointRendRCNNOptions) -> PointRendRCNNOptions:
    """Norms are fixed where weights are loaded, as in detectron2 and torchvision."""
    backbone = options.backbone
    weights = backbone.pretrained or backbone.checkpoint is not None
    switches = {"output_stride": 32, "freeze_norm": weights, **around("rendseg", backbone)[1]}
    return dataclasses.replace(options, backbone=filled(backbone, switches))


def _fill(options: ModelOptions) -> ModelOptions:
    parts, backbone, decoder = PRESET_PARTS[options.pointrend.preset], options.backbone, options.decoder
    preset = options.pointrend.preset
    model, switches = around(getattr(decoder, "preset", preset) if preset == "rendseg" else preset, backbone)
    changes = {**parts["backbone"], **switches}
    if backbone.name in STRIDE4:
        changes["output_stride"] = 4
    if not backbone.pretrained and backbone.checkpoint is None:
        changes["freeze_norm"] = False  # nothing is loaded that is worth keeping
    known = field_names(decoder)
    decoder = filled(decoder, {key: value for key, value in parts["decoder"].items() if key in known})
    norm = getattr(decoder, "norm", None)
    heads = tuple(filled(head, {"norm": "bn" if norm in (None, "none") else norm}) for head in options.auxiliary)
    options = dataclasses.replace(options, backbone=filled(backbone, changes), decoder=decoder, auxiliary=heads)
    return filled(options, model)
