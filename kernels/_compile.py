"""Compiles Triton kernels without a GPU, and reads registers, shared memory and spills from the result.

``kernels/_cases/<op>.py`` calls every launcher in each configuration of its own, and in those dtypes and layouts that
change what a kernel takes; what is compiled are the launches of these calls.
``tests/test_triton_compile.py`` asserts that nothing spills; ``python -m rendseg.kernels._compile`` prints the table.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import _common

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class CompileCase:
    """One launch: a kernel, and the arguments and options with which its launcher calls it on meta tensors."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def specialised(self, target: str) -> tuple[Any, ...]:
        """Options, signature, constants and attributes, as Triton makes them at a launch."""
        kernel, backend = self.kernel, make_backend(TARGETS[target])
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        pack = getattr(kernel, "_pack_args", functools.partial(_pack_arguments, kernel))
        return pack(backend, self.options, *bind(*self.arguments, **self.options))


def _pack_arguments(kernel: Any, backend: Any, options: Any, bound: Any, types: Any, _: Any) -> tuple[Any, ...]:
    """``JITFunction._pack_args`` for Triton 3.4, where it is a part of the launch."""
    kinds = [kind for kind, _ in types]
    marks = ["" if kind == "constexpr" else mark for kind, mark in types]
    values = list(bound.values())
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    marked = find_paths_if(marks, lambda _, mark: isinstance(mark, str))
    return (
        backend.parse_options(options),
        {parameter.name: kind for parameter, kind in zip(kernel.params, kinds, strict=True)},
        {path: get_iterable_path(values, path) for path in constants},
        {path: backend.parse_attr(get_iterable_path(marks, path)) for path in marked},
    )


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes of the machine. On AMD, ``registers`` counts vector registers with accumulators."""

    name: str
    target: str
    registers: int
    shared_bytes: int
    spills: int  # bytes on NVIDIA, registers on AMD
    stack_bytes: int  # spills included; a device assert takes some too
    seconds: float


def build(case: CompileCase, target: str) -> Any:
    """Triton's compiled kernel of ``case`` for one of :data:`TARGETS`; nothing is launched, so no GPU is needed."""
    options, *source = case.specialised(target)
    return triton.compile(ASTSource(case.kernel, *source), target=TARGETS[target], options=options.__dict__)


def compile_case(case: CompileCase, target: str) -> Compiled:
    """Compile ``case`` and read what the kernel takes."""
    start = time.perf_counter()
    kernel = build(case, target)
    seconds = time.perf_counter() - start
    registers, spills, stack = _read_cubin(kernel, target) if "cubin" in kernel.asm else _read_amdgcn(kernel)
    return Compiled(case.name, target, registers, int(kernel.metadata.shared), spills, stack, seconds)


def _read_cubin(kernel: Any, target: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of stack."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
        if not found:
            raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
        registers, stack, local = (int(number) for number in found.groups())
        if not stack and not local:
            return registers, 0, 0
        # A Triton for AMD alone may lack it.
        from triton.backends.nvidia import compiler as nvidia

        # A stack is no spill yet: the arguments of a failed assert lie there. The assembler tells the two apart.
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        arch = re.search(r"^\.target\s+(\w+)", kernel.asm["ptx"], re.M)
        fused = [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
        asks_arch = bool(inspect.signature(nvidia.get_ptxas).parameters)  # not in older Triton
        ptxas = nvidia.get_ptxas(*[int(TARGETS[target].arch)] * asks_arch).path
        log = _run(ptxas, "-v", *fused, f"--gpu-name={arch[1] if arch else target}", str(ptx), "-o", str(cubin))
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        if not spilled:
            raise RuntimeError(f"ptxas says nothing of spills: {log}")
        return registers, sum(int(number) for number in spilled), stack + local


def _read_amdgcn(kernel: Any) -> tuple[int, int, int]:
    """Vector registers, registers spilled and bytes of private memory."""
    text = kernel.asm["amdgcn"]

    def read(key: str) -> int:
        found = re.search(rf"^\s*(?:-\s*)?\.{key}:\s+(\d+)", text, re.M)
        if not found:
            raise RuntimeError(f"the code object has no {key}")
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, which costs no memory.
    return read("vgpr_count"), read("vgpr_spill_count"), read("private_segment_fixed_size")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernel_files() -> list[str]:
    """The names in ``kernels/`` that hold kernels of an operator."""
    from rendseg import kernels

    return sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_"))


@contextmanager
def _recording(target: str) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches on meta tensors are configured for ``target`` and listed: kernel, arguments, options."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, arguments, options))

    run = JITFunction.run
    JITFunction.run = record
    _common.META_ARCH = target
    try:
        yield launches
    finally:
        JITFunction.run = run
        _common.META_ARCH = "cpu"


def cases_of(file: str, target: str) -> list[CompileCase]:
    """What the calls of ``kernels/_cases/<file>.py`` launch on ``target``, each kernel and configuration once."""
    cases: dict[str, CompileCase] = {}
    names: Counter[str] = Counter()
    for name, call in importlib.import_module(f"rendseg.kernels._cases.{file}").calls():
        with _recording(target) as launches:
            call()
        for kernel, arguments, options in launches:
            title = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {name}"
            case = CompileCase(title, kernel, arguments, options)
            chosen, *source = case.specialised(target)
            key = f"{title.split()[0]} {chosen} {source}"
            if key not in cases:
                names[title] += 1
                cases[key] = case if names[title] == 1 else replace(case, name=f"{title} {names[title]}")
    return list(cases.values())


def table(rows: Iterable[Compiled]) -> str:
    """One line per kernel."""
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=6)
    lines = [f"{'kernel':<{width}}  target  registers  shared  spills  seconds"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.target:<6}  {row.registers:>9}  {row.shared_bytes:>6}  {row.spills:>6}"
            f"  {row.seconds:>7.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile; the exit status is 1 when something spills."""
    parser = argparse.ArgumentParser(prog="python -m rendseg.kernels._compile", description=__doc__)
    parser.add_argument("files", nargs="*", help="names in kernels/, without .py; default: all")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: sm_90")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case from the I-th on")
    parser.add_argument("--json", action="store_true", help="one JSON object per line in place of the table")
    options = parser.parse_args(arguments)
    index, count = (int(number) for number in options.part.split("/"))
    rows = []
    for target in options.target or ["sm_90"]:
        cases = [case for file in options.files or kernel_files() for case in cases_of(file, target)]
        for case in cases[index::count]:
            rows.append(compile_case(case, target))
            if options.json:
                print(json.dumps(asdict(rows[-1])), flush=True)
    if not options.json:
        print(table(rows))
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
