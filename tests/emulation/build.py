"""Compiles the CUDA ops of ``csrc/cuda`` with g++ into a library whose kernels run on the CPU.

The very ``.cu`` and ``.cuh`` files: ``cuda_on_cpu.h`` stands in for nvcc. Objects are kept in ``build/emulation`` and
made anew when a source changes; processes that build at the same time wait for each other.
``RENDSEG_EMULATION_SANITIZE=1`` adds AddressSanitizer and UndefinedBehaviorSanitizer; a process that loads such a
library must have been started with ``sanitizer_environment()``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import library
from torch.utils.cpp_extension import include_paths, library_paths

from rendseg import _toolchain
from rendseg.ops.schemas import SCHEMAS
from tests.limits import TIMEOUT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZE = os.environ.get("RENDSEG_EMULATION_SANITIZE", "0") != "0"
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-Wall", "-ffp-contract=off", "-fno-math-errno", "-fno-omit-frame-pointer"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


def missing() -> str:
    """Why the emulation cannot be built here; empty when it can."""
    candidate, cause = _toolchain.find_cxx()
    if candidate is None:
        return cause
    if "clang" in _toolchain.cxx_version(candidate):
        return "the emulation is written for g++"
    if shutil.which("ninja", path=os.pathsep.join(search_path())) is None:
        return "ninja is not installed"
    return ""


def search_path() -> list[str]:
    return [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]


def compiler() -> str:
    candidate, _ = _toolchain.find_cxx()
    assert candidate is not None
    return candidate


def flags(sanitize: bool) -> list[str]:
    # Sanitized code is slow to compile above -O1.
    return [*FLAGS, f"-I{HERE}", *(["-O1", *SANITIZERS] if sanitize else ["-O2"])]


def compile_environment() -> dict[str, str]:
    """Without what ``sanitizer_environment()`` adds: the compiler is not to run under the sanitizers."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def sanitizer_environment() -> dict[str, str]:
    """What a process needs that loads a sanitized library."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*shlex.split(compiler()), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        libraries.append(found.stdout.strip())
    return {
        "RENDSEG_EMULATION_SANITIZE": "1",
        "LD_PRELOAD": " ".join(libraries),
        # Python does not free everything; the threads of a kernel are fibers, on stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=97",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for other processes that build in ``folder``; the lock of one that dies is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_library(sanitize: bool = SANITIZE) -> Path:
    """The path of the library of all ops, made or brought up to date."""
    return build("emulation.so", sanitize)


def load(name: str) -> ctypes.CDLL:
    """``<name>.cpp`` of this folder as a library."""
    return ctypes.CDLL(str(build(f"{name}.so")))


def build(target: str, sanitize: bool = SANITIZE) -> Path:
    """The path of one of the targets of ``_rules``, made or brought up to date."""
    folder = ROOT / "build" / "emulation" / ("sanitized" if sanitize else "plain")
    with locked(folder):
        (folder / "build.ninja").write_text("\n".join(_rules(sanitize)) + "\n")
        environment = {**compile_environment(), "PATH": os.pathsep.join(search_path())}
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        done = subprocess.run(
            ["ninja", "-j", jobs, target], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    if done.returncode:
        raise RuntimeError(f"the emulation does not compile:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return folder / target


def _rules(sanitize: bool) -> list[str]:
    """What ninja is to know. A torch of another version has other headers; ninja sees a change of the command line."""
    torch_flags = [f"-isystem {path}" for path in include_paths() if "cuda" not in path.lower()]
    torch_libraries = [f"-L{path} -Wl,-rpath,{path}" for path in library_paths()]
    command = " ".join([shlex.quote(part) if " " in part else part for part in shlex.split(compiler())])
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {command}",
        f"flags = {' '.join(flags(sanitize))}",
        f"torch = {' '.join(torch_flags)}",
        f"link = {' '.join(SANITIZERS if sanitize else [])} -pthread",
        f"torch_link = {' '.join(torch_libraries)} -lc10 -ltorch_cpu -ltorch",
    ]
    # The headers of torch take longer than most kernels: g++ reads them once, and finds the result in its own folder.
    for rule, options in {
        "precompile": "$flags $torch -x c++-header",
        "compile_op": "$flags $torch -include torch_headers.h -x c++",
        "compile": "$flags -x c++",
    }.items():
        lines += [f"rule {rule}", f"  command = $cxx {options} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    # All ops as one file, as setup.py compiles several together.
    together = "$flags $torch -include torch_headers.h -fsyntax-only -MMD -MF $out.d -MT $out -x c++ -"
    lines += ["rule check_together", f"  command = printf '#include \"%s\"\\n' $in | $cxx {together} && touch $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    for rule, options in {
        "link_ops": "-shared $in $link $torch_link",
        "link": "-shared $in $link",
        "link_program": "$in $link",
    }.items():
        lines += [f"rule {rule}", f"  command = $cxx {options} -o $out.tmp && mv $out.tmp $out"]

    def path(file: Path) -> str:
        return str(file).replace(" ", "$ ")

    lines.append(f"build torch_headers.h.gch: precompile {path(HERE / 'torch_headers.h')}")
    ops = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda file: (-size_of(file), file.name))
    for source in ops:
        lines.append(f"build {source.stem}.o: compile_op {path(source)} | torch_headers.h.gch")
    lines.append(f"build together: check_together {' '.join(map(path, sorted(ops)))} | torch_headers.h.gch")
    for source in sorted(HERE.glob("*.cpp")):
        lines.append(f"build {source.stem}.cpp.o: compile {path(source)}")
        if source.stem != "cuda_on_cpu":
            lines.append(f"build {source.stem}.so: link {source.stem}.cpp.o cuda_on_cpu.cpp.o")
    lines.append("build faults: link_program faults.cpp.o cuda_on_cpu.cpp.o")
    lines.append(f"build emulation.so: link_ops {' '.join(f'{op.stem}.o' for op in ops)} cuda_on_cpu.cpp.o")
    return lines


def size_of(source: Path) -> int:
    """Bytes of an op: the larger take longer to compile, and are begun first."""
    return sum(file.stat().st_size for file in source.parent.glob(f"{source.stem}.cu*"))


class Emulated:
    """The loaded library: ``ops`` are the CUDA implementations, for CPU tensors."""

    def __init__(self) -> None:
        # The library that declares the operators lives as long as this object.
        self._declared = library.Library("rendseg_emulated", "DEF")
        for schema in SCHEMAS:
            self._declared.define(schema)
        path = str(build_library())
        torch.ops.load_library(path)
        self._c = ctypes.CDLL(path)
        self._c.rendseg_emulation_launches.restype = ctypes.c_uint64
        self.ops = torch.ops.rendseg_emulated

    def seed(self, value: int) -> None:
        """Order of blocks and threads, and garbage in shared memory, of all launches from here on."""
        self._c.rendseg_emulation_seed(ctypes.c_uint64(value))

    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._c.rendseg_emulation_launches())

    def device(self, processors: int = 3, shared_limit: int = 101376) -> None:
        """What the launches believe of the device: multiprocessors, bytes of shared memory for a block."""
        self._c.rendseg_emulation_settings(ctypes.c_int(processors), ctypes.c_int64(shared_limit))
