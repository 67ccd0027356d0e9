"""The floors as code against figures worked out by hand from the workloads (megabytes and gigaflops)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import _floors  # noqa: E402


def test_flops_per_point() -> None:
    # 2 (256 + C)(768 + C) for a 3 x 256 MLP that sees the coarse logits at every layer
    for workload in (_floors.W1, _floors.W2, _floors.W3):
        c = workload.classes
        assert workload.flops_per_point() == 2 * (256 + c) * (768 + c)


def test_points_are_capped_by_the_cells_of_a_step() -> None:
    assert _floors.W1.points() == 2 * 8192
    assert _floors.W2.points() == 64 * 64 + 3 * 8096
    assert _floors.W3.points() == 4 * 784  # 28 x 28 cells, then three selections: the step of 14 x 14 is left out


@pytest.mark.parametrize(
    ("element_size", "output", "megabytes"),
    [(4, "logits", 210), (2, "logits", 105), (4, "labels", 52), (2, "labels", 27)],
)
def test_w1_traffic(element_size: int, output: str, megabytes: float) -> None:
    assert _floors.W1.floor(element_size, output).bytes / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_w1_and_w2_work() -> None:
    assert _floors.W1.floor(4).flops / 1e9 == pytest.approx(7.1, rel=0.01)
    assert _floors.W2.floor(4).flops / 1e9 == pytest.approx(339, rel=0.01)
    assert _floors.W2.floor(4).bytes / 1e6 == pytest.approx(2795, rel=0.01)


@pytest.mark.parametrize(
    ("floor", "megabytes", "gigaflops"),
    [
        (_floors.encode_forward(4, 512, 8192, 32, 4), 67, 2.147),
        (_floors.encode_forward(16, 512, 8192, 32, 2), 135, 8.7),
        (_floors.encode_backward(4, 512, 8192, 32, 4), 135, 5.4),
        (_floors.encode_backward(16, 512, 8192, 32, 4), 539, 21.5),
        (_floors.point_sample_backward(4, 256, 128, 256, 2048, 4), 143, None),
        (_floors.selection(4, 19, 128, 256, 2048, 4), 10, None),
        (_floors.selection(300, 1, 256, 256, 12544, 4), 109, None),
    ],
)
def test_training_floors(floor: _floors.Floor, megabytes: float, gigaflops: float | None) -> None:
    assert floor.bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    if gigaflops is not None:
        assert floor.flops / 1e9 == pytest.approx(gigaflops, rel=0.02)


def test_serial_floor_adds_and_the_other_takes_the_larger() -> None:
    floor = _floors.Floor(bytes=2e9, flops=3e9)
    assert floor.seconds(1e9, 1e9) == 3.0
    assert floor.seconds(1e9, 1e9, serial=True) == 5.0
