"""One harness for every benchmark: ceilings first, then interleaved medians, floors, peak memory, JSON and a plot.

Usage in a script::

    bench = Bench("encode", __doc__)
    bench.compare("forward", {"eager": f, "rendseg": g}, baseline="eager", floor=floor)
    bench.bar("forward against eager", bench.ratio("forward", "eager", "rendseg"), at_least=3.0)
    raise SystemExit(bench.finish())

Speeds are ratios of medians within one run: the candidates of a row are run in turn, round after round, so that a slow
spell of the machine meets all of them alike.

On a GPU every candidate has two columns. The first is device time: replays of a CUDA graph that holds up to twenty
calls, timed by events. The second, "plain", is as many calls in a row without a graph, so it holds what the host needs
as well. ``bench.cold(function, *tensors)`` calls the function on several copies of the tensors in turn, more than the
L2 cache holds; such a candidate finds its inputs in memory, and the figure with warm inputs stands beside it.

On a GPU every candidate "rendseg ..." has a twin "triton ...": the same call under ``rendseg.backend("triton")``. Its
goals are three fifths of the speed of the CUDA C++ kernels, and more than that of eager PyTorch and of torch.compile.
On a CPU the twin is left out: Triton's interpreter tells nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from _floors import Floor  # noqa: E402

import rendseg  # noqa: E402
from rendseg.ops._triton import failure as triton_failure  # noqa: E402

Candidate = Callable[[], Any]

CALLS = 20  # in a sample on a GPU, unless they take longer than SAMPLE_MS
SAMPLE_MS = 5.0
GPU_BUDGET_S = 2.0  # for a column of a row
OURS, TRITON = "rendseg", "triton"  # how candidates that call our operators begin
TRITON_SHARE = 0.6  # of the speed of the CUDA C++ kernels


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p10: float
    p90: float
    samples: int


class Rotation:
    """One call on several sets of inputs in turn: when a set comes round again, the L2 cache holds others."""

    def __init__(self, function: Callable[..., Any], sets: list[tuple[torch.Tensor, ...]]) -> None:
        self.function, self.sets, self.turn = function, sets, 0

    def __call__(self) -> Any:
        tensors = self.sets[self.turn]
        self.turn = (self.turn + 1) % len(self.sets)
        return self.function(*tensors)

    def warm(self) -> Any:
        """The call on the first set alone."""
        return self.function(*self.sets[0])


def sets_to_rotate(inputs_bytes: int, l2_bytes: int) -> int:
    """How many copies of the inputs make three times the L2 cache; 64 at most."""
    return max(1, min(64, -(-3 * l2_bytes // max(inputs_bytes, 1))))


def calls_per_sample(call_ms: float, candidate: Candidate) -> int:
    """Enough calls for the clock, few enough for the budget; a rotation goes round at least once."""
    calls = max(1, min(CALLS, int(SAMPLE_MS / max(call_ms, 1e-6))))
    return max(calls, len(candidate.sets)) if isinstance(candidate, Rotation) else calls


def backend_of(key: str) -> AbstractContextManager[None]:
    """The backend that a candidate is called under, by its name."""
    return rendseg.backend("triton") if key.startswith(TRITON) else nullcontext()


def _quantiles(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Bench:
    """One benchmark run; see the module's docstring."""

    def __init__(self, name: str, description: str | None = None, argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(
            prog=f"bench/{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--quick", action="store_true", help="small cases and few samples: ends within a minute")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
        parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all cores)")
        parser.add_argument(
            "--samples", type=int, default=0, help="samples per candidate (0: 20 on the CPU, 50 on a GPU)"
        )
        parser.add_argument("--compile", action="store_true", help="time torch.compile too even with --quick")
        parser.add_argument("--output", type=Path, default=None, help="folder of the JSON and the plot")
        parser.add_argument("--no-plot", action="store_true", help="write no plot")
        self.args = parser.parse_args(argv)
        self.name = name
        self.device = torch.device(self.args.device)
        self.quick: bool = self.args.quick
        self.with_compile: bool = self.args.compile or not self.quick
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        self.samples = self.args.samples or (50 if self.device.type == "cuda" else 7 if self.quick else 20)
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failures: list[str] = []
        self._timings: dict[tuple[str, str], Timing] = {}
        self._cuda = self.device.type == "cuda"
        if self._cuda:
            # Not the default stream, which cannot be captured: a backward pass runs on the stream of its forward pass.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        print(f"{name}: {self._device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        self.ceilings = self._measure_ceilings()
        text = ", ".join(f"{key} {value:.4g}" for key, value in self.ceilings.items())
        print(f"ceilings measured now: {text}")
        self.no_triton = self._no_triton()
        if self.no_triton:
            self.note(f"no column triton: {self.no_triton}")
        elif "cuda" not in rendseg.backends["cpp"].devices:
            self.note(f"rendseg is Triton here, too: {rendseg.backends['cpp'].cause}")

    # -- Triton ------------------------------------------------------------------------------------------------------

    def _no_triton(self) -> str:
        """Why candidates get no twin under Triton; empty when they do."""
        if not self._cuda:
            return "on a CPU Triton's kernels are interpreted, which tells nothing about their speed"
        status = rendseg.backends["triton"]
        if "cuda" not in status.devices:
            return status.cause
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            return "TRITON_INTERPRET is set, and interpreted kernels tell nothing about speed"
        return triton_failure()

    def with_triton(self, row: str, candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
        """The candidates, and after each of ours the same call as ``"triton ..."``; one that raises is left out."""
        both: dict[str, Candidate] = {}
        for key, candidate in candidates.items():
            both[key] = candidate
            if not key.startswith(OURS) or self.no_triton:
                continue
            twin = TRITON + key.removeprefix(OURS)
            try:
                with backend_of(twin):
                    candidate()
                self._synchronize()
            except Exception as error:
                self.failures.append(f"{row}, {twin}: {type(error).__name__}: {str(error).splitlines()[0]}")
                self.note(f"  FAILED {self.failures[-1]}")
            else:
                both[twin] = candidate
        return both

    def _triton_bars(self, row: str, timings: Mapping[str, Timing]) -> None:
        """Each twin against ours in CUDA C++, and against the forms in PyTorch that the row holds."""
        for key in timings:
            if not key.startswith(TRITON):
                continue
            if "cuda" in rendseg.backends["cpp"].devices:
                share = self.ratio(row, OURS + key.removeprefix(TRITON), key)
                self.bar(f"{row}, {key}: speed over that of CUDA C++", share, at_least=TRITON_SHARE)
            for other in timings:
                if not other.startswith((OURS, TRITON)):
                    self.bar(f"{row}, {key} against {other}", self.ratio(row, other, key), at_least=1)

    # -- timing ------------------------------------------------------------------------------------------------------

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def cold(self, function: Callable[..., Any], *tensors: torch.Tensor) -> Candidate:
        """``function(*tensors)`` whose inputs are not in the L2 cache of a GPU; on the CPU just that call."""
        if not self._cuda:
            return lambda: function(*tensors)
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        copies = sets_to_rotate(sum(t.nbytes for t in tensors), l2_bytes)
        return Rotation(function, [tensors, *(tuple(t.detach().clone() for t in tensors) for _ in range(copies - 1))])

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.compile`` for the shapes of one row, whatever was compiled before; its backward can run again."""
        import torch._functorch.config

        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, dynamic=False)

    def _warm_up(self, candidate: Candidate) -> float:
        """Page faults, thread pools, compilation, caches of memory; milliseconds of a call."""
        candidate()
        self._synchronize()
        begin = time.perf_counter()
        candidate()
        self._synchronize()
        elapsed = time.perf_counter() - begin
        for _ in range((25 if self._cuda else 2) if elapsed < 0.2 else 0):
            candidate()
        self._synchronize()
        if not self._cuda or elapsed > 0.2:
            return elapsed * 1e3
        begin = time.perf_counter()
        for _ in range(5):
            candidate()
        self._synchronize()
        return (time.perf_counter() - begin) * 1e3 / 5

    def _captured(self, key: str, candidate: Candidate, calls: int) -> Callable[[], Any] | None:
        """Replays ``calls`` calls as a CUDA graph; ``None`` where the candidate cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(calls):
                    candidate()
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note(f"  {key}: no CUDA graph ({str(error).splitlines()[0]}); its calls are timed one by one")
            return None
        return graph.replay

    def _sampler(self, key: str, candidate: Candidate, graphs: bool) -> Callable[[], float]:
        """A function that takes one sample: milliseconds of a call."""
        with backend_of(key):
            call_ms = self._warm_up(candidate)
            if not self._cuda:
                return lambda: _wall_ms(candidate)
            calls = calls_per_sample(call_ms, candidate)
            replay = self._captured(key, candidate, calls) if graphs else None

        def run() -> None:
            for _ in range(calls):
                candidate()

        def sample() -> float:
            with backend_of(key):
                return _event_ms(replay or run) / calls

        return sample

    def measure(
        self, candidates: Mapping[str, Candidate], samples: int = 0, budget_s: float = 20.0, graphs: bool = True
    ) -> dict[str, Timing]:
        """Interleaved medians of ``candidates``; at least three rounds, then until ``samples`` or ``budget_s``.

        On a GPU: replays of CUDA graphs, or with ``graphs=False`` plain calls.
        """
        samples = samples or self.samples
        budget_s = min(budget_s, GPU_BUDGET_S) if self._cuda else budget_s
        samplers = {key: self._sampler(key, candidate, graphs) for key, candidate in candidates.items()}
        taken: dict[str, list[float]] = {key: [] for key in candidates}
        for sampler in samplers.values() if self._cuda else ():
            sampler()  # the first replay of a graph uploads it
        begin = time.perf_counter()
        gc.disable()
        try:
            for done in range(samples):
                for key, sampler in samplers.items():
                    taken[key].append(sampler())
                if done >= 2 and time.perf_counter() - begin > budget_s:
                    break
        finally:
            gc.enable()
        return {key: _quantiles(values) for key, values in taken.items()}

    def launches(self, candidate: Candidate, key: str = "") -> int | None:
        """Kernels, copies and fills that one call puts on a GPU, as the profiler counts them."""
        if not self._cuda:
            return None
        self._synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with backend_of(key), torch.profiler.profile(activities=activities) as profile:
            candidate()
            self._synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def compare(
        self,
        row: str,
        candidates: Mapping[str, Candidate],
        *,
        baseline: str = "eager",
        floor: Floor | None = None,
        serial: bool = False,
        precision: str = "fp32",
        images: float = 0,
        points: float = 0,
        memory: bool = False,
        samples: int = 0,
        budget_s: float = 20.0,
        **facts: Any,
    ) -> dict[str, Timing]:
        """Time the candidates of one row against ``baseline`` and keep the figures.

        ``images`` and ``points`` are items per call, for rates; ``facts`` (shape, dtype, layout, seed) go to the JSON.
        """
        candidates = self.with_triton(row, candidates)
        timings = self.measure(candidates, samples, budget_s)
        more = self._gpu_columns(candidates, samples, budget_s) if self._cuda else {}
        memory = memory or self._cuda
        peaks = {key: self.peak_extra_bytes(candidate, key) for key, candidate in candidates.items()} if memory else {}
        floor_ms = None
        if floor is not None:
            rate = self.ceilings[f"gemm_{precision}_gflops"] * 1e9
            floor_ms = floor.seconds(self.ceilings["copy_gb_s"] * 1e9, rate, serial) * 1e3
        print(f"\n{row}" + (f"   floor {floor_ms:.3g} ms" if floor_ms else ""))
        for key, timing in timings.items():
            self._timings[(row, key)] = timing
            entry: dict[str, Any] = {"row": row, "candidate": key, **asdict(timing), **facts, **more.get(key, {})}
            digits = 4 if self._cuda else 3
            spread = f"[{timing.p10:.{digits}f}, {timing.p90:.{digits}f}]"
            columns = [f"  {key:<22} {timing.median:9.{digits}f} ms  {spread}"]
            if "plain_median" in entry:
                columns.append(f"plain {entry['plain_median']:.4f} ms, {entry['launches']} launches")
            if "warm_median" in entry:
                columns.append(f"cold L2 (warm {entry['warm_median']:.4f} ms)")
            if baseline in timings:
                entry["ratio"] = timings[baseline].median / timing.median
                columns.append(f"{entry['ratio']:7.2f}x {baseline}")
            if key.startswith(TRITON) and "cuda" in rendseg.backends["cpp"].devices:
                entry["percent_of_cuda"] = 100 * timings[OURS + key.removeprefix(TRITON)].median / timing.median
                columns.append(f"{entry['percent_of_cuda']:.0f} % of CUDA C++")
            if images:
                entry["images_per_s"] = images / timing.median * 1e3
                columns.append(f"{entry['images_per_s']:.1f} images/s")
            if points:
                entry["points_per_s"] = points / timing.median * 1e3
                columns.append(f"{entry['points_per_s'] / 1e6:.3g} Mpoints/s")
            if floor is not None and floor_ms is not None:
                entry |= {"floor_ms": floor_ms, "percent_of_floor": 100 * floor_ms / timing.median}
                entry["gb_per_s"] = floor.bytes / timing.median / 1e6
                columns.append(f"{entry['gb_per_s']:.1f} GB/s, {entry['percent_of_floor']:.0f} % of floor")
            if key in peaks and peaks[key] is not None:
                entry["peak_extra_bytes"] = peaks[key]
                columns.append(f"peak extra {peaks[key] / 1e6:.1f} MB")
            self.rows.append(entry)
            print("  ".join(columns), flush=True)
        self._triton_bars(row, timings)
        return timings

    def _gpu_columns(
        self, candidates: Mapping[str, Candidate], samples: int, budget_s: float
    ) -> dict[str, dict[str, Any]]:
        """Beside the device time: plain calls, launches, and for cold inputs the time with warm ones."""
        plain = self.measure(candidates, samples, budget_s, graphs=False)
        rotations = {key: candidate for key, candidate in candidates.items() if isinstance(candidate, Rotation)}
        warm = self.measure({key: rotation.warm for key, rotation in rotations.items()}, samples, budget_s)
        columns: dict[str, dict[str, Any]] = {}
        for key, candidate in candidates.items():
            columns[key] = {
                "l2": "cold" if key in rotations else "warm",
                "plain_median": plain[key].median,
                "plain_p10": plain[key].p10,
                "plain_p90": plain[key].p90,
                "launches": self.launches(candidate, key),
            }
            if key in warm:
                columns[key]["warm_median"] = warm[key].median
        return columns

    def ratio(self, row: str, slow: str, fast: str) -> float:
        """How many times faster ``fast`` is than ``slow`` in ``row``."""
        return self._timings[(row, slow)].median / self._timings[(row, fast)].median

    def median(self, row: str, key: str) -> float:
        return self._timings[(row, key)].median

    # -- memory ------------------------------------------------------------------------------------------------------

    def peak_extra_bytes(self, candidate: Candidate, key: str = "") -> int | None:
        """Highest memory above the level before the call: allocator statistics on a GPU, resident set on Linux.

        Everything counts, outputs and scratch alike. ``None`` where the system cannot tell.
        """
        with backend_of(key):
            return self._peak_extra_bytes(candidate)

    def _peak_extra_bytes(self, candidate: Candidate) -> int | None:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            candidate()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        result = candidate()  # touch code and pools once, so that only this op's own memory remains
        del result
        try:
            import ctypes

            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except OSError:
            pass
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            result = candidate()
            peak = _status_bytes("VmHWM")
        except (OSError, KeyError):
            return None
        del result
        return max(peak - before, 0)

    # -- ceilings ----------------------------------------------------------------------------------------------------

    def _measure_ceilings(self) -> dict[str, float]:
        """What this device reaches on plain copies and products of random numbers, in this run."""
        elements = (1 << 28) if self._cuda else (1 << 24)
        source = torch.randn(elements, device=self.device)
        target = torch.empty_like(source)
        size = 8192 if self._cuda else 1024
        a, b = (torch.randn(size, size, device=self.device) for _ in range(2))
        half_a, half_b = a.bfloat16(), b.bfloat16()

        def median(job: Candidate) -> float:
            return self.measure({"ceiling": job}, samples=5, budget_s=2.0)["ceiling"].median

        flops = 2 * size**3
        ceilings = {"copy_gb_s": 2 * 4 * elements / median(lambda: target.copy_(source)) / 1e6}
        if self._cuda:
            with _tf32(False):
                ceilings["gemm_fp32_gflops"] = flops / median(lambda: a @ b) / 1e6
            with _tf32(True):
                ceilings["gemm_tf32_gflops"] = flops / median(lambda: a @ b) / 1e6
        else:
            ceilings["gemm_fp32_gflops"] = flops / median(lambda: a @ b) / 1e6
        ceilings["gemm_bf16_gflops"] = flops / median(lambda: half_a @ half_b) / 1e6
        if self._cuda:
            # Half of the L2 cache, read again and again; and kernels with nothing to do, one after the other.
            half = torch.cuda.get_device_properties(self.device).L2_cache_size // 2
            part, one = source[: half // 4], torch.zeros(1, device=self.device)
            ceilings["l2_read_gb_s"] = part.nbytes / median(lambda: part.sum()) / 1e6
            ceilings["launch_us"] = median(lambda: one.add_(1)) * 1e3
        return ceilings

    # -- results -----------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def bar(self, label: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> bool:
        """State a figure beside its goal; the process never fails for it (speed is measured, not asserted)."""
        held = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        goal = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        self.bars.append({"label": label, "value": value, "goal": goal, "reached": held})
        return held

    def finish(self) -> int:
        """Print the goals, write JSON (and a plot) atomically, return the exit status: 1 when a candidate failed."""
        if self.bars:
            print("\ngoals")
            for entry in self.bars:
                state = "reached" if entry["reached"] else "SHORT"
                print(f"  {entry['label']:<58} {entry['value']:8.2f}  (goal {entry['goal']})  {state}")
        folder = self.args.output or REPOSITORY / "bench" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        device = "gpu" if self._cuda else "cpu"
        stem = folder / f"{self.name}-{device}{'-quick' if self.quick else ''}"
        payload = {
            "benchmark": self.name,
            "provenance": self._provenance(),
            "ceilings": self.ceilings,
            "rows": self.rows,
            "goals": self.bars,
            "failures": self.failures,
            "notes": self.notes,
        }
        temporary = stem.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(payload, indent=1) + "\n")
        os.replace(temporary, stem.with_suffix(".json"))
        print(f"\nwrote {_shown(stem.with_suffix('.json'))}")
        if not self.args.no_plot:
            self._plot(stem.with_suffix(".png"))
        for failure in self.failures:
            print(f"FAILED {failure}", file=sys.stderr)
        return 1 if self.failures else 0

    def _plot(self, path: Path) -> None:
        try:
            import matplotlib
        except ImportError:
            print("no plot: matplotlib is not installed")
            return
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = list(dict.fromkeys(row["row"] for row in self.rows))
        figure, axes = plt.subplots(len(names), 1, figsize=(8, 0.5 + 1.1 * len(names)), squeeze=False)
        for axis, name in zip(axes[:, 0], names, strict=True):
            rows = [row for row in self.rows if row["row"] == name]
            labels = [row["candidate"] for row in rows]
            values = [row["median"] for row in rows]
            colours = [
                "tab:green" if label.startswith(OURS) else "tab:olive" if label.startswith(TRITON) else "tab:gray"
                for label in labels
            ]
            axis.barh(labels, values, color=colours)
            axis.invert_yaxis()
            axis.set_xscale("log")
            axis.set_title(f"{name} (ms, log scale)", fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
            for place, row in enumerate(rows):
                share = f" ({row['percent_of_floor']:.0f} % of floor)" if "percent_of_floor" in row else ""
                axis.text(row["median"], place, f" {row['median']:.3g}{share}", va="center", fontsize=7)
        figure.tight_layout()
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        plt.close(figure)
        os.replace(temporary, path)
        print(f"wrote {_shown(path)}")

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
        return platform.processor() or platform.machine()

    def _provenance(self) -> dict[str, Any]:
        isa = None
        try:
            from rendseg import _C  # type: ignore[attr-defined]

            isa = _C.isa()
        except ImportError:
            pass
        load = os.getloadavg() if hasattr(os, "getloadavg") else None
        facts: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "rendseg": rendseg.__version__,
            "backend": rendseg.current_backend(),
            "device": self._device_name(),
            "isa": isa,
            "threads": torch.get_num_threads(),
            "load_average": load,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "command": " ".join([f"bench/{self.name}.py", *sys.argv[1:]]),
        }
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            facts["triton"] = None
        if self._cuda:
            properties = torch.cuda.get_device_properties(self.device)
            asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
            facts |= {
                "cuda": torch.version.cuda,
                "processors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                asked: _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"),
                "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
                "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            }
        return facts


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _wall_ms(candidate: Candidate) -> float:
    begin = time.perf_counter()
    result = candidate()
    elapsed = (time.perf_counter() - begin) * 1e3
    del result  # freeing is not part of the op
    return elapsed


def _event_ms(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _git(*command: str) -> str | None:
    return _output("git", *command)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(REPOSITORY))
    except ValueError:
        return str(path)
