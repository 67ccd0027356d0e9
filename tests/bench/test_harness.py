"""The harness of the benchmarks: what it records on the CPU, and its way with a GPU, acted out by a stand-in."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        self.captures, self.replays, self.events = 0, 0, 0
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
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
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

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 100

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
    monkeypatch.setattr(bench, "launches", lambda candidate: 2)

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
    assert cuda.replays > 0 and "stubborn: no CUDA graph" in bench.notes[0] and len(bench.notes) == 1
    for row in rows.values():
        assert 0 < row["median"] <= 1 and row["plain_median"] > 0
        assert row["launches"] == 2 and row["peak_extra_bytes"] == 250
    assert rows["rendseg"]["l2"] == "cold" and rows["rendseg"]["warm_median"] > 0
    assert rows["eager"]["l2"] == "warm" and "warm_median" not in rows["eager"]
    assert bench.finish() == 0
    assert (tmp_path / "trial-gpu-quick.json").is_file()
