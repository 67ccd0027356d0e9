"""``make versions``: tries rendseg with several versions of torch, each with its Triton, and fills docs/versions.md.

Each row has a folder ``build/versions/ROW``: a virtual environment, a copy of the sources with the extension built for
that torch (CPU kernels only), and a log of each part. A part that was done for the same sources is not done again, so
that a run which was stopped goes on where it was. Rows that are not run keep what the page says of them.

``python tests/packaging/versions.py [ROW ...]`` does some rows only; ``RENDSEG_NO_EXTENSION=1`` saves the build.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "versions.md"
ROWS = ("2.8", "2.11", "2.13", "newest")  # the first is the oldest that pyproject.toml allows
NOT_RUN = "not run"
TIMEOUT = 3600  # seconds for one step

TRACED = "opcheck or compile or export or schemas or flops or torch_func"
INTERPRETED = "triton_dispatch or triton_torch_compile or triton_scatter_points"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# What is tried: the title of a column, the words after `python`, and what the environment gets. Not every test, since
# the whole takes half an hour: those that depend on how torch traces and registers, and on how Triton compiles.
PARTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "nn": ((*PYTEST, "tests/nn"), {}),
    "training": (("-m", "rendseg", "train", "configs/shapes/fcn.yaml", "train.iterations=20"), {}),
    "operators": ((*PYTEST, "tests/ops", "-m", "not slow and not triton", "-k", TRACED), {}),
    "Triton compiled": ((*PYTEST, "tests/test_triton_compile.py", "-k", "sm_100 or fused or pointers"), {}),
    "Triton interpreted": (
        (*PYTEST, "tests/ops", "-m", "triton", "-k", INTERPRETED),
        {"TRITON_INTERPRET": "1"},
    ),
}
COLUMNS = ("row", "torch", "Triton", "Python", "extension", *PARTS, "sources", "date")
HEAD = (
    "from importlib.metadata import PackageNotFoundError, version\n"
    "import json, platform\n"
    "def of(name):\n"
    "    try:\n"
    "        return version(name)\n"
    "    except PackageNotFoundError:\n"
    "        return 'none'\n"
    "print(json.dumps({'torch': of('torch'), 'Triton': of('triton'), 'Python': platform.python_version()}))\n"
)


def copy_sources(target: Path) -> str:
    """Brings ``target`` up to date without what was built there; returns a digest of the sources."""
    if target.is_dir():
        for entry in target.iterdir():
            if entry.name == "rendseg":  # holds the library
                for old in entry.iterdir():
                    if old.suffix != ".so" and old.name != "_build_facts.py":
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
            elif entry.name != "build":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    hidden = (".git", ".venv", "build", "dist", "runs", "results", ".*_cache")
    built = ("*.so", "*.egg-info", "__pycache__", "_build_facts.py")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*hidden, *built), dirs_exist_ok=True)
    digest = hashlib.sha256()
    for folder in ("csrc", "kernels", "rendseg", "tests", "configs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".yaml") and path.name != "_build_facts.py":
                digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Short name of the commit, with "+" where the sources differ from it; empty outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def run(command: list[str], log: Path, cwd: Path, **env: str) -> tuple[int, str]:
    """Exit status and output, which goes to ``log`` too; 124 when it ran too long."""
    unwanted = ("RENDSEG_", "PYTEST_", "TRITON_", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, cwd=cwd, env={**clean, **env}, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    return status, log.read_text(errors="replace")


def outcome(status: int, output: str) -> str:
    """The cell of a part: the counts of pytest, or whether the command succeeded."""
    counts = dict((word, int(n)) for n, word in re.findall(r"(\d+) (passed|failed|error)", output[-400:]))
    bad = counts.get("failed", 0) + counts.get("error", 0)
    if status == 124:
        return f"stopped after {TIMEOUT} s"
    if not counts:
        return "passed" if status == 0 else f"failed (exit status {status})"
    passed = f"{counts.get('passed', 0)} passed"
    return passed if status == 0 else f"{bad} failed, {passed}" if bad else f"{passed}, exit status {status}"


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def try_row(row: str) -> None:
    """Does what is not done yet of one row; each cell goes to the page at once."""
    folder = ROOT / "build" / "versions" / row
    folder.mkdir(parents=True, exist_ok=True)
    sources = copy_sources(folder / "source")
    kept = folder / "result.json"
    state: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    if state.get("digest") != sources:
        state = {"digest": sources, "cells": {"sources": commit(), "date": time.strftime("%Y-%m-%d")}}
    cells: dict[str, str] = state["cells"]
    python = str(folder / "venv" / "bin" / "python")
    source = folder / "source"

    def keep(cell: str, value: str) -> None:
        cells[cell] = value
        write(kept, json.dumps(state, indent=1))
        write(PAGE, with_row(PAGE.read_text(encoding="utf-8"), row, cells))
        print(f"{row}: {cell}: {value}", flush=True)

    if not (folder / "installed").is_file():
        torch = "torch" if row == "newest" else f"torch=={row}.*"
        install = [python, "-m", "pip", "install", "--no-compile"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder / "venv")],
            [*install, "--upgrade", "pip", "setuptools>=77", "wheel", "ninja", "pytest", "psutil"],
            [*install, "--no-build-isolation", torch, ".[train]"],
        ):
            status, said = run(command, folder / "install.log", source, RENDSEG_NO_EXTENSION="1")
            if status:
                raise SystemExit(f"{row}: {' '.join(command)} failed: {said[-2000:]}")
        (folder / "installed").touch()
    if "torch" not in cells:
        status, said = run([python, "-c", HEAD], folder / "versions.log", source)
        for cell, value in json.loads(said).items():
            keep(cell, value)
    if "extension" not in cells and os.environ.get("RENDSEG_NO_EXTENSION", "") not in ("", "0"):
        keep("extension", "left out")
    if "extension" not in cells:
        build = [python, "setup.py", "build_ext", "--inplace"]
        status, said = run(build, folder / "extension.log", source, RENDSEG_CUDA="0")
        keep("extension", "built" if status == 0 else "failed")
    for part, (words, env) in PARTS.items():
        if part not in cells:
            start = time.monotonic()
            log = folder / f"{part.replace(' ', '_')}.log"
            status, said = run([python, *words], log, source, PYTHONPATH=str(source), **env)
            keep(part, outcome(status, said))
            print(f"{row}: {part}: {time.monotonic() - start:.0f} s, {log.relative_to(ROOT)}", flush=True)


def with_row(page: str, row: str, cells: dict[str, str]) -> str:
    """``page`` with the line of ``row`` in its table replaced."""
    line = "| " + " | ".join([row, *(cells.get(column, NOT_RUN) for column in COLUMNS[1:])]) + " |"
    changed, count = re.subn(rf"^\| {re.escape(row)} \|.*$", line, page, flags=re.M)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} lines that begin with '| {row} |', where there must be one")
    return changed


def main(rows: list[str]) -> int:
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise SystemExit(f"unknown row {', '.join(unknown)}: one of {', '.join(ROWS)}")
    for row in rows or ROWS:
        try_row(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
