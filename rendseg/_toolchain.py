"""Where the compilers are: for ``setup.py``, which loads this file alone, and ``rendseg doctor``. No torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

CXX_NAMES = ("c++", "g++", "clang++")
# pyproject.toml repeats it. docs/versions.md shows with which versions the tests were run.
MIN_TORCH = "2.8"
# In every remedy: pip keeps a wheel that it built without the extension, and would install that one again.
INSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps ."


def too_old(torch_version: str) -> bool:
    """Whether this torch is older than :data:`MIN_TORCH`; what cannot be read counts as new enough."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    return found is not None and tuple(map(int, found.groups())) < tuple(map(int, MIN_TORCH.split(".")))


def output_of(command: list[str]) -> str:
    """What ``command`` prints, or nothing when it does not run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""


def find_cxx() -> tuple[str | None, str]:
    """``(command, "")`` of the C++ compiler, CXX first, or ``(None, cause)``."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else CXX_NAMES:
        program = shlex.split(candidate)
        if program and shutil.which(program[0]):
            return candidate, ""
    return None, f"no C++ compiler was found ({f'CXX={wanted}' if wanted else ', '.join(CXX_NAMES)}: not on PATH)"


def cxx_version(candidate: str) -> str:
    """First line of ``--version``."""
    return (output_of([*shlex.split(candidate), "--version"]).splitlines() or [""])[0]


def _is_toolkit(folder: Path) -> bool:
    return (folder / "include" / "cuda_runtime.h").is_file() and (folder / "bin" / "nvcc").exists()


def find_cuda_home() -> tuple[str | None, str]:
    """The toolkit root, ``(path, "")``, or ``(None, cause)``: the folder that holds ``include/cuda_runtime.h``.

    ``torch.utils.cpp_extension`` takes the folder above the ``nvcc`` on PATH without a look at it, which is wrong where
    that is a wrapper script; so the toolkit is found here, checked, and handed over as CUDA_HOME.
    """
    tried = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if value:
            if _is_toolkit(Path(value)):
                return value, ""
            tried.append(f"{variable}={value}")
    nvcc = shutil.which("nvcc")
    starts = [Path(nvcc), Path(nvcc).resolve()] if nvcc else []
    for start in list(starts):
        try:  # a wrapper script names the real compiler
            if start.stat().st_size < 65536 and start.read_bytes()[:2] == b"#!":
                starts += [Path(p) for p in re.findall(r"(/[^\s\"'$`;]*/nvcc)\b", start.read_text(errors="ignore"))]
        except OSError:
            pass
    for start in starts:
        for folder in start.parents:
            if _is_toolkit(folder):
                return str(folder), ""
        tried.append(f"above {start}")
    for folder in (Path("/usr/local/cuda"), Path("/opt/cuda")):
        if _is_toolkit(folder):
            return str(folder), ""
        tried.append(str(folder))
    where = ", ".join(dict.fromkeys(tried))
    return None, f"no CUDA toolkit (a folder with include/cuda_runtime.h and bin/nvcc) was found; looked at {where}"


def nvcc_release(cuda_home: str) -> str:
    """``"13.0"``, or empty when nvcc does not run."""
    found = re.search(r"release (\d+\.\d+)", output_of([str(Path(cuda_home) / "bin" / "nvcc"), "--version"]))
    return found[1] if found else ""
