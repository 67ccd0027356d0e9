"""Build of rendseg: prints its settings first, never downloads, and never needs a GPU.

The compiled extension ``rendseg._C`` is optional. Where it cannot be built the package is installed as pure Python, and
the reason is printed here and kept for ``rendseg doctor``. Environment:

RENDSEG_CUDA=0|1                leave the CUDA kernels out | stop when they cannot be built (default: if possible)
RENDSEG_NO_EXTENSION=1          install pure Python
RENDSEG_REQUIRE_EXTENSION=0|1   go on as pure Python | stop with the cause when the extension cannot be built
                                (default: 1 for ``setup.py build_ext``, 0 for an install)
TORCH_CUDA_ARCH_LIST            GPU architectures, as in PyTorch: "9.0", "8.0;9.0+PTX"
RENDSEG_EMULATE_AVX512=1        for tests: compile the AVX-512 kernels so that they run on a processor with AVX2, slowly
RENDSEG_SANITIZE=1              for tests: AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``)
CUDA_HOME                       the CUDA toolkit: the folder that holds include/cuda_runtime.h
CXX, MAX_JOBS                   C++ compiler, and the number of parallel compile jobs (default: the cores)
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import logging
import multiprocessing.connection
import os
import platform
import pprint
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"rendseg: setuptools >= 77 is needed, found {setuptools.__version__}: pip install -U setuptools wheel")

ROOT = Path(__file__).resolve().parent
FACTS_NAME = "_build_facts"
# Architectures built by default, where the compiler knows them; binaries also run on later members of the same family,
# and the PTX of the newest serves what comes after.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
# Compiling sanitized code is slow above -O1.
SANITIZERS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
# So many that a change of one .cu file does not compile all others again. Each more costs about 45 s of one core.
MIN_GROUPS = 2
CUDA_LIBRARIES = ["c10_cuda", "torch_cuda", "cudart"]  # torch_cuda: the state of random generators
BUILD_COMMANDS = {"build", "build_ext", "install", "develop", "bdist_wheel", "editable_wheel", "bdist", "bdist_egg"}


def say(message: str) -> None:
    print(f"[rendseg] {message}", flush=True)


def shout(*lines: str) -> None:
    bar = "*" * 100
    print("\n".join(("", bar, *(f"* rendseg: {line}" for line in lines), bar, "")), file=sys.stderr, flush=True)


def flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def load_toolchain() -> ModuleType:
    """``rendseg/_toolchain.py`` without the package, whose import needs torch."""
    spec = importlib.util.spec_from_file_location("_toolchain", ROOT / "rendseg" / "_toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOLCHAIN = load_toolchain()


def refuse_old_torch() -> None:
    """Stops below the oldest torch, which pip would otherwise replace for everything else in the environment too.

    Looks into the environment itself: an isolated build cannot import the torch that is installed.
    """
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for torch in importlib.metadata.distributions(name="torch", path=folders):
        if TOOLCHAIN.too_old(torch.version):
            minimum = f"torch {TOOLCHAIN.MIN_TORCH} or later is needed, and torch {torch.version} is installed"
            remedy = f"pip install -U 'torch>={TOOLCHAIN.MIN_TORCH}' torchvision, or another environment"
            sys.exit(f"rendseg: {minimum}. Remedy: {remedy}; then run the same command again")
        return


class CannotBuild(Exception):
    """The extension (or its CUDA part) cannot be built; the message is the cause."""

    def __init__(
        self, cause: str, remedy: str = "install a C++20 compiler (GCC 11 or later) and run the same command again"
    ) -> None:
        super().__init__(cause)
        self.remedy = remedy


# --- what is here -----------------------------------------------------------------------------------------------------


def find_compiler() -> tuple[str, str]:
    """``(CXX, first line of its --version)``; raises :class:`CannotBuild` when none works."""
    candidate, cause = TOOLCHAIN.find_cxx()
    if candidate is None:
        raise CannotBuild(cause)
    program = shlex.split(candidate)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise CannotBuild(f"the headers of this Python are not installed ({header} is missing)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\n#include <string>\nint main() { return std::string().size(); }\n")
        done = subprocess.run(
            [*program, *("-std=c++20", "-fopenmp", "-c", str(source), "-o", str(source.with_suffix(".o")))],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = done.stderr.strip()[-400:]
        raise CannotBuild(f"the C++ compiler {candidate} cannot compile C++20 with OpenMP: {said}")
    return candidate, TOOLCHAIN.cxx_version(candidate)


# --- settings ---------------------------------------------------------------------------------------------------------


def cuda_settings(torch_cuda: str | None) -> dict[str, str]:
    """Toolkit, its version and the architectures; raises :class:`CannotBuild` with the cause."""
    if not torch_cuda:
        raise CannotBuild("the installed torch is built without CUDA")
    home, cause = TOOLCHAIN.find_cuda_home()
    if home is None:
        raise CannotBuild(cause)
    os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension is imported, which would guess
    version = TOOLCHAIN.nvcc_release(home)
    if not version:
        raise CannotBuild(f"the nvcc of {home} does not run")
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise CannotBuild(f"the toolkit at {home} is CUDA {version}, the installed torch has CUDA {torch_cuda}")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = {int(n) for n in re.findall(r"sm_(\d+)", TOOLCHAIN.output_of([f"{home}/bin/nvcc", "--list-gpu-code"]))}
        archs = [a for a in DEFAULT_ARCHS if int(a.replace(".", "")) in known] or ["9.0"]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    return {"home": home, "version": version, "archs": os.environ["TORCH_CUDA_ARCH_LIST"]}


def build_flags(clang: bool) -> dict[str, list[str]]:
    """Every compile and link flag, in one place; CMakeLists.txt repeats the compile flags.

    No -march=native (the vector kernels choose their instruction set at run time) and no fast-math: contraction is off
    so that every instruction set, and the GPU, rounds alike.
    """
    common = ["-std=c++20", "-O3"]
    host = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    return {
        # GCC 12 takes the undefined operands of its own AVX-512 intrinsics for mistakes.
        # -g0 comes last: some Pythons pass -g.
        "cxx": [
            *common,
            *host,
            "-Wall",
            "-Wno-unknown-pragmas",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            "-g0",
        ],
        # Device-side asserts stay on: an index outside its range must stop the program, not corrupt memory.
        # -fmad=false is -ffp-contract=off of the device: a kernel rounds like the CPU and like its emulation; where a
        # fused multiply-add is wanted, it says fmaf.
        "nvcc": [*common, "-UNDEBUG", "-lineinfo", "-fmad=false", "-Xcompiler", ",".join([*host, "-g0"])],
        # GCC's OpenMP symbols come from the runtime that libtorch has loaded already (its libgomp may carry another
        # file name); a second runtime would have threads of its own that torch.set_num_threads does not reach.
        "link": ["-fopenmp"] if clang else [],
    }


def sources(cuda: bool) -> list[str]:
    """Relative paths, as setuptools wants them."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])]
    found = (f for p in patterns for f in glob.glob(p, root_dir=ROOT))
    return sorted(found, key=lambda f: (not f.endswith(".cu"), f))  # nvcc takes longest: it is begun first


