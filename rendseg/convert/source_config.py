"""Configurations of other frameworks, read as data: ``.py`` of mmsegmentation (literals alone, nothing is executed),
YAML of detectron2 and PaddleSeg, JSON of transformers."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .containers import read_json
from .errors import ConversionError

MISSING = object()
_DEEPEST = 20  # of files that build on one another


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a file and in those that it builds on."""
    return _read(path, 0)


def _read(path: Path, depth: int) -> dict[str, Any]:
    if depth > _DEEPEST:
        raise ConversionError(f"{path}: configurations build on one another without an end")
    try:
        if path.suffix == ".json":
            return read_json(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from None
    own = literals(text, path) if path.suffix == ".py" else _yaml(text, path)
    bases = own.pop("_base_", own.pop("_BASE_", ()))
    result: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        file = path.parent / str(base)
        if not file.is_file():
            raise ConversionError(f"{path} builds on {base}, which is not there: give a configuration that is whole")
        result = _merged(result, _read(file, depth + 1))
    return _merged(result, own)


def _merged(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``, as all these frameworks do."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping) or over.get("_delete_"):
        return {key: value for key, value in over.items() if key != "_delete_"} if isinstance(over, Mapping) else over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a mapping, got a {type(content).__name__}")
    return content


def literals(text: str, path: object) -> dict[str, Any]:
    """The assignments of a Python file whose values are literals, ``dict(...)`` of them or names given before."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConversionError(f"{path} is not readable Python: {error}") from None
    names: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, names)
            if value is not MISSING:
                names[node.targets[0].id] = value
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression; ``MISSING``: it is more than a literal."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id, MISSING)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else MISSING
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = [
            (None if key is None else _value(key, names), _value(v, names))
            for key, v in zip(node.keys, node.values, strict=True)
        ]
        return {key: value for key, value in pairs if isinstance(key, str) and value is not MISSING}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        given = ((word.arg, _value(word.value, names)) for word in node.keywords)
        return {key: value for key, value in given if key is not None and value is not MISSING}
    return MISSING


def lookup(config: Any, path: str) -> Any:
    """The value at ``a.b.c``; a list on the way stands for its first item. ``MISSING`` or null: there is none."""
    for key in path.split("."):
        while isinstance(config, list):
            config = config[0] if config else MISSING
        if not isinstance(config, Mapping) or config.get(key) is None:
            return MISSING
        config = config[key]
    return config
