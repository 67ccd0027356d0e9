"""Fail when a CUDA kernel of ours needs a stack frame or spills registers: `python csrc/check_resources.py [--table]`.

Reads the resource report of the built library (`cuobjdump -res-usage`). A kernel with STACK or LOCAL above zero keeps
part of its state in memory: registers were spilled, or a local array is indexed by a run-time value. Where that is
meant, csrc/resource_exceptions.txt names the kernel and the reason; an exception that no longer applies fails as well.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).resolve().parent
EXCEPTIONS = CSRC / "resource_exceptions.txt"
OURS = "_ZN7rendseg"  # mangled names of functions in namespace rendseg begin so


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; sizes in bytes."""

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int
    local: int


def parse(report: str) -> list[tuple[str, Usage]]:
    """``(mangled name, usage)`` of every kernel in the text that ``cuobjdump -res-usage`` prints."""
    found: list[tuple[str, Usage]] = []
    arch = function = ""
    for line in report.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            function = match[1]
        elif function and (match := re.match(r"\s*REG:\d+ ", line)):
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            usage = Usage(function, arch, *(numbers[key] for key in ("REG", "STACK", "SHARED", "LOCAL")))
            found.append((function, usage))
            function = ""
    return found


def demangler() -> ctypes._NamedFuncPointer:
    """``__cxa_demangle`` of the C++ runtime."""
    function = ctypes.CDLL(ctypes.util.find_library("stdc++") or "libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    return function


def demangle(name: str) -> str:
    """``rendseg::kernel<float>`` of a mangled name: without return type, parameters and the hash of a file."""
    status = ctypes.c_int()
    pointer = demangler()(name.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return short_name(text)


def short_name(text: str) -> str:
    text = text.replace("(anonymous namespace)::", "")
    start = text.find("rendseg::")
    depth = 0
    for i, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return text[start:i]
    return text[start:]


def ours(report: str) -> list[Usage]:
    """Kernels of namespace rendseg, by readable name and architecture."""
    kernels = [
        Usage(demangle(name), usage.arch, usage.registers, usage.stack, usage.shared, usage.local)
        for name, usage in parse(report)
        if name.startswith(OURS)
    ]
    return sorted(kernels, key=lambda usage: (usage.kernel, usage.arch))


def read_exceptions(text: str) -> dict[str, str]:
    """``kernel | reason`` lines; raises ``ValueError`` for a line without a reason."""
    exceptions: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        kernel, _, reason = (part.strip() for part in line.partition(" | "))
        if not reason:
            raise ValueError(f"line {number}: expected 'kernel | reason', got {line!r}")
        exceptions[kernel] = reason
    return exceptions


def faults(kernels: list[Usage], exceptions: dict[str, str]) -> list[str]:
    """What is wrong, one line each."""
    spilling = [usage for usage in kernels if usage.stack or usage.local]
    found = [
        f"{usage.kernel} on {usage.arch}: {usage.stack} bytes of stack, {usage.local} of local memory"
        for usage in spilling
        if usage.kernel not in exceptions
    ]
    stale = exceptions.keys() - {usage.kernel for usage in spilling}
    return found + [f"{kernel}: listed as an exception, but it needs no stack (or is gone)" for kernel in sorted(stale)]


def table(kernels: list[Usage]) -> str:
    """A row per kernel, and its registers / shared memory / stack for each architecture."""
    archs = sorted({usage.arch for usage in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    by_name: dict[str, dict[str, Usage]] = {}
    for usage in kernels:
        by_name.setdefault(usage.kernel, {})[usage.arch] = usage
    rows = [["registers / shared / stack", *archs]]
    for name, usages in by_name.items():
        of_archs = (usages.get(arch) for arch in archs)
        rows.append([name, *(f"{u.registers} / {u.shared} / {u.stack + u.local}" if u else "-" for u in of_archs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def find_cuobjdump() -> str | None:
    """On PATH, in CUDA_HOME, or the one that the package triton ships."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = find_spec("triton")
    folders = [Path(home) / "bin"] if home else []
    folders += [Path(place) / "backends/nvidia/bin" for place in (triton and triton.submodule_search_locations) or ()]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("extension", type=Path, nargs="?", help="default: rendseg/_C*.so of this checkout")
    parser.add_argument("--table", action="store_true", help="print registers, shared memory and stack of every kernel")
    args = parser.parse_args(argv)
    library = args.extension or next((CSRC.parent / "rendseg").glob("_C*.so"), None)
    if library is None:
        print("check_resources: SKIPPED, the extension is not built; no kernel was looked at")
        return 0
    if b".nv_fatbin" not in library.read_bytes():
        print(f"check_resources: SKIPPED, {library.name} is built without CUDA; no kernel was looked at")
        return 0
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print(
            "check_resources: FAILED, cuobjdump was not found (on PATH, in CUDA_HOME/bin, in the package triton): the "
            "kernels cannot be looked at; install it, or build with RENDSEG_CUDA=0"
        )
        return 1
    done = subprocess.run([cuobjdump, "-res-usage", str(library)], capture_output=True, text=True)
    if done.returncode:
        print(f"check_resources: FAILED, {cuobjdump}: {done.stderr.strip()}")
        return 1
    kernels = ours(done.stdout)
    if args.table:
        print(table(kernels))
    found = faults(kernels, read_exceptions(EXCEPTIONS.read_text()))
    if not kernels:
        found.append(f"no kernel of namespace rendseg in the report of {library.name}")
    for fault in found:
        print(f"check_resources: {fault}")
    archs = ", ".join(sorted({usage.arch for usage in kernels}))
    names = {usage.kernel for usage in kernels}
    verdict = "FAILED" if found else "no spills, no stack frames"
    print(f"check_resources: {len(names)} kernels for {archs or 'nothing'}: {verdict}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
