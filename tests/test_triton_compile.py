"""Every Triton kernel, in every configuration used by default, compiles for each GPU without spilling. Needs no GPU.

``python -m rendseg.kernels._compile`` prints the table of one target.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: kernels that are interpreted are not compiled"),
]


PARTS = 2  # of the cases of a target, for tests of moderate length that run side by side
# Compiling takes minutes for each target, so the targets share the cases out: each case is compiled for one of them.
# RENDSEG_COMPILE_ALL=1 compiles every case for every target.
COMPILE_ALL = os.environ.get("RENDSEG_COMPILE_ALL") == "1"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Tests that pass in the interpreter, at the least: a file that skips or loses its cases is found here. The files of a
# row share a process, whose imports take as long as many tests; the rows take about equally long.
INTERPRETED_TESTS = (
    {"encode": 165, "dispatch": 23},
    {"refine": 45, "scatter_points": 195, "torch_compile": 14},
    {"point_sample": 370, "mask_losses": 80},
    {"uncertain_points": 330, "subdivide": 98, "tuning": 24},
)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """kernels/_compile.py, with a cache of its own, so that every kernel is truly compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from rendseg.kernels import _compile

    return _compile


@contextmanager
def linker() -> Iterator[None]:
    """Skips where Triton came without what it needs for an AMD GPU."""
    try:
        yield
    except Exception as error:
        if "ROCm linker" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiler: Any, target: str, part: int) -> None:
    cases = []
    for file in compiler.kernel_files():
        of_file = compiler.cases_of(file, target)
        if not COMPILE_ALL:
            of_file = of_file[TARGETS.index(target) :: len(TARGETS)]
        cases += of_file
    with linker():
        rows = [compiler.compile_case(case, target) for case in cases[part::PARTS]]
    assert len(rows) > (100 if COMPILE_ALL else 25)
    assert not [f"{row.name}: {row.spills}" for row in rows if row.spills], target


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_has_a_case(compiler: Any, target: str) -> None:
    covered: set[str] = set()
    kernels: set[str] = set()
    for file in compiler.kernel_files():
        cases = compiler.cases_of(file, target)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), f"{file}: two cases of one name"
        covered |= {case.kernel.__name__ for case in cases}
    for file in (ROOT / "kernels").glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M))
    assert kernels == covered


def test_kernels_say_what_their_pointers_are(compiler: Any) -> None:
    kernels = {case.kernel for file in compiler.kernel_files() for case in compiler.cases_of(file, "sm_90")}
    for kernel in kernels:
        words = inspect.getdoc(kernel.fn) or ""
        pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
        missing = [pointer for pointer in pointers if not re.search(rf"\b{pointer}\b.*:", words)]
        assert not missing, f"{kernel.__name__}: the docstring says nothing of {missing}"


def test_a_spill_is_seen(compiler: Any) -> None:
    # The gradient of the coordinates keeps over 100 registers: with 32 it must spill.
    case = next(c for c in compiler.cases_of("point_sample", "sm_90") if "coords fp32 channels_last C=256" in c.name)
    roomy = compiler.compile_case(case, "sm_90")
    tight = compiler.CompileCase(**{**vars(case), "options": {**case.options, "maxnreg": 32}})
    cramped = compiler.compile_case(tight, "sm_90")
    assert roomy.spills == 0 and roomy.registers > 32
    assert cramped.spills > 0 and cramped.registers <= 32


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_positions_are_not_fused(compiler: Any, target: str) -> None:
    # csrc/math/bilinear.h rounds every product before it is added to; so must the Triton kernels, to the same bits.
    # Not looked at on AMD: the cells kernel, whose integer division is made of fused floating-point steps.
    names = r"point_sample(_cells)? fp32 \w+ C=256$" if target == "sm_90" else r"point_sample fp32 \w+ C=256$"
    for case in compiler.cases_of("point_sample", target):
        if re.match(names, case.name):
            with linker():
                assembly = compiler.build(case, target).asm
            fused = re.findall(
                r"\bfma\.\S+|\bv_\w*fma\w*f\d+|\bv_\w*mac\w*f\d+", assembly.get("ptx") or assembly["amdgcn"]
            )
            assert not fused, f"{case.name}: {set(fused)}"


# -- the interpreter, from a run that does not interpret ---------------------------------------------------------------


def test_every_file_is_interpreted() -> None:
    files = {path.stem.removeprefix("test_triton_") for path in (ROOT / "tests" / "ops").glob("test_triton_*.py")}
    assert sorted(files) == sorted(file for row in INTERPRETED_TESTS for file in row)


@pytest.mark.slow
@pytest.mark.parametrize("expected", INTERPRETED_TESTS, ids=" ".join)
def test_interpreted(expected: dict[str, int]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", "-m", "triton", "-p", "no:cacheprovider"]
        + ["-o", "addopts=--import-mode=importlib", *(f"tests/ops/test_triton_{file}.py" for file in expected)],
        cwd=ROOT,
        env=_clean_environment() | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = Counter(re.findall(r"^PASSED tests/ops/test_triton_(\w+)\.py::", done.stdout, re.M))
    assert all(passed[file] >= number for file, number in expected.items()), passed


def _clean_environment() -> dict[str, str]:
    """Without what a run of pytest, its workers and its options leave there."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_", "RENDSEG_"))}
