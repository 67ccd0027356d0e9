"""Every test of this folder once more under AddressSanitizer and UndefinedBehaviorSanitizer, in other processes.

The build and the runs take over ten minutes, so only with ``RENDSEG_SANITIZE_KERNELS=1``, which ``make sanitize`` sets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.emulation import build
from tests.limits import TIMEOUT

# The first two build and run sanitized programs of their own; the kernels of the last have cases in the other files.
SKIPPED = ("test_faults.py", "test_sanitizers.py", "test_division.py")
FILES = [file for file in build.HERE.glob("test_*.py") if file.name not in SKIPPED]
FILES.sort(key=lambda file: (-file.stat().st_size, file.name))
PARTS = 3  # processes, since each loads torch under the sanitizers before its first test


@pytest.mark.slow
@pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")
@pytest.mark.skipif(build.SANITIZE, reason="this is that process")
@pytest.mark.skipif(os.environ.get("RENDSEG_SANITIZE_KERNELS") != "1", reason="only with RENDSEG_SANITIZE_KERNELS=1")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_kernel_under_the_sanitizers(part: int) -> None:
    files = FILES[part::PARTS]
    build.build_library(sanitize=True)
    # The process is none of the workers of pytest-xdist, should this be one.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *map(str, files)],
        cwd=build.ROOT,
        env={**inherited, **build.sanitizer_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    assert "runtime error" not in said and "AddressSanitizer" not in said, said[-8000:]
    with_passed = set(re.findall(r"^PASSED tests/emulation/(\w+\.py)::", said, re.MULTILINE))
    assert with_passed == {file.name for file in files}, said[-2000:]
    print(f"under the sanitizers: {said.strip().splitlines()[-1]}")
