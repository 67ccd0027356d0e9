"""Decoders by name: a decoder is an options class and a function that builds it, registered together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .._discover import import_modules
from .._nearest import did_you_mean
from .options import DecoderOptions

if TYPE_CHECKING:
    from .backbones import Backbone
    from .decoder import Decoder
    from .segmenter import Segmenter

    Builder = Callable[[Any, Backbone, int], Decoder]
    B = TypeVar("B", bound=Builder)

_DECODERS: dict[str, _Entry] = {}


class _Entry(NamedTuple):
    options: type[DecoderOptions]
    builder: Builder
    models: dict[str, type[Segmenter]]


def register_decoder(
    name: str,
    options: type[DecoderOptions],
    *,
    segmenter: type[Segmenter] | None = None,
    pointrend: type[Segmenter] | None = None,
) -> Callable[[B], B]:
    """Register ``builder(options, backbone, num_classes) -> Decoder`` under ``name``; a decorator.

    ``options`` derives from ``DecoderOptions``: its fields are the keys that ``model.decoder`` accepts. Fields called
    ``norm``, ``neck_norm``, ``top_down`` or ``level_order`` that are ``None`` are filled in from the PointRend preset.
    ``segmenter`` and ``pointrend`` wrap the decoder instead of ``Segmenter`` and ``PointRend``, with the
    same arguments.
    """
    if not issubclass(options, DecoderOptions):
        raise TypeError(f"options must derive from DecoderOptions, got {options.__name__}")
    if name in _DECODERS:
        raise ValueError(f"a decoder called {name!r} is registered already")

    def add(builder: B) -> B:
        models = {"segmenter": segmenter, "pointrend": pointrend}
        _DECODERS[name] = _Entry(options, builder, {key: kind for key, kind in models.items() if kind is not None})
        return builder

    return add


def decoder_names() -> list[str]:
    import_modules(__package__)
    return sorted(_DECODERS)


def _entry(name: str) -> _Entry:
    import_modules(__package__)
    if name not in _DECODERS:
        names = decoder_names()
        hint = did_you_mean(name, names)
        raise ValueError(f"model.decoder.name must be one of {', '.join(names)}, got {name!r}{hint}")
    return _DECODERS[name]


def decoder_options_class(name: str) -> type[DecoderOptions]:
    return _entry(name).options


def model_classes(name: str) -> dict[str, type[Segmenter]]:
    """By ``model.name``: what wraps this decoder where it is not the usual class."""
    return _entry(name).models


def build_decoder(options: DecoderOptions, backbone: Backbone, num_classes: int) -> Decoder:
    """The decoder registered under ``options.name``."""
    kind, builder, _ = _entry(options.name)
    if not isinstance(options, kind):
        raise TypeError(f"decoder {options.name!r} takes {kind.__name__}, got {type(options).__name__}")
    return builder(options, backbone, num_classes)
