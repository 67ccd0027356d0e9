"""``rendseg doctor``: runs with torch alone, and names the cause when something cannot be used."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rendseg import _backends, _extension, _toolchain, doctor
from rendseg.ops.schemas import SCHEMAS
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]
# Refuses everything that the trainer, not the operators, needs.
ONLY_TORCH = """
import sys
for name in "typer pydantic yaml timm accelerate torchvision torchmetrics matplotlib triton".split():
    sys.modules[name] = None
"""


def run(program: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RENDSEG_")}
    clean["PYTHONPATH"] = str(cwd)
    return fresh.run(program, {**clean, **env}, cwd)


def test_report_has_every_part_and_every_operator() -> None:
    text = doctor.report()
    for part in ("Versions", "Build", "Backends", "Operators", "Training"):
        assert f"\n{part}" in f"\n{text}"
    table = text[text.index("Operators") :]
    for schema in SCHEMAS:
        assert f"  {schema.split('(')[0]} " in table


def test_runs_as_a_command_with_torch_alone() -> None:
    program = (
        ONLY_TORCH + "import runpy; sys.argv = ['rendseg', 'doctor']; runpy.run_module('rendseg', run_name='__main__')"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "Backends" in done.stdout


def test_import_works_with_torch_alone() -> None:
    done = run(ONLY_TORCH + "import rendseg, rendseg.ops; print(rendseg.backends['triton'].usable)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    done = run("from rendseg.doctor import report; print(report())", CXX=str(tmp_path / "no-such-compiler"))
    assert f"CXX={tmp_path / 'no-such-compiler'}: not on PATH" in done.stdout, done.stderr


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert "rendseg needs 2.8 or later; remedy: pip install -U 'torch>=2.8'" in doctor.report()
    for version in ("2.8.0", "2.10.0a0+git1234", "3.0", "unknown"):
        assert not _toolchain.too_old(version)


def test_triton_that_torch_does_not_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["filelock", 'triton==3.8.0; platform_system == "Linux"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for here, says in [
        ("", 'not installed; remedy: pip install "triton==3.8.0"'),
        ("3.6.0", '3.6.0, but torch wants another; remedy: pip install "triton==3.8.0"'),
        ("3.8.0", "3.8.0\n"),
    ]:
        monkeypatch.setattr(doctor, "_version", lambda name, here=here: here)
        report = doctor.report()
        assert f"triton        {says}" in report
    assert 'pip install "triton==3.8.0"' in _backends.backends["triton"].remedy
    column = report[report.index("operator ") :].splitlines()[1 : len(SCHEMAS) + 1]
    assert {row.split()[3] for row in column} == {"-"}, "what is not installed has no kernels"
    wanted[1:] = []
    assert _backends.triton_wanted() == "triton", "a torch for the CPU asks for none"


# --- why an extension does not load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message,cause,remedy",
    [
        ("libcudart.so.12: cannot open shared object file: No such file or directory", "libcudart.so.12", "rebuild"),
        (
            "libomp.so.5: cannot open shared object file: No such file or directory",
            "libomp.so.5",
            "install the package",
        ),
        ("/x/_C.so: undefined symbol: _ZN3c105ErrorC2E", "another torch", "rebuild it against the installed torch"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by _C.so)", "newer", "on this machine"),
        ("dynamic module does not define module export function", "does not load", "rebuild"),
    ],
)
def test_load_errors_are_explained(message: str, cause: str, remedy: str) -> None:
    got_cause, got_remedy = _extension._explain(ImportError(message), "2.13.0", "2.15.0")
    assert cause in got_cause and remedy in got_remedy


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without a library, to be given one that does not fit."""
    shutil.copytree(
        ROOT / "rendseg", tmp_path / "rendseg", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_facts.py")
    )
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


WHY = """
import rendseg
s = rendseg.backends["cpp"]
print(s.usable, s.cause, s.remedy, sep="\\n")
import sys, torch, rendseg.ops
sys.stderr.write("before the calls\\n")
for logits in torch.zeros(2, 1, 2, 3, 3):
    print(rendseg.ops.uncertain_points(logits, 4)[0].tolist())
"""


def why(package: Path, warns: str = "at the first call") -> tuple[str, str]:
    """Cause and remedy of the backend; the calls work, and there is one warning that says both, or none."""
    done = run(WHY, cwd=package)
    assert done.returncode == 0, done.stderr
    usable, cause, remedy, *points = done.stdout.splitlines()
    assert usable == "False" and points == ["[[0, 1, 2, 3]]"] * 2
    at_import, at_call = (said.count(f"{cause}. Remedy: {remedy}") for said in done.stderr.split("before the calls"))
    assert (at_import, at_call) == {"at import": (1, 0), "at the first call": (0, 1), "never": (0, 0)}[warns]
    return cause, remedy


def test_not_built(package: Path) -> None:
    cause, remedy = why(package)
    assert "not built" in cause and "C++20 compiler" in remedy
    assert "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps ." in remedy


def test_left_out_on_purpose(package: Path) -> None:
    facts = 'EXTENSION = False\nREASON = "RENDSEG_NO_EXTENSION=1 was set for the build"\nTORCH_VERSION = ""\n'
    (package / "rendseg" / "_build_facts.py").write_text(facts)
    cause, remedy = why(package, warns="never")
    assert "RENDSEG_NO_EXTENSION=1" in cause and "without that setting" in remedy


def test_built_for_another_python(package: Path) -> None:
    (package / "rendseg" / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    cause, remedy = why(package)
    assert "another Python (_C.cpython-399-x86_64-linux-gnu.so)" in cause


def test_built_for_another_torch(package: Path) -> None:
    (package / "rendseg" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    (package / "rendseg" / "_build_facts.py").write_text('EXTENSION = True\nREASON = ""\nTORCH_VERSION = "2.3.1+cpu"\n')
    cause, remedy = why(package, warns="at import")
    assert f"built for torch 2.3.1+cpu, running {torch.__version__}" in cause and "rebuild" in remedy


def test_damaged_library(package: Path) -> None:
    (package / "rendseg" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    cause, remedy = why(package)
    assert "does not load" in cause and "rebuild" in remedy


# --- where the toolkit is ---------------------------------------------------------------------------------------------


def fake_toolkit(root: Path) -> Path:
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").write_text("")
    (root / "bin").mkdir()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.7, V13.7.1'\n")
    nvcc.chmod(0o755)
    return root


def test_toolkit_is_found_behind_a_wrapper_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = fake_toolkit(tmp_path / "opt" / "cuda-13.7")
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert _toolchain.find_cuda_home() == (str(toolkit), "")
    assert _toolchain.nvcc_release(str(toolkit)) == "13.7"


def test_a_cuda_home_without_headers_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(toolkit))
    assert _toolchain.find_cuda_home() == (str(toolkit), "")
