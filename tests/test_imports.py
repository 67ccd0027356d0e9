"""No circle among the modules of rendseg: what imports what is read from the source, nothing is imported.

An import within a function counts like one at the head of a file, since it hides a circle and does not open it. What
only a type checker reads (``if TYPE_CHECKING:``) does not count.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rendseg"

# Circles that are still there; a circle that has been opened must leave the list.
KNOWN: set[frozenset[str]] = set()


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module; a package has the name of its folder."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from statements(other)
            continue
        yield child
        yield from statements(child)


def imports_of(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of ``known`` that a module names in an import."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of a package, or a name in it
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return found & known - {name}


def circles(package: Path) -> set[frozenset[str]]:
    """The largest sets of modules that reach one another."""
    files = modules_of(package)
    after = {name: imports_of(name, path, set(files)) for name, path in files.items()}
    reached = {}
    for name in after:
        seen: set[str] = set()
        waiting = list(after[name])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += after[other]
        reached[name] = seen
    return {
        frozenset(other for other in reached[name] if name in reached[other]) for name in after if name in reached[name]
    }


def test_no_circle_but_the_known_ones() -> None:
    assert {tuple(sorted(circle)) for circle in circles(PACKAGE)} == {tuple(sorted(circle)) for circle in KNOWN}


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        ("from house.two import x", "import os", 0),
        ("from house.two import x", "from house import one", 1),
        ("from .two import x", "def f():\n    from .one import y", 1),
        ("import house.two", "if TYPE_CHECKING:\n    from .one import y\nelse:\n    import os", 0),
        ("from . import two", "try:\n    import house.one as x\nexcept ImportError:\n    pass", 1),
    ],
)
def test_a_circle_is_seen(tmp_path: Path, one: str, two: str, found: int) -> None:
    house = tmp_path / "house"
    house.mkdir()
    for name, text in (("__init__", ""), ("one", one), ("two", two)):
        (house / f"{name}.py").write_text(text)
    assert circles(house) == ({frozenset({"house.one", "house.two"})} if found else set())


@pytest.mark.parametrize("order", [("kernels", "rendseg.kernels"), ("rendseg.kernels", "kernels")])
@pytest.mark.parametrize("installed", [True, False])
def test_the_folder_kernels_gives_way_to_the_package(
    order: tuple[str, str], installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the root of a checkout ``import kernels`` finds the package on PyPI, and without it a folder, not ours."""
    import rendseg

    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    monkeypatch.setattr(sys, "path", [str(PACKAGE.parent), str(tmp_path), *sys.path])
    for name in order:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(rendseg, "kernels", None, raising=False)
    importlib.invalidate_caches()
    found = {name: importlib.import_module(name) for name in order}
    assert hasattr(found["kernels"], "theirs") is installed and not hasattr(found["rendseg.kernels"], "theirs")
    assert (found["kernels"].__file__ is None) is not installed
    ours = PACKAGE.parent / "kernels"
    assert [Path(p) for p in found["rendseg.kernels"].__path__] == [ours]
    if not installed:
        with pytest.raises(ImportError, match="import these files as rendseg.kernels"):
            importlib.import_module("kernels._common")
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