def grouped(files: list[str], folder: Path, groups: int) -> list[str]:
    """``files`` with the .cu files replaced by at most ``groups`` files that include them.

    nvcc spends about 45 s of each on the headers of torch, which are read once for a group. Errors and dependency
    files name the files themselves.
    """
    kernels = [f for f in files if f.endswith(".cu")]
    if len(kernels) <= groups:
        return files
    paths = [folder / f"group_{number}_of_{groups}.cu" for number in range(1, groups + 1)]
    lines = {f: f'#include "{ROOT / f}"\n' for f in kernels}
    # Groups that exist stay as they are while they hold these files: a new one is compiled from its start.
    if sorted("".join(p.read_text() for p in paths if p.is_file()).splitlines(True)) != sorted(lines.values()):
        # The largest first, each to the group that has least so far.
        size = {f: sum(p.stat().st_size for p in Path(ROOT, f).parent.glob(f"{Path(f).stem}.cu*")) for f in kernels}
        members: list[list[str]] = [[] for _ in paths]
        for file in sorted(kernels, key=lambda f: (-size[f], f)):
            min(members, key=lambda group: sum(size[f] for f in group)).append(file)
        folder.mkdir(parents=True, exist_ok=True)
        for path, group in zip(paths, members, strict=True):
            path.write_text("".join(lines[f] for f in sorted(group)))
    return [*map(str, paths), *(f for f in files if f not in kernels)]


