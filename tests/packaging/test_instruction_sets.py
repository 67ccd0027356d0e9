"""The built extension runs on a processor without AVX-512 or AVX2: only the kernels of a set use its instructions.

The machine code itself is read, so the test also finds such a fault on a processor that has every set.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from rendseg import _extension
from tests.limits import TIMEOUT

WIDE = {  # instructions of a set by their registers or mnemonics, and the namespaces that may hold them
    "AVX-512": (re.compile(r"%zmm\d|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b"), ("rendseg::avx512::",)),
    "AVX": (re.compile(r"%ymm\d"), ("rendseg::avx512::", "rendseg::avx2::")),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86-64")
def test_wide_instructions_stay_in_their_namespace() -> None:
    if _extension.C is None:
        pytest.skip("the extension is not built")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(_extension.C.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout
    inside: dict[str, set[str]] = {name: set() for name in WIDE}
    outside: dict[str, set[str]] = {name: set() for name in WIDE}
    function = ""
    for line in text.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = match[1]
            continue
        instruction = line.partition("\t")[2].partition("<")[0]
        for name, (registers, namespaces) in WIDE.items():
            if registers.search(instruction):
                (inside if any(n in function for n in namespaces) else outside)[name].add(function)
    assert outside == {name: set() for name in WIDE}
    if "avx512 (emulated)" in getattr(_extension.facts(), "CPU_ISAS", ()):
        del inside["AVX-512"]
    assert all(len(functions) > 20 for functions in inside.values()), "the report does not show the kernels"
