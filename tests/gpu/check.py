"""What only a GPU can show, in stages that do not stop each other: ``make gpu-check``; see docs/gpu.md.

Each stage runs in processes of its own with a limit, and what it found is written before the next begins, so a crash, a
hang or the end of the time costs the case in flight. This file and what it imports need only the standard library: it
must report also where torch cannot be imported.

Exit status: 0, everything that was asked for ran and passed; 1, something failed; 2, nothing failed, but not all ran.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

import report as reports  # noqa: E402
import sanitize_parts  # noqa: E402
import smoke  # noqa: E402
from processes import Job, how_it_ended, run  # noqa: E402

# Seconds of each stage when the whole has the default budget; a larger budget stretches them.
LIMITS = {
    "build": 180.0,
    "smoke": 75.0,
    "bench-quick": 110.0,
    "tests": 150.0,
    "triton": 90.0,
    "sanitize": 120.0,
    "bench": 240.0,
}
BUDGET = 480.0
REHEARSAL_BUDGET = 1800.0  # a rehearsal may have two slow cores; its limits are stretched likewise
LEAST = {"build": 20.0, "bench-quick": 20.0, "sanitize": 20.0, "bench": 25.0}  # not begun with less; 10 for the others
RESERVE = 4.0  # seconds for the last files and the summary
NEEDS_EXTENSION = ("smoke", "bench-quick", "tests", "sanitize", "bench")
RESTARTS = 6  # of one operator, after cases that killed its process
OUR_FILES = (
    "gpu-check.json",
    "gpu-check.log",
    "gpu-check-cases.jsonl",
    "gpu-check-rows.jsonl",
    "gpu-check-bench.tar.gz",
)
LOG_LIMIT = 14 << 20  # bytes of the log of a run
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# The rest of what --quick leaves out, for each benchmark.
BENCH_REST = {"refine": "W3,stages", "points": "T1,step,scatter", "encode": "broadcast"}

PROBE = """
import json, platform
facts = {"python": platform.python_version()}
try:
    import torch
    facts["torch"] = torch.__version__
    facts["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "devices": torch.cuda.device_count(),
                  "processors": p.multi_processor_count, "memory_gb": round(p.total_memory / 2**30, 1)}