class Plan:
    """What this run builds and why; ``facts`` ends up in ``rendseg/_build_facts.py``."""

    def __init__(self) -> None:
        self.command = BUILD_COMMANDS.intersection(sys.argv[1:])
        # `setup.py build_ext` asks for the extension by name; an install takes what it can get.
        default = "1" if "build_ext" in sys.argv[1:] else "0"
        self.required = os.environ.get("RENDSEG_REQUIRE_EXTENSION", default) != "0"
        self.cuda_required = os.environ.get("RENDSEG_CUDA") == "1"
        self.cuda = False
        self.extension: Extension | None = None
        self.facts: dict[str, object] = {
            "EXTENSION": False,
            "REASON": "",
            "PYTHON": platform.python_version(),
            "TORCH_VERSION": "",
            "COMPILER": "",
            "FLAGS": {},
            "CPU_ISAS": (),
            "CUDA": False,
            "CUDA_REASON": "",
            "CUDA_VERSION": "",
            "CUDA_ARCHS": "",
        }
        if self.command or "dist_info" in sys.argv[1:]:  # pip asks for that first, and then fetches the packages
            refuse_old_torch()
        if not self.command:  # sdist, egg_info, --version: nothing is compiled
            return
        try:
            self._prepare()
        except CannotBuild as cause:
            self.facts["REASON"] = str(cause)
            self.failed(str(cause), cause.remedy)
        self._print()

    def _prepare(self) -> None:
        if flag("RENDSEG_NO_EXTENSION"):
            raise CannotBuild("RENDSEG_NO_EXTENSION=1 was set for the build", "build without that setting")
        try:
            import torch
        except ImportError as error:
            raise CannotBuild(
                f"torch cannot be imported by the build ({error})",
                f"where torch is installed, run {TOOLCHAIN.INSTALL}",
            ) from error
        self.facts["TORCH_VERSION"] = torch.__version__
        cxx, version = find_compiler()
        os.environ["CXX"] = cxx  # the same one for ninja and for the link
        clang = "clang" in version
        self.facts["COMPILER"] = version
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        os.environ.setdefault("MAX_JOBS", str(cores))
        cuda: dict[str, str] = {}
        try:
            if os.environ.get("RENDSEG_CUDA") == "0":
                raise CannotBuild("RENDSEG_CUDA=0 was set for the build")
            cuda = cuda_settings(torch.version.cuda)
            self.cuda = True
            self.facts.update(CUDA=True, CUDA_VERSION=cuda["version"], CUDA_ARCHS=cuda["archs"])
        except CannotBuild as cause:
            self.facts["CUDA_REASON"] = str(cause)
            if self.cuda_required:
                sys.exit(f"rendseg: RENDSEG_CUDA=1 asks for the CUDA kernels, but {cause}")
        # It warns of a missing CUDA runtime; none is needed to build.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils.cpp_extension import include_paths, library_paths

        # Not CppExtension: the module uses no symbol of libtorch_python, and so loads in any process that has libtorch.
        flags = build_flags(clang)
        if flag("RENDSEG_SANITIZE"):
            flags["cxx"] += SANITIZERS
            flags["link"] += SANITIZERS
        emulated = flag("RENDSEG_EMULATE_AVX512")
        if emulated:  # -Wno-psabi: how functions take 64-byte vectors matters to nobody outside
            flags["cxx"] += ["-DRENDSEG_EMULATE_AVX512", "-Wno-psabi"]
        self.facts["FLAGS"] = flags
        if platform.machine() in ("x86_64", "AMD64"):
            self.facts["CPU_ISAS"] = ("default", "avx2", "avx512 (emulated)" if emulated else "avx512")
        else:
            self.facts["CPU_ISAS"] = ("default",)
        include_dirs = include_paths()
        library_dirs = library_paths()
        libraries = ["c10", "torch_cpu", "torch"]
        if self.cuda:
            include_dirs.append(os.path.join(cuda["home"], "include"))
            library_dirs.append(os.path.join(cuda["home"], "lib64"))
            libraries += CUDA_LIBRARIES
        self.extension = Extension(
            "rendseg._C",
            sources(self.cuda),
            depends=[],
            include_dirs=include_dirs,
            library_dirs=library_dirs,
            libraries=libraries,
            extra_compile_args={"cxx": flags["cxx"], "nvcc": flags["nvcc"]},
            extra_link_args=flags["link"],
            language="c++",
            optional=not self.required,
        )

    def failed(self, cause: str, remedy: str) -> None:
        """The extension will be missing: stop when it was asked for, else say so where it cannot be overlooked."""
        if flag("RENDSEG_NO_EXTENSION") and not self.required:
            return
        if self.required:
            sys.exit(f"rendseg: the extension cannot be built: {cause}. Remedy: {remedy}")
        shout(
            "the compiled kernels are NOT built; the pure-PyTorch reference will be used, which is slower.",
            f"Cause: {cause}",
            f"Remedy: {remedy}",
        )

    def _print(self) -> None:
        facts = self.facts
        say("build settings")
        say(f"  python      {facts['PYTHON']} ({sys.executable})")
        say(f"  torch       {facts['TORCH_VERSION'] or 'not importable'}")
        if self.extension is None:
            say(f"  extension   no: {facts['REASON']}")
            return
        flags = facts["FLAGS"]
        assert isinstance(flags, dict)
        say(f"  compiler    {facts['COMPILER']} ({os.environ['CXX']}), {os.environ['MAX_JOBS']} jobs")
        say(f"  flags       {' '.join(flags['cxx'])}")
        if self.cuda:
            say(f"  CUDA        {facts['CUDA_VERSION']} at {os.environ['CUDA_HOME']}, for {facts['CUDA_ARCHS']}")
            say(f"  nvcc flags  {' '.join(flags['nvcc'])}")
        else:
            say(f"  CUDA        no: {facts['CUDA_REASON']}")
        say(f"  sources     {len(self.extension.sources)} files")

    def write_facts(self, folder: Path) -> None:
        lines = ['"""Written by the build; read by ``rendseg doctor`` and when the library does not load."""\n']
        lines += [f"{name} = {pprint.pformat(value, width=110)}" for name, value in self.facts.items()]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{FACTS_NAME}.py").write_text("\n".join(lines) + "\n")


