"""The harness of the benchmarks: what it records on the CPU, and its way with a GPU, acted out by a stand-in."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("_harness")
    for name in ("_harness", "_floors"):
        sys.modules.pop(name, None)


def quick(harness: Any, folder: Path) -> Any:
    return harness.Bench("trial", "A trial.", ["--device", "cpu", "--quick", "--output", str(folder), "--no-plot"])


def test_a_run_on_the_cpu(harness: Any, tmp_path: Path) -> None:
    bench = quick(harness, tmp_path)
    x = torch.randn(64)
    call = bench.cold(torch.exp, x)
    assert torch.equal(call(), x.exp()) and bench.launches(call) is None
    bench.compare("exp", {"eager": lambda: x.exp(), "rendseg": call}, floor=harness.Floor(512.0, 0.0), shape=[64])
    bench.bar("exp against eager", bench.ratio("exp", "eager", "rendseg"), at_least=0.0)
    assert bench.finish() == 0
    written = json.loads((tmp_path / "trial-cpu-quick.json").read_text())
    assert [row["candidate"] for row in written["rows"]] == ["eager", "rendseg"]
    assert {"median", "p10", "p90", "samples", "ratio", "percent_of_floor", "shape"} <= written["rows"][1].keys()
    assert "plain_median" not in written["rows"][1]
    assert set(written["ceilings"]) == {"copy_gb_s", "gemm_fp32_gflops", "gemm_bf16_gflops"}
    assert written["provenance"]["device"] and written["goals"][0]["reached"]


def test_rotation(harness: Any) -> None:
    mib = 1 << 20
    assert harness.sets_to_rotate(10 * mib, 50 * mib) == 15
    assert harness.sets_to_rotate(79 * mib, 50 * mib) == 2
    assert harness.sets_to_rotate(500 * mib, 50 * mib) == 1
    assert harness.sets_to_rotate(0, 50 * mib) == harness.sets_to_rotate(1, 50 * mib) == 64
    sets = [(torch.tensor(i),) for i in range(3)]
    rotation = harness.Rotation(lambda t: int(t), sets)
    assert [rotation() for _ in range(5)] == [0, 1, 2, 0, 1]
    assert rotation.warm() == 0 and rotation() == 2, "a warm call does not turn the rotation"
    assert harness.calls_per_sample(0.01, rotation) == harness.CALLS
    assert harness.calls_per_sample(1000.0, rotation) == 3 and harness.calls_per_sample(1000.0, sets.clear) == 1


class StandIn:
    """Of ``torch.cuda``: counts what is captured and replayed; each event is a millisecond after the one before."""

    def __init__(self) -> None:
        self.captures, self.replays, self.events, self.pools, self.asked = 0, 0, 0, 0, 0
        self.capturing = False
        stand_in = self

        class CUDAGraph:
            def replay(self) -> None:
                stand_in.replays += 1

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0

            def record(self) -> None:
                stand_in.events += 1
                self.at = stand_in.events

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        self.CUDAGraph, self.Event = CUDAGraph, Event

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        self.captures += 1
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def current_stream(self) -> object:
        return object()

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> int:
        self.asked += 1
        return 100 if self.asked % 2 else 150  # before a call, and with its result

    def max_memory_allocated(self) -> int:
        return 350

    def get_device_properties(self, device: Any) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1000, multi_processor_count=3)

    def get_device_name(self, device: Any) -> str:
        return "stand-in"


def test_the_columns_of_a_gpu(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = quick(harness, tmp_path)
    cuda = StandIn()
    monkeypatch.setattr(harness.torch, "cuda", cuda)
    monkeypatch.setattr(bench, "_cuda", True)
    monkeypatch.setattr(bench, "quick", False)
    monkeypatch.setattr(bench, "launches", lambda candidate, key: 2)

    def stubborn() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    x = torch.zeros(100)  # 400 bytes: eight sets are three times the cache
    call = bench.cold(torch.exp, x)
    assert isinstance(call, harness.Rotation) and len(call.sets) == 8
    bench.compare(
        "exp", {"eager": lambda: x.exp(), "rendseg": call, "stubborn": stubborn}, floor=harness.Floor(800.0, 0.0)
    )
    rows = {row["candidate"]: row for row in bench.rows}
    assert cuda.captures == 4, "three candidates, and the warm form of the cold one"
    assert cuda.replays > 0 and "stubborn: no CUDA graph" in bench.notes[1] and len(bench.notes) == 2, bench.notes
    for row in rows.values():
        assert 0 < row["median"] <= 1 and row["plain_median"] > 0
        assert row["launches"] == 2
        assert row["peak_extra_bytes"] == 250 and row["peak_beyond_result_bytes"] == 200
    assert rows["rendseg"]["l2"] == "cold" and rows["rendseg"]["warm_median"] > 0
    assert rows["eager"]["l2"] == "warm" and "warm_median" not in rows["eager"]
    assert cuda.pools == 2, "the graphs of a column share their memory"
    assert bench.finish() == 0
    assert (tmp_path / "trial-gpu.json").is_file()


# --- the column triton ------------------------------------------------------------------------------------------------


def test_a_cpu_has_no_column_triton(harness: Any, tmp_path: Path) -> None:
    bench = quick(harness, tmp_path)
    x = torch.randn(64)
    bench.compare("exp", {"eager": lambda: x.exp(), "rendseg": lambda: x.exp(), "rendseg nhwc": lambda: x.exp()})
    assert [row["candidate"] for row in bench.rows] == ["eager", "rendseg", "rendseg nhwc"]
    assert "on a CPU Triton's kernels are interpreted" in bench.no_triton
    assert f"no column triton: {bench.no_triton}" in bench.notes and bench.bars == []


class Backends:
    """Of ``rendseg``: which setting is in force, without a GPU that could serve it."""

    def __init__(self, cpp: tuple[str, ...] = ("cpu", "cuda"), triton: tuple[str, ...] = ("cuda",)) -> None:
        self.chosen = "auto"
        self.backends = {
            "cpp": SimpleNamespace(devices=cpp, cause="" if "cuda" in cpp else "no CUDA kernels are built"),
            "triton": SimpleNamespace(devices=triton, cause="" if triton else "the package triton is not installed"),
        }

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        before, self.chosen = self.chosen, name
        try:
            yield
        finally:
            self.chosen = before


@pytest.fixture
def on_gpu(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``on_gpu(backends)`` is a ``Bench`` that believes in a GPU; a call takes as long as its candidate says."""

    def make(backends: Backends) -> Any:
        bench = quick(harness, tmp_path)
        monkeypatch.setattr(harness.torch, "cuda", StandIn())
        for name in ("backend", "backends"):
            monkeypatch.setattr(harness.rendseg, name, getattr(backends, name))
        monkeypatch.setattr(harness, "triton_failure", lambda: "")
        monkeypatch.setattr(bench, "_cuda", True)
        monkeypatch.setattr(bench, "launches", lambda candidate, key: None)

        def sampler(key: str, candidate: Any, graphs: bool, pool: Any) -> Any:
            def sample() -> float:
                with harness.backend_of(key):
                    return float(candidate())

            return sample, 0.0

        monkeypatch.setattr(bench, "_sampler", sampler)
        bench.no_triton = bench._no_triton()
        return bench

    return make