except Exception as error:
    facts["torch_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
try:
    import triton
    facts["triton"] = triton.__version__
except Exception as error:
    facts["triton_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("PROBE " + json.dumps(facts))
"""


class Stopped(Exception):
    """The driver was asked to end."""


def write_atomically(path: Path, contents: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: as words."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file; one that was cut off is left out."""
    entries = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def architectures() -> str:
    """Of the GPUs of this machine, as torch's builds take them."""
    found = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    return ";".join(sorted({word for word in found if re.fullmatch(r"\d+\.\d+", word)})) or "9.0"


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def words(name: str) -> list[str]:
        return os.environ.get(name, "").replace(",", " ").split()

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stages", nargs="*", default=words("STAGES"), help=f"of {', '.join(LIMITS)}; default: all")
    parser.add_argument(
        "--budget",
        type=float,  # also of the text in the environment
        default=os.environ.get("BUDGET") or None,
        help=f"seconds for the whole; default: {BUDGET:g}, in a rehearsal {REHEARSAL_BUDGET:g}",
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check"))
    parser.add_argument(
        "--rehearse",
        action="store_true",
        default=os.environ.get("REHEARSE", "") not in ("", "0"),
        help="without a GPU, with the emulated kernels",
    )
    parser.add_argument("--ops", nargs="*", default=[], help="operators of the stages smoke and triton; default: all")
    parser.add_argument("--dtypes", nargs="*", default=[], help="dtypes of these stages; default: all")
    parser.add_argument("--tests", nargs="*", default=[], help="files or tests of the stage tests; default: tests/gpu")
    parser.add_argument("--parts", nargs="*", default=list(sanitize_parts.PARTS), help="of the stage sanitize")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes of the stage tests; default: as many as the cores allow, 12 at most",
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in LIMITS]
    if unknown:
        parser.error(f"STAGES: no stage is called {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    args.stages = [name for name in LIMITS if not args.stages or name in args.stages]
    if args.budget is None:
        args.budget = REHEARSAL_BUDGET if args.rehearse else BUDGET
    if not args.budget > 0:
        parser.error(f"BUDGET must be a number of seconds above 0, got {args.budget:g}")
    return args


class Check:
    """One run of the driver."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rehearsal, self.out = args, args.rehearse, args.out.resolve()
        self.begin = time.monotonic()
        self.end = self.begin + args.budget - RESERVE
        self.stretch = max(1.0, args.budget / BUDGET)
        self.cores = len(os.sched_getaffinity(0))
        self.out.mkdir(parents=True, exist_ok=True)
        for name in OUR_FILES:
            (self.out / name).unlink(missing_ok=True)
        self.cases = self.out / "gpu-check-cases.jsonl"
        (ROOT / "build").mkdir(exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=ROOT / "build"))
        self.logs: list[tuple[str, Path]] = []
        self.stages: list[dict[str, Any]] = []
        self.machine: dict[str, Any] = {"python": sys.version.split()[0], "cores": self.cores}
        self.probed: Job | None = None
        self.build_failed = ""
        self.sanitizer = "" if self.rehearsal else find_sanitizer()
        self.commit = output_of("git", "rev-parse", "HEAD")
        self.dirty = bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))
        self.device = "cpu" if self.rehearsal else "cuda"
        self.gathered = 0.0
        self.stopped = ""

    # -- processes -----------------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MAKEFLAGS")}
        # The programs of the packages of this Python, such as ninja, lie beside it.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "RENDSEG_CHECK_REHEARSE": str(int(self.rehearsal))}
        if self.build_failed:
            env["RENDSEG_DISABLE_EXTENSION"] = "1"  # an older one may lie there
        return env | more

    def job(self, stage: str, name: str, command: Iterable[str], limit: float, **env: str) -> Job:
        log = self.work / f"{len(self.logs):03d}.log"
        self.logs.append((f"{stage}: {name}", log))
        return Job(name, list(command), log, limit, self.environment(**env), ROOT)

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def side_by_side(self, most: int) -> int:
        """Processes at a time; two cores are left free where there are many."""
        return max(1, min(most, self.cores - 2 if self.cores > 4 else self.cores))

    def threads(self, at_once: int) -> dict[str, str]:
        """The processor cores, shared out."""
        return {"OMP_NUM_THREADS": str(max(1, self.cores // max(at_once, 1)))}

    def tick(self) -> None:
        """The log and the rows so far, every ten seconds: should the whole machine go, they remain."""
        if time.monotonic() - self.gathered > 10:
            self.gather()

    def run(self, jobs: Iterable[Job], at_once: int, limit: float, ended: Callable[[Job], Iterable[Job]]) -> list[Job]:
        waiting = list(jobs)
        try:
            return run(waiting, at_once, min(time.monotonic() + limit, self.end), ended, self.tick)
        except Stopped as error:  # what the stage has found so far is put together, and nothing begins any more
            self.stopped, self.end = str(error), time.monotonic()
            return []

    # -- what is here --------------------------------------------------------------------------------------------------

    def start_probe(self) -> None:
        self.probed = self.job("machine", "probe", self.python("-c", PROBE), 90)
        self.probed.start()

    def finish_probe(self) -> None:
        if self.probed is None:
            return
        probe, self.probed = self.probed, None
        probe.limit = min(probe.limit, max(self.end - probe.started, 1.0))
        while not probe.done():
            time.sleep(0.1)
        for line in probe.log.read_text(errors="replace").splitlines():
            if line.startswith("PROBE "):
                self.machine |= json.loads(line.removeprefix("PROBE "))
        if "torch" not in self.machine:
            how = self.machine.get("torch_error") or probe.ended_how() or "no answer"
            self.machine["torch_error"] = how
        if not self.rehearsal:
            asked = "driver_version,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"
            self.machine["nvidia-smi"] = output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
            self.machine["driver"] = self.machine["nvidia-smi"].split(",")[0] or None

    def obstacle(self, stage: str) -> str:
        """Why a stage cannot run; empty where it can."""
        if self.stopped:
            return self.stopped
        left = self.end - time.monotonic()
        least = LEAST.get(stage, 10.0)
        if left < least:
            return f"{max(left, 0):.0f} s of {self.args.budget:.0f} are left, it needs {least:.0f} at least"
        if stage == "build":
            return ""
        if self.build_failed and stage in NEEDS_EXTENSION:
            return "build failed"
        self.finish_probe()
        if "torch_error" in self.machine:
            return f"torch cannot be imported: {self.machine['torch_error']}"
        if not self.rehearsal and not self.machine.get("device"):
            return "torch finds NO GPU on this machine: nothing was run, nothing was checked"
        if stage in NEEDS_EXTENSION and not self.rehearsal and not glob.glob(str(ROOT / "rendseg" / "_C*.so")):
            return "the extension is not built (stage build)"
        return ""

    # -- stages --------------------------------------------------------------------------------------------------------

    def build(self, stage: dict[str, Any], limit: float) -> None:
        if self.rehearsal:
            program = (
                f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]; import smoke; smoke.own_tests(); "
                "from tests.emulation import build as b; print(b.missing() or b.build_library())"
            )
            job = self.job("build", "emulated kernels", self.python("-c", program), limit)
        else:
            job = self.job(
                "build",
                "setup.py",
                self.python("setup.py", "build_ext", "--inplace"),
                limit,
                RENDSEG_CUDA="1",
                RENDSEG_REQUIRE_EXTENSION="1",
                MAX_JOBS=os.environ.get("MAX_JOBS") or str(self.cores),
                TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(),
            )
        self.run([job], 1, limit, lambda job: ())
        how = job.ended_how()
        if not how and self.rehearsal and not (ROOT / "build/emulation/plain/emulation.so").is_file():
            how = "no library came of it"
        if how:
            self.build_failed = how
            stage["failures"].append({"case": job.name, "outcome": how, "message": job.tail(2)})
            return
        stage["counts"] = {"built": 1}
        stage["notes"].append(f"{'emulated kernels' if self.rehearsal else 'extension'} built in {job.seconds:.0f} s")
        if not self.rehearsal:
            self.resources(stage)

    def resources(self, stage: dict[str, Any]) -> None:
        """Kernels that spill, as notes: of the devices here, not of other architectures in the same library."""
        self.finish_probe()
        job = self.job("build", "resources", self.python("csrc/check_resources.py", "--table"), 40)
        self.run([job], 1, 40, lambda job: ())
        text = job.log.read_text(errors="replace")
        here = "sm_" + self.machine.get("capability", "").replace(".", "")
        stage["notes"] += resource_notes(text, here) or [f"registers: not looked at: {job.ended_how()} {job.tail()}"]

    def smoke(self, stage: dict[str, Any], limit: float) -> None:
        backend = "emulated" if self.rehearsal else "cpp"
        jobs = [(op, ()) for op in self.args.ops or smoke.OPS]
        self.operators(stage, limit, backend, jobs, self.side_by_side(12), {})

    def triton(self, stage: dict[str, Any], limit: float) -> None:
        # Compilation takes a core each: a process for each operator and dtype, those of the large kernels first.
        order = sorted(smoke.OPS, key=lambda op: op not in ("refine", "encode", "subdivide", "sample_uncertain_points"))
        jobs = [
            (op, (dtype,))
            for op in order
            if not self.args.ops or op in self.args.ops
            for dtype in (smoke.dtypes_of(op, "triton")[:1] if op == "point_labels" else smoke.dtypes_of(op, "triton"))
            if not self.args.dtypes or dtype in self.args.dtypes
        ]
        if self.rehearsal:  # starting a process takes longer than the rest: one for each operator, and two dtypes
            two = {"uint8", "float32", "bfloat16"}
            jobs = [
                (op, tuple(d for o, (d,) in jobs if o == op and d in two)) for op in dict.fromkeys(o for o, _ in jobs)
            ]
        env = {"TRITON_INTERPRET": "1"} if self.rehearsal else {}
        self.operators(stage, limit, "triton", jobs, self.side_by_side(64), env)

    def operators(
        self,
        stage: dict[str, Any],
        limit: float,
        backend: str,
        wanted: list[tuple[str, tuple[str, ...]]],
        at_once: int,
        env: dict[str, str],
    ) -> None:
        """Cases of smoke.py, in a process for each of ``wanted``: (operator, dtypes); one that dies is started again
        after the case that killed it."""
        name = stage["name"]
        planned: dict[str, list[str]] = {}
        restarts: dict[str, int] = {}
        died: dict[str, str] = {}
        found_dead: dict[str, str] = {}  # a process that ended outside of any case

        def command(key: str, op: str, dtypes: tuple[str, ...], after: str) -> Job:
            arguments = ["--op", op, "--backend", backend, "--device", self.device, "--stage", name]
            arguments += [part for dtype in dtypes for part in ("--dtype", dtype)]
            arguments += ["--results", str(self.cases), *(["--after", after] if after else [])]
            arguments += ["--limit", f"{0.8 * limit if backend == 'triton' else min(40.0, 0.8 * limit):.0f}"]
            arguments += ["--small"] if self.rehearsal and (backend == "triton" or op == "refine") else []
            job = self.job(
                name, key, self.python(str(HERE / "smoke.py"), *arguments), limit, **self.threads(at_once), **env
            )
            return job

        parts: dict[str, tuple[str, tuple[str, ...]]] = {}
        jobs = []
        for op, dtypes in wanted:
            dtypes = dtypes or tuple(self.args.dtypes)
            key = " ".join([op, *dtypes])
            parts[key] = (op, dtypes)
            planned[key] = smoke.case_names(op, backend, dtypes)
            if planned[key]:
                jobs.append(command(key, op, dtypes, ""))

        def ended(job: Job) -> Iterable[Job]:
            begun, finished = self.outcomes(name)
            mine = [case for case in planned[job.name] if case in begun]
            open_ones = [case for case in mine if case not in finished and case not in died]
            how = job.ended_how()
            for case in open_ones:
                died[case] = "still running when the time was up" if job.timed_out else how or "its process ended"
            last = mine[-1] if mine else ""
            left = planned[job.name][planned[job.name].index(last) + 1 :] if last else planned[job.name]
            if not left or job.timed_out:
                return
            restarts[job.name] = restarts.get(job.name, 0) + 1
            # One that ended outside of a case would do so again.
            if not mine or restarts[job.name] > RESTARTS or (not open_ones and last not in finished):
                found_dead[job.name] = f"{how or 'ended'}: {job.tail()}"
                return
            yield command(job.name, *parts[job.name], last)

        self.run(jobs, at_once, limit, ended)
        begun, finished = self.outcomes(name)
        counts = {"ok": 0, "wrong": 0, "error": 0, "died": 0, "not run": 0}
        ran: set[str] = set()
        for key, cases in planned.items():
            if key in found_dead:
                stage["failures"].append({"case": key, "outcome": "process ended", "message": found_dead[key]})
            for case in cases:
                if case in finished:
                    entry = finished[case]
                    ran.update(entry.get("ops", ()))
                elif case in begun:
                    message = died.get(case, "still running when the time was up")
                    entry = {"outcome": "died", "message": message}
                else:
                    entry = {"outcome": "not run"}
                entry = {"case": case} | {k: v for k, v in entry.items() if k not in ("event", "stage", "pid", "ops")}
                kind = entry["outcome"] if entry["outcome"] in counts else "died"
                counts[kind] += 1
                stage["cases"].append(entry)
                if kind not in ("ok", "not run"):
                    stage["failures"].append(entry)
        stage["counts"] = counts
        stage["largest"] = largest(stage["cases"])
        stage["notes"] += [f"largest error over its bound, by dtype: {stage['largest']}"] if stage["largest"] else []
        if not self.args.ops and counts["ok"] == sum(counts.values()):
            missed = schemas() - ran
            if missed:
                stage["failures"].append({"case": ", ".join(sorted(missed)), "outcome": "operators that no case calls"})

    def outcomes(self, stage: str) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """Names of the cases that were begun, and the last line of each that has ended; the worst of two counts."""
        begun: set[str] = set()
        finished: dict[str, dict[str, Any]] = {}
        for entry in read_lines(self.cases):
            if entry.get("stage") != stage or "case" not in entry:
                continue
            if entry.get("event") == "begin":
                begun.add(entry["case"])
            elif entry.get("event") == "end":
                held = finished.get(entry["case"])
                if held is None or held["outcome"] in ("ok", "skipped"):
                    finished[entry["case"]] = entry
        return begun, finished

    def tests(self, stage: dict[str, Any], limit: float) -> None:
        if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("xdist") is None:
            stage.update(outcome="not run", reason="pytest or pytest-xdist is not installed")
            return
        workers = self.args.workers or self.side_by_side(12)
        chosen = [str(Path("tests/gpu") / name) for name in self.args.tests] or ["tests/gpu"]
        job = self.job(
            "tests",
            "pytest",
            self.python(
                *("-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"),
                *("-n", str(workers), "--dist", "load", "--max-worker-restart", "500"),
                *shlex.split(os.environ.get("PYTEST_ARGS", "")),
            ),
            limit,
            CUDA_LAUNCH_BLOCKING="1",
            RENDSEG_CHECK_RESULTS=str(self.cases),
            RENDSEG_CHECK_TEST_LIMIT=os.environ.get("RENDSEG_CHECK_TEST_LIMIT", "60"),
            **self.threads(workers),
        )
        self.run([job], 1, limit, lambda job: ())
        entries = [entry for entry in read_lines(self.cases) if entry.get("stage") == "tests"]
        collected = max((entry["count"] for entry in entries if entry.get("event") == "collected"), default=0)
        begun, finished = self.outcomes("tests")
        stage["collected"] = collected
        counts = {"ok": 0, "failed": 0, "timeout": 0, "died": 0, "skipped": 0, "not run": 0}
        for case in sorted(begun | finished.keys()):
            entry = finished.get(case)
            if entry is None:
                message = "still running when the time was up" if job.timed_out else "its process died in it"
                entry = {"outcome": "died", "message": message}
            entry = {"case": case.removeprefix("tests/gpu/")} | {
                k: v for k, v in entry.items() if k not in ("event", "stage", "pid", "case")
            }
            counts[entry["outcome"]] += 1
            stage["cases"].append(entry)
            if entry["outcome"] not in ("ok", "skipped"):
                stage["failures"].append(entry)
        counts["not run"] = max(0, collected - len(begun))
        errors = {entry["case"]: entry.get("message", "") for entry in entries if entry.get("event") == "collect"}
        for case, message in errors.items():
            stage["failures"].append({"case": case, "outcome": "not collected", "message": message})
        stage["counts"] = counts | ({"not collected": len(errors)} if errors else {})
        if not begun and not errors:
            stage["failures"].append(
                {"case": "pytest", "outcome": job.ended_how() or "ran no test", "message": job.tail(2)}
            )

    def sanitize(self, stage: dict[str, Any], limit: float) -> None:
        if not self.rehearsal and not self.sanitizer:
            reason = "compute-sanitizer is not here (PATH, CUDA_HOME/bin): memory errors and races were not looked for"
            stage.update(outcome="not run", reason=reason)
            return
        dtypes = dict(zip(SANITIZERS, sanitize_parts.DTYPES, strict=True))
        jobs = []
        groups = [tuple(self.args.parts)] if self.rehearsal else [(part,) for part in self.args.parts]
        for tool in SANITIZERS:
            for parts in groups:
                command = self.python(
                    *(str(HERE / "sanitize.py"), "--device", self.device),
                    *(word for part in parts for word in ("--part", part)),
                    *("--stage", f"sanitize {tool}", "--results", str(self.cases)),
                )
                if self.rehearsal:  # without the tools, a dtype for each
                    command += ["--emulated", "--dtype", dtypes[tool]]
                else:
                    kernels = [] if tool == "initcheck" else ["--kernel-name", "kns=rendseg"]
                    command = [
                        *(str(self.sanitizer), "--error-exitcode", "1", "--report-api-errors", "no", "--tool", tool),
                        *kernels,
                        *command,
                    ]
                # Without torch's cache of memory each tensor has bounds of its own.
                jobs.append(
                    self.job(
                        "sanitize", f"{tool} {','.join(parts)}", command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
                    )
                )
        every = list(jobs)
        self.run(jobs, self.side_by_side(len(jobs)), limit, lambda job: ())
        counts = {"ok": 0, "failed": 0, "timeout": 0, "not run": 0}
        refused: list[str] = []
        called: dict[str, set[str]] = {tool: set() for tool in SANITIZERS}
        for job in every:
            tool, parts = job.name.split()[0], tuple(job.name.split()[1].split(","))
            begun, finished = self.outcomes(f"sanitize {tool}")
            mine = {case: entry for case, entry in finished.items() if case.startswith(parts)}
            for entry in mine.values():
                called[tool].update(entry.get("ops", ()))
            if not job.started:
                kind, message = "not run", "the time was up"
            else:
                kind, message = sanitizer_verdict(job, any(case.startswith(parts) for case in begun), self.rehearsal)
            open_ones = sorted(case for case in begun if case.startswith(parts) and case not in finished)
            if kind in ("failed", "timeout") and open_ones:
                message = f"in {', '.join(open_ones)}: {message}"
            counts[kind] += 1
            entry = {"case": job.name, "outcome": kind, "seconds": round(job.seconds, 1), "message": message}
            stage["cases"].append(entry)
            if kind in ("failed", "timeout"):
                stage["failures"].append(entry)
            elif kind == "not run":
                refused.append(f"{job.name}: {message}")
        stage["counts"] = counts
        if counts["not run"] == len(every):
            stage.update(outcome="not run", reason=f"compute-sanitizer refuses: {refused[0].partition(': ')[2]}")
        elif refused:
            stage["notes"] += refused[:3]
        for tool, names in called.items():
            missed = schemas() - names
            if missed and counts["ok"] == len(every) and self.args.parts == list(sanitize_parts.PARTS):
                stage["failures"].append(
                    {"case": f"{tool}: {', '.join(sorted(missed))}", "outcome": "operators that nothing calls"}
                )

    def bench_quick(self, stage: dict[str, Any], limit: float) -> None:
        self.benchmarks(stage, limit, {name: ["--quick"] for name in BENCH_REST})

    def bench(self, stage: dict[str, Any], limit: float) -> None:
        # Alone, this stage runs every workload; after bench-quick, those that bench-quick leaves out.
        rest = "bench-quick" in self.args.stages
        scripts = {name: ["--only", only] if rest else [] for name, only in BENCH_REST.items()}
        if not self.rehearsal and (ROOT / "bench" / "models.py").is_file():
            if importlib.util.find_spec("timm") is None:
                stage["notes"].append("bench/models.py: not run, it needs timm")
            else:
                scripts["models"] = []
        self.benchmarks(stage, limit, scripts)

    def benchmarks(self, stage: dict[str, Any], limit: float, scripts: dict[str, list[str]]) -> None:
        """One after the other: they are timed."""
        text = (ROOT / "bench" / "_harness.py").read_text() if (ROOT / "bench" / "_harness.py").is_file() else ""
        if self.rehearsal and "--rehearse" not in text:
            stage.update(outcome="not run", reason="the benchmarks of this checkout cannot be rehearsed")
            return
        counts = {"ok": 0, "failed": 0, "timeout": 0, "rows": 0}
        before = len(self.rows())
        deadline = min(time.monotonic() + limit, self.end)
        place = self.work / "bench"
        for number, (name, arguments) in enumerate(scripts.items()):
            script = ROOT / "bench" / f"{name}.py"
            left = deadline - time.monotonic()
            if not script.is_file() or left < 5:
                reason = "is missing" if not script.is_file() else "not run, the time was up"
                stage["notes"].append(f"bench/{name}.py {reason}")
                continue
            # What one leaves over is for the next; none may take the time of all.
            share = left if number + 1 == len(scripts) else max(left * 0.6, left / (len(scripts) - number))
            command = self.python(str(script), "--device", self.device, "--output", str(place), *arguments)
            if self.rehearsal:
                command.append("--rehearse")
            if "--seconds" in text:
                command += ["--seconds", f"{max(share - 10, 5):.0f}"]
            job = self.job(stage["name"], f"bench/{name}.py", command, share)
            self.run([job], 1, share, lambda job: ())
            how = job.ended_how()
            said = [
                line.strip().removeprefix("FAILED ")
                for line in job.log.read_text(errors="replace").splitlines()
                if line.startswith("FAILED ")
            ]
            kind = "timeout" if job.timed_out else "failed" if how else "ok"
            counts[kind] += 1
            stage["cases"].append({"case": job.name, "outcome": kind, "seconds": round(job.seconds, 1), "message": how})
            for line in said or ([f"{how}: {job.tail()}"] if how else []):
                stage["failures"].append({"case": job.name, "outcome": kind, "message": line})
        counts["rows"] = len(self.rows()) - before
        stage["counts"] = counts

    # -- results -------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Every line that the benchmarks have left so far."""
        found = []
        for name in (*BENCH_REST, "models"):  # refine first: of a long table the end is cut
            entries = read_lines(self.work / "bench" / f"{name}-rows.jsonl")
            found += [{"benchmark": name, **entry} for entry in entries]
        return found

    def gather(self) -> None:
        """The logs of all processes in one file, and the rows in one file."""
        self.gathered = time.monotonic()
        texts, left = [], LOG_LIMIT
        for title, path in self.logs:
            if path.is_file():
                text = read_log(path, min(left, 2 << 20))
                left -= len(text)
                texts.append(f"\n===== {title} =====\n".encode() + text)
        write_atomically(self.out / "gpu-check.log", b"".join(texts))
        rows = self.rows()
        if rows:
            write_atomically(self.out / "gpu-check-rows.jsonl", "".join(json.dumps(finite(row)) + "\n" for row in rows))

    def pack(self) -> None:
        """What the benchmarks wrote (JSON and plots) in one archive: files in OUT are few."""
        files = sorted(path for path in (self.work / "bench").glob("*") if path.suffix in (".json", ".png"))
        if not files:
            return
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            for path in files:
                archive.add(path, arcname=path.name)
        write_atomically(self.out / "gpu-check-bench.tar.gz", held.getvalue())

    def report(self, done: bool) -> dict[str, Any]:
        stages = self.stages
        failed = any(stage["outcome"] in ("failed", "timeout") for stage in stages)
        missing = [stage["name"] for stage in stages if stage["outcome"] == "not run"]
        missing += [
            stage["name"] for stage in stages if stage["outcome"] != "not run" and stage["counts"].get("not run")
        ]
        verdict = "FAILED" if failed else f"NOT ALL RAN: {', '.join(missing)}" if missing else "passed"
        return {
            "verdict": verdict if done else "under way",
            "status": 1 if failed else 2 if missing else 0,
            "rehearsal": self.rehearsal,
            "timings_mean_nothing": self.rehearsal,
            "machine": self.machine,
            "commit": self.commit or None,
            "dirty": self.dirty,
            "seconds": round(time.monotonic() - self.begin, 1),
            "budget": self.args.budget,
            "stages": stages,
            "out": str(self.out),
            "files": sorted(name for name in OUR_FILES if (self.out / name).is_file()),
        }

    def save(self, done: bool = False) -> None:
        self.gather()
        self.pack()
        write_atomically(self.out / "gpu-check.json", json.dumps(finite(self.report(done)), indent=1) + "\n")

    # -- the whole -----------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> None:
        entry: dict[str, Any] = {
            "name": name,
            "outcome": "",
            "reason": "",
            "seconds": 0.0,
            "limit": None,
            "counts": {},
            "failures": [],
            "notes": [],
            "cases": [],
        }
        self.stages.append(entry)
        entry["reason"] = self.obstacle(name)
        if entry["reason"]:
            entry["outcome"] = "not run"
            print(f"gpu-check: {name}: not run: {entry['reason']}", flush=True)
            return
        limit = min(LIMITS[name] * self.stretch, self.end - time.monotonic())
        entry["limit"] = round(limit, 1)
        print(f"gpu-check: {name} begins, limit {limit:.0f} s", flush=True)
        begin = time.monotonic()
        try:
            getattr(self, name.replace("-", "_"))(entry, limit)
        except Stopped:
            entry["failures"].append({"case": name, "outcome": "stopped from outside"})
            raise
        except Exception as error:  # a fault of this file must not cost the other stages
            entry["failures"].append({"case": name, "outcome": "the driver failed", "message": smoke.first_line(error)})
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            if self.stopped:
                entry["failures"].append({"case": name, "outcome": self.stopped})
            if not entry["outcome"]:
                entry["outcome"] = "failed" if entry["failures"] else "ok"
        counts = ", ".join(f"{number} {what}" for what, number in entry["counts"].items() if number)
        print(f"gpu-check: {name}: {entry['outcome']} in {entry['seconds']:.1f} s; {counts}", flush=True)

    def main(self) -> int:
        try:
            self.start_probe()
            for name in self.args.stages:
                self.stage(name)
                self.save()
            self.finish_probe()
        except Stopped as error:
            print(f"gpu-check: {error}", flush=True)
            for name in self.args.stages[len(self.stages) :]:
                self.stages.append(
                    {
                        "name": name,
                        "outcome": "not run",
                        "reason": str(error),
                        "counts": {},
                        "failures": [],
                        "notes": [],
                    }
                )
        finally:
            if self.probed is not None:
                self.probed.kill()
            rows = self.rows()
            self.save(done=True)
            report = self.report(done=True)
            print("\n" + reports.summary({**report, "rows": rows}), flush=True)
            shutil.rmtree(self.work, ignore_errors=True)
        return int(report["status"])


def schemas() -> set[str]:
    """The names of all operators, read from the text of rendseg: importing it would need torch."""
    text = (ROOT / "rendseg" / "ops" / "schemas.py").read_text()
    return set(re.findall(r"^    [\"'](\w+)\(", text, re.MULTILINE))


def resource_notes(text: str, here: str) -> list[str]:
    """What check_resources.py says of the kernels for this device; the number of findings for others."""
    said = [line.partition(": ")[2].strip() for line in text.splitlines() if line.startswith("check_resources: ")]
    if not said:
        return []
    *faults, verdict = said
    ours = [line for line in faults if " on sm_" not in line or f" on {here}: " in line]
    if len(ours) == len(faults):
        return [f"registers: {line}" for line in [*ours[:4], verdict]]
    others = f"{len(faults) - len(ours)} findings of other architectures than {here} do not count here"
    return [f"registers: {line}" for line in [*ours[:4], f"{len(ours)} findings on {here}; {others}"]]


def largest(cases: Iterable[dict[str, Any]]) -> str:
    """For each dtype the largest error over its bound, and where."""
    worst: dict[str, tuple[float, str]] = {}
    for case in cases:
        if not case.get("bound") or not isinstance(case.get("error"), (int, float)):
            continue
        dtype = case["case"].split()[1]
        worst[dtype] = max(worst.get(dtype, (0.0, "")), (case["error"] / case["bound"], case["case"].split()[0]))
    return ", ".join(f"{dtype} {share:.2g} ({op})" for dtype, (share, op) in worst.items())


def sanitizer_verdict(job: Job, began: bool, rehearsal: bool) -> tuple[str, str]:
    """``(outcome, message)`` of a process under compute-sanitizer (or, in a rehearsal, without it)."""
    text = job.log.read_text(errors="replace")
    said = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    if job.timed_out:
        return "timeout", job.ended_how()
    if job.error:
        return "not run", job.error
    # A tool that may not be used with this device says so, and the program may go on without it.
    refusal = [line for line in said if re.search(r"not supported|permission|Unable to|Failed to|Internal", line)]
    summary = next((line for line in said if "SUMMARY" in line), "")
    if refusal and (not began or not summary or "evice not supported" in refusal[0]):
        return "not run", refusal[0]
    if not job.returncode:
        # Without its closing line the tool has checked nothing.
        return ("ok", summary) if summary or rehearsal else ("not run", "the tool printed no summary")
    finding = re.compile(
        r"Invalid|Uninitialized|hazard|misaligned|out of bounds|Race reported|Program hit", re.IGNORECASE
    )
    found = [line for line in said if finding.search(line) and "SUMMARY" not in line]
    at = next((line for line in said if line.startswith("at ") or "rendseg::" in line), "")
    words = [part for part in (found[0] if found else "", at, summary) if part]
    return "failed", "; ".join(words) or how_it_ended(job.returncode) + (
        f": {job.tail()}" if job.returncode > 0 else ""
    )


def read_log(path: Path, limit: int) -> bytes:
    """A file, or its beginning and its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= limit:
            return file.read()
        head = file.read(limit // 4)
        file.seek(size - limit // 2)
        return head + b"\n[...]\n" + file.read()


def main(argv: list[str] | None = None) -> int:
    def stop(number: int, frame: Any) -> None:
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # the summary is to come out
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    args = parse(argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    return Check(args).main()


if __name__ == "__main__":
    raise SystemExit(main())
