"""Every test of this folder once more under AddressSanitizer and UndefinedBehaviorSanitizer, in other processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulation import build

# They build and run sanitized programs of their own.
SKIPPED = ("test_faults.py", "test_sanitizers.py")


def run(file: Path) -> str:
    """What pytest said of one file under the sanitizers; raises AssertionError when it is not green."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=build.ROOT,
        env={**os.environ, **build.sanitizer_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{file.name}: {said[-8000:]}"
    assert "runtime error" not in said and "AddressSanitizer" not in said, f"{file.name}: {said[-8000:]}"
    passed = re.search(r"^(\d+) passed.* in ", said, re.MULTILINE)
    assert passed is not None and int(passed[1]) > 0, f"{file.name}: {said[-2000:]}"
    return f"{file.name}: {said.strip().splitlines()[-1]}"


@pytest.mark.slow
@pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")
@pytest.mark.skipif(build.SANITIZE, reason="this is that process")
def test_every_kernel_under_the_sanitizers() -> None:
    build.build_library(sanitize=True)
    files = [file for file in build.HERE.glob("test_*.py") if file.name not in SKIPPED]
    files.sort(key=lambda file: file.stat().st_size, reverse=True)  # the long ones first
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for said in pool.map(run, files):
            print(f"under the sanitizers: {said}")
