"""The driver of ``make gpu-check``: one fault costs one case, and the summary comes out, also where little is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))
import check  # noqa: E402
import processes  # noqa: E402
import report  # noqa: E402
import smoke  # noqa: E402

from rendseg import ops  # noqa: E402
from rendseg.ops.schemas import SCHEMAS  # noqa: E402
from tests.emulation import build  # noqa: E402
from tests.limits import TIMEOUT  # noqa: E402


def without(folder: Path, *packages: str) -> dict[str, str]:
    """An environment whose Python says of these packages that they are not there, and that has another ``tests``."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys

            class Blocker:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] in {packages!r}:
                        raise ImportError("no module named " + name + " (blocked by a test)")

            sys.meta_path.insert(0, Blocker())
        """)
    )
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "__init__.py").write_text("")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RENDSEG_", "TRITON_", "PYTEST_"))
    }
    for name in ("OUT", "STAGES", "BUDGET", "REHEARSE"):
        kept.pop(name, None)
    return {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def driver(
    env: dict[str, str], out: Path, *arguments: str, timeout: float = TIMEOUT
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(GPU / "check.py"), "--out", str(out), *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (out / "gpu-check.json").is_file(), done.stdout + done.stderr
    return done, json.loads((out / "gpu-check.json").read_text())


def stage(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in result["stages"] if entry["name"] == name)


def outcomes(result: dict[str, Any], name: str) -> dict[str, str]:
    return {case["case"]: case["outcome"] for case in stage(result, name)["cases"]}


# --- where little is installed ----------------------------------------------------------------------------------------


def test_the_gpu_tests_are_collected_without_pydantic(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"],
        env=without(tmp_path, "pydantic", "typer"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "error" not in done.stdout.splitlines()[-1]
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {f"tests/gpu/{path.name}" for path in GPU.glob("test_*.py")}


def test_without_torch_the_driver_still_reports(tmp_path: Path) -> None:
    env = without(tmp_path / "path", "torch")
    done, result = driver(env, tmp_path / "out", "--stages", "smoke", "triton", "sanitize", "--rehearse")
    assert done.returncode == 2
    for name in ("smoke", "triton", "sanitize"):
        entry = stage(result, name)
        assert entry["outcome"] == "not run" and "torch cannot be imported: ImportError" in entry["reason"]
    assert "NOT ALL RAN: smoke, triton, sanitize" in done.stdout


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    done, result = driver(without(tmp_path / "path"), tmp_path / "out", "--budget", "6")
    assert done.returncode == 2
    assert [entry["name"] for entry in result["stages"]] == list(check.LIMITS)
    assert {entry["outcome"] for entry in result["stages"]} == {"not run"}
    assert all("are left, it needs" in entry["reason"] for entry in result["stages"])


@pytest.mark.parametrize("arguments", [["--stages", "smoke", "bath"], ["--budget", "0"]], ids=["stage", "budget"])
def test_a_wrong_option_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(GPU / "check.py"), "--out", str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("check.py: error: ")
    assert not list(tmp_path.iterdir())


# --- one fault costs one case -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")
def test_a_short_rehearsal_with_planted_faults(tmp_path: Path) -> None:
    """A segmentation fault and a lost CUDA context, in smoke and in the tests: every other result is there."""
    build.build_library()
    env = without(tmp_path / "path", "pydantic", "typer")
    names = {
        dtype: f"test_scatter_points.py::test_matches_the_reference[(2, 19, 65, 33, 200)-False-torch.{dtype}]"
        for dtype in ("float16", "bfloat16", "float32", "float64")
    }
    env["RENDSEG_CHECK_PLANT"] = (
        "smoke:scatter_points float32 channels_last@segv,smoke:uncertainty float32 contiguous@sticky,"
        "tests:200)-False-torch.float16@segv,tests:200)-False-torch.bfloat16@sticky,"
        "sanitize memcheck:encoding float32@segv"
    )
    env["RENDSEG_CHECK_CASES"] = "4"
    done, result = driver(
        env,
        tmp_path / "out",
        *("--rehearse", "--stages", "build", "smoke", "tests", "triton", "sanitize", "--workers", "2"),
        *("--ops", "scatter_points", "uncertainty", "--dtypes", "float32"),
        *("--tests", "test_scatter_points.py", "--parts", "encoding"),
    )
    assert done.returncode == 1, done.stdout
    assert stage(result, "build")["outcome"] == "ok"
    smoked = outcomes(result, "smoke")
    assert smoked == {
        "scatter_points float32 contiguous": "ok",
        "scatter_points float32 channels_last": "died",
        "uncertainty float32 contiguous": "error",
        "uncertainty float32 channels_last": "ok",
    }
    told = {case["case"]: case.get("message", "") for case in stage(result, "smoke")["cases"]}
    assert "SIGSEGV" in told["scatter_points float32 channels_last"]
    assert "the CUDA context is lost" in told["uncertainty float32 contiguous"]
    tested = outcomes(result, "tests")
    assert [tested[name] for name in names.values()] == ["died", "failed", "ok", "ok"]
    assert len(tested) == stage(result, "tests")["collected"] == 6
    assert stage(result, "tests")["counts"]["not run"] == 0
    assert set(outcomes(result, "triton").values()) == {"ok"}
    assert outcomes(result, "sanitize") == {
        "memcheck encoding": "failed",
        "racecheck encoding": "ok",
        "initcheck encoding": "ok",
    }
    text = done.stdout[done.stdout.index("== gpu-check: summary ==") :]
    for words in ("scatter_points float32 channels_last: died", "uncertainty float32 contiguous: error"):
        assert words in text
    assert names["float16"] + ": died" in text and names["bfloat16"] + ": failed" in text
    assert len(text.splitlines()) <= 100
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_driver_that_is_stopped_reports_what_it_has(tmp_path: Path) -> None:
    """As by the time limit of a rented machine: the case that hangs is named, those before it are kept."""
    out = tmp_path / "out"
    env = without(tmp_path / "path") | {"RENDSEG_CHECK_PLANT": "triton:point_labels uint8 contiguous@hang"}
    arguments = [
        "--rehearse",
        "--stages",
        "triton",
        "bench",
        "--ops",
        "scatter_points",
        "point_labels",
        "--out",
        str(out),
    ]
    # Triton's interpreter needs no build.
    process = subprocess.Popen(
        [sys.executable, str(GPU / "check.py"), *arguments], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 200
        lines = out / "gpu-check-cases.jsonl"
        while not any(entry.get("case", "").startswith("point_labels") for entry in check.read_lines(lines)):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.2)
        process.terminate()
        text, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 1
    result = json.loads((out / "gpu-check.json").read_text())
    assert outcomes(result, "triton")["point_labels uint8 contiguous"] == "died"
    assert stage(result, "bench")["reason"] == "stopped by SIGTERM" and "stopped by SIGTERM" in text
    assert set(outcomes(result, "triton").values()) <= {"ok", "died", "not run"}


@pytest.mark.parametrize("how", ["in the group", "in a session of its own"])
def test_a_process_is_killed_whole(how: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    session = "True" if "session" in how else "False"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '300'], start_new_session={session})\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    job = processes.Job("x", [sys.executable, "-S", "-c", program], tmp_path / "log", 300, dict(os.environ), ROOT)

    def enough() -> None:
        if note.exists() and note.read_text():
            job.limit = 0

    assert processes.run([job], 1, time.monotonic() + 100, tick=enough) == []
    assert job.timed_out and job.ended_how().startswith("killed after")
    end = time.monotonic() + 20
    while alive(int(note.read_text())):
        assert time.monotonic() < end, "the child of a killed process is alive"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    job = processes.Job("x", [str(tmp_path / "nothing")], tmp_path / "log", 5, {}, ROOT)
    after = processes.Job("y", [sys.executable, "-c", "print('hello')"], tmp_path / "log2", 60, dict(os.environ), ROOT)
    assert processes.run([job, after], 1, time.monotonic() + 60) == []
    assert job.ended_how().startswith("cannot be started") and after.returncode == 0 and after.tail() == "hello"


def test_what_is_past_the_deadline_is_given_back(tmp_path: Path) -> None:
    job = processes.Job("x", ["true"], tmp_path / "log", 5, {}, ROOT)
    assert processes.run([job], 1, time.monotonic() - 1) == [job]
    assert not job.started


# --- what is read from the tools --------------------------------------------------------------------------------------


def verdict(tmp_path: Path, text: str, code: int, began: bool = True, rehearsal: bool = False) -> tuple[str, str]:
    log = tmp_path / "log"
    log.write_text(text)
    job = SimpleNamespace(log=log, timed_out=False, error="", returncode=code, tail=lambda: text.splitlines()[-1])
    return check.sanitizer_verdict(job, began, rehearsal)  # type: ignore[arg-type]


def test_a_sanitizer_that_refuses_the_device_has_not_run(tmp_path: Path) -> None:
    refused = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the section\n"
    for code in (0, 1, 255):
        assert verdict(tmp_path, refused, code, began=True)[0] == "not run"
    assert verdict(tmp_path, "========= COMPUTE-SANITIZER\nsanitize: ran encode\n", 0)[0] == "not run"


def test_what_a_sanitizer_finds_is_named(tmp_path: Path) -> None:
    text = (
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
        "=========     at void rendseg::encode_kernel<float>(Params)+0x120\n========= ERROR SUMMARY: 1 error\n"
    )
    kind, message = verdict(tmp_path, text, 1)
    assert kind == "failed" and "Invalid __global__ read" in message and "encode_kernel" in message
    good = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert verdict(tmp_path, good, 0)[0] == "ok"
    assert verdict(tmp_path, good + "Traceback\nValueError: x\n", 1)[0] == "failed"
    assert verdict(tmp_path, "sanitize: ran encode\n", 0, rehearsal=True)[0] == "ok"
    assert verdict(tmp_path, "ValueError: x\n", 1, rehearsal=True)[0] == "failed"


def test_only_spills_of_the_device_count() -> None:
    text = (
        "a table\ncheck_resources: rendseg::k<float> on sm_80: 8 bytes of stack, 0 of local memory\n"
        "check_resources: 3 kernels for sm_80, sm_90: FAILED\n"
    )
    (line,) = check.resource_notes(text, "sm_90")
    assert line.startswith("registers: 0 findings on sm_90; 1 findings of other architectures")
    assert "rendseg::k<float> on sm_80" in check.resource_notes(text, "sm_80")[0]
    good = "check_resources: 3 kernels for sm_90: no spills, no stack frames\n"
    assert check.resource_notes(good, "sm_90") == ["registers: 3 kernels for sm_90: no spills, no stack frames"]
    assert check.resource_notes("Traceback", "sm_90") == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"case": "a"}\n{"case": "b", "outc')
    assert check.read_lines(path) == [{"case": "a"}]
    assert check.read_lines(tmp_path / "none") == []


def test_every_operator_has_a_case() -> None:
    assert set(smoke.RUN) == set(smoke.OPS)
    # refine calls subdivide_labels, which has a case of its own.
    assert set(smoke.OPS) == {op.rstrip("_") for op in ops.__all__} | {"subdivide_labels"}
    assert check.schemas() == {schema.partition("(")[0] for schema in SCHEMAS}
    assert "encode bfloat16 channels_last" in smoke.case_names("encode")
    assert smoke.case_names("encode", "triton", ("float16",)) == ["encode float16 contiguous"]


# --- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary_is_short_whatever_there_is_to_say() -> None:
    many = [
        {
            "case": f"test_x.py::test_y[{i}]",
            "outcome": "failed",
            "message": "long words " * 40,
            "error": 2.0,
            "bound": 1.0,
        }
        for i in range(900)
    ]
    stages = [
        {
            "name": name,
            "outcome": "failed",
            "seconds": 9.0,
            "limit": 10.0,
            "counts": {"ok": 3, "wrong": 900},
            "reason": "",
            "failures": many,
            "notes": ["words " * 60] * 40,
        }
        for name in check.LIMITS
    ]
    rows = [
        {"row": f"row {i}", "candidate": candidate, "median": 1.0, "percent_of_floor": 50.0}
        for i in range(300)
        for candidate in ("eager", "hand-tuned", "compiled", "rendseg nhwc", "triton nhwc")
    ]
    facts = {"commit": "c" * 40, "dirty": True, "seconds": 1.0, "budget": 2.0, "out": "/o", "verdict": "FAILED"}
    text = report.summary({**facts, "machine": {"python": "3.12"}, "stages": stages, "rows": rows, "files": ["a"]})
    lines = text.splitlines()
    assert len(lines) <= 100 and len(text) < 11_000
    for name in check.LIMITS:
        assert sum(line.startswith(f"  {name}") for line in lines) >= 1, f"no failing case of {name} is shown"
    assert any("more: " in line for line in lines) and lines[-1].startswith("written to /o")


def test_the_table_of_speed() -> None:
    rows = [
        {"row": "W1", "candidate": "eager", "median": 8.0},
        {"row": "W1", "candidate": "hand-tuned", "median": 4.0},
        {"row": "W1", "candidate": "compiled", "median": 5.0},
        {"row": "W1", "candidate": "rendseg", "median": 2.0, "percent_of_floor": 40.0},
        {"row": "W1", "candidate": "triton", "median": 2.5},
        {"row": "W1", "candidate": "rendseg labels", "median": 1.0},
        {"event": "ceilings", "copy_gb_s": 3000.0},
    ]
    head, plain, labels = report.speed_lines(rows)
    assert head.split()[1:6] == ["rendseg", "triton", "eager", "hand-tuned", "compile"]
    assert plain.split() == ["W1", "2", "2.5", "8", "4", "5", "4.00", "40"]
    assert labels.split() == ["W1", "labels", "1", "-", "8", "4", "5", "8.00", "-"]
