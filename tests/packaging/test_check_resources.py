"""csrc/check_resources.py on recorded reports of ``cuobjdump -res-usage``: no toolkit and no GPU needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout")

# CUDA 13, shortened: two architectures, an anonymous namespace, a kernel that is not ours, a device without kernels.
REPORT = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0

Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7rendseg36_GLOBAL__N__a52e6226_4_t_cu_d76751334fineEPf:
  REG:10 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7rendseg5spillIdEEvPT_NS_6LayoutEi:
  REG:30 STACK:128 SHARED:0 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7rendseg5spillIfEEvPT_NS_6LayoutEi:
  REG:22 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z7foreignPf:
  REG:8 STACK:64 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7rendseg36_GLOBAL__N__a52e6226_4_t_cu_d76751334fineEPf:
  REG:10 STACK:0 SHARED:1152 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7rendseg5spillIdEEvPT_NS_6LayoutEi:
  REG:30 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:556 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7rendseg5spillIfEEvPT_NS_6LayoutEi:
  REG:22 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:556 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
host = linux
compile_size = 64bit
compressed
ptxasOptions =
"""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_resources", ROOT / "csrc" / "check_resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_parse(check: ModuleType) -> None:
    kernels = check.ours(REPORT)
    assert [(u.kernel, u.arch) for u in kernels] == [
        ("rendseg::fine", "sm_80"),
        ("rendseg::fine", "sm_90"),
        ("rendseg::spill<double>", "sm_80"),
        ("rendseg::spill<double>", "sm_90"),
        ("rendseg::spill<float>", "sm_80"),
        ("rendseg::spill<float>", "sm_90"),
    ]
    assert kernels[1] == check.Usage("rendseg::fine", "sm_90", registers=10, stack=0, shared=1152, local=0)
    assert check.ours("") == []


def test_short_names(check: ModuleType) -> None:
    name = "void rendseg::(anonymous namespace)::k<(rendseg::Mode)1, float>(float*, rendseg::Args<int>)"
    assert check.short_name(name) == "rendseg::k<(rendseg::Mode)1, float>"
    assert check.short_name("rendseg::plain(int)") == "rendseg::plain"


def test_stack_and_spills_are_faults(check: ModuleType) -> None:
    kernels = check.ours(REPORT)
    assert check.faults(kernels, {}) == [
        "rendseg::spill<double> on sm_80: 128 bytes of stack, 0 of local memory",
        "rendseg::spill<double> on sm_90: 0 bytes of stack, 8 of local memory",
    ]
    assert check.faults(kernels, {"rendseg::spill<double>": "a reason"}) == []
    stale = check.faults(kernels, {"rendseg::spill<double>": "a reason", "rendseg::fine": "was needed once"})
    assert stale == ["rendseg::fine: listed as an exception, but it needs no stack (or is gone)"]


def test_exceptions_need_a_reason(check: ModuleType) -> None:
    text = "# a comment\n\nrendseg::spill<double> | indexed by lane | once\n"
    assert check.read_exceptions(text) == {"rendseg::spill<double>": "indexed by lane | once"}
    for line in ("rendseg::fine", "rendseg::fine |", "rendseg::fine | "):
        with pytest.raises(ValueError, match="line 1: expected 'kernel | reason'"):
            check.read_exceptions(line)
    check.read_exceptions((ROOT / "csrc" / "resource_exceptions.txt").read_text())


def test_table(check: ModuleType) -> None:
    header, fine, *_ = check.table(check.ours(REPORT)).splitlines()
    assert header.split() == ["registers", "/", "shared", "/", "stack", "sm_80", "sm_90"]
    assert fine.split() == ["rendseg::fine", "10", "/", "128", "/", "0", "10", "/", "1152", "/", "0"]


def test_what_cannot_be_looked_at_is_said(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF, nothing for a GPU")
    assert check.main([str(library)]) == 0
    assert "SKIPPED, _C.so is built without CUDA" in capsys.readouterr().out
    library.write_bytes(b"\x7fELF .nv_fatbin")
    monkeypatch.setattr(check, "find_cuobjdump", lambda: None)
    assert check.main([str(library)]) == 1
    assert "FAILED, cuobjdump was not found" in capsys.readouterr().out


def test_the_verdict(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").write_text(REPORT)
    (tmp_path / "cuobjdump").write_text(f"#!/bin/sh\ncat {tmp_path}/report\n")
    (tmp_path / "cuobjdump").chmod(0o755)
    (tmp_path / "_C.so").write_bytes(b".nv_fatbin")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    exceptions = tmp_path / "exceptions.txt"
    monkeypatch.setattr(check, "EXCEPTIONS", exceptions)
    for listed, status, said in (
        ("", 1, "rendseg::spill<double> on sm_80: 128 bytes of stack"),
        ("rendseg::spill<double> | a reason\n", 0, "3 kernels for sm_80, sm_90: no spills, no stack frames"),
    ):
        exceptions.write_text(listed)
        assert check.main([str(tmp_path / "_C.so"), "--table"]) == status
        assert said in capsys.readouterr().out
    (tmp_path / "report").write_text("")
    assert check.main([str(tmp_path / "_C.so")]) == 1
    assert "no kernel of namespace rendseg" in capsys.readouterr().out
