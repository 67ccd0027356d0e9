"""The Triton kernels of point_sample and point_labels against the reference in float64; see _triton.py for where."""

from __future__ import annotations

import itertools

import pytest
import torch
from _triton import DEVICE, TRITON, implementation, to_device
from cases_point_sample import LABEL_DTYPES, NAN, WILD, bad_inputs, bad_labels, maps, points, samples
from torch import Tensor

from rendseg import reference
from rendseg._extension import C
from rendseg.reference.point_sample import _point_sample_backward as reference_backward

pytestmark = TRITON

CASES = {name: (inputs, coords) for name, inputs, coords in samples()}
MODES = list(itertools.product(("bilinear", "nearest"), ("zeros", "border"), (False, True)))
# Halves are rounded once at the end: within half an ulp (2**-11, 2**-8) of float64 samples of magnitude < 8.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def sample(inputs: list[Tensor], coords: Tensor, *options) -> Tensor:
    out = implementation("point_sample", "point_sample")(to_device(inputs), to_device(coords), *options)
    assert out.is_contiguous() and out.dtype == inputs[0].dtype
    return out.cpu()


def backward(grad: Tensor, inputs: list[Tensor], coords: Tensor, *options) -> list[Tensor]:
    function = implementation("point_sample", "_point_sample_backward")
    return [g.cpu() for g in function(to_device(grad), to_device(inputs), to_device(coords), *options)]


