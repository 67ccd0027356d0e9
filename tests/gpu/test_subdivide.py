"""subdivide on a GPU against float64 arithmetic and the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rendseg import _backends, reference
from rendseg.ops import subdivide
from tests.ops import cases_subdivide as cases

pytestmark = pytest.mark.gpu
CASES = {name: (logits, kwargs) for name, logits, kwargs in cases.logits_cases()}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("subdivide", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """What the allocator hands out next holds NaN."""
    if torch.cuda.is_available():
        torch.full((64 << 20,), float("nan"), device="cuda")


def on_gpu(kwargs: dict) -> dict:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in kwargs.items()}


def labels_of(x: Tensor, num_points: int, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.rendseg._subdivide_labels(x, num_points, *rest)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_interpolate(case: str, dtype: torch.dtype) -> None:
    logits, kwargs = CASES[case]
    for layout, x in cases.layouts(logits.to(dtype).cuda()):
        factor, aligned = kwargs.get("scale_factor", 2), kwargs.get("align_corners", False)
        fine, indices, coords = subdivide(x, **on_gpu(kwargs))
        size = (x.shape[2] * factor, x.shape[3] * factor)
        want = F.interpolate(x.double().cpu(), size=size, mode="bilinear", align_corners=aligned)
        tolerance = dict(cases.TOLERANCE[dtype])
        tolerance["atol"] = max(tolerance["atol"], tolerance["rtol"] * float(logits.abs().max()) * 0.5)
        torch.testing.assert_close(fine.double().cpu(), want, **tolerance, msg=lambda m, at=layout: f"{at}: {m}")
        wanted = reference.uncertain_points(fine.cpu(), kwargs["num_points"], kwargs.get("class_index"))
        assert torch.equal(indices.cpu(), wanted[0]) and torch.equal(coords.cpu(), wanted[1]), layout
        nothing, same, _ = subdivide(x, **on_gpu(kwargs), return_logits=False)
        assert nothing is None and torch.equal(same, indices)
        labels, same, _ = labels_of(x, kwargs["num_points"], factor, aligned)
        plain = subdivide(x, kwargs["num_points"], factor, aligned)
        assert torch.equal(labels.long(), plain[0].argmax(1)) and torch.equal(same, plain[1]), layout


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name, logits", list(cases.special_cases()), ids=[case[0] for case in cases.special_cases()])
def test_special_values(name: str, logits: Tensor, dtype: torch.dtype) -> None:
    for layout, x in cases.layouts(logits.to(dtype).cuda()):
        fine, indices, _ = subdivide(x, 50)
        want = F.interpolate(x.double().cpu(), scale_factor=2, mode="bilinear")
        for same in (Tensor.isnan, lambda t: t == float("inf"), lambda t: t == float("-inf")):
            assert torch.equal(same(fine.cpu()), same(want)), layout
        assert torch.equal(indices.cpu(), reference.uncertain_points(fine.cpu(), 50)[0]), layout
        labels, same_indices, _ = labels_of(x, 50)
        assert torch.equal(labels.cpu().long(), fine.cpu().argmax(1)) and torch.equal(same_indices, indices), layout


def regions(n: int, c: int, h: int, w: int) -> Tensor:
    """Smooth logits with regions of one winner each, as a network gives."""
    coarse = cases.make(n, c, max(2, h // 16), max(2, w // 16), seed=5)
    return F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, k", [((1, 19, 512, 1024), 8192), ((4, 150, 128, 128), 8096)], ids=str)
def test_large_maps(shape: tuple[int, ...], k: int, dtype: torch.dtype, channels_last: bool) -> None:
    """The last steps of the benchmark workloads: streaming stores, many tiles, pruned labels; 20 runs alike."""
    x = regions(*shape).to(dtype).cuda()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    fine, indices, coords = subdivide(x, k)
    labels, same, _ = labels_of(x, k)
    want = F.interpolate(x.double(), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(fine.double(), want, rtol=cases.TOLERANCE[dtype]["rtol"], atol=2e-5)
    assert torch.equal(labels.long(), fine.argmax(1))
    assert torch.equal(indices.cpu(), reference.uncertain_points(fine.cpu(), k)[0]) and torch.equal(same, indices)
    for _ in range(20):
        again = subdivide(x, k)
        assert all(torch.equal(a, b) for a, b in zip(again, (fine, indices, coords), strict=True))
        again = labels_of(x, k)
        assert all(torch.equal(a, b) for a, b in zip(again, (labels, indices, coords), strict=True))


def test_instance_masks() -> None:
    """100 masks of one class, step by step from 7x7 to 224x224."""
    x, other = cases.make(100, 1, 7, 7).float().cuda(), cases.make(100, 80, 7, 7).half().cuda()
    chosen = torch.arange(100).cuda() % 80
    while x.shape[2] < 224:
        fine, indices, _ = subdivide(x, 784)
        assert torch.equal(indices.cpu(), reference.uncertain_points(fine.cpu(), 784)[0])
        x = fine
    fine, indices, _ = subdivide(other, 100, class_index=chosen)
    assert torch.equal(indices.cpu(), reference.uncertain_points(fine.cpu(), 100, chosen.cpu())[0])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("factor, aligned", [(2, False), (2, True), (3, False), (1, False)])
def test_gradient(factor: int, aligned: bool, dtype: torch.dtype) -> None:
    for _, start in cases.layouts(cases.make(2, 3, 25, 37).to(dtype).cuda()):
        x = start.detach().requires_grad_()
        fine, indices, _ = subdivide(x, 9, factor, aligned)
        assert not indices.requires_grad
        upstream = cases.make(*fine.shape, seed=1).to(dtype).cuda()
        fine.backward(upstream)
        y = x.detach().double().cpu().requires_grad_()
        size = (x.shape[2] * factor, x.shape[3] * factor)
        F.interpolate(y, size=size, mode="bilinear", align_corners=aligned).backward(upstream.double().cpu())
        rounding = {2: 1e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
        torch.testing.assert_close(x.grad.double().cpu(), y.grad, rtol=rounding, atol=2 * rounding)
        first = x.grad.clone()
        for _ in range(20):
            x.grad = None
            subdivide(x, 9, factor, aligned)[0].backward(upstream)
            assert torch.equal(x.grad, first)


@pytest.mark.gradcheck
@pytest.mark.parametrize("aligned", [False, True])
def test_gradcheck(aligned: bool) -> None:
    x = cases.make(2, 3, 3, 4).cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: subdivide(t, 5, 2, aligned)[0], (x,))


def test_graph_and_other_stream() -> None:
    x = regions(2, 7, 90, 120).half().cuda()
    upstream = cases.make(2, 7, 180, 240).half().cuda()

    def work() -> tuple[Tensor, ...]:
        gradient = torch.ops.rendseg._subdivide_backward(upstream, 90, 120, False)
        return (*subdivide(x, 700), *labels_of(x, 700), *subdivide(x, 700, 3, True), gradient)

    expected = [t.clone() for t in work()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for _ in range(3):
        for t in captured:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def kernels(function) -> list[str]:
    """Names of the kernels that one call launches, memory operations left out."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.lower().startswith(("memset", "memcpy"))]


