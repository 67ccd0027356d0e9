"""``make sanitize``: the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the CPU extension in a copy of the sources in ``build/sanitize``, so that no other build is touched, and runs the
fuzz and the tests of the operators there, then the tests of the emulated CUDA kernels under the same sanitizers.
``--only fuzz``, ``--only ops`` or ``--only kernels`` takes one part; other arguments go to the fuzz.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "sanitize"
FOLDERS = ("csrc", "kernels", "rendseg", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md")
BUILT = shutil.ignore_patterns("_C.*", "_build_facts.py", "__pycache__")
LIMIT = 6 * 3600  # seconds for a part; on two slow cores the tests take the better part of an hour


def copy_sources() -> None:
    """With their times, so that the build compiles what changed."""
    for folder in FOLDERS:
        shutil.rmtree(COPY / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, COPY / folder, ignore=BUILT)
    for file in FILES:
        shutil.copy2(ROOT / file, COPY / file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("fuzz", "ops", "kernels"))
    options, fuzz = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    from tests.emulation.build import missing, sanitizer_environment

    if missing():
        sys.exit(f"sanitize: needs g++ and ninja: {missing()}")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
    compiled = clean | {"RENDSEG_CUDA": "0", "RENDSEG_SANITIZE": "1"}
    loaded = clean | sanitizer_environment() | {"PYTHONPATH": str(COPY), "RENDSEG_BACKEND": "auto"}
    loaded["ASAN_OPTIONS"] += ":allocator_may_return_null=1"  # a size that memory does not hold is refused, not fatal
    loads = "import rendseg; cpp = rendseg.backends['cpp']; assert cpp.usable, cpp"
    parts = {
        "build": ([sys.executable, "setup.py", "build_ext", "--inplace"], compiled),
        "load": ([sys.executable, "-c", loads], loaded),
        "fuzz": ([sys.executable, "-m", "tests.fuzz", "--calls", "2000", *fuzz], loaded),
        "ops": (
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not triton", "tests/ops"],
            loaded,
        ),
        "kernels": (
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/emulation/test_sanitizers.py"],
            clean | {"PYTHONPATH": str(COPY), "RENDSEG_SANITIZE_KERNELS": "1"},
        ),
    }
    copy_sources()
    for name, (command, environment) in parts.items():
        if name == (options.only or name) or (name in ("build", "load") and options.only != "kernels"):
            print(f"== {name}: {' '.join(command[1:])}", flush=True)
            done = subprocess.run(command, cwd=COPY, env=environment, timeout=LIMIT)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