PLAN = Plan()


def base_build_ext() -> type:
    """torch's (ninja, nvcc) where there is something to compile."""
    if PLAN.extension is None:
        return build_ext
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


class BuildExt(base_build_ext()):  # type: ignore[misc]
    """Builds the extension where it can, without the CUDA part if only that fails, and writes the build facts."""

    def run(self) -> None:
        if PLAN.extension is not None:
            # A library left by an earlier build must not be packaged when this one fails.
            Path(self.build_lib, *self.get_ext_filename("rendseg._C").split("/")).unlink(missing_ok=True)
        super().run()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        PLAN.write_facts(ROOT / "rendseg" if inplace else Path(self.build_lib) / "rendseg")

    def build_extensions(self) -> None:
        if PLAN.extension is None:
            return
        try:
            super().build_extensions()
        except Exception as error:
            if PLAN.cuda and not PLAN.cuda_required and not PLAN.required:
                self._without_cuda(error)
            else:
                self._give_up(error)

    def _without_cuda(self, error: Exception) -> None:
        cause = f"compiling the CUDA kernels failed: {last_line(error)}"
        shout("the CUDA kernels are NOT built.", cause, "The compiler's message is above. Building for the CPU only.")
        PLAN.cuda = False
        PLAN.facts.update(CUDA=False, CUDA_REASON=cause)
        assert PLAN.extension is not None
        PLAN.extension.sources[:] = sources(False)
        PLAN.extension.libraries[:] = [name for name in PLAN.extension.libraries if name not in CUDA_LIBRARIES]
        try:
            super().build_extensions()
        except Exception as again:
            self._give_up(again)

    def _give_up(self, error: Exception) -> None:
        PLAN.facts.update(EXTENSION=False, REASON=f"the compile failed: {last_line(error)}", CUDA=False)
        PLAN.failed(str(PLAN.facts["REASON"]), "read the compiler's message above; RENDSEG_CUDA=0 leaves CUDA out")

    def build_extension(self, ext: Extension) -> None:
        if not getattr(self, "use_ninja", True):
            self._compile_side_by_side()
        files = ext.sources
        ext.depends = [*files]  # what is looked at without ninja
        ext.sources = grouped(files, Path(self.build_temp), max(int(os.environ["MAX_JOBS"]), MIN_GROUPS))
        super().build_extension(ext)
        ext.sources = files
        PLAN.facts.update(EXTENSION=True, REASON="")

    def _compile_side_by_side(self) -> None:
        """Without ninja torch compiles one file after the other, which takes many minutes; here as many as MAX_JOBS.

        Each file in a process of its own: torch changes the state of the compiler object for every file.
        """
        single, context = self.compiler.compile, multiprocessing.get_context("fork")

        def compile_all(sources: list[str], output_dir: str | None = None, **options: Any) -> list[str]:
            waiting, failed = list(sources), list[str]()
            running: dict[Any, tuple[Any, str]] = {}
            while waiting or running:
                while waiting and not failed and len(running) < int(os.environ["MAX_JOBS"]):
                    arguments = ([waiting[0]], output_dir)
                    process = context.Process(target=single, args=arguments, kwargs=options)
                    process.start()
                    running[process.sentinel] = (process, waiting.pop(0))
                if not running:
                    break
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process, source = running.pop(sentinel)
                    process.join()
                    failed += [source] if process.exitcode else []
            if failed:
                raise RuntimeError(f"compiling {', '.join(failed)} failed")
            return list(self.compiler.object_filenames(sources, strip_dir=False, output_dir=output_dir))

        self.compiler.compile = compile_all

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists what an sdist holds, the same on every machine

    def get_outputs(self) -> list[str]:
        return [f for f in super().get_outputs() if os.path.exists(f)] + [
            os.path.join(self.build_lib, "rendseg", f"{FACTS_NAME}.py")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {k: v for k, v in super().get_output_mapping().items() if os.path.exists(k) or os.path.exists(v)}


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


class BuildPy(build_py):
    """Leaves the facts of an earlier in-place build out; build_ext writes those of this one."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [m for m in super().find_package_modules(package, package_dir) if m[1] != FACTS_NAME]

    def run(self) -> None:
        super().run()
        # Without an extension there is no build_ext step, and the reason must be shipped all the same.
        if PLAN.extension is None and PLAN.command:
            editable = getattr(self, "editable_mode", False)
            PLAN.write_facts(ROOT / "rendseg" if editable else Path(self.build_lib) / "rendseg")


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [f for f in files if os.path.basename(f) != f"{FACTS_NAME}.py"])


setup(
    packages=[*find_packages(include=["rendseg", "rendseg.*"]), "rendseg.kernels._cases"],
    # The Triton kernels sit in kernels/ at the top and ship as rendseg.kernels; the stand-in
    # rendseg/kernels/__init__.py serves a checkout only.
    package_dir={"rendseg.kernels": "kernels"},
    include_package_data=False,
    package_data={"rendseg": ["py.typed"]},
    ext_modules=[PLAN.extension] if PLAN.extension is not None else [],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "sdist": Sdist},
    zip_safe=False,
)
