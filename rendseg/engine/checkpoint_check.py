"""What each field of a checkpoint must be; :func:`problem` names the first one that is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Check = Callable[[Any], bool]


def _whole(low: int, high: int = 2**62) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _palette(value: Any) -> bool:
    byte = _whole(0, 255)
    return isinstance(value, list) and all(
        isinstance(color, list) and len(color) == 3 and all(map(byte, color)) for color in value
    )


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(_mapping(row) and _whole(0)(row.get("iteration")) for row in value)


def _sums(value: Any) -> bool:
    return _mapping(value) and all(map(_number, value.values()))


# Dotted name, whether it must be there, what is wanted, check.
_FIELDS: tuple[tuple[str, bool, str, Check], ...] = (
    ("config", True, "a mapping", _mapping),
    ("rendseg", False, "a text", lambda value: isinstance(value, str)),
    ("classes", True, "a mapping", _mapping),
    ("classes.names", True, "a list of names", _texts),
    ("classes.palette", True, "a list of [red, green, blue] from 0 to 255", _palette),
    ("classes.ignore_index", True, "a whole number", _whole(-(2**62))),
    ("classes.ids", False, "a list of whole numbers", lambda v: isinstance(v, list) and all(map(_whole(0), v))),
    ("model", True, "a mapping of tensors", _mapping),
    ("training", True, "a mapping", _mapping),
    ("training.progress", True, "a mapping", _mapping),
    ("training.progress.iteration", True, "a whole number, 0 or more", _whole(0)),
    ("training.progress.samples", False, "a whole number, 0 or more", _whole(0)),
    ("training.progress.seconds", False, "a number, 0 or more", lambda value: _number(value) and value >= 0),
    ("training.progress.best", False, "a number from -1 to 1", lambda value: _number(value) and -1 <= value <= 1),
    ("training.progress.history", False, "a list of rows with an iteration", _rows),
    ("training.progress.evaluations", False, "a list of rows with an iteration", _rows),
    ("training.progress.window", False, "a mapping of numbers", _sums),
    ("training.progress.window_size", False, "a whole number, 0 or more", _whole(0)),
    ("training.optimizer", False, "a mapping", _mapping),
    ("training.optimizer.state", False, "a mapping", lambda value: isinstance(value, Mapping)),
    ("training.optimizer.param_groups", False, "a list", lambda value: isinstance(value, list)),
    ("training.scaler", False, "a mapping of numbers, or nothing", lambda value: value is None or _sums(value)),
    ("training.rng", False, "a list with a state for each process", lambda v: isinstance(v, list) and len(v) > 0),
)
PROGRESS = frozenset(name.split(".")[2] for name, *_ in _FIELDS if name.count(".") == 2 and ".progress." in name)


def problem(contents: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint's contents, with the field's name; None if nothing is."""
    for name, needed, wanted, check in _FIELDS:
        *parents, last = name.split(".")
        holder: Any = contents
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, Mapping) else None
        if not isinstance(holder, Mapping):
            continue  # an optional part that is not there; what is there has been checked
        if last not in holder:
            if needed:
                return f"it has no {name}"
        elif not check(holder[last]):
            return f"{name} must be {wanted}, got {_shown(holder[last])}"
    return _progress(contents) or _tensors(contents) or _rng(contents["training"].get("rng", []))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    text = repr(value) if isinstance(value, (int, float, str, list, dict, type(None))) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _progress(contents: Mapping[str, Any]) -> str | None:
    classes, progress = contents["classes"], contents["training"]["progress"]
    if len(classes["palette"]) != len(classes["names"]):
        return f"classes.palette has {len(classes['palette'])} colours for {len(classes['names'])} names"
    if len(classes.get("ids", classes["names"])) != len(classes["names"]):
        return f"classes.ids has {len(classes['ids'])} numbers for {len(classes['names'])} names"
    unknown = sorted(set(progress) - PROGRESS)
    if unknown:
        return f"training.progress has the unknown entry {unknown[0]!r}"
    iteration = progress["iteration"]
    train = contents["config"].get("train")
    length = train.get("iterations") if isinstance(train, Mapping) else None
    if type(length) is int and iteration > length:
        return f"training.progress.iteration is {iteration}, beyond config.train.iterations, {length}"
    if progress.get("samples", iteration) < iteration:
        return f"training.progress.samples is {progress['samples']}, less than an image for each iteration"
    if progress.get("window_size", 0) > iteration:
        return f"training.progress.window_size is {progress['window_size']}, of {iteration} iterations"
    for key in ("history", "evaluations"):
        rows = [row["iteration"] for row in progress.get(key, [])]
        if rows and max(rows) > iteration:
            return f"training.progress.{key} has iteration {max(rows)}, beyond {iteration}"
    return None


def _tensors(contents: Mapping[str, Any]) -> str | None:
    for key, value in contents["model"].items():
        if wrong := _tensor(value):
            return f"model.{key} {wrong}"
    optimizer = contents["training"].get("optimizer", {})
    for i, group in enumerate(optimizer.get("param_groups", [])):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list) or not all(map(_whole(0), numbers)):
            return f"training.optimizer.param_groups.{i}.params must be a list of whole numbers, got {_shown(numbers)}"
    for index, entries in optimizer.get("state", {}).items():
        name = f"training.optimizer.state.{index}"
        if not _whole(0)(index) or not isinstance(entries, Mapping):
            return f"{name} must be a parameter's number with a mapping, got {_shown(entries)}"
        for key, value in entries.items():
            wrong = _tensor(value) if isinstance(value, Tensor) or not _number(value) else None
            if wrong and value is not None:
                return f"{name}.{key} {wrong}"
    return None


def _tensor(value: Any) -> str | None:
    """What keeps ``value`` from being the numbers of a network."""
    if not isinstance(value, Tensor):
        return f"must be a tensor, got {_shown(value)}"
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        return f"must be an ordinary tensor of real numbers, got {value.dtype}, {value.layout}"
    if value.is_floating_point() and not torch.isfinite(value).all():
        return "holds NaN or infinity"
    return None


def _rng(states: list[Any]) -> str | None:
    """Random states that no generator takes."""
    for i, state in enumerate(states):
        for kind, take in (("python", _python), ("numpy", _numpy), ("torch", torch.Generator().set_state)):
            try:
                take(state[kind])
            except Exception as error:  # each generator has its own
                return f"training.rng.{i}.{kind} is no random state: {type(error).__name__}"
        if not isinstance(state.get("cuda"), (Tensor, type(None))):
            return f"training.rng.{i}.cuda is no random state"
    return None


def _python(state: Any) -> None:
    version, internal, gauss = state
    random.Random().setstate((version, tuple(internal.tolist()), gauss))
    if gauss is not None and not _number(gauss):
        raise ValueError(gauss)


def _numpy(state: Any) -> None:
    name, keys, position, has_gauss, cached = state
    np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
