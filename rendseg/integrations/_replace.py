"""Replacing functions of other packages, and putting them back.

A function is only replaced if it can be recognised: by its source, which must be one that was compared with rendseg's,
or by its parameters together with what it computes on a small example (``_points.py``).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_ABSENT = object()
_TORCH = str(Path(torch.__file__).parent)


@dataclass
class Report:
    """What ``rendseg.patch`` replaced, and what it left alone with the reason; ``print`` shows it."""

    target: str
    version: str = ""
    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    _changes: list[tuple[Any, str, Any, Any]] = field(default_factory=list, repr=False)

    @staticmethod
    def joined(reports: Sequence[Report]) -> Report:
        return Report(
            ", ".join(report.target for report in reports),
            ", ".join(report.version for report in reports),
            [entry for report in reports for entry in report.replaced],
            [entry for report in reports for entry in report.left],
        )

    def __str__(self) -> str:
        lines = [f"{self.target} {self.version}".strip()]
        for title, entries in (("replaced", self.replaced), ("left alone", self.left)):
            lines.append(f"  {title}: {len(entries) or 'nothing'}")
            lines += [f"    {name}: {why}" for name, why in entries]
        return "\n".join(lines)

    def keep(self, name: str, why: str) -> None:
        """Note once that ``name`` was left alone."""
        if (name, why) not in self.left:
            self.left.append((name, why))


def undo(report: Report) -> None:
    for owner, name, before, after in reversed(report._changes):
        if vars(owner).get(name, _ABSENT) is not after:
            continue  # replaced once more by somebody else
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    report._changes.clear()


def name_of(owner: Any, name: str) -> str:
    path = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
    return f"{path}.{name}"


def _shape_of(node: Any) -> Any:
    """A syntax tree as nested tuples, without docstrings, annotations and places; the same for each Python."""
    if isinstance(node, list):
        return tuple(_shape_of(part) for part in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        fields["body"] = body[1:]
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return "Assign", _shape_of([node.target]), _shape_of(node.value)
    if isinstance(node, ast.Assign):
        return "Assign", _shape_of(node.targets), _shape_of(node.value)
    skipped = ("annotation", "returns", "type_comment", "type_params", "ctx", "kind", "simple")
    kept = [
        (name, _shape_of(value)) for name, value in fields.items() if name not in skipped and value not in (None, [])
    ]
    return type(node).__name__, tuple(kept)


def fingerprint(function: Any) -> str:
    """A short hash of what a function does: comments, docstrings, annotations and layout do not count.

    Decorators of torch (``no_grad``) are in the source. Any other wrapper may change what the function does.
    """
    while hasattr(function, "__wrapped__"):
        if not function.__code__.co_filename.startswith(_TORCH):
            raise TypeError(f"{function.__qualname__} is wrapped")
        function = function.__wrapped__
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(repr(_shape_of(tree)).encode()).hexdigest()[:16]


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def find_module(report: Report, name: str) -> ModuleType | None:
    """The imported module, or ``None`` with a note in the report if this version has none of that name."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        report.keep(name, f"cannot be imported ({error})")
        return None


def known(report: Report, owner: Any, name: str, *, takes: Sequence[str] = (), sources: Collection[str] = ()) -> bool:
    """Whether ``owner.name`` is there, has the parameters ``takes``, and a source among ``sources``; else a note."""
    if not hasattr(owner, name):
        report.keep(name_of(owner, name), "is not there in this version")
        return False
    function = getattr(owner, name)
    try:
        if takes and parameters(function) != tuple(takes):
            wanted = ", ".join(takes)
            report.keep(name_of(owner, name), f"takes ({', '.join(parameters(function))}) and not ({wanted})")
            return False
        if sources and fingerprint(function) not in sources:
            report.keep(name_of(owner, name), "its source differs from the one that rendseg was compared with")
            return False
    except (OSError, TypeError, ValueError):
        report.keep(name_of(owner, name), "its source or its parameters cannot be read")
        return False
    return True


def replace(report: Report, owner: Any, name: str, new: Callable[..., Any], why: str) -> None:
    """Put ``new`` at ``owner.name``, in the kind (static method, plain function) that was there."""
    before = vars(owner).get(name, _ABSENT)
    original = before.__func__ if isinstance(before, (staticmethod, classmethod)) else before
    if callable(original):
        functools.update_wrapper(new, original)
    after: Any = staticmethod(new) if isinstance(before, staticmethod) else new
    setattr(owner, name, after)
    report._changes.append((owner, name, before, after))
    report.replaced.append((name_of(owner, name), why))


def overridden(part: Any, base: type, names: Iterable[str]) -> str:
    """Says which of ``names`` an object does not have from ``base``; empty if it has them all."""
    kind: Any = type(part)
    if not isinstance(part, base):
        return f"is a {kind.__name__}"
    for name in names:
        if name in vars(part) or getattr(kind, name) is not getattr(base, name):
            return f"overrides {name}"
    return ""


def name_subclasses(report: Report, base: Any, names: Sequence[str]) -> None:
    """Note the subclasses that override a piece: their objects keep the code that they have."""
    for kind in base.__subclasses__():
        own = [name for name in names if getattr(kind, name) is not getattr(base, name)]
        if own:
            path = f"{kind.__module__}.{kind.__qualname__}"
            report.keep(path, f"overrides {', '.join(own)}: its own code runs, on the replaced functions it calls")
        name_subclasses(report, kind, names)
