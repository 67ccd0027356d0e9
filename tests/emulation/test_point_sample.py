"""The CUDA point_sample and point_labels on the CPU: every path of the kernels against the reference in float64."""

from __future__ import annotations

import itertools

import cases_point_sample as cases
import pytest
import torch
from torch import Tensor

from rendseg import reference

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