def milliseconds(backends: Backends, auto: float, triton: float) -> Any:
    return lambda: {"auto": auto, "triton": triton}[backends.chosen]


def test_every_candidate_of_ours_has_a_twin_under_triton(on_gpu: Any, tmp_path: Path) -> None:
    backends = Backends()
    bench = on_gpu(backends)
    bench.compare(
        "exp",
        {
            "eager": milliseconds(backends, 4.0, -1.0),
            "compiled": milliseconds(backends, 2.0, -1.0),
            "rendseg": milliseconds(backends, 1.0, 1.25),
            "rendseg nhwc": milliseconds(backends, 1.0, 2.5),
        },
    )
    rows = {row["candidate"]: row for row in bench.rows}
    assert list(rows) == ["eager", "compiled", "rendseg", "triton", "rendseg nhwc", "triton nhwc"]
    medians = {key: row["median"] for key, row in rows.items()}
    assert medians == {
        "eager": 4.0, "compiled": 2.0, "rendseg": 1.0, "triton": 1.25, "rendseg nhwc": 1.0, "triton nhwc": 2.5
    }  # fmt: skip
    assert rows["triton"]["percent_of_cuda"] == pytest.approx(80) and rows["triton"]["ratio"] == pytest.approx(3.2)
    assert rows["triton nhwc"]["percent_of_cuda"] == pytest.approx(40) and "percent_of_cuda" not in rows["rendseg"]
    assert rows["triton"]["plain_median"] == 1.25 and backends.chosen == "auto"
    goals = {bar["label"]: (bar["value"], bar["goal"], bar["reached"]) for bar in bench.bars}
    assert goals == {
        "exp, triton: speed over that of CUDA C++": (0.8, ">= 0.6", True),
        "exp, triton against eager": (3.2, ">= 1", True),
        "exp, triton against compiled": (1.6, ">= 1", True),
        "exp, triton nhwc: speed over that of CUDA C++": (0.4, ">= 0.6", False),
        "exp, triton nhwc against eager": (1.6, ">= 1", True),
        "exp, triton nhwc against compiled": (0.8, ">= 1", False),
    }
    assert bench.finish() == 0, "a goal that is missed is no failure"
    written = json.loads((tmp_path / "trial-gpu-quick.json").read_text())
    assert written["rows"][3]["percent_of_cuda"] == pytest.approx(80) and written["failures"] == []


