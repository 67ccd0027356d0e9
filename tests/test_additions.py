"""An op, a decoder and a data set have their files and are named where CONTRIBUTING.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rendseg import ops, reference
from rendseg.data.registry import dataset_names
from rendseg.models import decoder_names

ROOT = Path(__file__).resolve().parents[1]
# {op} is the name of a public function, {file} that of its file in rendseg/ops.
OP_FILES = (
    "rendseg/reference/{file}.py",
    "csrc/cpu/{file}.cpp",
    "csrc/cuda/{file}.cu",
    "csrc/cuda/{file}.cuh",
    "kernels/{file}.py",
    "tests/ops/cases_{file}.py",
    "tests/ops/test_{file}.py",
    "tests/ops/test_triton_{file}.py",
    "tests/emulation/test_{file}.py",
    "tests/gpu/test_{file}.py",
)
OP_NAMED_IN = (
    "tests/gpu/smoke.py",
    "tests/gpu/sanitize.py",
    "docs/operators.md",
    "docs/api/ops.md",
    "README.md",
)
DECODER_NAMED_IN = ("docs/models.md", "README.md")
DATASET_NAMED_IN = ("docs/models.md", "README.md")


def file_of(op: str) -> str:
    """The file of rendseg/ops that defines a public function."""
    return getattr(ops, op).__module__.rpartition(".")[2]


def unnamed(name: str, files: tuple[str, ...]) -> list[str]:
    return [file for file in files if not re.search(rf"\b{name}\b", (ROOT / file).read_text())]


def missing(op: str, file: str, root: Path = ROOT) -> list[str]:
    return [path for path in (pattern.format(file=file, op=op) for pattern in OP_FILES) if not (root / path).is_file()]


@pytest.mark.parametrize("op", ops.__all__)
def test_an_op_has_its_files(op: str) -> None:
    assert not missing(op, file_of(op)) and not unnamed(op, OP_NAMED_IN)


def test_what_is_missing_is_named() -> None:
    assert missing("smooth", "smooth") == [pattern.format(file="smooth") for pattern in OP_FILES]
    assert unnamed("no_such_op", OP_NAMED_IN) == list(OP_NAMED_IN)


def test_every_op_has_a_reference() -> None:
    assert set(ops.__all__) <= set(reference.__all__)


def test_every_file_of_ops_is_exported() -> None:
    files = {path.stem for path in (ROOT / "rendseg" / "ops").glob("[!_]*.py")} - {"schemas"}
    assert {file_of(op) for op in ops.__all__} == files


@pytest.mark.parametrize("name", decoder_names())
def test_a_decoder_is_named(name: str) -> None:
    assert not unnamed(name, DECODER_NAMED_IN)


@pytest.mark.parametrize("name", dataset_names())
def test_a_data_set_is_named(name: str) -> None:
    assert not unnamed(name, DATASET_NAMED_IN)
    tested = [
        path for path in (ROOT / "tests" / "data").glob("test_*.py") if re.search(rf"\b{name}\b", path.read_text())
    ]
    assert tested, f"no file of tests/data names {name}"
