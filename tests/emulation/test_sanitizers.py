"""Every test of this folder once more under AddressSanitizer and UndefinedBehaviorSanitizer, in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.emulation import build


@pytest.mark.slow
@pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")
@pytest.mark.skipif(build.SANITIZE, reason="this is that process")
def test_every_kernel_under_the_sanitizers() -> None:
    build.build_library(sanitize=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(build.HERE)],
        cwd=build.ROOT,
        env={**os.environ, **build.sanitizer_environment()},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    passed = re.search(r"^(\d+) passed.* in ", said, re.MULTILINE)
    assert passed is not None and int(passed[1]) > 0, said[-2000:]
    assert "runtime error" not in said and "AddressSanitizer" not in said, said[-8000:]
    print(f"under the sanitizers: {said.strip().splitlines()[-1]}")