def test_launches() -> None:
    x = cases.make(1, 19, 70, 70).float().cuda()  # 140 x 140 cells are selected in two launches
    grad = torch.zeros(1, 19, 140, 140, device="cuda")
    assert len(kernels(lambda: subdivide(x, 500))) == 1 + 2
    assert len(kernels(lambda: labels_of(x, 500))) == 3 + 2
    assert len(kernels(lambda: torch.ops.rendseg._subdivide_backward(grad, 70, 70, False))) == 1


def test_labels_take_little_memory() -> None:
    """Keys, labels, what is known of the source cells: nothing of the size of the logits."""
    x = regions(1, 19, 512, 1024).bfloat16().cuda()
    labels_of(x, 8192)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels_of(x, 8192)
    assert torch.cuda.max_memory_allocated() - before < 18 << 20  # the logits would be 76 MiB


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_inputs(), ids=[c[0] for c in cases.bad_inputs()])
def test_bad_input(name: str, kwargs: dict, exception: type[Exception], pattern: str) -> None:
    if name == "index value":
        pytest.skip("asserted on the device: test_a_class_outside_the_map_is_a_device_assert")
    kwargs = kwargs | {"logits": kwargs["logits"].cuda()} if name == "index device" else on_gpu(kwargs)
    with pytest.raises(exception, match=pattern):
        subdivide(**kwargs)


@pytest.mark.bad_input
def test_a_class_outside_the_map_is_a_device_assert() -> None:
    program = (
        "import torch, rendseg.ops\n"
        "rendseg.ops.subdivide(torch.zeros(1, 3, 4, 4).cuda(), 2, class_index=torch.tensor([3]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr
