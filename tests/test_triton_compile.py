"""Every Triton kernel, in every configuration used by default, compiles for each GPU without spilling. Needs no GPU.

``python -m rendseg.kernels._compile`` prints the table of one target.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: kernels that are interpreted are not compiled"),
]


# Every case for four targets, and every operator interpreted, take more minutes than the rest of the tests together.
full = pytest.mark.skipif(
    os.environ.get("RENDSEG_TRITON_FULL", "0") == "0", reason="takes many minutes: set RENDSEG_TRITON_FULL=1"
)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """kernels/_compile.py, with a cache of its own, so that every kernel is truly compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from rendseg.kernels import _compile

    return _compile


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))


@full
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100", "gfx942"])
def test_nothing_spills(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = jobs()
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    base = [sys.executable, "-m", "rendseg.kernels._compile", "--json", "--target", target]
    running = [
        subprocess.Popen(
            [*base, "--part", f"{i}/{count}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(count)
    ]
    results = [process.communicate() for process in running]
    rows = [json.loads(line) for out, _ in results for line in out.splitlines()]
    assert all(process.returncode in (0, 1) for process in running) and rows, "\n".join(err for _, err in results)
    assert not any("Traceback" in err for _, err in results), "\n".join(err for _, err in results)
    if target == "sm_90":
        from rendseg.kernels import _compile

        with capsys.disabled():
            print(f"\n{_compile.table(sorted((_compile.Compiled(**row) for row in rows), key=lambda row: row.name))}")
    spilled = [f"{row['name']}: {row['spills']}" for row in rows if row["spills"]]
    assert not spilled, f"{target}: {spilled}"


def test_every_kernel_has_a_case(compiler: Any) -> None:
    import triton

    for file in compiler.kernel_files():
        module = __import__(f"rendseg.kernels.{file}", fromlist=["compile_cases"])
        cases = module.compile_cases()
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), f"{file}: two cases of one name"
        covered = {case.kernel.__name__ for case in cases}
        kernels = {
            name
            for name, value in inspect.getmembers(module)
            if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel")
        }
        assert kernels <= covered, f"{file}: no compile case for {kernels - covered}"


def test_kernels_say_what_their_pointers_are(compiler: Any) -> None:
    import triton

    for file in compiler.kernel_files():
        module = __import__(f"rendseg.kernels.{file}", fromlist=["compile_cases"])
        for name, value in inspect.getmembers(module):
            if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel"):
                words = inspect.getdoc(value.fn) or ""
                pointers = [argument for argument in value.arg_names if argument.endswith("_ptr")]
                missing = [pointer for pointer in pointers if not re.search(rf"\b{pointer}\b.*:", words)]
                assert not missing, f"{file}.{name}: the docstring says nothing of {missing}"


def test_a_spill_is_seen(compiler: Any) -> None:
    # The gradient of the coordinates keeps over 100 registers: with 32 it must spill.
    case = next(c for c in compiler.cases_of("point_sample") if "coords fp32 channels_last C=256" in c.name)
    roomy = compiler.compile_case(case, "sm_90")
    tight = compiler.CompileCase(**{**vars(case), "options": {**case.options, "maxnreg": 32}})
    cramped = compiler.compile_case(tight, "sm_90")
    assert roomy.spills == 0 and roomy.registers > 32
    assert cramped.spills > 0 and cramped.registers <= 32


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_positions_are_not_fused(compiler: Any, target: str) -> None:
    # csrc/math/bilinear.h rounds every product before it is added to; so must the Triton kernels, to the same bits.
    # Not looked at on AMD: the cells kernel, whose integer division is made of fused floating-point steps.
    names = r"point_sample (fp32 \w+ C=256$|cells)" if target == "sm_90" else r"point_sample fp32 \w+ C=256$"
    for case in compiler.cases_of("point_sample"):
        if re.match(names, case.name):
            assembly = compiler.build(case, target).asm
            fused = re.findall(
                r"\bfma\.\S+|\bv_\w*fma\w*f\d+|\bv_\w*mac\w*f\d+", assembly.get("ptx") or assembly["amdgcn"]
            )
            assert not fused, f"{case.name}: {set(fused)}"


def test_a_case_that_does_not_fit_its_kernel_is_refused(compiler: Any) -> None:
    case = compiler.cases_of("scatter_points")[0]
    wrong = compiler.CompileCase(**{**vars(case), "signature": {"no_such": "i32"}})
    with pytest.raises(ValueError, match=r"the kernel has no argument \['no_such'\], the case leaves out"):
        compiler.compile_case(wrong, "sm_90")


# -- the interpreter, from a run that does not interpret ---------------------------------------------------------------


@full
@pytest.mark.slow
def test_interpreted_operators() -> None:
    files = sorted(str(path) for path in (ROOT / "tests" / "ops").glob("test_triton_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "-p", "no:cacheprovider"]
    running = [
        subprocess.Popen(
            [*command, *files[i :: jobs()]],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(min(jobs(), len(files)))
    ]
    outputs = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(text[-6000:] for text in outputs)
    passed = sum(int(number) for text in outputs for number in re.findall(r"(\d+) passed", text.splitlines()[-1]))
    assert passed > 600, outputs
