"""Decoders by name: a decoder is an options class and a function that builds it, registered together."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .options import DecoderOptions

if TYPE_CHECKING:
    from .backbones import Backbone
    from .decoder import Decoder

    Builder = Callable[[Any, Backbone, int], Decoder]
    B = TypeVar("B", bound=Builder)

_DECODERS: dict[str, tuple[type[DecoderOptions], Builder]] = {}


def register_decoder(name: str, options: type[DecoderOptions]) -> Callable[[B], B]:
    """Register ``builder(options, backbone, num_classes) -> Decoder`` under ``name``; a decorator.

    ``options`` is a frozen dataclass derived from ``DecoderOptions``: its fields are the keys that ``model.decoder``
    accepts. Fields called ``norm``, ``neck_norm``, ``top_down`` or ``level_order`` that are ``None`` are filled in from
    the PointRend preset.
    """
    if not issubclass(options, DecoderOptions):
        raise TypeError(f"options must derive from DecoderOptions, got {options.__name__}")
    if name in _DECODERS:
        raise ValueError(f"a decoder called {name!r} is registered already")

    def add(builder: B) -> B:
        _DECODERS[name] = (options, builder)
        return builder

    return add


def arguments(options: DecoderOptions, *without: str) -> dict[str, Any]:
    """The fields of ``options`` as keyword arguments for its decoder, except ``name`` and those of ``without``."""
    fields = dataclasses.fields(options)
    return {f.name: getattr(options, f.name) for f in fields if f.name not in ("name", *without)}


def with_preset(options: DecoderOptions, preset: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``preset``, each with the value in ``options`` unless that is ``None``."""
    return {key: value if getattr(options, key) is None else getattr(options, key) for key, value in preset.items()}


def decoder_names() -> list[str]:
    return sorted(_DECODERS)


def _entry(name: str) -> tuple[type[DecoderOptions], Builder]:
    if name not in _DECODERS:
        close = difflib.get_close_matches(str(name), _DECODERS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model.decoder.name must be one of {', '.join(decoder_names())}, got {name!r}{hint}")
    return _DECODERS[name]


def decoder_options_class(name: str) -> type[DecoderOptions]:
    return _entry(name)[0]


def build_decoder(options: DecoderOptions, backbone: Backbone, num_classes: int) -> Decoder:
    """The decoder registered under ``options.name``."""
    kind, builder = _entry(options.name)
    if not isinstance(options, kind):
        raise TypeError(f"decoder {options.name!r} takes {kind.__name__}, got {type(options).__name__}")
    return builder(options, backbone, num_classes)
