"""The CUDA point_sample and point_labels on the CPU: every path of the kernels against the reference in float64."""

from __future__ import annotations

import itertools

import cases_point_sample as cases
import pytest
import torch
from torch import Tensor

from rendseg import _extension, reference
from rendseg.reference.point_sample import _point_sample_backward as reference_backward

SEEDS = (0, 1, 2)
CASES = {name: (inputs, coords) for name, inputs, coords in cases.samples() if "larger" not in name}
MODES = list(itertools.product(("bilinear", "nearest"), ("zeros", "border"), (False, True)))
# As for the CPU kernels: halves are rounded once at the end.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def sample(emulated, maps: list[Tensor], coords: Tensor, *options) -> Tensor:
    """The same bits for every order of threads and blocks."""
    results = []
    for seed in SEEDS:
        emulated.seed(seed)
        results.append(emulated.ops.point_sample(maps, coords, *options))
    assert all(torch.equal(r.nan_to_num(7.0), results[0].nan_to_num(7.0)) for r in results[1:])
    return results[0]


@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
@pytest.mark.parametrize("name", CASES)
def test_forward(emulated, name, mode, padding_mode, align_corners) -> None:
    inputs, coords = CASES[name]
    out = sample(emulated, inputs, coords, mode, padding_mode, align_corners)
    wanted = reference.point_sample(inputs, coords, mode, padding_mode, align_corners)
    assert out.is_contiguous() and out.shape == wanted.shape
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize(
    "channels", [3, 72, 75]
)  # planes; vectors where channels_last; single channels where not whole
def test_dtypes_forward(emulated, dtype, layout, channels) -> None:
    maps, coords = [cases.maps(2, channels, 6, 7, dtype, layout)], cases.points(2, 45)
    if dtype == torch.float64:
        coords = coords.double()
    out = sample(emulated, maps, coords, "bilinear", "zeros", False)
    wanted = reference.point_sample([m.double() for m in maps], coords.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_more_maps_than_one_launch_takes(emulated) -> None:
    maps = [cases.maps(2, 1 + i % 3, 3 + i, 9 - i % 4, seed=i) for i in range(19)]
    coords = cases.points(2, 21)
    before = emulated.launches()
    out = emulated.ops.point_sample(maps, coords)
    assert emulated.launches() == before + 3
    torch.testing.assert_close(out, reference.point_sample(maps, coords), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_channels_last_that_is_not_aligned(emulated, dtype) -> None:
    """Taken from memory that starts between two vectors."""
    flat = torch.randn(2 * 5 * 6 * 40 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)[1:]
    value, coords = flat.view(2, 5, 6, 40).permute(0, 3, 1, 2), cases.points(2, 33)
    wanted = reference.point_sample(value, coords)
    torch.testing.assert_close(emulated.ops.point_sample([value], coords), wanted)


def backward(emulated, maps: list[Tensor], coords: Tensor, *options, flags=(True, True), seeds=SEEDS) -> list[Tensor]:
    """Gradients for a random upstream one: against the reference in float64, and the same bits for every seed."""
    shape = (coords.shape[0], sum(m.shape[1] for m in maps), *coords.shape[1:-1])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(maps[0].dtype)
    results = []
    for seed in seeds:
        emulated.seed(seed)
        results.append(emulated.ops._point_sample_backward(grad, maps, coords, *options, *flags))
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results[0], other, strict=True))
    got = results[0]
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32  # where cells begin
    wanted = reference_backward(grad.to(dtype), [m.to(dtype) for m in maps], coords.to(dtype), *options, *flags)
    tolerance = 4 * TOLERANCES[maps[0].dtype]
    for value, gradient, right in zip((*maps, coords), got, wanted, strict=True):
        assert gradient.dtype == value.dtype and gradient.shape == right.shape
    for value, gradient, right in zip(maps, got, wanted, strict=False):
        torch.testing.assert_close(gradient.to(dtype), right, rtol=tolerance, atol=tolerance)
        if flags[0] and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
            assert gradient.is_contiguous(memory_format=torch.channels_last)
        else:
            assert gradient.is_contiguous()
    torch.testing.assert_close(got[-1].to(dtype), wanted[-1].to(dtype), rtol=1e-3, atol=1e-3, equal_nan=True)
    if _extension.LOADED and flags[0]:  # each cell is summed in the order of the CPU kernels
        cpu = torch.ops.rendseg._point_sample_backward(grad, maps, coords, *options, *flags)
        assert all(torch.equal(a, b) for a, b in zip(got[:-1], cpu[:-1], strict=True))
    return got


@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
@pytest.mark.parametrize("name", CASES)
def test_backward(emulated, name, mode, padding_mode, align_corners) -> None:
    inputs, coords = CASES[name]
    backward(emulated, inputs, coords, mode, padding_mode, align_corners, seeds=SEEDS[:2])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("channels", [1, 3, 72, 75])  # upstream read in place; whole vectors; not whole
