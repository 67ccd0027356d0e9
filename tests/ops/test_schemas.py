"""The operators are declared with the same words in C++ and in Python, and registered as declared."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rendseg.ops
from rendseg import _extension, reference
from rendseg.ops.schemas import SCHEMAS
from tests import fresh

ROOT = Path(__file__).resolve().parents[2]


def declared_in_cpp() -> list[tuple[str, str]]:
    """``(schema, tags)`` of every ``m.def`` of csrc/library.cpp, in order."""
    text = re.sub(r"^\s*//.*$", "", (ROOT / "csrc" / "library.cpp").read_text(), flags=re.MULTILINE)
    found = []
    for literals, tags in re.findall(r'm\.def\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)(?:,\s*\{([^}]*)\})?\s*\)\s*;', text):
        words = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals)).replace('\\"', '"')
        found.append((words, tags.strip()))
    assert len(found) == text.count("m.def("), (
        "a definition of library.cpp is written in a way that this test cannot read"
    )
    return found


def test_cpp_and_python_say_the_same_words() -> None:
    assert tuple(schema for schema, _ in declared_in_cpp()) == SCHEMAS


def test_names_are_unique() -> None:
    names = [schema.split("(")[0] for schema in SCHEMAS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("schema", SCHEMAS, ids=[schema.split("(")[0] for schema in SCHEMAS])
def test_registered_as_declared(schema: str) -> None:
    name = schema.split("(")[0]
    registered = getattr(torch.ops.rendseg, name).default._schema
    assert str(registered) == str(torch._C.parse_schema(f"rendseg::{schema}"))


PUBLIC = sorted({schema.split("(")[0] for schema in SCHEMAS if not schema.startswith("_")})


@pytest.mark.parametrize("module", [rendseg.ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("name", PUBLIC)
def test_python_has_the_arguments_and_defaults_of_the_schema(name: str, module: Any) -> None:
    found = inspect.signature(getattr(module, name)).parameters.values()
    defaults = [None if p.default is p.empty else repr(p.default) for p in found]
    declared = getattr(torch.ops.rendseg, name).default._schema.arguments
    assert [p.name for p in found] == [a.name for a in declared]
    assert [p.kind is p.KEYWORD_ONLY for p in found] == [a.kwarg_only for a in declared]
    assert defaults == [repr(a.default_value) if a.has_default_value() else None for a in declared]


def test_refine_says_the_same_twice() -> None:
    ours, definition = inspect.signature(rendseg.ops.refine), inspect.signature(reference.refine)
    assert ours.parameters == definition.parameters


@pytest.mark.parametrize("schema", SCHEMAS, ids=[schema.split("(")[0] for schema in SCHEMAS])
def test_a_launcher_has_the_arguments_of_the_schema_and_no_defaults(schema: str) -> None:
    pytest.importorskip("triton")
    name = schema.split("(")[0]
    file = rendseg._backends.triton_ops()[name]
    launcher = importlib.import_module(f"rendseg.kernels.{file}").IMPLEMENTATIONS[name]
    found = inspect.signature(launcher).parameters.values()
    assert [p.name for p in found] == [a.name for a in getattr(torch.ops.rendseg, name).default._schema.arguments]
    assert all(p.default is p.empty for p in found)


def test_mutation_is_declared() -> None:
    assert torch.ops.rendseg.scatter_points_.default._schema.is_mutable
    mutable = {schema.split("(")[0] for schema in SCHEMAS if "!" in schema}
    assert mutable == {"scatter_points_"}


@pytest.mark.parametrize("name,tags", [(schema.split("(")[0], tags) for schema, tags in declared_in_cpp()])
def test_tags_agree(name: str, tags: str) -> None:
    wanted = {tag.split("::")[-1] for tag in tags.split(",") if tag}
    got = {tag.name for tag in getattr(torch.ops.rendseg, name).default.tags}
    assert wanted <= got
    assert ("nondeterministic_seeded" in got) == ("nondeterministic_seeded" in wanted)


@pytest.mark.skipif(not _extension.LOADED, reason="this run has no extension: the case above is that one")
def test_registered_as_declared_without_the_extension() -> None:
    program = (
        "import torch, rendseg.ops._register\n"
        "from rendseg import _extension\n"
        "from rendseg.ops.schemas import SCHEMAS\n"
        "assert not _extension.LOADED\n"
        "for s in SCHEMAS:\n"
        "    op = getattr(torch.ops.rendseg, s.split('(')[0]).default\n"
        "    assert str(op._schema) == str(torch._C.parse_schema('rendseg::' + s)), s\n"
        "print('checked', len(SCHEMAS))\n"
    )
    env = {**os.environ, "RENDSEG_DISABLE_EXTENSION": "1", "PYTHONPATH": str(ROOT)}
    done = fresh.run(program, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"checked {len(SCHEMAS)}"
