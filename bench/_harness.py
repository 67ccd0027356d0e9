"""One harness for every benchmark: ceilings first, then interleaved medians, floors, peak memory, JSON and a plot.

Usage in a script::

    def rows(bench):
        bench.run("Enc", forward, bench)  # forward calls bench.compare("forward", {"eager": f, "rendseg": g}, ...)
        bench.bar("forward against eager", bench.ratio("forward", "eager", "rendseg"), at_least=3.0)

    bench = Bench("encode", __doc__)
    raise SystemExit(bench.main(rows))

Nothing that was timed is lost. Each row goes to ``<output>/<name>-rows.jsonl`` at once, with ceilings, provenance and
flags. A candidate that raises is named and the other candidates of its row are timed; a part (``bench.run``) that
raises is named and the next part runs. The JSON with everything is written after each part and at the end, and the exit
status is 1 if anything failed. After an error that leaves the GPU unusable for this process, what is left is named as
not run.

Speeds are ratios of medians within one run: the candidates of a row are run in turn, round after round, so that a slow
spell of the machine meets all of them alike.

On a GPU every candidate has two columns. The first is device time: replays of a CUDA graph that holds up to twenty
calls, timed by events. The second, "plain", is as many calls in a row without a graph, so it holds what the host needs
as well. ``bench.cold(function, *tensors)`` calls the function on several copies of the tensors in turn, more than the
L2 cache holds; such a candidate finds its inputs in memory, and the figure with warm inputs stands beside it.

On a GPU every candidate "rendseg ..." has a twin "triton ...": the same call under ``rendseg.backend("triton")``. Its
goals are three fifths of the speed of the CUDA C++ kernels, and more than that of eager PyTorch and of torch.compile.
On a CPU the twin is left out: Triton's interpreter tells nothing about speed.

``--quick`` on a GPU is a choice of workloads at their real sizes (``GPU_QUICK``) with short times for each column, and
torch.compile for W1 alone. ``--only W1,T2`` chooses workloads; every script takes the names of all of them and runs its
own. ``--rehearse`` runs the rows of a GPU on a CPU, at tiny sizes, with the emulated CUDA kernels in the place of the
CPU kernels: it tries the scripts, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
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

# The workloads of each script, in the order in which they run.
WORKLOADS = {
    "refine": ("W1", "W2", "W3", "stages"),
    "points": ("T1", "T2", "T3", "step", "scatter"),
    "encode": ("Enc", "broadcast"),
    "criterion": ("K1", "K2"),
    "masks": ("M1", "M2"),
}
GPU_QUICK = ("W1", "W2", "T2", "T3", "Enc")  # what --quick runs on a GPU

CALLS = 20  # in a sample on a GPU, unless they take longer than SAMPLE_MS
SAMPLE_MS = 5.0
GPU_BUDGET_S, GPU_QUICK_BUDGET_S = 2.0, 0.4  # for the first column of a row; half of it for each other column
GPU_WARM_S, GPU_QUICK_WARM_S = 0.5, 0.1  # of warming up before the samples of a column, after the first two calls
NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
MEANINGLESS = "REHEARSAL: emulated kernels, tiny sizes; the figures mean nothing"
OURS, TRITON = "rendseg", "triton"  # how candidates that call our operators begin
TRITON_SHARE = 0.6  # of the speed of the CUDA C++ kernels


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p10: float
    p90: float
    samples: int
    first_call_s: float = 0.0  # compilation included


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


def column_of(key: str) -> str:
    """The column of a table of speed that a candidate stands in, by its name."""
    if key.startswith((OURS, TRITON)):
        return OURS if key.startswith(OURS) else TRITON
    if "compile" in key:
        return "torch.compile"
    return "hand-tuned eager" if "tuned" in key or key.startswith("gemm") else "eager"


def workloads_of(name: str, only: str | None, default: Collection[str]) -> list[str]:
    """The workloads that script ``name`` runs; an unknown name in ``only`` ends the process with one line."""
    known = {workload.lower(): workload for workloads in WORKLOADS.values() for workload in workloads}
    own = WORKLOADS.get(name, ())
    if only is None:
        return [workload for workload in own if workload in default]
    asked = [word.strip() for word in only.split(",") if word.strip()]
    unknown = [word for word in asked if word.lower() not in known]
    if unknown or not asked:
        print(
            f"bench/{name}.py: --only takes {','.join(known.values())} (commas between), got {only!r}", file=sys.stderr
        )
        raise SystemExit(2)
    return [workload for workload in own if workload.lower() in {word.lower() for word in asked}]


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _quantiles(samples: list[float], first_call_s: float) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered), first_call_s)


class Bench:
    """One benchmark run; see the module's docstring."""

    def __init__(self, name: str, description: str | None = None, argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(
            prog=f"bench/{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--quick", action="store_true", help="few samples: small cases, on a GPU a choice of them")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
        parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all cores)")
        parser.add_argument(
            "--samples", type=int, default=0, help="samples per candidate (0: 20 on the CPU, 50 on a GPU)"
        )
        parser.add_argument("--compile", action="store_true", help="time torch.compile too even with --quick")
        if name in WORKLOADS:
            parser.add_argument("--only", help=f"workloads, with commas between: {','.join(WORKLOADS[name])}")
            parser.add_argument(
                "--rehearse", action="store_true", help="try the rows of a GPU on this CPU; the figures mean nothing"
            )
        parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further part after this time")
        parser.add_argument("--output", type=Path, default=None, help="folder of the JSON and the plot")
        parser.add_argument("--no-plot", action="store_true", help="write no plot")
        self._begin = time.monotonic()
        self.args = parser.parse_args(argv)
        self.name = name
        self.rehearsal: bool = getattr(self.args, "rehearse", False)
        self.device = torch.device("cpu" if self.rehearsal else self.args.device)
        self.quick: bool = self.args.quick
        self._cuda = self.device.type == "cuda"
        every = WORKLOADS.get(name, ())
        only = getattr(self.args, "only", None)
        self.workloads = workloads_of(name, only, GPU_QUICK if self.quick and self.for_gpu else every)
        if every and not self.workloads:
            print(f"bench/{name}.py: nothing to do, its workloads are {','.join(every)}")
            raise SystemExit(0)
        if self._cuda and not torch.cuda.is_available():
            print(f"bench/{name}.py: torch finds no GPU", file=sys.stderr)
            raise SystemExit(1)
        self.with_compile: bool = self.args.compile or not (self.quick or self.rehearsal)
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        few = 10 if self._cuda else 7
        self.samples = self.args.samples or (few if self.quick else 50 if self._cuda else 20)
        if self.rehearsal:
            self.samples = self.args.samples or 1
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.lost = ""  # why the GPU cannot be used any more by this process
        self._complete = False
        self._timings: dict[tuple[str, str], Timing] = {}
        self._beyond_result: dict[tuple[str, str], float] = {}
        self._emulated = self._take_emulated_kernels() if self.rehearsal else None
        if self._cuda:
            # Not the default stream, which cannot be captured: a backward pass runs on the stream of its forward pass.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        self.provenance = self._provenance()
        print(f"{name}: {self._device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if self.rehearsal:
            self.note(MEANINGLESS)
        self.ceilings: dict[str, float] = {}
        try:
            self.ceilings = self._measure_ceilings()
        except Exception as error:
            self.fail("ceilings", error)
        self._clear()
        text = ", ".join(f"{key} {value:.4g}" for key, value in self.ceilings.items())
        print(f"ceilings measured now: {text}", flush=True)
        self.no_triton = self._no_triton()
        if self.no_triton:
            self.note(f"no column triton: {self.no_triton}")
        elif "cuda" not in rendseg.backends["cpp"].devices:
            self.note(f"rendseg is Triton here, too: {rendseg.backends['cpp'].cause}")

    def _take_emulated_kernels(self) -> Any:
        try:
            from tests.emulation import as_backend
        except Exception as error:
            print(f"bench/{self.name}.py: no rehearsal without the emulated kernels: {one_line(error)}")
            raise SystemExit(1) from error
        return as_backend._EMULATED

    # -- parts and failures ------------------------------------------------------------------------------------------

    @property
    def for_gpu(self) -> bool:
        """Whether the rows are those of a GPU."""
        return self._cuda or self.rehearsal

    def wants(self, workload: str) -> bool:
        return workload in self.workloads

    def main(self, body: Callable[[Bench], None]) -> int:
        """``body(bench)``, then the results, also when ``body`` raises; returns the exit status."""

        def end(number: int, frame: Any) -> None:
            raise KeyboardInterrupt(f"signal {number}")

        # What a driver sends when the time is up: no row may take that for a failure of its own.
        before = signal.signal(signal.SIGTERM, end)
        try:
            body(self)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self.fail("the run ended early", error)
        finally:
            signal.signal(signal.SIGTERM, before)
        return self.finish()

    def run(self, title: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(...)``, a part of the run. What it raises is a failure of this part; then ``None`` is returned."""
        seconds = time.monotonic() - self._begin
        if self.lost or seconds > self.args.seconds:
            cause = f"the GPU was lost before: {self.lost}" if self.lost else f"{seconds:.0f} s are gone"
            self.note(f"{title}: not run, {cause}")
            if self.lost:
                self.failures.append(f"{title}: not run, the GPU was lost before")
            return None
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            self.fail(title, error)
            return None
        finally:
            gc.collect()
            self._clear()
            self._write()

    def fail(self, title: str, error: BaseException | str) -> None:
        """Name a failure, with the traceback in the log, and see whether the GPU still answers."""
        self.failures.append(f"{title}: {error if isinstance(error, str) else one_line(error)}")
        self.note(f"  FAILED {self.failures[-1]}")
        if isinstance(error, BaseException):
            traceback.print_exception(error, limit=-4)
        if not self.lost:
            try:
                self._synchronize()
            except RuntimeError as sticky:
                self.lost = one_line(sticky)
                self.note(f"  the GPU cannot be used any more in this process: {self.lost}")

    def _clear(self) -> None:
        """Give memory back: that of finished graphs would stay in pools of their own."""
        if self._cuda and not self.lost:
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.note(f"  memory could not be given back: {one_line(error)}")

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

    def with_triton(
        self, row: str, candidates: Mapping[str, Candidate], twins: Collection[str] | None = None
    ) -> dict[str, Candidate]:
        """The candidates, and after each of ours (of ``twins`` only, if given) the same call as ``"triton ..."``.

        A twin that raises is left out.
        """
        both: dict[str, Candidate] = {}
        for key, candidate in candidates.items():
            both[key] = candidate
            if not key.startswith(OURS) or self.no_triton or (twins is not None and key not in twins) or self.lost:
                continue
            twin = TRITON + key.removeprefix(OURS)
            begin = time.monotonic()
            try:
                with backend_of(twin):
                    candidate()
                self._synchronize()
            except Exception as error:
                self.fail(f"{row}, {twin}", error)
            else:
                both[twin] = candidate
            if time.monotonic() - begin > 1:
                self.note(f"  {row}, {twin}: {time.monotonic() - begin:.1f} s until its kernels were compiled")
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
        if not self.for_gpu:
            return lambda: function(*tensors)
        copies = 2
        if self._cuda:
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            copies = sets_to_rotate(sum(t.nbytes for t in tensors), l2_bytes)
        return Rotation(function, [tensors, *(tuple(t.detach().clone() for t in tensors) for _ in range(copies - 1))])

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.compile`` for the shapes of one row, whatever was compiled before; its backward can run again."""
        import torch._functorch.config

        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False
        if self.rehearsal:  # tracing is tried, and the C++ compiler left out
            return torch.compile(function, dynamic=False, backend="eager")
        return torch.compile(function, dynamic=False)

    def _warm_up(self, candidate: Candidate) -> tuple[float, float]:
        """Page faults, thread pools, compilation, caches of memory; ms of a call, seconds of the first one."""
        begin = time.perf_counter()
        candidate()
        self._synchronize()
        first = time.perf_counter() - begin
        if self.rehearsal:
            return first * 1e3, first
        begin = time.perf_counter()
        candidate()
        self._synchronize()
        elapsed = time.perf_counter() - begin
        if not self._cuda:
            for _ in range(2 if elapsed < 0.2 else 0):
                candidate()
            return elapsed * 1e3, first
        time_for_it = GPU_QUICK_WARM_S if self.quick else GPU_WARM_S
        calls = min(25, int(time_for_it / max(elapsed, 1e-6)))
        begin = time.perf_counter()
        for _ in range(calls):
            candidate()
        self._synchronize()
        return (time.perf_counter() - begin) * 1e3 / calls if calls else elapsed * 1e3, first

    def _captured(self, key: str, candidate: Candidate, calls: int, pool: Any) -> Callable[[], Any] | None:
        """Replays ``calls`` calls as a CUDA graph; ``None`` where the candidate cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                for _ in range(calls):
                    candidate()
        except RuntimeError as error:
            torch.cuda.synchronize()
            try:  # a capture that fails may leave the allocator believing that it goes on
                torch._C._cuda_endAllocateToPool(self.device.index or 0, pool)
            except (RuntimeError, AttributeError):
                pass
            self.note(f"  {key}: no CUDA graph ({one_line(error)}); its calls are timed one by one")
            return None
        return graph.replay

    def _sampler(self, key: str, candidate: Candidate, graphs: bool, pool: Any = None) -> tuple[Callable, float]:
        """A function that takes one sample, milliseconds of a call; and the seconds of the first call."""
        with backend_of(key):
            call_ms, first = self._warm_up(candidate)
            if not self._cuda:
                return lambda: _wall_ms(candidate), first
            calls = calls_per_sample(call_ms, candidate)
            replay = self._captured(key, candidate, calls, pool) if graphs else None

        def run() -> None:
            for _ in range(calls):
                candidate()

        def sample() -> float:
            with backend_of(key):
                return _event_ms(replay or run) / calls

        return sample, first

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        samples: int = 0,
        budget_s: float = 20.0,
        graphs: bool = True,
        row: str = "",
    ) -> dict[str, Timing]:
        """Interleaved medians of ``candidates``; at least three rounds, then until ``samples`` or ``budget_s``.

        On a GPU: replays of CUDA graphs, or with ``graphs=False`` plain calls. The graphs share one pool of memory,
        since only one of them runs at a time: the scratch of a W2 in eager PyTorch is several GB. A candidate that
        raises is a failure of ``row`` and missing in the result.
        """
        samples = samples or self.samples
        if self._cuda:
            budget_s = min(budget_s, GPU_QUICK_BUDGET_S if self.quick else GPU_BUDGET_S)
            budget_s = budget_s if graphs else budget_s / 2
        pool = torch.cuda.graph_pool_handle() if self._cuda and graphs else None
        samplers: dict[str, Callable[[], float]] = {}
        first: dict[str, float] = {}

        def attempt(key: str, step: Callable[[], Any]) -> Any:
            try:
                return step()
            except Exception as error:
                self.fail(f"{row}, {key}", error)
                samplers.pop(key, None)
                if self.lost:
                    raise RuntimeError(f"the GPU was lost by {key}: {self.lost}") from None
                return None

        for key, candidate in candidates.items():
            made = attempt(key, lambda k=key, c=candidate: self._sampler(k, c, graphs, pool))
            if made is not None:
                samplers[key], first[key] = made
        taken: dict[str, list[float]] = {key: [] for key in samplers}
        for key, sampler in list(samplers.items()) if self._cuda else ():
            attempt(key, sampler)  # the first replay of a graph uploads it
        begin = time.perf_counter()
        gc.disable()
        try:
            for done in range(samples):
                for key, sampler in list(samplers.items()):
                    value = attempt(key, sampler)
                    if value is not None:
                        taken[key].append(value)
                if done >= 2 and time.perf_counter() - begin > budget_s:
                    break
        finally:
            gc.enable()
        timings = {key: _quantiles(taken[key], first[key]) for key in samplers}
        samplers.clear()
        self._clear()
        return timings

    def launches(self, candidate: Candidate, key: str = "") -> int | None:
        """Kernels, copies and fills that one call puts on a GPU, as the profiler counts them."""
        if self._emulated is not None:  # those of our own kernels
            before = self._emulated.launches()
            candidate()
            return int(self._emulated.launches() - before)
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
        twins: Collection[str] | None = None,
        **facts: Any,
    ) -> dict[str, Timing]:
        """Time the candidates of one row against ``baseline`` and keep the figures.

        ``images`` and ``points`` are items per call, for rates; ``facts`` (shape, dtype, layout, seed) go to the JSON.
        ``twins``: which of ours get a twin under Triton; all of them when not given.
        """
        candidates = self.with_triton(row, candidates, twins)
        timings = self.measure(candidates, samples, budget_s, row=row)
        candidates = {key: candidate for key, candidate in candidates.items() if key in timings}
        more = self._gpu_columns(row, candidates, samples, budget_s) if self.for_gpu else {}
        peaks: dict[str, tuple[int, int] | None] = {}
        for key, candidate in candidates.items() if (memory or self._cuda) and not self.lost else ():
            try:
                peaks[key] = self.peak_extra_bytes(candidate, key)
            except Exception as error:
                self.fail(f"{row}, {key}, memory", error)
        floor_ms = None
        if floor is not None and self.ceilings:
            rate = self.ceilings[f"gemm_{precision}_gflops"] * 1e9
            floor_ms = floor.seconds(self.ceilings["copy_gb_s"] * 1e9, rate, serial) * 1e3
        print(f"\n{row}" + (f"   floor {floor_ms:.3g} ms" if floor_ms else ""))
        for key, timing in timings.items():
            self._timings[(row, key)] = timing
            entry: dict[str, Any] = {"row": row, "candidate": key, "column": column_of(key)}
            entry |= {**asdict(timing), **facts, **more.get(key, {})}
            digits = 4 if self._cuda else 3
            spread = f"[{timing.p10:.{digits}f}, {timing.p90:.{digits}f}]"
            columns = [f"  {key:<22} {timing.median:9.{digits}f} ms  {spread}"]
            if "plain_median" in entry:
                columns.append(f"plain {entry['plain_median']:.4f} ms")
            if entry.get("launches") is not None:
                columns.append(f"{entry['launches']} launches")
            if "warm_median" in entry:
                columns.append(f"cold L2 (warm {entry['warm_median']:.4f} ms)")
            if baseline in timings:
                entry["ratio"] = timings[baseline].median / timing.median
                columns.append(f"{entry['ratio']:7.2f}x {baseline}")
            if key.startswith(TRITON) and self._twin_of(key) in timings:
                entry["percent_of_cuda"] = 100 * timings[self._twin_of(key)].median / timing.median
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
            if (peak := peaks.get(key)) is not None:
                entry["peak_extra_bytes"], entry["peak_beyond_result_bytes"] = peak
                self._beyond_result[(row, key)] = peak[1] / 1e6
                columns.append(f"peak extra {peak[0] / 1e6:.1f} MB, {peak[1] / 1e6:.1f} beyond the result")
            if self.rehearsal:
                entry["rehearsal"] = True
                columns.append("(rehearsal: meaningless)")
            self._keep(entry)
            print("  ".join(columns), flush=True)
        self._triton_bars(row, timings)
        return timings

    def _twin_of(self, triton: str) -> str | None:
        """The candidate in CUDA C++ of a candidate in Triton; none where ours is Triton itself."""
        return OURS + triton.removeprefix(TRITON) if "cuda" in rendseg.backends["cpp"].devices else None

    def _keep(self, entry: dict[str, Any]) -> None:
        """A timed row: into the results, and as a line of its own into the file of rows."""
        self.rows.append(entry)
        line = {
            "benchmark": self.name,
            **entry,
            "quick": self.quick,
            "rehearsal": self.rehearsal,
            "flags": self._flags(),
            "ceilings": self.ceilings,
            "provenance": self.provenance,
        }
        try:
            with open(self.folder() / f"{self.name}-rows.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line)) + "\n")
        except OSError as error:  # a full disk loses the file, not the run
            self.note(f"  the row is not in the file of rows: {one_line(error)}")

    def _gpu_columns(
        self, row: str, candidates: Mapping[str, Candidate], samples: int, budget_s: float
    ) -> dict[str, dict[str, Any]]:
        """Beside the device time: plain calls, launches, and for cold inputs the time with warm ones (not if quick)."""
        rotations = {key: candidate for key, candidate in candidates.items() if isinstance(candidate, Rotation)}
        columns: dict[str, dict[str, Any]] = {key: {"l2": "cold" if key in rotations else "warm"} for key in candidates}
        try:
            for key, plain in self.measure(candidates, samples, budget_s, graphs=False, row=f"{row}, plain").items():
                columns[key] |= {"plain_median": plain.median, "plain_p10": plain.p10, "plain_p90": plain.p90}
            warm = {} if self.quick and self._cuda else {key: rotation.warm for key, rotation in rotations.items()}
            for key, timing in self.measure(warm, samples, budget_s, row=f"{row}, warm").items():
                columns[key]["warm_median"] = timing.median
            for key, candidate in candidates.items():
                columns[key]["launches"] = self.launches(candidate, key)
        except Exception as error:  # the first column is there, and is kept
            self.fail(f"{row}, further columns", error)
        return columns

    def ratio(self, row: str, slow: str, fast: str) -> float:
        """How many times faster ``fast`` is than ``slow`` in ``row``; NaN where one of them was not timed."""
        return self.median(row, slow) / self.median(row, fast)

    def median(self, row: str, key: str) -> float:
        """Milliseconds; NaN where the candidate was not timed."""
        timing = self._timings.get((row, key))
        return timing.median if timing else math.nan

    # -- memory ------------------------------------------------------------------------------------------------------

    def peak_extra_bytes(self, candidate: Candidate, key: str = "") -> tuple[int, int] | None:
        """Highest memory above the level before the call: allocator statistics on a GPU, resident set on Linux.

        First everything, outputs and scratch alike; then without what is still held with the result (of a backward: the
        gradients). ``None`` where the system cannot tell.
        """
        with backend_of(key):
            return self._peak_extra_bytes(candidate)

    def _peak_extra_bytes(self, candidate: Candidate) -> tuple[int, int] | None:
        if not self.for_gpu:
            gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = candidate()
            torch.cuda.synchronize()
            peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        else:
            result = candidate()  # touch code and pools once, so that only this op's own memory remains
            del result
            _trim()
            try:
                Path("/proc/self/clear_refs").write_text("5")
                before = _status_bytes("VmRSS")
                result = candidate()
                peak = _status_bytes("VmHWM")
                _trim()
                after = _status_bytes("VmRSS")
            except (OSError, KeyError):
                return None
        del result
        return max(peak - before, 0), max(peak - max(after, before), 0)

    def beyond_result(self, row: str, key: str) -> float:
        """The second figure of ``peak_extra_bytes`` in MB; NaN where it was not measured."""
        return self._beyond_result.get((row, key), math.nan)

    # -- ceilings ----------------------------------------------------------------------------------------------------

    def _measure_ceilings(self) -> dict[str, float]:
        """What this device reaches on plain copies and products of random numbers, in this run."""
        elements = (1 << 12) if self.rehearsal else (1 << 28) if self._cuda else (1 << 24)
        source = torch.randn(elements, device=self.device)
        target = torch.empty_like(source)
        size = 64 if self.rehearsal else 8192 if self._cuda else 1024
        a, b = (torch.randn(size, size, device=self.device) for _ in range(2))
        # Some processors multiply bfloat16 a hundred times slower than float32.
        half_size = 256 if self.quick and not self.for_gpu else size
        half_a, half_b = (t[:half_size, :half_size].bfloat16() for t in (a, b))

        def median(job: Candidate) -> float:
            return self.measure({"ceiling": job}, samples=5, budget_s=2.0, row="ceilings")["ceiling"].median

        flops = 2 * size**3
        ceilings = {"copy_gb_s": 2 * 4 * elements / median(lambda: target.copy_(source)) / 1e6}
        if self.for_gpu:
            with _tf32(False):
                ceilings["gemm_fp32_gflops"] = flops / median(lambda: a @ b) / 1e6
            with _tf32(True):
                ceilings["gemm_tf32_gflops"] = flops / median(lambda: a @ b) / 1e6
        else:
            ceilings["gemm_fp32_gflops"] = flops / median(lambda: a @ b) / 1e6
        ceilings["gemm_bf16_gflops"] = 2 * half_size**3 / median(lambda: half_a @ half_b) / 1e6
        if self.for_gpu:
            # Half of the L2 cache, read again and again; and kernels with nothing to do, one after the other.
            half = torch.cuda.get_device_properties(self.device).L2_cache_size // 2 if self._cuda else 1 << 13
            part, one = source[: half // 4], torch.zeros(1, device=self.device)
            ceilings["l2_read_gb_s"] = part.nbytes / median(lambda: part.sum()) / 1e6
            ceilings["launch_us"] = median(lambda: one.add_(1)) * 1e3
        return ceilings

    # -- results -----------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def bar(self, label: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> bool:
        """State a figure beside its goal; the process never fails for it (speed is measured, not asserted).

        NaN is a figure that was not measured; it reaches no goal.
        """
        held = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        goal = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        self.bars.append({"label": label, "value": value, "goal": goal, "reached": held and not math.isnan(value)})
        return bool(self.bars[-1]["reached"])

    def folder(self) -> Path:
        """Where the results go; those of a rehearsal never among the others."""
        folder = self.args.output or REPOSITORY / ("build/rehearsal" if self.rehearsal else "bench/results")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stem(self) -> Path:
        device = "rehearsal" if self.rehearsal else "gpu" if self._cuda else "cpu"
        return self.folder() / f"{self.name}-{device}{'-quick' if self.quick else ''}"

    def _write(self) -> None:
        """Everything so far, as one JSON file that is always whole."""
        payload = {
            "benchmark": self.name,
            "rehearsal": self.rehearsal,
            "complete": self._complete,
            "workloads": self.workloads,
            "seconds": time.monotonic() - self._begin,
            "provenance": self.provenance | self._flags(),
            "ceilings": self.ceilings,
            "rows": self.rows,
            "goals": self.bars,
            "failures": self.failures,
            "notes": self.notes,
        }
        path = self.stem().with_suffix(".json")
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(_finite(payload), indent=1) + "\n")
        os.replace(temporary, path)

    def finish(self) -> int:
        """Print the goals, write JSON (and a plot) atomically, return the exit status: 1 when a candidate failed."""
        if self.bars:
            print("\ngoals")
            for entry in self.bars:
                known = not math.isnan(entry["value"])
                state = "reached" if entry["reached"] else "SHORT" if known else "not measured"
                figure = f"{entry['value']:8.2f}" if known else " " * 8
                state = "(rehearsal: meaningless)" if self.rehearsal else state
                print(f"  {entry['label']:<58} {figure}  (goal {entry['goal']})  {state}")
        if self._cuda:
            self.provenance["at the end: " + NVIDIA_SMI] = _nvidia_smi()
        self._complete = True
        self._write()
        print(f"\nwrote {_shown(self.stem().with_suffix('.json'))}")
        if self.rows and not (self.args.no_plot or self.rehearsal):
            try:
                self._plot(self.stem().with_suffix(".png"))
            except Exception as error:  # the figures are written
                print(f"no plot: {one_line(error)}")
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
            "device": self._device_name(),
            "isa": isa,
            "threads": torch.get_num_threads(),
            "load_average": load,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "command": " ".join([f"bench/{self.name}.py", *sys.argv[1:]]),
        }
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            facts["triton"] = None
        if self._cuda:
            properties = torch.cuda.get_device_properties(self.device)
            facts |= {
                "cuda": torch.version.cuda,
                "processors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                NVIDIA_SMI: _nvidia_smi(),
            }
        return facts

    def _flags(self) -> dict[str, Any]:
        """What a script may set after the start, and what the candidates of a row run under."""
        return {
            "backend": rendseg.current_backend(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


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
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_smi() -> str | None:
    return _output("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader")


def _finite(value: Any) -> Any:
    """``None`` for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*command: str) -> str | None:
    return _output("git", *command)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(REPOSITORY))
    except ValueError:
        return str(path)
