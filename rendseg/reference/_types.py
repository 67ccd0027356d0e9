"""The types of arguments, from the annotations of a function: one line that names the argument, what was wanted and
what arrived."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Generator, Tensor

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, with the types of its arguments checked before each call."""
    wrong = _checker(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            message = wrong(args, kwargs)
            if message:
                raise TypeError(message)
        return function(*args, **kwargs)

    return call


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which refuses wrong types by itself; they are looked at only after that, so that a call that
    succeeds costs the same."""
    wrong = _checker(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception:
            message = wrong(args, kwargs)
            if not message:
                raise
        raise TypeError(message)

    return call


class _Kind(NamedTuple):
    wanted: str
    fits: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    if isinstance(value, (int, torch.SymInt)):
        return -(2**63) <= value < 2**63 if isinstance(value, int) else True
    try:
        operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        return False
    return True


def _is_number(value: Any) -> bool:
    known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    return known or (hasattr(type(value), "__float__") and not isinstance(value, Tensor))


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)  # UTF-8 has none of these


_KINDS: dict[Any, _Kind] = {
    Tensor: _Kind("a tensor", lambda value: isinstance(value, Tensor) and not value.is_nested),
    Generator: _Kind("a torch.Generator", lambda value: isinstance(value, Generator)),
    int: _Kind("a 64-bit integer", _is_integer),
    float: _Kind("a number", _is_number),
    bool: _Kind("True or False", lambda value: hasattr(type(value), "__bool__")),  # as the dispatcher of PyTorch
    str: _Kind("a string", _is_string),
    type(None): _Kind("None", lambda value: value is None),
    Callable: _Kind("callable", callable),
}


def _kinds(hint: Any) -> list[_Kind]:
    if hint in _KINDS:
        return [_KINDS[hint]]
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Callable:
        return [_KINDS[Callable]]
    if origin is Sequence:
        (item,) = _kinds(inside[0])

        def fits(value: Any) -> bool:
            if isinstance(value, (str, bytes, Tensor, dict)) or not isinstance(value, Iterable):
                return False
            return isinstance(value, Iterator) or all(map(item.fits, value))  # an iterator could be read once only

        return [_Kind(f"a list of {item.wanted.removeprefix('a ')}s", fits)]
    return [kind for part in inside for kind in _kinds(part)]  # a union


def _type_name(value: Any) -> str:
    return "nested tensor" if isinstance(value, Tensor) and value.is_nested else type(value).__name__


def _words(value: Any) -> str:
    if value is None or isinstance(value, (int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {' and '.join(sorted({_type_name(item) for item in value}))}"
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _checker(function: Callable[..., Any]) -> Callable[[Sequence[Any], dict[str, Any]], str]:
    """``wrong(args, kwargs)``: what to say of the first argument of a wrong type, or nothing."""
    hints = get_type_hints(function)
    kinds = {name: _kinds(hints[name]) for name in inspect.signature(function).parameters}

    def wrong(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        named = {name: value for name, value in kwargs.items() if name in kinds}
        for name, value in (*zip(kinds, args, strict=False), *named.items()):
            if not any(kind.fits(value) for kind in kinds[name]):
                return f"{name} must be {' or '.join(kind.wanted for kind in kinds[name])}, got {_words(value)}"
        return ""

    return wrong
