"""point_sample and point_labels on a GPU against the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rendseg import _backends, reference
from rendseg.ops import point_labels, point_sample
from rendseg.reference.point_sample import _point_sample_backward as reference_backward
from tests.ops import cases_point_sample as cases

pytestmark = pytest.mark.gpu

CASES = {name: (inputs, coords) for name, inputs, coords in cases.samples()}
MODES = list(itertools.product(("bilinear", "nearest"), ("zeros", "border"), (False, True)))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("point_sample", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def poison() -> None:
    """What the allocator hands out next holds NaN."""
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")


def on_gpu(maps: list[Tensor], coords: Tensor, *options) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients for a fixed upstream gradient, through the public op and autograd."""
    maps = [m.cuda().requires_grad_() for m in maps]
    coords = coords.cuda().requires_grad_()
    poison()
    out = point_sample(maps, coords, *options)
    return out.detach(), list(torch.autograd.grad(out, (*maps, coords), upstream(out.shape, out.dtype).cuda()))


def upstream(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def check(maps: list[Tensor], coords: Tensor, *options) -> None:
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32  # where cells begin
    tolerance = TOLERANCES[maps[0].dtype]
    out, grads = on_gpu(maps, coords, *options)
    wide = [m.to(dtype) for m in maps]
    wanted = reference.point_sample(wide, coords, *options)
    assert out.is_contiguous() and out.shape == wanted.shape and out.dtype == maps[0].dtype
    # Positions of a large map are good to a few 1e-5 cells only.
    slack = 10 if max(m.shape[-1] for m in maps) > 100 else 1
    torch.testing.assert_close(out.cpu().to(dtype), wanted, rtol=tolerance, atol=slack * tolerance, equal_nan=True)
    grad = upstream(out.shape, out.dtype).to(dtype)
    rights = reference_backward(grad, wide, coords.to(dtype), *options, True, True)
    for value, got, right in zip(maps, grads, rights, strict=False):
        torch.testing.assert_close(got.cpu().to(dtype), right, rtol=4 * tolerance, atol=40 * slack * tolerance)
        last = value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if slack == 1:  # the slope jumps from cell to cell
        torch.testing.assert_close(grads[-1].cpu().to(dtype), rights[-1], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("no ")])
def test_matches_the_reference(name, mode, padding_mode, align_corners) -> None:
    check(*CASES[name], mode, padding_mode, align_corners)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("no ")])
def test_empty(name) -> None:
    out, grads = on_gpu(*CASES[name], "bilinear", "zeros", False)
    assert out.numel() == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("channels", [1, 3, 72, 75])
@pytest.mark.parametrize("points,size", [(45, (6, 7)), (2048, (64, 48)), (1100, (37, 53)), (900, (9, 8))], ids=str)
def test_dtypes_and_layouts(dtype, layout, channels, points, size) -> None:
    """Points listed at once, filed under tiles, and too many for a tile."""
    maps, coords = [cases.maps(2, channels, *size, dtype, layout)], cases.points(2, points, spread=0.05)
    check(maps, coords.double() if dtype == torch.float64 else coords, "bilinear", "zeros", False)


@pytest.mark.parametrize("channels", [1, 24])
def test_a_hundred_thousand_points(channels) -> None:
    for coords in (cases.points(2, 100_000), torch.full((2, 100_000, 2), 0.37)):
        value = torch.rand(2, channels, 50, 70)
        ones = torch.ones(2, channels, 100_000)
        out, _ = on_gpu([value], coords, "bilinear", "zeros", False)
        torch.testing.assert_close(out.cpu(), reference.point_sample(value, coords), rtol=1e-5, atol=1e-5)
        args = ([value.cuda()], coords.cuda(), "bilinear", "zeros", False, True, False)
        grad = torch.ops.rendseg._point_sample_backward(ones.cuda(), *args)[0]
        wanted = reference_backward(ones.double(), [value.double()], coords.double(), *args[2:])[0]
        torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 40])
@pytest.mark.parametrize("points", [300, 2000, 20_000])
def test_the_same_bits_every_time(layout, channels, points) -> None:
    value, coords = cases.maps(2, channels, 60, 70, layout=layout), cases.points(2, points)
    first = None
    for _ in range(20):
        out, grads = on_gpu([value], coords, "bilinear", "zeros", False)
        if first is None:
            first = [out, *grads]
        assert all(torch.equal(a, b) for a, b in zip(first, [out, *grads], strict=True))


