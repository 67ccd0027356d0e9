"""Rules that rename tensors, and the engine that applies them in both directions.

A rule is ``(theirs, ours)`` or ``(theirs, ours, change)``. In a pattern ``{i}`` stands for a whole number, ``{i+2}``
and ``{5-i}`` for one computed from it, and ``*`` for the rest of the name. The first rule that fits is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError


class Change(NamedTuple):
    """What happens to a tensor besides the name; ``there(back(x)) == x``."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    part: int = 0
    parts: int = 1
    """The tensor is the ``part``-th of ``parts`` that are joined along the first axis."""
    subtract: bool = False
    """The tensor is subtracted from what another rule gives for the same name."""


def _same(x: Tensor) -> Tensor:
    return x


SAME = Change(_same, _same)
TRANSPOSE = Change(Tensor.t, Tensor.t)
FOLD = Change(_same, _same, subtract=True)
"""The bias of a convolution before a batch norm, which is as good as a smaller running mean."""
QUERY, KEY, VALUE = (Change(_same, _same, part, 3) for part in range(3))
# Swin joins 2 x 2 cells: [C, 4] with the cells column by column there, [4, C] row by row here.
_CELLS = (0, 2, 1, 3)


def _merge_there(x: Tensor) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // 4, 4))[..., list(_CELLS)].transpose(-1, -2).flatten(-2)


def _merge_back(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, x.shape[-1] // 4)).transpose(-1, -2)[..., list(_CELLS)].flatten(-2)


MERGE = Change(_merge_there, _merge_back)
# ASPP: image pooling first there, last here; each branch has as many channels as the result.
POOL_LAST = Change(lambda x: x.roll(-x.shape[0], 1), lambda x: x.roll(x.shape[0], 1))

Rule = tuple[str, str] | tuple[str, str, Change]

_PIECE = re.compile(r"\{(?:(\d+)-)?([a-z])(?:\+(\d+))?\}|(\*)")


@cache
def _pattern(text: str) -> tuple[re.Pattern[str], dict[str, tuple[int, int]]]:
    """The regular expression of a pattern; for each letter sign and offset: its number is ``sign * value + offset``."""
    regex, signs, end = "", {}, 0
    for piece in _PIECE.finditer(text):
        less, letter, more, rest = piece.groups()
        regex += re.escape(text[end : piece.start()])
        end = piece.end()
        if rest:
            regex += "(?P<rest>.+)"
            continue
        regex += rf"(?P<{letter}>\d{{1,6}})"
        signs[letter] = (-1, int(less)) if less else (1, int(more or 0))
    return re.compile(regex + re.escape(text[end:])), signs


def matched(text: str, name: str) -> dict[str, str] | None:
    """The values of a pattern's letters, and its ``rest``, in a name; None: it does not fit."""
    regex, signs = _pattern(text)
    found = regex.fullmatch(name)
    if found is None:
        return None
    values = dict(found.groupdict())
    for letter, (sign, offset) in signs.items():
        value = sign * (int(values[letter]) - offset)
        if value < 0:
            return None
        values[letter] = str(value)
    return values


def filled(text: str, values: Mapping[str, str]) -> str | None:
    """The name that a pattern gives for these values; None: a number would be negative."""

    def one(piece: re.Match[str]) -> str:
        less, letter, more, rest = piece.groups()
        if rest:
            return values["rest"]
        number = int(less) - int(values[letter]) if less else int(values[letter]) + int(more or 0)
        return str(number) if number >= 0 else "\0"

    name = _PIECE.sub(one, text)
    return None if "\0" in name else name


def renamed(rules: Sequence[Rule], name: str) -> tuple[str, Change] | None:
    """The name that the first fitting rule gives, and the change; None: no rule fits."""
    for rule in rules:
        values = matched(rule[0], name)
        if values is None:
            continue
        target = filled(rule[1], values)
        if target is not None:
            return target, rule[2] if len(rule) == 3 else SAME
    return None


def reversed_rules(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The same rules the other way round; those that only subtract have nothing to give back."""
    for theirs, ours, *change in rules:
        if not change:
            yield ours, theirs
        elif not change[0].subtract:
            yield ours, theirs, change[0]._replace(there=change[0].back, back=change[0].there)


class Applied(NamedTuple):
    """What came of a set of tensors."""

    tensors: dict[str, Tensor]
    dead: list[str]
    left: list[str]
    """Names that no rule knows."""


def apply(rules: Sequence[Rule], dead: Sequence[str], tensors: Mapping[str, Tensor], path: object) -> Applied:
    """``tensors`` under our names. ``dead`` are patterns of what is known to have no effect."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    subtracted: dict[str, Tensor] = {}
    ignored, left = [], []
    for name, tensor in tensors.items():
        if any(matched(pattern, name) is not None for pattern in dead):
            ignored.append(name)
            continue
        found = renamed(rules, name)
        if found is None:
            left.append(name)
            continue
        target, change = found
        try:
            value = change.there(tensor)
        except (RuntimeError, IndexError, ValueError):
            raise ConversionError(f"{path}: {name} has an unexpected shape, {list(tensor.shape)}") from None
        if change.subtract:
            subtracted[target] = value
        elif change.parts > 1:
            parts.setdefault(target, {})[change.part] = value
            if len(parts[target]) == change.parts:
                result[target] = torch.cat([parts[target][i] for i in range(change.parts)])
        elif target in result:
            raise ConversionError(f"{path}: two tensors are {target}, the second of them {name}")
        else:
            result[target] = value
    incomplete = [name for name in parts if name not in result]
    if incomplete:
        raise ConversionError(f"{path}: a part of {incomplete[0]} is missing")
    for name, bias in subtracted.items():
        if name not in result:
            raise ConversionError(f"{path}: {name} is missing")
        result[name] = result[name] - bias
    return Applied(result, ignored, left)


def split(rules: Sequence[Rule], tensors: Mapping[str, Tensor], path: object) -> Applied:
    """``tensors`` of ours under their names: ``apply`` the other way round."""
    backward = list(reversed_rules(rules))
    joined = [rule for rule in backward if len(rule) == 3 and rule[2].parts > 1]
    result = apply([rule for rule in backward if rule not in joined], (), tensors, path)
    left = []
    for name in result.left:
        targets = [(filled(rule[1], values), rule[2]) for rule in joined if (values := matched(rule[0], name))]
        if not targets:
            left.append(name)
        for target, change in targets:
            assert target is not None
            result.tensors[target] = tensors[name].chunk(change.parts)[change.part]
    return result._replace(left=left)
