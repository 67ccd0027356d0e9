"""uncertainty, uncertain_points and the selection on a GPU against the reference; run by ``make gpu-check``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rendseg import _backends, ops, reference
from tests.ops.cases_uncertain_points import bad_inputs, logits_cases

pytestmark = pytest.mark.gpu

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("uncertain_points", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def on_gpu(t: Tensor | None) -> Tensor | None:
    """A copy with the same strides: layouts stay what they are."""
    if t is None:
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = t.as_strided((size,), (1,)).cuda()
    return memory.as_strided(t.shape, t.stride())


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@contextmanager
def poisoned(value: int) -> Iterator[None]:
    """What the allocator hands out next was filled with ``value``."""
    torch.full((64 << 20,), value, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    yield


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str) -> None:
    logits, class_index = CASES[case]
    cells = logits.shape[2] * logits.shape[3]
    x, chosen = on_gpu(logits), on_gpu(class_index)
    assert x.stride() == logits.stride()
    with poisoned(0xFF):
        assert_same(ops.uncertainty(x, chosen), reference.uncertainty(logits, class_index))
    for value, num_points in enumerate({1, (cells + 2) // 3, cells, cells + 5}):
        with poisoned(0xA5 + value):
            got = ops.uncertain_points(x, num_points, chosen)
        for mine, wanted in zip(got, reference.uncertain_points(logits, num_points, class_index), strict=True):
            assert_same(mine, wanted)


def bits(low: int, high: int, cells: int, seed: int) -> Tensor:
    """Logits of one channel whose magnitudes have bits of [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (cells,), generator=generator, dtype=torch.int32).view(torch.float32)


BIN = 700 << 20
# One channel: the margin is the magnitude. Each goes another way through the selection; see csrc/cuda/select.cuh.
MAPS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(1)),
    "uniform": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(2)) + 1,
    "half ties": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(3)).bfloat16().float(),
    "all equal": lambda n: torch.full((n,), 3.0),
    "all NaN": lambda n: torch.full((n,), float("nan")),
    "crowded": lambda n: bits(BIN, BIN + 2**20, n, 4),
    "crowded in 22 bits": lambda n: bits(BIN, BIN + 500, n, 5),
    "two values": lambda n: bits(BIN, BIN + 2, n, 6),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "size", [(1, 14, 14), (300, 28, 28), (100, 224, 224), (16, 128, 128), (1, 1024, 2048)], ids=str
)
def test_selection_is_exact_and_the_same_twenty_times(name: str, size: tuple[int, int, int]) -> None:
    images, height, width = size
    x = MAPS[name](images * height * width).view(images, 1, height, width).cuda()
    for k in {1, height * width // 250 + 1, height * width // 2, height * width}:
        # A stable sort on the device; only for the magnitudes, which the reference shares.
        wanted = reference.uncertain_points(x, k)
        for run in range(20):
            with poisoned(run):
                got = ops.uncertain_points(x, k)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 19, 1024, 2048), (2, 150, 129, 131), (3, 1000, 20, 30)], ids=str)
def test_large_maps(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    x = (4 * torch.randn(shape, generator=generator, device="cuda")).to(dtype, memory_format=layout)
    x[0, 0, ::17, ::5] = float("nan")
    assert torch.equal(ops.uncertainty(x).isnan(), x.isnan().any(1))
    torch.testing.assert_close(ops.uncertainty(x), reference.uncertainty(x), rtol=0, atol=0, equal_nan=True)
    got, wanted = ops.uncertain_points(x, 8192), reference.uncertain_points(x, 8192)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def kernels(call: Callable[[], object]) -> list[str]:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches() -> None:
    for size, launches, clears in (((28, 28), 2, 0), ((128, 128), 2, 0), ((224, 224), 3, 1), ((1024, 2048), 4, 1)):
        for layout in LAYOUTS:
            x = torch.randn(1, 3, *size, device="cuda").to(memory_format=layout)
            names = kernels(lambda x=x: ops.uncertain_points(x, 100))
            assert sum("Memset" in name for name in names) == clears, names
            assert len(names) - clears == launches, names
            assert len(kernels(lambda x=x: ops.uncertainty(x))) == 1


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (512, 512)], ids=str)
def test_another_stream_and_a_graph(size: tuple[int, int]) -> None:
    def fresh(seed: int) -> Tensor:
        return torch.randn(3, 5, *size, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")

    stream = torch.cuda.Stream()
    for seed in range(4):
        x = fresh(seed)
        wanted = reference.uncertain_points(x, 300)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = ops.uncertain_points(x, 300)
        stream.synchronize()
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    x = fresh(9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, coords = ops.uncertain_points(x, 300)
        scores = ops.uncertainty(x)
    for seed in range(10, 14):
        x.copy_(fresh(seed))
        for out in (indices, coords, scores):
            out.zero_()
        graph.replay()
        wanted = reference.uncertain_points(x, 300)
        assert torch.equal(indices, wanted[0]) and torch.equal(coords, wanted[1])
        assert torch.equal(scores, reference.uncertainty(x))


def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(2, 3, 300, 300, device="cuda")
    chosen = torch.tensor([1, 2], device="cuda")
    ops.uncertain_points(x, 50, chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.uncertain_points(x, 50, chosen)
        ops.uncertainty(x, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.bad_input
@pytest.mark.parametrize("op", ["uncertainty", "uncertain_points"])
def test_bad_input(op: str) -> None:
    for name, of, kwargs, exception, pattern in bad_inputs("cuda"):
        if of == op:
            for function in (getattr(ops, op), getattr(torch.ops.rendseg, op)):
                with pytest.raises(exception, match=pattern):
                    function(**kwargs)
                    raise AssertionError(f"{name} was let through")


@pytest.mark.bad_input
@pytest.mark.parametrize("channel", [-1, 3, 2**40])
def test_a_class_outside_the_map_is_a_device_assert(channel: int) -> None:
    program = (
        "import torch, rendseg.ops\n"
        f"rendseg.ops.uncertainty(torch.zeros(1, 3, 2, 2).cuda(), torch.tensor([{channel}]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr
