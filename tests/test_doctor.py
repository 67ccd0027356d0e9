"""``rendseg doctor``: runs with torch alone, and names the cause when something cannot be used."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rendseg import _extension, _toolchain, doctor
from rendseg.ops.schemas import SCHEMAS
from tests.limits import TIMEOUT

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
    return subprocess.run(
        [sys.executable, "-c", program], env={**clean, **env}, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT
    )


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


WHY = "import rendseg; s = rendseg.backends['cpp']; print(s.usable); print(s.cause); print(s.remedy)"


def why(package: Path) -> tuple[str, str]:
    done = run(WHY, cwd=package)
    assert done.returncode == 0, done.stderr
    usable, cause, remedy = done.stdout.splitlines()
    assert usable == "False"
    return cause, remedy


def test_not_built(package: Path) -> None:
    cause, remedy = why(package)
    assert "not built" in cause and "C++20 compiler" in remedy


def test_left_out_on_purpose(package: Path) -> None:
    facts = 'EXTENSION = False\nREASON = "RENDSEG_NO_EXTENSION=1 was set for the build"\nTORCH_VERSION = ""\n'
    (package / "rendseg" / "_build_facts.py").write_text(facts)
    cause, remedy = why(package)
    assert "RENDSEG_NO_EXTENSION=1" in cause and "without that setting" in remedy


def test_built_for_another_python(package: Path) -> None:
    (package / "rendseg" / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    cause, remedy = why(package)
    assert "another Python (_C.cpython-399-x86_64-linux-gnu.so)" in cause


def test_built_for_another_torch(package: Path) -> None:
    (package / "rendseg" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    (package / "rendseg" / "_build_facts.py").write_text('EXTENSION = True\nREASON = ""\nTORCH_VERSION = "2.3.1+cpu"\n')
    cause, remedy = why(package)
    assert "built for torch 2.3.1+cpu" in cause and "rebuild" in remedy


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
