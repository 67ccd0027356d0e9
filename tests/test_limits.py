"""Every process that a test starts has an end."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
WAITING = ("run", "check_call", "check_output", "communicate", "call")


def waits_for_ever(program: str) -> list[int]:
    """Lines with a call of ``subprocess`` that has no ``timeout``."""
    lines = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            owner = ast.unparse(node.func.value)
            named = {keyword.arg for keyword in node.keywords}
            if (owner == "subprocess" or node.func.attr == "communicate") and not named & {"timeout", None}:
                lines.append(node.lineno)
    return lines


def test_every_process_has_a_limit() -> None:
    found = {str(file.relative_to(TESTS)): waits_for_ever(file.read_text()) for file in TESTS.rglob("*.py")}
    assert len(found) > 100 and not {name: lines for name, lines in found.items() if lines}


def test_one_without_is_seen() -> None:
    assert waits_for_ever(
        "import subprocess\nsubprocess.run(['a'], timeout=1)\nsubprocess.run(['b'])\np.communicate()"
    ) == [3, 4]