def test_a_twin_that_raises_is_left_out_and_ends_the_run_as_failed(on_gpu: Any, tmp_path: Path) -> None:
    backends = Backends()
    bench = on_gpu(backends)

    def broken() -> float:
        if backends.chosen == "triton":
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1.0

    bench.compare("exp", {"eager": milliseconds(backends, 4.0, -1.0), "rendseg": broken})
    assert [row["candidate"] for row in bench.rows] == ["eager", "rendseg"] and backends.chosen == "auto"
    assert bench.finish() == 1
    written = json.loads((tmp_path / "trial-gpu-quick.json").read_text())
    assert written["failures"] == ["exp, triton: RuntimeError: out of resource: shared memory"]


def test_without_cuda_kernels_there_is_nothing_to_hold_triton_to(on_gpu: Any) -> None:
    backends = Backends(cpp=("cpu",))
    bench = on_gpu(backends)
    bench.compare("exp", {"eager": milliseconds(backends, 4.0, 1.0), "rendseg": milliseconds(backends, 1.0, 1.0)})
    assert [bar["label"] for bar in bench.bars] == ["exp, triton against eager"]
    assert "percent_of_cuda" not in bench.rows[-1]


@pytest.mark.parametrize("cause", ["absent", "interpreted", "broken"])
def test_why_a_gpu_may_have_no_column_triton(
    harness: Any, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bench = on_gpu(Backends(triton=() if cause == "absent" else ("cuda",)))
    if cause == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if cause == "broken":
        monkeypatch.setattr(harness, "triton_failure", lambda: "RuntimeError: no C compiler")
    bench.no_triton = bench._no_triton()
    wanted = {"absent": "not installed", "interpreted": "TRITON_INTERPRET is set", "broken": "no C compiler"}[cause]
    assert wanted in bench.no_triton
    assert list(bench.with_triton("exp", {"rendseg": lambda: 1.0})) == ["rendseg"]


def test_compiled_again_for_other_shapes(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = quick(harness, tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor takes half a minute
    for size in (3, 4):
        x = torch.randn(size, requires_grad=True)
        out = bench.compiled(lambda t: (t * 2).sin())(x)
        for _ in range(2):
            (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        torch.testing.assert_close(grad, 2 * (2 * x).cos())


# --- what fails, and what is kept -------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trial-rows.jsonl").read_text().splitlines()]


def test_a_failure_costs_its_candidate_or_its_part_alone(harness: Any, tmp_path: Path) -> None:
    bench = quick(harness, tmp_path)
    seen: list[int] = []

    def fails() -> None:
        raise RuntimeError("no kernel image\nmore")

    def first(bench: Any) -> None:
        bench.compare("exp", {"eager": lambda: 1, "broken": fails, "rendseg": lambda: 2})
        seen.append(len(lines_of(tmp_path)))  # on disk before the next row
        raise SystemExit("the values are wrong")

    def body(bench: Any) -> None:
        bench.run("first", first, bench)
        seen.append(len(json.loads((tmp_path / "trial-cpu-quick.json").read_text())["rows"]))
        bench.run("second", bench.compare, "log", {"eager": lambda: 1})
        bench.bar("broken against eager", bench.ratio("exp", "eager", "broken"), at_least=1.0)
        raise ValueError("after the rows")

    assert bench.main(body) == 1
    assert seen == [2, 2]
    written = json.loads((tmp_path / "trial-cpu-quick.json").read_text())
    assert written["complete"] and [(row["row"], row["candidate"]) for row in written["rows"]] == [
        ("exp", "eager"), ("exp", "rendseg"), ("log", "eager")
    ]  # fmt: skip
    assert written["failures"] == [
        "exp, broken: RuntimeError: no kernel image",
        "first: SystemExit: the values are wrong",
        "the run ended early: ValueError: after the rows",
    ]
    assert written["goals"] == [{"label": "broken against eager", "value": None, "goal": ">= 1", "reached": False}], (
        "a figure that was not measured reaches no goal, and JSON has no NaN"
    )
    lines = lines_of(tmp_path)
    assert [line["row"] for line in lines] == ["exp", "exp", "log"] and lines[1]["column"] == "rendseg"
    for line in lines:
        assert line["ceilings"] and line["provenance"]["torch"] and "matmul_allow_tf32" in line["flags"]
        assert line["rehearsal"] is False and line["median"] >= 0


def test_a_lost_gpu_ends_the_measuring_and_is_named(
    harness: Any, on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = on_gpu(Backends(triton=()))

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails() -> float:
        monkeypatch.setattr(harness.torch.cuda, "synchronize", lost)
        return lost()  # type: ignore[return-value]

    def body(bench: Any) -> None:
        bench.run("kept", bench.compare, "kept", {"eager": lambda: 1.0})
        bench.run("exp", bench.compare, "exp", {"rendseg": fails, "eager": lambda: 1.0})
        bench.run("log", bench.compare, "log", {"eager": lambda: 1.0})

    assert bench.main(body) == 1
    written = json.loads((tmp_path / "trial-gpu-quick.json").read_text())
    assert [row["row"] for row in written["rows"]] == ["kept"]
    assert written["failures"][0].startswith("exp, rendseg: RuntimeError: CUDA error: an illegal")
    assert written["failures"][-1] == "log: not run, the GPU was lost before"


def test_no_part_is_begun_after_the_time(harness: Any, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--no-plot", "--seconds", "0"]
    bench = harness.Bench("trial", "A trial.", arguments)
    assert bench.main(lambda bench: bench.run("late", pytest.fail, "begun")) == 0
    assert any(note.startswith("late: not run") for note in bench.notes)


def test_workloads_by_name(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    every = harness.WORKLOADS["refine"]
    assert harness.workloads_of("refine", None, every) == list(every)
    assert harness.workloads_of("refine", None, harness.GPU_QUICK) == ["W1", "W2"]
    assert harness.workloads_of("refine", "w2, T1,W1", every) == ["W1", "W2"]
    assert harness.workloads_of("encode", "W1", every) == []
    for unknown in ("W1,W9", "", ","):
        with pytest.raises(SystemExit) as ended:
            harness.workloads_of("refine", unknown, every)
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "W1,W2,W3,stages,T1,T2,T3,step,scatter,Enc,broadcast" in said[0]


def test_columns(harness: Any) -> None:
    keys = ("eager", "eager nhwc", "hand-tuned", "eager tuned", "gemm", "gemm, torch.compile", "compiled",
            "rendseg, channels_last", "triton nhwc", "broadcast")  # fmt: skip
    assert [harness.column_of(key) for key in keys] == [
        "eager", "eager", "hand-tuned eager", "hand-tuned eager", "hand-tuned eager", "torch.compile", "torch.compile",
        "rendseg", "triton", "eager"
    ]  # fmt: skip