@pytest.mark.skipif(not _backends.has_kernel("point_sample", "cpu"), reason="the CPU kernels are not built")
@pytest.mark.parametrize("name", ["many channels", "channels_last", "list", "more than one block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_cpu_kernels(name, dtype) -> None:
    """Every operation of both is rounded, and sums run in the same order."""
    maps, coords = [m.to(dtype) for m in CASES[name][0]], CASES[name][1]
    out, grads = on_gpu(maps, coords, "bilinear", "border", False)
    assert torch.equal(out.cpu(), point_sample(maps, coords, "bilinear", "border", False))
    tail = ("bilinear", "border", False, True, True)
    wanted = torch.ops.rendseg._point_sample_backward(upstream(out.shape, dtype), maps, coords, *tail)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(grads[:-1], wanted[:-1], strict=True))


@pytest.mark.gradcheck
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(layout) -> None:
    maps = [cases.maps(2, 9, 4, 5, torch.float64, layout), cases.maps(2, 1, 3, 2, torch.float64)]
    coords = cases.points(2, 6).double().cuda().requires_grad_()
    inputs = [m.cuda().requires_grad_() for m in maps]
    assert torch.autograd.gradcheck(lambda a, b, c: point_sample([a, b], c), (*inputs, coords))


def kernels_of(function) -> int:
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return sum(1 for event in recorded.events() if "point_" in event.name and "kernel" in event.name)


def test_launches() -> None:
    maps = [cases.maps(2, 40, 60, 70).cuda(), cases.maps(2, 3, 30, 40, layout="channels_last").cuda()]
    coords, grad = cases.points(2, 2000).cuda(), torch.randn(2, 43, 2000).cuda()
    tail = ("bilinear", "zeros", False)
    backward = torch.ops.rendseg._point_sample_backward
    assert kernels_of(lambda: torch.ops.rendseg.point_sample(maps, coords)) == 1
    assert kernels_of(lambda: backward(grad, maps, coords, *tail, True, False)) == 2
    assert kernels_of(lambda: backward(grad, maps, coords, *tail, True, True)) == 3
    assert kernels_of(lambda: backward(grad[:, :1, :500], [maps[0][:, :1]], coords[:, :500], *tail, True, False)) == 1
    labels = torch.zeros(2, 9, 9, dtype=torch.uint8, device="cuda")
    assert kernels_of(lambda: torch.ops.rendseg.point_labels(labels, coords)) == 1


@pytest.mark.parametrize("points", [200, 2000])
def test_other_stream_and_graph(points) -> None:
    maps = [cases.maps(2, 40, 60, 70).cuda(), cases.maps(2, 3, 30, 40, layout="channels_last").cuda()]
    coords, grad = cases.points(2, points).cuda(), torch.randn(2, 43, points).cuda()

    def run() -> list[Tensor]:
        gradients = torch.ops.rendseg._point_sample_backward(grad, maps, coords, "bilinear", "zeros", False, True, True)
        return [torch.ops.rendseg.point_sample(maps, coords), *gradients]

    wanted = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(2):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", cases.LABEL_DTYPES, ids=str)
def test_labels(dtype) -> None:
    limits = torch.iinfo(dtype)
    labels = torch.randint(limits.min, limits.max, (2, 33, 47), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, 0, 0] = limits.max
    points = torch.cat((cases.points(2, 3000), torch.tensor([cases.WILD, cases.WILD])), 1)
    for coords in (points, points.double()):
        wanted = reference.point_labels(labels, coords, -1)
        assert torch.equal(point_labels(labels.cuda(), coords.cuda(), -1).cpu(), wanted)


@pytest.mark.bad_input
@pytest.mark.parametrize("call,error,words", [pytest.param(*c[1:], id=c[0]) for c in cases.bad_inputs()])
def test_bad_input(call, error, words) -> None:
    call = call | {"input": [m.cuda() for m in call["input"]], "coords": call["coords"].cuda()}
    with pytest.raises(error, match=words):
        torch.ops.rendseg.point_sample(**call)


@pytest.mark.bad_input
@pytest.mark.parametrize("call,error,words", [pytest.param(*c[1:], id=c[0]) for c in cases.bad_labels()])
def test_bad_labels(call, error, words) -> None:
    with pytest.raises(error, match=words):
        torch.ops.rendseg.point_labels(**{k: v.cuda() for k, v in call.items()})


@pytest.mark.bad_input
def test_another_device() -> None:
    with pytest.raises(RuntimeError, match="coords must be on the device of input"):
        torch.ops.rendseg.point_sample([cases.maps(2, 3, 4, 5).cuda()], cases.points(2, 6))
