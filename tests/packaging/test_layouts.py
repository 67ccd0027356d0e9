"""rendseg.kernels is importable, and nothing foreign is shipped, in every way the package can be installed.

Most layouts are built as pure Python (RENDSEG_NO_EXTENSION=1), which takes seconds; one wheel holds the real extension.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from rendseg import _toolchain
from tests.limits import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys, torch, rendseg, rendseg.kernels, rendseg.reference
from pathlib import Path
assert Path(rendseg.__file__).is_relative_to({where!r}), rendseg.__file__
import importlib.util
spec = importlib.util.find_spec("kernels")  # of a checkout: a folder, which gives way to any package of this name
assert spec is None or spec.origin is None, spec
folders = [Path(p) for p in rendseg.kernels.__path__]
names = {{f.stem for folder in folders for f in folder.glob("*.py")}}
assert names >= {names!r}, names
print("ok")
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source checkout")


def kernel_names() -> set[str]:
    return {f.stem for f in (ROOT / "kernels").glob("*.py")}


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RENDSEG_", "PYTHONPATH", "CXX", "CC"))}
    return {**clean, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}


def run(command: list[str], cwd: Path, expect: int = 0, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=TIMEOUT)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), said[-4000:]
    return said


def check(where: Path, cwd: Path, pythonpath: Path | None = None, prelude: str = "") -> None:
    program = prelude + CHECK.format(where=str(where), names=kernel_names())
    env = {"PYTHONPATH": str(pythonpath)} if pythonpath else {}
    assert run([sys.executable, "-c", program], cwd, **env).strip().endswith("ok")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no test writes into the tree under test."""
    target = tmp_path_factory.mktemp("src") / "rendseg"
    unwanted = shutil.ignore_patterns(
        *(
            ".git",
            ".venv",
            "build",
            "dist",
            "cmake-build",
            "runs",
            "*.so",
            "*.egg-info",
            "__pycache__",
            "_build_facts.py",
        ),
        *(".*_cache", "results", "tests"),
    )
    shutil.copytree(ROOT, target, ignore=unwanted)
    if not (target / "README.md").exists():
        (target / "README.md").write_text("rendseg\n")
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), RENDSEG_NO_EXTENSION="1")


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), "."]
    said = run(pip, source, **env)
    (out / "log.txt").write_text(said)
    wheels = list(out.glob("*.whl"))
    assert len(wheels) == 1, said
    return wheels[0]


def install(wheel: Path, target: Path) -> Path:
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], target.parent)
    return target


def test_in_tree() -> None:
    check(ROOT, ROOT, ROOT)


def test_pure_wheel(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = archive.read("rendseg/_build_facts.py").decode()
        metadata = archive.read(next(n for n in names if n.endswith("dist-info/METADATA"))).decode()
    assert "rendseg/kernels/__init__.py" not in names, "the stand-in serves a checkout alone"
    assert "RENDSEG_NO_EXTENSION=1 was set" in facts
    assert {"rendseg/py.typed", "rendseg/ops/schemas.py", "rendseg/reference/encode.py"} <= names
    assert {f"rendseg/kernels/{name}.py" for name in kernel_names()} <= names
    top = {name.split("/")[0] for name in names}
    assert top == {"rendseg", next(t for t in top if t.endswith(".dist-info"))}, "only the package is shipped"
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    assert any(name.endswith("/LICENSE") for name in names)
    assert f"Requires-Dist: torch>={_toolchain.MIN_TORCH}" in metadata
    target = install(wheel, tmp_path / "site")
    check(target, tmp_path, target)


def test_entry_point_and_doctor(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "rendseg = rendseg.cli:main" in entry
    target = install(wheel, tmp_path / "site")
    said = run([sys.executable, "-m", "rendseg", "doctor"], tmp_path, PYTHONPATH=str(target))
    assert "RENDSEG_NO_EXTENSION=1 was set for the build" in said and "remedy:" in said


def test_sdist(checkout: Path, tmp_path: Path) -> None:
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", program, str(tmp_path)], checkout, RENDSEG_NO_EXTENSION="1")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
        tar.extractall(tmp_path / "unpacked", filter="data")
    for folder, patterns in {
        "csrc": ("*.h", "*.cpp", "*.cu", "*.cuh"),
        "kernels": ("*.py",),
        "configs": ("*.yaml",),
        "examples": ("*.cpp",),
    }.items():
        wanted = {str(f.relative_to(checkout)) for p in patterns for f in (checkout / folder).rglob(p)}
        assert wanted <= names, wanted - names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "rendseg/py.typed"} <= names
    assert "rendseg/kernels/__init__.py" in names, "the stand-in makes an unpacked sdist a checkout"
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_facts.py"))]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    check(unpacked, unpacked, unpacked)
    built = build_wheel(unpacked, tmp_path / "wheel", RENDSEG_NO_EXTENSION="1")
    target = install(built, tmp_path / "site")
    check(target, tmp_path, target)


def test_editable(checkout: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(target)]
    run([*pip, "-e", "."], source, RENDSEG_NO_EXTENSION="1")
    assert "RENDSEG_NO_EXTENSION=1" in (source / "rendseg" / "_build_facts.py").read_text()
    # Without the editable install that this environment may have of the tree under test.
    prelude = (
        "import site, sys\n"
        "sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]\n"
        "for name in [n for n in sys.modules if n.startswith('__editable__')]:\n"
        "    del sys.modules[name]\n"
        f"sys.path.insert(0, {str(target)!r})\n"
        f"site.addsitedir({str(target)!r})\n"
    )
    check(source, tmp_path, prelude=prelude)


# --- builds that cannot succeed ---------------------------------------------------------------------------------------


def test_without_a_compiler_it_installs_and_says_so(checkout: Path, tmp_path: Path) -> None:
    built = build_wheel(checkout, tmp_path / "wheel", CXX="/nowhere/c++")
    said = (tmp_path / "wheel" / "log.txt").read_text()
    assert "the compiled kernels are NOT built" in said and "CXX=/nowhere/c++: not on PATH" in said
    target = install(built, tmp_path / "site")
    said = run([sys.executable, "-m", "rendseg", "doctor"], tmp_path, PYTHONPATH=str(target))
    assert "CXX=/nowhere/c++" in said and "install a C++20 compiler" in said
    program = "import torch, rendseg.ops; print(rendseg.ops.uncertain_points(torch.zeros(1, 2, 3, 3), 4)[0].tolist())"
    printed, warning = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(target)).split("\n", 1)
    assert printed == "[[0, 1, 2, 3]]" and "RuntimeWarning: the operators run without the compiled kernels" in warning


@pytest.mark.parametrize("command,isolated", [("dist_info", True), ("bdist_wheel", True), ("build_ext", False)])
def test_an_old_torch_stops_the_build(checkout: Path, tmp_path: Path, command: str, isolated: bool) -> None:
    """Before pip fetches another: it asks for dist_info first. An isolated build does not see what is installed."""
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "torch-2.7.1.dist-info").mkdir()
    (site / "torch-2.7.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.7.1\n")
    hides = f"import sys; sys.path.remove({str(site)!r})\n" if isolated else ""
    (tmp_path / "sitecustomize.py").write_text(hides)
    tools = tmp_path / "tools"  # setuptools alone, not the torch beside it
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack", "wheel"):
        folder = Path(importlib.import_module(name).__file__ or "").parent
        for path in (folder, *folder.parent.glob(f"{name}-*.dist-info")):
            (tools / path.name).symlink_to(path)
    python = str(tmp_path / "venv" / "bin" / "python")
    said = run([python, "setup.py", command], checkout, expect=1, PYTHONPATH=f"{tmp_path}:{tools}")
    said = said.strip().splitlines()[-1]
    assert said.startswith(f"rendseg: torch {_toolchain.MIN_TORCH} or later is needed, and torch 2.7.1 is installed")
    assert f"pip install -U 'torch>={_toolchain.MIN_TORCH}'" in said


def test_asked_for_by_name_it_fails_with_the_cause(checkout: Path) -> None:
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    said = run(build, checkout, expect=1, CXX="/nowhere/c++")
    assert "the extension cannot be built: no C++ compiler was found (CXX=/nowhere/c++: not on PATH)" in said


def test_cuda_asked_for_by_name_fails_with_the_cause(checkout: Path, tmp_path: Path) -> None:
    toolkit = tmp_path / "cuda"
    for folder in ("include", "bin"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").write_text("")
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    said = run(build, checkout, expect=1, RENDSEG_CUDA="1", CUDA_HOME=str(toolkit))
    cause = f"is CUDA 9.2, the installed torch has CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    assert "RENDSEG_CUDA=1 asks for the CUDA kernels, but" in said and cause in said


@pytest.mark.parametrize("required", [False, True])
def test_a_compile_that_fails(checkout: Path, tmp_path: Path, required: bool) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkout, source, ignore=shutil.ignore_patterns("csrc"))
    (source / "csrc").mkdir()
    (source / "csrc" / "library.cpp").write_text('#error "this file does not compile"\n')
    env = {"RENDSEG_CUDA": "0", "RENDSEG_REQUIRE_EXTENSION": "1" if required else "0"}
    if required:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(tmp_path / "w"),
            ".",
        ]
        assert "the compile failed" in run(pip, source, expect=1, **env)
        return
    built = build_wheel(source, tmp_path / "wheel", **env)
    assert "the compiled kernels are NOT built" in (tmp_path / "wheel" / "log.txt").read_text()
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "the compile failed" in archive.read("rendseg/_build_facts.py").decode()


# --- with the extension -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_with_the_extension(tmp_path: Path) -> None:
    """Built in the tree itself: the objects of its in-place build are reused."""
    from rendseg import _extension

    if not _extension.LOADED or not list((ROOT / "build").glob("temp.*")):
        pytest.skip("the extension is not built in this checkout")
    facts = _extension.facts()
    env = {"RENDSEG_CUDA": "1" if getattr(facts, "CUDA", False) else "0", "RENDSEG_REQUIRE_EXTENSION": "1"}
    if getattr(facts, "CUDA_ARCHS", ""):
        env["TORCH_CUDA_ARCH_LIST"] = facts.CUDA_ARCHS
    run([sys.executable, "setup.py", "bdist_wheel", "-d", str(tmp_path)], ROOT, **env)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert len(libraries) == 1 and libraries[0].startswith("rendseg/_C.")
    target = install(built, tmp_path / "site")
    check(target, tmp_path, target)
    program = "import rendseg; print(rendseg.backends['cpp'].usable)"
    assert run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(target)).strip() == "True"
