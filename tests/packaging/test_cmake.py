"""The C++ library and its example, built by CMake and run by ctest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


@pytest.mark.slow
def test_library_and_example(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    # Unoptimised: this test is about the build, and the kernels have tests of their own.
    run(
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        *generator,
        prefix,
        "-DRENDSEG_CUDA=OFF",
        "-DCMAKE_BUILD_TYPE=Debug",
    )
    run("cmake", "--build", str(tmp_path), "--parallel", os.environ.get("MAX_JOBS", "2"))
    said = run("ctest", "--test-dir", str(tmp_path), "--output-on-failure", "-V")
    assert "100% tests passed" in said and "1: ok" in said