def like_output(inputs: list[Tensor], coords: Tensor, seed: int = 3) -> Tensor:
    shape = (coords.shape[0], sum(m.shape[1] for m in inputs), *coords.shape[1:-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def judge(name: str) -> torch.dtype:
    """What the reference computes in: float64, but float32 where a coordinate overflows only there."""
    return torch.float32 if "wild" in name else torch.float64


@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, mode, padding_mode, align_corners):
    inputs, coords = CASES[name]
    out = sample(inputs, coords, mode, padding_mode, align_corners)
    if mode == "nearest":  # cells, not sums: those of float32 positions, exactly
        assert torch.equal(out, reference.point_sample(inputs, coords, mode, padding_mode, align_corners))
    else:
        judged = [m.to(judge(name)) for m in inputs], coords.to(judge(name))
        wanted = reference.point_sample(*judged, mode, padding_mode, align_corners).double()
        tolerance = 2e-4 if "larger" in name else 1e-5  # positions near 500 are good to 3e-5 cells
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("padding_mode,align_corners", [("zeros", False), ("border", True)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("name", [n for n in CASES if DEVICE == "cuda" or "larger" not in n])  # 2 million cells
def test_backward(name, mode, padding_mode, align_corners):
    inputs, coords = CASES[name]
    grad = like_output(inputs, coords)
    options = (mode, padding_mode, align_corners, True, True)
    *got, got_coords = backward(grad, inputs, coords, *options)
    *wanted, _ = reference_backward(grad, inputs, coords, *options)
    for feature, a, b in zip(inputs, got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3 if "larger" in name else 1e-5)
        assert a.stride() == b.stride() and a.shape == feature.shape
    if "larger" not in name:  # the slope jumps from cell to cell, and positions near 500 are good to 3e-5 cells only
        dtype = judge(name)
        wanted_coords = reference_backward(grad.to(dtype), [m.to(dtype) for m in inputs], coords.to(dtype), *options)
        torch.testing.assert_close(
            got_coords.double(), wanted_coords[-1].double(), rtol=1e-3, atol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize(
    "channels,mode,padding_mode,align_corners",
    [(5, *MODES[0]), (5, *MODES[3]), (5, *MODES[-1]), (1, *MODES[3]), (67, *MODES[0])],
)
def test_dtypes(dtype, layout, channels, mode, padding_mode, align_corners):
    inputs = [maps(2, channels, 6, 7, dtype, layout)]
    coords = points(2, 70) if dtype != torch.float64 else points(2, 70).double()
    options = (mode, padding_mode, align_corners)
    tolerance = TOLERANCES[dtype]
    out = sample(inputs, coords, *options)
    wanted = reference.point_sample(wide(inputs), coords.double(), *options)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    grad = like_output(inputs, coords)
    got = backward(grad, inputs, coords, *options, True, True)
    wanted = reference_backward(grad.double(), wide(inputs), coords.double(), *options, True, True)
    assert got[0].dtype == dtype and got[1].dtype == coords.dtype
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=tolerance * 4, atol=tolerance * 4)
    # Coordinates and sums over channels are float32 whatever the maps are.
    slack = 1e-3 if dtype != torch.float64 else 1e-9
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=slack, atol=slack * channels**0.5)
    if layout == "channels_last" and channels > 1:
        assert got[0].is_contiguous(memory_format=torch.channels_last)
    else:
        assert got[0].is_contiguous()


def test_float64_coords_of_a_float32_map():
    inputs, coords = [maps(2, 9, 6, 5)], points(2, 30).double()
    wanted = reference.point_sample(inputs, coords)
    torch.testing.assert_close(sample(inputs, coords), wanted, rtol=1e-5, atol=1e-5)
    got = backward(like_output(inputs, coords), inputs, coords, "bilinear", "zeros", False, True, True)
    assert got[1].dtype == torch.float64


@pytest.mark.skipif(C is None, reason="the compiled kernels are not loaded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["many channels", "channels_last", "list", "one channel", "same point many times"])
def test_the_same_bits_as_the_cpu_kernels(name, dtype):
    # Every product is rounded before it is added, taps are added in one order: nothing is left to differ.
    inputs, coords = CASES[name]
    inputs = [m.to(dtype) for m in inputs]
    for options in (MODES[0], MODES[3], MODES[4], MODES[7]):  # each of the three switches both ways
        assert torch.equal(sample(inputs, coords, *options), torch.ops.rendseg.point_sample(inputs, coords, *options))
        grad = like_output(inputs, coords)
        got = backward(grad, inputs, coords, *options, True, False)
        wanted = torch.ops.rendseg._point_sample_backward(grad, inputs, coords, *options, True, False)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradients_of_any_strides(layout):
    inputs, coords = [maps(2, 12, 6, 5, layout=layout)], points(2, 20)
    plain = like_output(inputs, coords)
    turned = plain.transpose(1, 2).contiguous().transpose(1, 2)
    options = ("bilinear", "zeros", False, True, True)
    for a, b in zip(backward(plain, inputs, coords, *options), backward(turned, inputs, coords, *options), strict=True):
        assert torch.equal(a, b)
    expanded = torch.ones(()).expand(2, 12, 20)  # what sum().backward() hands over
    for a, b in zip(
        backward(expanded, inputs, coords, *options),
        backward(expanded.contiguous(), inputs, coords, *options),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_only_what_is_asked_for():
    inputs, coords = CASES["list"]
    grad = like_output(inputs, coords)
    sizes = [m.numel() for m in inputs]
    got = backward(grad, inputs, coords, "bilinear", "zeros", False, False, True)
    assert [g.numel() for g in got] == [0] * len(inputs) + [coords.numel()]
    got = backward(grad, inputs, coords, "bilinear", "zeros", False, True, False)
    assert [g.numel() for g in got] == [*sizes, 0]


@pytest.mark.parametrize("name", ["list", "no points", "one cell"])
def test_memory_poisoned(name):
    inputs, coords = CASES[name]
    grad = like_output(inputs, coords)
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        out = sample(inputs, coords)
        got = backward(grad, inputs, coords, "bilinear", "border", False, True, True)
    finally:
        torch.use_deterministic_algorithms(previous)
    torch.testing.assert_close(out, reference.point_sample(inputs, coords))
    for a, b in zip(
        got, reference_backward(grad, inputs, coords, "bilinear", "border", False, True, True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_nan_and_infinity():
    value = torch.arange(12.0).view(1, 1, 3, 4) + 1
    out = sample([value], torch.tensor([[(NAN, 0.5), (0.5, NAN), (NAN, NAN)]]), "bilinear", "border")
    assert out.tolist() == [[[5.0, 2.5, 1.0]]]
    inputs, coords = [maps(1, 9, 4, 4)], torch.full((1, 3, 2), NAN)
    assert sample(inputs, coords).isnan().all()
    grad, coords_grad = backward(like_output(inputs, coords), inputs, coords, "bilinear", "zeros", False, True, True)
    assert (grad == 0).all() and coords_grad.isnan().all()
    coords = torch.tensor([WILD])
    grads = backward(like_output(inputs, coords), inputs, coords, "bilinear", "border", False, True, True)
    assert all(g.isfinite().all() for g in grads)
    infinite = torch.zeros(1, 9, 3, 3)
    infinite[:, :, 0, 0] = float("-inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        out = sample([infinite.contiguous(memory_format=layout)], torch.tensor([[(0.05, 0.05), (0.9, 0.9)]]))
        assert (out[:, :, 0] == float("-inf")).all() and (out[:, :, 1] == 0).all()


def test_halves_to_even():
    # The border between two cells is a tie of nearest: the even one is taken, as by F.grid_sample.
    value = torch.arange(8.0).view(1, 1, 1, 8)
    coords = torch.stack((torch.arange(9) / 8, torch.full((9,), 0.5)), -1).unsqueeze(0)
    assert torch.equal(sample([value], coords, "nearest"), reference.point_sample(value, coords, "nearest"))


@pytest.mark.bad_input
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input(name, call, error, words):
    if "sparse" not in name:
        call = to_device(call)
    with pytest.raises(error, match=words):
        implementation("point_sample", "point_sample")(**call)


@pytest.mark.bad_input
def test_bad_input_of_the_backward():
    inputs, coords, tail = [maps(2, 3, 4, 5)], points(2, 6), ("bilinear", "zeros", False, True, True)
    with pytest.raises(ValueError, match=r"grad must have shape \[2, 3, 6\] as the output, got \[2, 4, 6\]"):
        backward(torch.zeros(2, 4, 6), inputs, coords, *tail)
    with pytest.raises(TypeError, match="grad must have the dtype of input"):
        backward(torch.zeros(2, 3, 6).double(), inputs, coords, *tail)


# -- labels --------------------------------------------------------------------------------


def labels_at(labels: Tensor, coords: Tensor, ignore_index: int) -> Tensor:
    return implementation("point_sample", "point_labels")(to_device(labels), to_device(coords), ignore_index).cpu()


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("height,width", [(5, 7), (1, 1), (3, 480)])
def test_labels(dtype, height, width):
    low, high = max(torch.iinfo(dtype).min, -(2**60)), min(torch.iinfo(dtype).max, 2**60 + 1)
    labels = torch.randint(low, high, (2, height, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, 0, 0] = torch.iinfo(dtype).max  # beyond the exact range of float32, and of float64 for int64
    borders = torch.arange(width + 1).float() / width
    near = torch.cat([borders, torch.nextafter(borders, torch.tensor(2.0)), torch.nextafter(borders, -borders - 1)])
    rows = torch.arange(near.numel()).remainder(height + 1).float() / height
    coords = torch.cat([points(1, 60)[0], torch.tensor(WILD), torch.stack((near, rows), -1)]).repeat(2, 1, 1)
    strided = torch.zeros(2, width, height * 2, dtype=dtype)
    strided[:, :, ::2] = labels.transpose(1, 2)
    for ignore_index in (255, 1, -1, 2**40):
        wanted = reference.point_labels(labels, coords, ignore_index)
        assert torch.equal(labels_at(labels, coords, ignore_index), wanted)
    for tensor, points_ in ((labels, coords.double()), (strided[:, :, ::2].transpose(1, 2), coords)):
        assert torch.equal(labels_at(tensor, points_, 255), reference.point_labels(labels, coords, 255))


@pytest.mark.parametrize("n,p", [(0, 5), (2, 0), (0, 0)])
def test_no_labels(n, p):
    assert labels_at(torch.zeros(n, 3, 4, dtype=torch.uint8), torch.rand(n, p, 2), 255).shape == (n, p)


@pytest.mark.bad_input
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_labels()])
def test_bad_labels(name, call, error, words):
    with pytest.raises(error, match=words):
        implementation("point_sample", "point_labels")(**to_device(call))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_graph_capture():
    inputs, coords = to_device(CASES["list"][0]), to_device(CASES["list"][1])
    grad = to_device(like_output(*CASES["list"]))
    forward, back = (implementation("point_sample", op) for op in ("point_sample", "_point_sample_backward"))
    options = ("bilinear", "zeros", False)
    wanted = [forward(inputs, coords, *options), *back(grad, inputs, coords, *options, True, True)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [forward(inputs, coords, *options), *back(grad, inputs, coords, *options, True, True)]
    for tensor in got:
        tensor.zero_()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
