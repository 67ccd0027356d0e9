"""Without the extension and without a compiler everything works, and nothing tries to build.

PATH holds nothing but stand-ins for compilers and build tools, which write down their call and fail; an audit hook sees
whatever is started by another path.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import fresh

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ptxas", "ninja", "cmake", "make", "ld")

HEAD = """
import sys
started = []
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}
sys.addaudithook(lambda event, args: started.append((event, str(args[:2]))) if event in STARTS else None)
"""
USE = """
import torch, rendseg, rendseg.ops, rendseg.nn
from rendseg import ops
torch.manual_seed(0)
logits = torch.randn(2, 3, 6, 8, requires_grad=True)
coords = ops.sample_uncertain_points(logits.detach(), 7)
ops.point_sample(logits, coords).square().sum().backward()
assert logits.grad.abs().sum() > 0
features, codewords, scale = (torch.randn(s, requires_grad=True) for s in ((2, 4, 3, 5), (6, 4), (6,)))
ops.encode(features, codewords, scale).square().sum().backward()
assert all(t.grad.isfinite().all() for t in (features, codewords, scale))
head = rendseg.nn.PointHead(4, 3, 8, 1).eval()
with torch.no_grad():
    assert ops.refine(logits, features, head, steps=1, num_points=9).shape == (2, 3, 12, 16)
serving = {rendseg._backends.serving(op, "cpu") for op in ("point_sample", "encode", "subdivide")}
# torch looks for libraries by ldconfig
print(rendseg.current_backend(), serving, [call for call in started if "ldconfig" not in call[1]])
"""
DOCTOR = """
from rendseg.doctor import report
print(report())
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the stand-ins, which make up the folder beside it, were called with."""
    calls = tmp_path / "calls"
    calls.write_text("")
    (tmp_path / "bin").mkdir()
    for name in COMPILERS:
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >>"{calls}"\nexit 1\n')
        stand_in.chmod(0o755)
    return calls


def run(program: str, log: Path, **env: str) -> str:
    unwanted = ("RENDSEG_", "TRITON_", "CC", "CXX", "CUDA", "LD_", "PYTEST_XDIST")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    clean |= {"PATH": str(log.parent / "bin"), "PYTHONPATH": str(ROOT), "RENDSEG_DISABLE_EXTENSION": "1"}
    # Caches of what was compiled before, by another process, must not hide an attempt.
    clean |= {name: str(log.parent / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    done = fresh.run(HEAD + program, {**clean, **env}, log.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stand_ins_are_seen(log: Path) -> None:
    out = run("import subprocess; subprocess.run(['c++', '-c', 'x.cpp']); print(len(started))", log)
    assert (out.strip(), log.read_text()) == ("1", "c++ -c x.cpp\n")


def test_the_reference_serves_and_doctor_says_why(log: Path) -> None:
    said = run(USE + DOCTOR, log).splitlines()
    assert said[0] == "auto {'reference'} []", "nothing was started by the import and the operators"
    report = "\n".join(said[1:])
    assert "RENDSEG_DISABLE_EXTENSION=1 is set" in report
    # The report asks the compilers for their version, and nothing else.
    assert {call.split(" ", 1)[1] for call in log.read_text().splitlines()} <= {"--version"}


@pytest.mark.triton
def test_triton_interprets(log: Path) -> None:
    said = run(USE, log, TRITON_INTERPRET="1", RENDSEG_BACKEND="triton").splitlines()
    assert said[-1] == "triton {'triton'} []"
    assert log.read_text() == ""
