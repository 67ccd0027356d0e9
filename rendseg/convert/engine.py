"""From a source's tensors to ours, and to the configuration of the network that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .containers import Source
from .errors import ConversionError
from .infer import backbone_name, detector, num_classes, options
from .registry import FORMATS, Format, Part, find_part, load_format
from .rules import Applied, apply, matched, renamed
from .source_config import MISSING, literals, lookup

_ENCODER_SIGN = "layer1.0.conv1.weight"
DETECTOR = "pointrend_rcnn"


class Model(NamedTuple):
    """A network of another framework under our names."""

    format: Format
    model: Part
    backbone: Part
    theirs: dict[str, Tensor]
    """As in the source, except prefixes and last components."""
    applied: Applied


def gather(sources: Sequence[Source], format_name: str) -> dict[str, Tensor]:
    """The tensors of one source, or of an encoder's and a decoder's."""
    wanted = load_format(format_name).files
    if len(sources) not in (1, wanted):
        names = "the files of the encoder and of the decoder" if wanted == 2 else "one file or folder"
        raise ConversionError(f"--from {format_name} takes {names}, got {len(sources)}")
    if len(sources) == 1:
        return sources[0].tensors
    encoders = [_ENCODER_SIGN in source.tensors for source in sources]
    if sorted(encoders) != [False, True]:
        raise ConversionError(f"{sources[0].path} and {sources[1].path} must be an encoder and a decoder")
    return {
        f"{'encoder' if encoder else 'decoder'}.{name}": tensor
        for source, encoder in zip(sources, encoders, strict=True)
        for name, tensor in source.tensors.items()
    }


def identify(tensors: Mapping[str, Tensor], format_name: str, path: object) -> Model:
    """The network behind ``tensors``, with all of them under our names; ``ConversionError`` names what is left."""
    form = load_format(format_name)
    theirs = form.named(tensors)
    model, backbone = find_part(form.models, theirs), find_part(form.backbones, theirs, form.prefix)
    if model is None or backbone is None:
        lacking = "model" if model is None else "backbone"
        known = ", ".join(dict.fromkeys(part.name for part in (form.models if model is None else form.backbones)))
        raise ConversionError(
            f"{path} holds no {lacking} that --from {format_name} knows ({known}); its first tensor is "
            f"{next(iter(tensors))}{_looks_like(tensors, format_name)}"
        )
    dead = [*form.dead, *model.dead, *(form.prefix + pattern for pattern in backbone.dead)]
    applied = apply(form.rules(model, backbone), dead, theirs, path)
    if applied.left:
        raise ConversionError(
            f"{path}: {len(applied.left)} tensors have no place in the {model.name} of {format_name}, first "
            f"{applied.left[0]}"
        )
    ours = {name: _plain(tensor) for name, tensor in applied.tensors.items()}
    return Model(form, model, backbone, theirs, applied._replace(tensors=ours))


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).clone(memory_format=torch.contiguous_format)


def _looks_like(tensors: Mapping[str, Tensor], asked: str) -> str:
    """A hint at the formats to which the names belong."""
    found = []
    for name in FORMATS:
        form = load_format(name)
        theirs = form.named(tensors)
        if name != asked and find_part(form.models, theirs) and find_part(form.backbones, theirs, form.prefix):
            found.append(name)
    return f"; it looks like {' or '.join(found)}" if found else ""


def source_config(sources: Sequence[Source]) -> dict[str, Any] | None:
    """The configuration that stands in the files themselves; mmsegmentation's is Python text."""
    for source in sources:
        if "config.json" in source.rest:
            return {**source.rest["config.json"], **source.rest.get("preprocessor_config.json", {})}
        meta = source.rest.get("meta")
        text = (
            next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), None)
            if isinstance(meta, dict)
            else None
        )
        if text is not None:
            return literals(text, source.path)
    return None


def configure(
    found: Model, config: Mapping[str, Any] | None, given: Mapping[str, Any], path: object
) -> tuple[dict[str, Any], int]:
    """Our dotted keys, and the number of classes. ``given`` are the keys of the command line, which win.

    Raises:
        ConversionError: with every key that is neither in the tensors, nor known, nor given.
    """
    from rendseg._options import field_names
    from rendseg.models.registry import decoder_options_class

    state, form = found.applied.tensors, found.format
    keys = {**form.settings, **found.model.settings, **found.backbone.settings}
    asks = {**form.asks, **found.model.asks, **found.backbone.asks}
    objects = keys.get("model.name") == DETECTOR
    if objects:
        keys, asks = ({key: value for key, value in of.items() if _of_objects(key)} for of in (keys, asks))
    fields = () if objects else field_names(decoder_options_class(keys["model.decoder.name"]))
    refined = keys.get("model.name") != "segmenter"
    for read in (*found.model.reads, *form.reads) if config is not None else ():
        value = lookup(config, read.path)
        value = read.default if value is MISSING else value
        if value is None or not _wanted(read.key, fields, asks, refined) or (objects and not _of_objects(read.key)):
            continue
        if isinstance(read.via, Mapping):
            if value not in read.via:
                raise ConversionError(f"{path}: {read.path} is {value!r}, which is not known here")
            value = read.via[value]
        elif read.via is not None:
            try:
                value = read.via(value)
            except ConversionError:
                raise
            except (TypeError, ValueError, AttributeError):
                raise ConversionError(f"{path}: {read.path} is {value!r}, which is not known here") from None
        keys.setdefault(read.key, value)
    keys.pop("", None)
    keys |= detector(state) if objects else options(keys["model.decoder.name"], state)
    keys |= given
    net = found.model.backbone + "net."
    if "model.backbone.name" not in keys:
        keys["model.backbone.name"] = backbone_name(state, net, path)
    missing = [f"{key} ({words})" for key, words in asks.items() if key not in keys and _needed(key, keys, state, net)]
    if missing:
        raise ConversionError(
            f"{path} leaves open {'; '.join(missing)}. Give the model's configuration with --config FILE, or these "
            "keys with --set KEY=VALUE (the normalisation with --normalize)"
        )
    _spread(keys, fields, refined)
    return keys, num_classes(state, path)


