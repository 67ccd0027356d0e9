"""Plain mappings, as read from YAML, into frozen dataclasses: every value is checked against the type of its field, and
an unknown key is an error that names the nearest one. ``dataclasses.asdict`` gives the mapping back.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from .._nearest import did_you_mean

T = TypeVar("T")


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def parse(kind: type[T], values: Mapping[str, Any], where: str, start: T | None = None) -> T:
    """``kind`` (or the instance ``start``) with ``values`` set, each checked against the type of its field."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown key {where}.{key}{did_you_mean(key, known)} (known keys: {', '.join(known)})")
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
    near = did_you_mean(value, _choices(hint)) if literal and isinstance(value, str) else ""
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
