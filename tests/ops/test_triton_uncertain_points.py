"""The Triton kernels of uncertainty, uncertain_points and sample_uncertain_points against the reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from _triton import DEVICE, TRITON, implementation, to_device
from cases_uncertain_points import bad_inputs, logits_cases
from torch import Tensor

from rendseg import reference

pytestmark = [*TRITON, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy, on NaN in the interpreter


def smaller(name: str, logits: Tensor) -> Tensor:
    """Fewer cells for the small tiles of ``channels_last``, and fewer images, in the same layout."""
    if "33x37 channels_last" in name:
        return logits[:, :, :11, :17].contiguous(memory_format=torch.channels_last)
    return logits[:3] if "flipped" in name else logits


CASES = {
    name: (smaller(name, logits), index)
    for name, logits, index in logits_cases()
    if "70x131" not in name and "large" not in name[:5]
}
BAD = {f"{op}: {name}": (op, kwargs, exception, pattern) for name, op, kwargs, exception, pattern in bad_inputs()}


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    result = implementation("uncertain_points", op)(*to_device(args), **to_device(kwargs))
    return tuple(tensor.cpu() for tensor in result) if isinstance(result, tuple) else result.cpu()


def select_module() -> Any:
    return importlib.import_module("rendseg.kernels._select")


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection in several launches, which maps of more than 8192 cells take, already beyond 1024."""
    monkeypatch.setattr(select_module(), "SMALL", 1024)


def assert_selects(logits: Tensor, num_points: int, class_index: Tensor | None = None) -> None:
    indices, coords = run("uncertain_points", logits, num_points, class_index)
    wanted = reference.uncertain_points(logits, num_points, class_index)
    assert indices.dtype == torch.int64 and coords.dtype == torch.float32
    assert torch.equal(indices, wanted[0]) and torch.equal(coords, wanted[1])


