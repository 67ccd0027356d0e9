"""The emulation can fail: every planted fault is caught, and the same kernel without it passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import build
from tests.limits import TIMEOUT

pytestmark = [
    pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}"),
    pytest.mark.skipif(build.SANITIZE, reason="builds and runs its own sanitized program"),
]

SEEDS = 20
WRONG, COMPLAINT, SANITIZER = 2, 3, 97
# In the order of enum class Fault: (exit code, what is said).
FAULTS = {
    "missing barrier": (WRONG, "wrong result"),
    "missing second barrier": (WRONG, "wrong result"),
    "missing warp barrier": (WRONG, "wrong result"),
    "barrier not reached": (COMPLAINT, "deadlock in block .*95 threads wait in __syncthreads at faults.cpp"),
    "different barriers": (COMPLAINT, "threads of one block meet in different barriers"),
    "shuffle not reached": (COMPLAINT, "meet in different operations|threads wait in __shfl_sync"),
    "shuffle from an absent lane": (COMPLAINT, "shuffle from a lane that takes no part"),
    "uninitialized shared memory": (WRONG, "wrong result"),
    "overflow of static shared memory": (SANITIZER, r"index 96 out of bounds for type .float \[96\]"),
    "overflow of dynamic shared memory": (SANITIZER, "heap-buffer-overflow|use-after-poison"),
    "write beyond a tensor": (SANITIZER, "heap-buffer-overflow"),
    "read beyond a tensor": (SANITIZER, "heap-buffer-overflow"),
    "missing wait for an asynchronous copy": (WRONG, "wrong result"),
    "shift by the width": (SANITIZER, "shift exponent 32 is too large"),
    "failed assert": (COMPLAINT, r"a planted assert \(thread 5 of block 3, faults.cpp"),
}


def environment() -> dict[str, str]:
    options = {name: value for name, value in build.sanitizer_environment().items() if name.endswith("_OPTIONS")}
    options["UBSAN_OPTIONS"] += f":exitcode={SANITIZER}"
    return {**os.environ, **options}


@pytest.fixture(scope="module")
def program() -> Path:
    return build.build("faults", sanitize=True)


def test_without_a_fault(program: Path) -> None:
    done = subprocess.run(
        [program, "0", str(SEEDS)], env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=list(FAULTS))
def test_is_caught(program: Path, number: int) -> None:
    code, said = list(FAULTS.values())[number - 1]
    done = subprocess.run(
        [program, str(number), str(SEEDS)], env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(said, done.stdout + done.stderr), done.stdout + done.stderr


def test_a_write_beyond_a_torch_tensor_is_caught() -> None:
    library = str(build.build("faults.so", sanitize=True))
    beyond = list(FAULTS).index("write beyond a tensor") + 1
    program = (
        "import ctypes, sys, torch\n"
        f"lib = ctypes.CDLL({library!r})\n"
        "given, out = torch.arange(480.0), torch.empty(480)\n"
        "lib.rendseg_fault(int(sys.argv[1]), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))\n"
        "print('returned', float(out[0]))\n"
    )
    for fault, code in ((0, 0), (beyond, SANITIZER)):
        done = subprocess.run(
            [sys.executable, "-c", program, str(fault)],
            env={**os.environ, **build.sanitizer_environment()},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert ("returned 95.0" in done.stdout) == (fault == 0)
        assert ("heap-buffer-overflow" in done.stderr) == (fault != 0)