def test_dtypes_backward(emulated, dtype, layout, channels) -> None:
    maps, coords = [cases.maps(2, channels, 6, 7, dtype, layout)], cases.points(2, 45)
    backward(emulated, maps, coords.double() if dtype == torch.float64 else coords, "bilinear", "border", False)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("size", [(41, 60), (37, 53)])  # three tiles; rows of four cells, and not
def test_points_filed_under_tiles(emulated, dtype, layout, channels, size) -> None:
    maps, coords = [cases.maps(2, channels, *size, dtype, layout)], cases.points(2, 800, spread=0.05)
    coords[1] *= torch.tensor([1.0, 0.5])  # the first tile of this image has more points than it can list at once
    backward(emulated, maps, coords.double() if dtype == torch.float64 else coords, "bilinear", "zeros", False)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize("points", [512, 513, 1100])
def test_all_points_in_one_cell(emulated, layout, channels, points) -> None:
    coords = torch.full((1, points, 2), 0.37)
    backward(emulated, [cases.maps(1, channels, 5, 6, layout=layout)], coords, "bilinear", "zeros", True, seeds=(0, 1))


def test_backward_of_more_maps_than_one_launch_takes(emulated) -> None:
    maps = [cases.maps(2, 1 + 5 * (i % 3), 3 + i, 9 - i % 4, seed=i) for i in range(11)]
    backward(emulated, maps, cases.points(2, 21), "bilinear", "zeros", False)


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["few channels", "many channels", "channels_last, many channels", "list"])
def test_only_the_wanted_gradients(emulated, name, flags) -> None:
    backward(emulated, *CASES[name], "bilinear", "zeros", False, flags=flags)


@pytest.mark.parametrize("channels", [3, 40])
def test_upstream_gradient_of_any_strides(emulated, channels) -> None:
    maps, coords = [cases.maps(2, channels, 6, 7)], cases.points(2, 45)
    whole = torch.randn(2, 45, channels, generator=torch.Generator().manual_seed(3))
    tail = (maps, coords, "bilinear", "zeros", False, True, True)
    for grad in (whole.transpose(1, 2), torch.tensor(2.0).expand(2, channels, 45)):
        for got, wanted in zip(
            emulated.ops._point_sample_backward(grad, *tail),
            emulated.ops._point_sample_backward(grad.contiguous(), *tail),
            strict=True,
        ):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", cases.LABEL_DTYPES, ids=str)
def test_labels(emulated, dtype) -> None:
    limits = torch.iinfo(dtype)
    labels = torch.randint(limits.min, limits.max, (2, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, 0, 0] = limits.max  # beyond the exact range of float32, and of float64 for int64
    near = torch.arange(8).float() / 7
    borders = [torch.nextafter(near, torch.tensor(to)) for to in (2.0, -1.0)] + [near]
    points = torch.cat(
        [
            torch.stack((torch.cat(borders), torch.cat(borders).flip(0)), -1),
            torch.tensor(cases.WILD),
            cases.points(1, 300)[0],
        ]
    ).repeat(2, 1, 1)
    for coords in (points, points.double()):
        assert torch.equal(emulated.ops.point_labels(labels, coords, -1), reference.point_labels(labels, coords, -1))
    strided = torch.zeros(2, 7, 10, dtype=dtype)
    strided[:, :, ::2] = labels.transpose(1, 2)
    view = strided[:, :, ::2].transpose(1, 2)
    assert torch.equal(emulated.ops.point_labels(view, points, 9), reference.point_labels(labels, points, 9))
    assert emulated.ops.point_labels(labels, points[:, :0]).shape == (2, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "call,error,words", [pytest.param(*c[1:], id=c[0]) for c in cases.bad_inputs() if "sparse" not in c[0]]
)
def test_bad_input(emulated, call, error, words) -> None:
    with pytest.raises(error, match=words):
        emulated.ops.point_sample(**call)


@pytest.mark.bad_input
@pytest.mark.parametrize("call,error,words", [pytest.param(*c[1:], id=c[0]) for c in cases.bad_labels()])
def test_bad_labels(emulated, call, error, words) -> None:
    with pytest.raises(error, match=words):
        emulated.ops.point_labels(**call)


@pytest.mark.bad_input
def test_bad_upstream_gradient(emulated) -> None:
    maps, coords, tail = [cases.maps(2, 3, 4, 5)], cases.points(2, 6), ("bilinear", "zeros", False, True, True)
    with pytest.raises(ValueError, match=r"grad must have shape \[2, 3, 6\] as the output, got \[2, 4, 6\]"):
        emulated.ops._point_sample_backward(torch.zeros(2, 4, 6), maps, coords, *tail)
    with pytest.raises(TypeError, match="grad must have the dtype of input"):
        emulated.ops._point_sample_backward(torch.zeros(2, 3, 6).double(), maps, coords, *tail)