@pytest.mark.parametrize("case", CASES)
def test_uncertainty(case: str) -> None:
    logits, class_index = CASES[case]
    got = run("uncertainty", logits, class_index)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, reference.uncertainty(logits, class_index), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_uncertain_points(case: str) -> None:
    logits, class_index = CASES[case]
    cells = logits.shape[2] * logits.shape[3]
    for num_points in {cells // 3 + 1, cells + 5}:
        assert_selects(logits, num_points, class_index)


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_channel_is_seen(channels: int, dtype: torch.dtype) -> None:
    """The two largest sit at every pair of channels once: cells = channels², in both layouts."""
    logits = torch.zeros(1, channels, channels, channels, dtype=dtype)
    first, second = torch.meshgrid(torch.arange(channels), torch.arange(channels), indexing="ij")
    logits.scatter_add_(1, first[None, None], torch.full((1, 1, channels, channels), 5.0, dtype=dtype))
    logits.scatter_add_(1, second[None, None], torch.full((1, 1, channels, channels), 3.0, dtype=dtype))
    logits[0, channels - 1, 0, 0] = math.nan
    for layout in (torch.contiguous_format, torch.channels_last):
        x = logits.contiguous(memory_format=layout)
        torch.testing.assert_close(run("uncertainty", x), reference.uncertainty(x), rtol=0, atol=0, equal_nan=True)


def maps() -> dict[str, Tensor]:
    """One-channel maps too large for one program, with keys of every awkward kind."""
    generator = torch.Generator().manual_seed(0)
    size = (1, 1, 47, 101)  # two tiles and a half
    return {
        "normal": torch.randn(size, generator=generator),
        "zeros": torch.zeros(size),
        "eight values": torch.randint(0, 8, size, generator=generator) * 0.5,
        "one ulp apart": 1 + torch.randint(0, 1000, size, generator=generator) * 2.0**-23,
        "subnormal": torch.randint(0, 5000, size, generator=generator) * 2.0**-149,
        "signed zeros": torch.randint(0, 2, size, generator=generator) * -0.0,
        "all magnitudes": torch.exp2(torch.rand(size, generator=generator) * 250 - 125),
        "all NaN": torch.full(size, math.nan),
        "mostly infinite": torch.where(torch.rand(size, generator=generator) < 0.9, math.inf, 1.0),
        "descending": torch.arange(47 * 101).flip(0).float().view(size),
        "two images": torch.randn(2, 1, 40, 60, generator=generator),
    }


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize("name", maps())
def test_selection_of_large_maps(name: str) -> None:
    logits = maps()[name]
    for num_points in (1, 700, 10**6) if name in ("normal", "zeros", "all NaN") else (700,):
        assert_selects(logits, num_points)


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize("max_blocks", [2, 3])
def test_programs_of_several_tiles(max_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, as on maps beyond a million cells; two seeds and a map of ties."""
    monkeypatch.setattr(select_module(), "MAX_BLOCKS", max_blocks)
    generator = torch.Generator().manual_seed(max_blocks)
    logits = torch.randn(2, 1, 80, 130, generator=generator)
    assert_selects(logits, 2000)
    assert_selects(logits.round(), 5000)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000])
def test_selection_in_one_program(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for logits in (torch.randn(1, 1, 1, size, generator=generator), torch.zeros(1, 1, 1, size)):
        for num_points in {1, size // 2 + 1, size}:
            assert_selects(logits, num_points)


def test_many_small_images() -> None:
    logits = torch.randn(12, 1, 14, 14, generator=torch.Generator().manual_seed(1))
    assert_selects(logits, 50)


@pytest.mark.usefixtures("many_programs")
def test_runs_agree() -> None:
    logits = (torch.randn(1, 3, 50, 60, generator=torch.Generator().manual_seed(2)) * 4).round()
    first = run("uncertain_points", logits, 900)
    for _ in range(20 if DEVICE == "cuda" else 1):
        again = run("uncertain_points", logits, 900)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# Sampling


def assert_samples(logits: Tensor, num_points: int, draws: Tensor, *ratios: float, **options: Any) -> None:
    """Equal to the reference, or where they differ the margins of the chosen points agree to the last digits.

    The reference may fuse a product and a difference, so that points near the threshold change places.
    """
    got = run("sample_uncertain_points", logits, num_points, *ratios, random_coords=draws, **options)
    wanted = reference.sample_uncertain_points(logits, num_points, *ratios, random_coords=draws, **options)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    kept = int((ratios[1] if len(ratios) > 1 else 0.75) * num_points)
    assert torch.equal(got[:, kept:], wanted[:, kept:])
    if torch.equal(got[:, :kept], wanted[:, :kept]):
        return
    class_index = options.pop("class_index", None)
    exact = [
        reference.uncertainty(reference.point_sample(logits.double(), c, **options).unsqueeze(-1), class_index)[..., 0]
        for c in (got[:, :kept].double(), wanted[:, :kept].double())
    ]
    eps = torch.finfo(logits.dtype).eps + (0 if logits.dtype == torch.float64 else 2e-6 * max(logits.shape[2:]))
    slack = 4 * eps * float(logits.double().abs().max())
    torch.testing.assert_close(exact[0].sort(1).values, exact[1].sort(1).values, rtol=0, atol=slack)
    drawn = draws.tolist()
    for n, row in enumerate(got[:, :kept].tolist()):
        order = [drawn[n].index(point) for point in row]
        assert order == sorted(order), "the chosen points are in the order of drawing"


SAMPLED = [
    name
    for name in CASES
    if not any(word in name for word in ("NaN", "equal", "flipped", "float64")) and not name.startswith("float16")
]
SAMPLED += ["float16 2x40x17x1"]
SAMPLED += ["float64 1x1x5x7", "float64 class_index channels_last"]


@pytest.mark.parametrize("case", SAMPLED)
def test_sample_uncertain_points(case: str) -> None:
    logits, class_index = CASES[case]
    generator = torch.Generator().manual_seed(9)
    for padding_mode, align_corners in (("zeros", False), ("border", True)):
        draws = torch.rand(len(logits), 3 * 40 + 10, 2, generator=generator)
        options = {"class_index": class_index, "padding_mode": padding_mode, "align_corners": align_corners}
        assert_samples(logits, 40, draws, **options)


@pytest.mark.parametrize("oversample,importance", [(1.0, 0.5), (2.5, 0.0), (3.0, 1.0), (1.0, 1.0), (7.3, 0.2)])
def test_ratios(oversample: float, importance: float) -> None:
    logits = torch.randn(2, 4, 20, 24, generator=torch.Generator().manual_seed(10))
    for num_points in (1, 100):
        total = int(oversample * num_points) + num_points - int(importance * num_points)
        draws = torch.rand(2, total, 2, generator=torch.Generator().manual_seed(11))
        assert_samples(logits, num_points, draws, oversample, importance)


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_points(dtype: torch.dtype) -> None:
    """More candidates than one program selects among, drawn and given."""
    logits = torch.randn(1, 1, 48, 40, generator=torch.Generator().manual_seed(12)).to(dtype)
    draws = torch.rand(1, 3 * 800 + 200, 2, generator=torch.Generator().manual_seed(13))
    assert_samples(logits, 800, draws)


def test_coordinates_off_the_map() -> None:
    """With zeros a point off the map samples 0 in every class; NaN is such a point. Border goes to the edge."""
    generator = torch.Generator().manual_seed(14)
    logits = torch.randn(2, 4, 7, 9, generator=generator)
    draws = torch.rand(2, 65, 2, generator=generator) * 3 - 1
    draws[0, ::7, 0] = math.nan
    draws[1, ::5, 1] = math.inf
    draws[1, 1::5, 0] = -math.inf
    draws[0, 1::7, 1] = 1e30
    for padding_mode in ("zeros", "border"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = logits.contiguous(memory_format=layout)
            got = run("sample_uncertain_points", x, 20, random_coords=draws, padding_mode=padding_mode)
            wanted = reference.sample_uncertain_points(x, 20, random_coords=draws, padding_mode=padding_mode)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_ties_of_samples_go_to_the_first_drawn() -> None:
    draws = torch.rand(2, 30 + 3, 2, generator=torch.Generator().manual_seed(15))
    got = run("sample_uncertain_points", torch.ones(2, 3, 8, 8), 10, random_coords=draws, padding_mode="border")
    assert torch.equal(got[:, :7], draws[:, :7])


def test_unknown_logits_are_most_uncertain() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 3.0
    logits[0, 1, 0, 0] = math.nan
    draws = torch.tensor([[[0.5, 0.5], [2.0, 2.0], [0.2, 0.2], [0.9, 0.9]]])  # the third touches the NaN
    assert torch.equal(run("sample_uncertain_points", logits, 1, 4.0, 1.0, random_coords=draws)[0, 0], draws[0, 2])


def test_draws_on_strided_coordinates() -> None:
    logits = torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(16))
    draws = torch.rand(2, 2, 65, generator=torch.Generator().manual_seed(17)).transpose(1, 2)
    assert_samples(logits, 20, draws)


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize("num_points", [60, 500])
def test_draws_follow_the_seed(num_points: int) -> None:
    """The same generator state, the same points, which are uniform and distinct."""
    logits = torch.zeros(2, 1, 16, 16)
    logits[..., 8:] = 5.0
    torch.manual_seed(3)
    first, second = (run("sample_uncertain_points", logits, num_points) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(run("sample_uncertain_points", logits, num_points), first) and not torch.equal(first, second)
    generator = torch.Generator(DEVICE).manual_seed(3)
    assert torch.equal(run("sample_uncertain_points", logits, num_points, generator=generator), first)
    assert ((first >= 0) & (first < 1)).all() and not torch.equal(first[0], first[1])
    assert len({tuple(point) for point in first.flatten(0, 1).tolist()}) > 0.99 * first[..., 0].numel()
    kept = num_points * 3 // 4
    assert (first[:, :kept, 0] < 0.5 + 0.5 / 16).all(), "half of the many candidates lie on the uncertain side"
    rest = first[:, kept:]
    assert abs(float(rest.mean()) - 0.5) < 3 / math.sqrt(12 * rest.numel())
    # With every candidate kept, the draws come out as they are: uniform in both coordinates.
    every = run("sample_uncertain_points", logits, num_points, 1.0, 1.0)
    sigma = math.sqrt(1 / 12 / (2 * num_points))
    assert ((every.flatten(0, 1).mean(0) - 0.5).abs() < 4 * sigma).all()


def test_empty_batch() -> None:
    assert run("sample_uncertain_points", torch.zeros(0, 3, 4, 5), 7).shape == (0, 7, 2)
    indices, coords = run("uncertain_points", torch.zeros(0, 3, 200, 200), 7)
    assert indices.shape == (0, 7) and coords.shape == (0, 7, 2)


@pytest.mark.skipif(DEVICE == "cuda", reason="an index out of range is only refused on the CPU")
def test_class_that_does_not_exist_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, where the range is not checked: NaN everywhere in that image."""
    module = importlib.import_module("rendseg.kernels.uncertain_points")
    monkeypatch.setattr(module, "check_class_index", lambda *_: None)
    logits = torch.ones(3, 2, 4, 5)
    got = run("uncertainty", logits, torch.tensor([1, 2, -1 << 40]))
    assert (got[0] == -1).all() and got[1:].isnan().all()


def test_outputs_never_require_grad() -> None:
    logits = torch.randn(1, 3, 5, 6, requires_grad=True)
    for op, args in (("uncertainty", ()), ("uncertain_points", (3,)), ("sample_uncertain_points", (3,))):
        results = run(op, logits, *args)
        assert not any(r.requires_grad for r in (results if isinstance(results, tuple) else (results,)))


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    op, kwargs, exception, pattern = BAD[case]
    with pytest.raises(exception, match=pattern):
        implementation("uncertain_points", op)(**kwargs)
