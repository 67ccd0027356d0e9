"""The base of all options: frozen dataclasses, read from plain mappings and checked by pydantic.

Without pydantic (a machine that only runs networks) the classes and their defaults are the same, and values are taken
as they are. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from typing_extensions import dataclass_transform

from ._nearest import did_you_mean, nearest

if TYPE_CHECKING:
    from pydantic import Field, ValidationError
    from pydantic.dataclasses import dataclass as _checked
else:
    try:
        from pydantic import Field, ValidationError
        from pydantic.dataclasses import dataclass as _checked
    except ImportError:

        def Field(**limits: Any) -> None:
            """No limits."""

        class ValidationError(ValueError):
            """Never raised."""

        _checked = None

Flag = Annotated[bool, Field(strict=True)]
LARGEST = 2**53  # a larger integer is a slip, and is not exact as a float
Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Whole = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
class Options:
    """A subclass becomes a frozen dataclass of keyword arguments. ``__post_init__`` checks what types cannot exclude
    and raises ``ValueError``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _checked is None:
            dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        else:
            _checked(cls, frozen=True, kw_only=True, config={"extra": "forbid"})


O = TypeVar("O", bound=Options)  # noqa: E741


def read(kind: type[O], values: Any, where: str = "", start: O | None = None) -> O:
    """``kind`` (or a copy of ``start``) with ``values`` set; ``where`` is the section that errors name.

    Errors: one line, ``TypeError`` for a value of the wrong type, else ``ValueError``.
    """
    values = {str(key): value for key, value in mapping(values, where).items()}
    try:
        return kind(**values) if start is None else dataclasses.replace(start, **values)  # type: ignore[type-var]
    except ValidationError as error:
        problem = problems(error, kind, values)[0]
        text = problem.text(".".join(filter(None, (where, problem.key))))
        raise (TypeError if problem.kind == "type" else ValueError)(text) from None


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """``value``, or the fields of options; ``TypeError`` unless it is a mapping."""
    if isinstance(value, Options):
        value = dataclasses.asdict(value)  # type: ignore[call-overload]
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def field_names(kind: type[Options] | Options) -> list[str]:
    """The keys of a section."""
    return [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]


def filled(options: O, values: Mapping[str, Any]) -> O:
    """``options`` with those of ``values`` whose field is ``None``."""
    return dataclasses.replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})  # type: ignore[type-var]


def all_keys(section: type[Options], prefix: str = "") -> list[str]:
    """Every dotted key of a section and the sections in it."""
    return [key for name in field_names(section) for key in (prefix + name, *_inner_keys(section, prefix, name))]


def _inner_keys(section: type[Options], prefix: str, name: str) -> list[str]:
    inner = _section_of(_fields(section)[name].annotation)
    return [] if inner is None else all_keys(inner, f"{prefix}{name}.")


class Problem(NamedTuple):
    """One thing that is wrong with a section."""

    kind: Literal["unknown", "missing", "type", "value"]
    key: str
    """Dotted; ``""``: the section as a whole."""
    message: str
    """What follows the key."""

    def text(self, name: str) -> str:
        """The whole message, with ``name`` for the key."""
        if self.kind == "unknown":
            return f"unknown key {name}{self.message}"
        return f"{name}{self.message}" if name else self.message.removeprefix(": ")


def problems(error: ValidationError, kind: type[Options], values: Mapping[str, Any]) -> list[Problem]:
    """What pydantic found in ``values``, unknown keys first because they often cause the rest."""
    found: dict[str, Problem] = {}
    for entry in error.errors():
        problem = _problem(entry, kind, values)
        if problem.key not in found or found[problem.key].kind == "type":  # of several types, the one that nearly fits
            found[problem.key] = problem
    return sorted(found.values(), key=lambda problem: problem.kind != "unknown")