def _wanted(key: str, fields: Sequence[str], asks: Mapping[str, str], refined: bool) -> bool:
    """Whether a key of the source's configuration has a meaning for this network."""
    if key.startswith("model.backbone."):
        return key in asks
    if key.startswith("model.pointrend."):
        return refined
    return not key.startswith("model.decoder.") or key.removeprefix("model.decoder.") in fields


def _of_objects(key: str) -> bool:
    """Whether a detector has a key."""
    from rendseg._options import field_names
    from rendseg.models.options import PointRendRCNNOptions

    section, _, rest = key.partition(".")
    return section in ("", "data") or (
        section == "model" and rest.partition(".")[0] in field_names(PointRendRCNNOptions)
    )


def _needed(key: str, keys: Mapping[str, Any], state: Mapping[str, Tensor], net: str) -> bool:
    if key == "model.backbone.first_dilation":
        return keys.get("model.backbone.output_stride", 32) < 32
    if key == "model.backbone.stride_in_1x1":
        return net + "layer1.0.conv3.weight" in state
    return True


def _spread(keys: dict[str, Any], fields: Sequence[str], refined: bool) -> None:
    """Put what concerns several of our keys, or one of several, in its places."""
    aligned = keys.pop("align_corners", None)
    if aligned is not None:
        keys.setdefault("model.pointrend.upsample_align_corners", aligned)
        if "align_corners" in fields:
            keys.setdefault("model.decoder.align_corners", aligned)
        if refined:
            keys.setdefault("model.pointrend.sampling_align_corners", aligned)
    weight = keys.pop("auxiliary_weight", None)
    if weight is not None and "aux_weight" in fields:
        keys.setdefault("model.decoder.aux_weight", weight)
    for head in keys.get("model.auxiliary", ()) if weight is not None else ():
        head["weight"] = weight
    if max(map(abs, keys["data.mean"])) > 1:
        keys.setdefault("data.pixel_max", 255)


def class_list(sources: Sequence[Source], config: Mapping[str, Any] | None, count: int) -> tuple[list[str] | None, Any]:
    """Names and colours of the classes where the source has them."""
    for source in sources:
        meta = source.rest.get("meta")
        if isinstance(meta, dict):
            data: Any = meta.get("dataset_meta")
            data = data if isinstance(data, dict) else meta
            names = data.get("classes", data.get("CLASSES"))
            if isinstance(names, (list, tuple)) and len(names) == count:
                palette = data.get("palette", data.get("PALETTE"))
                return [str(name) for name in names], palette
    labels = (config or {}).get("id2label")
    if isinstance(labels, Mapping) and len(labels) == count:
        return [str(labels.get(str(i), labels.get(i))) for i in range(count)], None
    return None, None


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Sections from dotted keys."""
    result: dict[str, Any] = {}
    for key, value in keys.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


def backbone_weights(tensors: Mapping[str, Tensor], names: Sequence[str], path: str) -> dict[str, Tensor] | None:
    """The weights of a backbone alone under the names ``names`` of a timm network, from any framework; None: they are
    of none that is known, or of another network."""
    wanted = {name for name in names if not name.endswith("num_batches_tracked")}
    for format_name in FORMATS:
        form = load_format(format_name)
        theirs = form.named(tensors)
        for part in form.backbones:
            for prefix in dict.fromkeys((form.prefix, "backbone.", "")):
                own = {name: value for name, value in theirs.items() if name.startswith(prefix)}
                if find_part((part,), own, prefix) is None:
                    continue
                rules = form.backbone_rules(part, prefix, "")
                if prefix:  # of a whole model: the rest is not the backbone's
                    rest = [name for name in own if renamed(rules, name) is None]
                    own = {name: value for name, value in own.items() if name not in rest}
                applied = apply(rules, [*form.dead, *(prefix + pattern for pattern in part.dead)], own, path)
                ours = {
                    name.removeprefix("net."): value
                    for name, value in applied.tensors.items()
                    if name.startswith("net.")
                }
                for name in wanted - ours.keys():
                    number = next((n for pattern, n in part.fill.items() if matched(pattern, name)), None)
                    if number is not None and (like := ours.get(name.rpartition(".")[0] + ".weight")) is not None:
                        ours[name] = torch.full_like(like, number)
                if not applied.left and wanted <= ours.keys() and ours.keys() <= set(names):
                    return ours
    return None