def _problem(entry: Any, root: type[Options], values: Any) -> Problem:
    section, field, value = root, None, values
    path: list[str] = []
    for part in map(str, entry["loc"]):
        inner = section if field is None else _section_of(field.annotation)
        if inner is None:
            break
        section, field = inner, _fields(inner).get(part)
        value = value.get(part) if isinstance(value, Mapping) else value
        path.append(part)
    key, sort, got = ".".join(path), entry["type"], f", got {value!r}"
    if sort in ("unexpected_keyword_argument", "extra_forbidden"):
        return Problem("unknown", key, _nearest_key(path, section, root))
    if sort == "missing" and len(path) == len(entry["loc"]):
        return Problem("missing", key, " is missing")
    if field is None or sort in ("value_error", "assertion_error"):
        message = entry["msg"].removeprefix("Value error, ")
        return Problem("value", key, f": {message}{'' if field is None or ', got ' in message else got}")
    if sort in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        limits = dict(_limits(field.annotation, field.metadata))
        if limits.get("le") == LARGEST and sort != "less_than_equal":
            del limits["le"]
        return Problem("value", key, f" must {_range(limits)}{got}")
    if sort == "finite_number":
        return Problem("value", key, f" must be finite{got}")
    if sort in ("too_short", "string_too_short", "string_pattern_mismatch"):
        return Problem("value", key, f": {entry['msg'][:1].lower()}{entry['msg'][1:]}{got}")
    choices = [choice for choice in _choices(field.annotation) if isinstance(value, str)]
    close = did_you_mean(value, choices) if choices else ""
    return Problem("value" if choices else "type", key, f" must be {_describe(field.annotation)}{got}{close}")


def _nearest_key(path: list[str], section: type[Options], root: type[Options]) -> str:
    """The nearest key of the same section, else of all; or the known ones."""
    name, everywhere = path[-1], all_keys(root)
    inside = nearest(name, field_names(section))
    begins = inside is not None and inside.startswith(name)
    near = None if begins else next((key for key in everywhere if key.split(".")[-1] == name), None)
    if near is None and inside is not None:
        near = ".".join([*path[:-1], inside])
    if near is None:  # of another section: less likely, and so more alike
        tails = {key.split(".")[-1]: key for key in everywhere}
        near = tails.get(nearest(name, tails, 0.6) or "")
    return f"; known: {', '.join(field_names(section))}" if near is None else f"; did you mean {near!r}?"


def _fields(section: type[Options]) -> dict[str, Any]:
    return section.__pydantic_fields__  # type: ignore[attr-defined]


def _section_of(hint: Any) -> type[Options] | None:
    parts = (hint, *typing.get_args(hint))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Options)), None)


def _describe(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    if origin in (tuple, list):
        return f"a list of {_describe(args[0])}"
    if origin is dict or _section_of(hint):
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", "?"))


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _limits(hint: Any, metadata: Sequence[Any] = ()) -> Iterator[tuple[str, Any]]:
    """The limits of the numbers in a type: ``ge``, ``gt``, ``le`` and ``lt``, and ``float`` for such numbers."""
    for part in typing.get_args(hint):
        yield from _limits(part)
    for item in (*metadata, *(m for info in getattr(hint, "__metadata__", ()) for m in getattr(info, "metadata", ()))):
        yield from ((name, getattr(item, name)) for name in ("ge", "gt", "le", "lt") if hasattr(item, name))
    if hint is float:
        yield "float", True


def _range(limits: Mapping[str, Any]) -> str:
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        if high == LARGEST:
            return "be at most 2^53"
        return f"lie in {'[' if 'ge' in limits else '('}{low:g}, {high:g}{']' if 'le' in limits else ')'}"
    if low is None:
        return f"be {'at most' if 'le' in limits else 'below'} {high}"
    if "gt" in limits:
        return "be positive" if low == 0 else f"be above {low}"
    if "float" in limits:
        return "be finite and not negative" if low == 0 else f"be at least {low} and finite"
    return f"be at least {low}"
