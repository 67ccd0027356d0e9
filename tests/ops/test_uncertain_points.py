from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _common import assert_opcheck, backends_to_test, bad_input_runner, thread_counts, use_threads
from cases_uncertain_points import bad_inputs, logits_cases
from torch import Tensor

import rendseg
from rendseg import _extension, ops, reference
from rendseg.reference import _draws

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
BAD = {f"{op}: {name}": (op, kwargs, exception, pattern) for name, op, kwargs, exception, pattern in bad_inputs()}
FEW = ("float32 2x19x33x37", "bfloat16 2x19x33x37 channels_last", "float16 class_index", "empty batch")

compiled_only = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


def margins(logits: Tensor, class_index: Tensor | None) -> np.ndarray:
    """Independent of the reference: ``[N, H, W]`` by numpy's sort in float64, rounded to float32; NaN if unknown."""
    values = logits.detach().double().numpy()
    if class_index is not None:
        values = np.take_along_axis(values, class_index.numpy().reshape(-1, 1, 1, 1), axis=1)
    with np.errstate(invalid="ignore"):
        if values.shape[1] == 1:
            return np.abs(values[:, 0]).astype(np.float32)
        ordered = np.sort(values, axis=1)
        margin = (ordered[:, -1] - ordered[:, -2]).astype(np.float32)
    return np.where(np.isnan(values).any(1), np.float32(np.nan), margin)


def smallest(margin: np.ndarray, k: int) -> np.ndarray:
    """Ascending indices ``[N, k]`` of the smallest margins, NaN first, ties to the smallest index, by a stable sort."""
    flat = margin.reshape(len(margin), math.prod(margin.shape[1:]))
    order = np.argsort(np.where(np.isnan(flat), np.float32(-1), flat), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# Uncertainty


@pytest.mark.parametrize("case", CASES)
def test_uncertainty(case: str, isa: str) -> None:
    logits, class_index = CASES[case]
    got = ops.uncertainty(logits, class_index)
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), -margins(logits, class_index))


@pytest.mark.parametrize("case", CASES)
def test_reference_uncertainty(case: str) -> None:
    logits, class_index = CASES[case]
    np.testing.assert_array_equal(reference.uncertainty(logits, class_index).numpy(), -margins(logits, class_index))


@pytest.mark.parametrize("channels", range(1, 36))
def test_every_channel_is_seen(channels: int, isa: str) -> None:
    """The two largest sit at every pair of channels once: cells = channels², in both layouts."""
    logits = torch.zeros(1, channels, channels, channels)
    first, second = torch.meshgrid(torch.arange(channels), torch.arange(channels), indexing="ij")
    logits.scatter_add_(1, first[None, None], torch.full((1, 1, channels, channels), 5.0))
    logits.scatter_add_(1, second[None, None], torch.full((1, 1, channels, channels), 3.0))
    # 5 against 3, or 8 against 0 where both fall on one channel; a single channel holds 8.
    wanted = torch.where(first == second, -8.0, -2.0)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(ops.uncertainty(logits.contiguous(memory_format=layout))[0], wanted)
        spoilt = logits.to(torch.bfloat16, memory_format=layout)
        spoilt[0, channels - 1, 0, 0] = math.nan
        got = ops.uncertainty(spoilt)[0]
        assert got[0, 0].isnan() and torch.equal(got.flatten()[1:], wanted.flatten()[1:])


# Selection


@pytest.mark.parametrize("case", CASES)
def test_uncertain_points(case: str, isa: str) -> None:
    logits, class_index = CASES[case]
    n, _, height, width = logits.shape
    for num_points in {1, 2, height * width // 3 + 1, max(1, height * width - 1), height * width, height * width + 5}:
        indices, coords = ops.uncertain_points(logits, num_points, class_index)
        k = min(num_points, height * width)
        assert indices.dtype == torch.int64 and indices.shape == (n, k)
        assert coords.dtype == torch.float32 and coords.shape == (n, k, 2)
        np.testing.assert_array_equal(indices.numpy(), smallest(margins(logits, class_index), k))
        row, col = indices // width, indices % width
        centres = torch.stack(((col.double() + 0.5) / width, (row.double() + 0.5) / height), dim=-1)
        torch.testing.assert_close(coords.double(), centres, rtol=2**-23, atol=0)
        expected = reference.uncertain_points(logits, num_points, class_index)
        assert torch.equal(indices, expected[0]) and torch.equal(coords, expected[1])


def maps() -> Iterator[tuple[str, Tensor]]:
    """One-channel maps large enough for several chunks and threads, with keys of every awkward kind."""
    generator = torch.Generator().manual_seed(0)
    size = (1, 1, 384, 517)
    yield "normal", torch.randn(size, generator=generator)
    yield "zeros", torch.zeros(size)
    yield "eight values", torch.randint(0, 8, size, generator=generator) * 0.5
    yield "one ulp apart", 1 + torch.randint(0, 1000, size, generator=generator) * 2.0**-23
    yield "subnormal", torch.randint(0, 5000, size, generator=generator) * 2.0**-149
    yield "signed zeros", torch.randint(0, 2, size, generator=generator) * -0.0
    yield "all magnitudes", torch.exp2(torch.rand(size, generator=generator) * 250 - 125)
    yield "mostly NaN", torch.where(torch.rand(size, generator=generator) < 0.9, math.nan, 1.0)
    yield "mostly infinite", torch.where(torch.rand(size, generator=generator) < 0.9, math.inf, 1.0)
    yield "ascending", torch.arange(384 * 517).float().view(size)
    yield "descending", torch.arange(384 * 517).flip(0).float().view(size)


MAPS = dict(maps())


@pytest.mark.parametrize("name", MAPS)
def test_selection_of_large_maps(name: str) -> None:
    values = MAPS[name].abs().numpy().reshape(1, -1)
    for num_points in (1, 1000, 20000, 60000, 198527):
        wanted = smallest(values, num_points)
        for threads in thread_counts():
            with use_threads(threads):
                got = ops.uncertain_points(MAPS[name], num_points)[0]
            np.testing.assert_array_equal(got.numpy(), wanted)


def test_selection_holds_the_values_of_topk() -> None:
    logits = torch.randn(3, 5, 61, 67, generator=torch.Generator().manual_seed(5))
    scores = ops.uncertainty(logits).flatten(1)
    indices, _ = ops.uncertain_points(logits, 500)
    assert (indices.diff(dim=1) > 0).all()
    chosen = scores.gather(1, indices).sort(dim=1, descending=True).values
    assert torch.equal(chosen, scores.topk(500, dim=1).values)


@pytest.mark.parametrize("images", [1, 3, 20])
def test_threads_agree(images: int, isa: str) -> None:
    logits = (torch.randn(images, 3, 120, 250, generator=torch.Generator().manual_seed(6)) * 4).round()
    draws = torch.rand(images, 3 * 5000 + 1250, 2, generator=torch.Generator().manual_seed(7))
    results = []
    for threads in thread_counts():
        with use_threads(threads):
            results.append(
                (
                    ops.uncertainty(logits),
                    *ops.uncertain_points(logits, 3000),
                    ops.sample_uncertain_points(logits, 5000, random_coords=draws),
                )
            )
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@compiled_only
@pytest.mark.parametrize("op", ["uncertainty", "uncertain_points", "sample_uncertain_points"])
def test_layouts_are_read_in_place(op: str) -> None:
    x = torch.randn(2, 24, 40, 50)
    last = x.contiguous(memory_format=torch.channels_last)
    readable = [x, last, x[:, 3:9], last[:, 3:9], x[:, :, 4:20], last[:, :, 4:20], x[1:], x.bfloat16(), last.half()]

    def copies(logits: Tensor) -> int:
        args = () if op == "uncertainty" else (50,)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            getattr(ops, op)(logits, *args)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")

    assert [copies(logits) for logits in readable] == [0] * len(readable)
    assert copies(x[..., ::2]) == 1  # the probe sees a copy where there is one


# Training-time selection


def check_sampled(
    logits: Tensor, coords: Tensor, draws: Tensor, num_points: int, oversample: float, importance: float, **options: Any
) -> None:
    """``coords`` against scores in float64 by F.grid_sample; at the threshold rounding may choose."""
    candidates, kept = int(oversample * num_points), int(importance * num_points)
    n = len(logits)
    assert coords.dtype == torch.float32 and coords.shape == (n, num_points, 2)
    assert torch.equal(coords[:, kept:], draws[:, candidates:])
    class_index = options.get("class_index")
    grid = 2 * draws[:, :candidates, None].double() - 1
    for i in range(n):
        values = F.grid_sample(
            logits[i : i + 1].double(),
            grid[i : i + 1],
            padding_mode=options.get("padding_mode", "zeros"),
            align_corners=options.get("align_corners", False),
        )[0, :, :, 0]
        if class_index is not None:
            values = values[class_index[i], None]
        margin = values[0].abs() if len(values) == 1 else values.topk(2, dim=0).values.diff(dim=0)[0].neg()
        where = {tuple(point): j for j, point in enumerate(draws[i, :candidates].tolist())}
        assert len(where) == candidates
        chosen = torch.tensor([where[tuple(point)] for point in coords[i, :kept].tolist()], dtype=torch.int64)
        assert (chosen.diff() > 0).all(), "the chosen points are in the order of drawing"
        left = torch.ones(candidates, dtype=torch.bool)
        left[chosen] = False
        if kept and left.any():
            # Grid positions are rounded in float32, values to the dtype of the logits.
            eps = torch.finfo(logits.dtype).eps + (0 if logits.dtype == torch.float64 else 2e-6 * max(logits.shape[2:]))
            slack = 4 * eps * logits[i].double().abs().max()
            assert margin[chosen].max() <= margin[left].min() + slack


@pytest.mark.parametrize("case", [name for name in CASES if "NaN" not in name and "equal" not in name])
def test_sample_uncertain_points(case: str, isa: str) -> None:
    logits, class_index = CASES[case]
    generator = torch.Generator().manual_seed(9)
    for padding_mode in ("zeros", "border"):
        for align_corners in (False, True):
            options = {"class_index": class_index, "padding_mode": padding_mode, "align_corners": align_corners}
            draws = torch.rand(len(logits), 3 * 40 + 10, 2, generator=generator)
            got = ops.sample_uncertain_points(logits, 40, random_coords=draws, **options)
            check_sampled(logits, got, draws, 40, 3.0, 0.75, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_of_images(layout: torch.memory_format, dtype: torch.dtype, isa: str) -> None:
    """With image_index, mask n is that of logits gathered by it; without class_index all classes count."""
    logits = torch.randn(3, 5, 20, 24, generator=torch.Generator().manual_seed(23)).to(dtype, memory_format=layout)
    images, classes = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([4, 0, 0, 1, 9])[[0, 1, 2, 3, 3]]
    draws = torch.rand(5, 3 * 40 + 10, 2, generator=torch.Generator().manual_seed(24))
    gathered = logits[images, classes].unsqueeze(1)
    got = ops.sample_uncertain_points(logits, 40, class_index=classes, image_index=images, random_coords=draws)
    check_sampled(gathered, got, draws, 40, 3.0, 0.75)
    got = ops.sample_uncertain_points(logits, 40, image_index=images, random_coords=draws)
    check_sampled(logits[images], got, draws, 40, 3.0, 0.75)
    none = ops.sample_uncertain_points(logits, 40, class_index=images[:0], image_index=images[:0])
    assert none.shape == (0, 40, 2)
    torch.manual_seed(25)
    first = ops.sample_uncertain_points(logits, 40, class_index=classes, image_index=images)
    torch.manual_seed(25)
    drawn = _draws.uniform_points(_draws.draw_key(logits.device), 5, 3 * 40 + 10)
    given = ops.sample_uncertain_points(logits, 40, class_index=classes, image_index=images, random_coords=drawn)
    assert torch.equal(first, given)


@pytest.mark.parametrize("oversample,importance", [(1.0, 0.5), (2.5, 0.0), (3.0, 1.0), (1.01, 0.999), (7.3, 0.2)])
def test_ratios(oversample: float, importance: float, isa: str) -> None:
    logits = torch.randn(2, 4, 20, 24, generator=torch.Generator().manual_seed(10))
    for num_points in (1, 7, 100):
        total = int(oversample * num_points) + num_points - int(importance * num_points)
        draws = torch.rand(2, total, 2, generator=torch.Generator().manual_seed(11))
        got = ops.sample_uncertain_points(logits, num_points, oversample, importance, random_coords=draws)
        check_sampled(logits, got, draws, num_points, oversample, importance)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_points(channels: int, dtype: torch.dtype, isa: str) -> None:
    """More than one block of points, and (for halves) more points than cells."""
    logits = torch.randn(2, channels, 48, 40, generator=torch.Generator().manual_seed(12)).to(dtype)
    draws = torch.rand(2, 3 * 4500 + 1125, 2, generator=torch.Generator().manual_seed(13))
    for layout in (torch.contiguous_format, torch.channels_last):
        got = ops.sample_uncertain_points(logits.contiguous(memory_format=layout), 4500, random_coords=draws)
        check_sampled(logits, got, draws, 4500, 3.0, 0.75)


def test_values_are_sampled_before_the_margin_is_taken(isa: str) -> None:
    """Between two sure cells of different classes the sampled margin is zero; the sampled uncertainty would be flat."""
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    draws = torch.tensor([[[0.25, 0.5], [0.3, 0.5], [0.5, 0.5], [0.75, 0.5]]])
    got = ops.sample_uncertain_points(logits, 1, 4.0, 1.0, random_coords=draws)
    assert got.tolist() == [[[0.5, 0.5]]]


def test_ties_of_samples_go_to_the_first_drawn(isa: str) -> None:
    draws = torch.rand(2, 30 + 3, 2)
    got = ops.sample_uncertain_points(torch.ones(2, 3, 8, 8), 10, random_coords=draws, padding_mode="border")
    assert torch.equal(got[:, :7], draws[:, :7])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("align_corners", [False, True])
def test_coordinates_off_the_map(layout: torch.memory_format, align_corners: bool, isa: str) -> None:
    """With zeros a point off the map samples 0 in every class, the smallest margin there is; NaN is such a point."""
    logits = torch.zeros(1, 3, 6, 5).contiguous(memory_format=layout)
    logits[:, 0] = 9.0
    wild = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3.0, -1.5]
    inside = [[0.5, 0.5], [0.4, 0.6], [0.3, 0.3]]
    for value in wild:
        for point in ([value, 0.5], [0.5, value], [value, value]):
            draws = torch.tensor([[*inside, point]])
            got = ops.sample_uncertain_points(logits, 1, 4.0, 1.0, random_coords=draws, align_corners=align_corners)
            torch.testing.assert_close(got[0, 0], torch.tensor(point), rtol=0, atol=0, equal_nan=True)
    # With border the nearest edge, NaN at the low one: the last column is the only uncertain one.
    logits[:, 1, :, 4] = 9.0
    for value, chosen in ((math.inf, True), (1e30, True), (3.0, True), (-math.inf, False), (math.nan, False)):
        draws = torch.tensor([[*inside, [value, 0.5]]])
        got = ops.sample_uncertain_points(
            logits, 1, 4.0, 1.0, random_coords=draws, padding_mode="border", align_corners=align_corners
        )
        assert torch.equal(got[0, 0], draws[0, 3 if chosen else 0])


def test_wild_coordinates_match_the_reference(isa: str) -> None:
    logits = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(14))
    draws = torch.rand(2, 65, 2, generator=torch.Generator().manual_seed(15)) * 3 - 1
    draws[0, ::7, 0] = math.nan
    draws[1, ::5, 1] = math.inf
    draws[1, 1::5, 0] = -math.inf
    for padding_mode in ("zeros", "border"):
        got = ops.sample_uncertain_points(logits, 20, random_coords=draws, padding_mode=padding_mode)
        wanted = reference.sample_uncertain_points(logits, 20, random_coords=draws, padding_mode=padding_mode)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_unknown_logits_are_most_uncertain(isa: str) -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 3.0
    logits[0, 1, 0, 0] = math.nan
    draws = torch.tensor([[[0.5, 0.5], [2.0, 2.0], [0.2, 0.2], [0.9, 0.9]]])  # the third touches the NaN
    got = ops.sample_uncertain_points(logits, 1, 4.0, 1.0, random_coords=draws)
    assert torch.equal(got[0, 0], draws[0, 2])


def test_philox_gives_its_known_answers() -> None:
    """Those that come with Random123: key, counter, words."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for key, counter, words in (
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (ones,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        given = tuple(torch.tensor([word]) for word in counter)
        assert tuple(int(word) for word in _draws.philox(torch.tensor([key]), given)) == words


@pytest.mark.parametrize("images", [1, 2, 9])
def test_draws_are_a_function_of_one_number_of_the_generator(images: int, isa: str) -> None:
    """The same for any number of threads and every instruction set, and those of the reference."""
    logits = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(16))
    torch.manual_seed(17)
    key = _draws.draw_key(logits.device)
    draws = _draws.uniform_points(key, images, 3 * 61 + 16)  # odd: the last counter of an image gives one point
    after = torch.get_rng_state()
    assert 0 <= draws.min() and draws.max() < 1 and draws.unique().numel() > 0.999 * draws.numel()
    assert (draws.mean((0, 1)) - 0.5).abs().max() < 4 / math.sqrt(12 * draws[..., 0].numel())
    wanted = ops.sample_uncertain_points(logits, 61, random_coords=draws)
    assert torch.equal(torch.get_rng_state(), after), "given points take no number"
    for threads in thread_counts():
        with use_threads(threads):
            torch.manual_seed(17)
            assert torch.equal(ops.sample_uncertain_points(logits, 61), wanted)
            assert torch.equal(torch.get_rng_state(), after)
            generator = torch.Generator().manual_seed(17)
            torch.manual_seed(99)
            before = torch.get_rng_state()
            assert torch.equal(ops.sample_uncertain_points(logits, 61, generator=generator), wanted)
            assert torch.equal(torch.get_rng_state(), before), "the default generator is left alone"
    generator.manual_seed(17)
    assert torch.equal(reference.sample_uncertain_points(logits, 61, generator=generator)[:, 45:], wanted[:, 45:])


def test_draws_stay_float32_when_the_default_dtype_is_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for function in (ops.sample_uncertain_points, reference.sample_uncertain_points):
            assert function(torch.zeros(1, 1, 4, 4), 5).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# Plumbing


def calls() -> dict[str, Callable[[Tensor], Any]]:
    draws = torch.rand(2, 3 * 8 + 2, 2, generator=torch.Generator().manual_seed(18))
    return {
        "uncertainty": lambda x: ops.uncertainty(x),
        "uncertain_points": lambda x: ops.uncertain_points(x, 11),
        "sample_uncertain_points": lambda x: ops.sample_uncertain_points(x, 8, random_coords=draws[: len(x)]),
    }


CALLS = calls()


def flatten(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.opcheck
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case: str, requires_grad: bool) -> None:
    logits, class_index = CASES[case]
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)
    draws = torch.rand(len(logits), 3 * 8 + 2, 2)
    assert_opcheck(torch.ops.rendseg.uncertainty.default, (logits, class_index))
    assert_opcheck(torch.ops.rendseg.uncertain_points.default, (logits, 11, class_index))
    assert_opcheck(
        torch.ops.rendseg.sample_uncertain_points.default,
        (logits, 8),
        {"class_index": class_index, "random_coords": draws, "padding_mode": "border"},
    )
    index = torch.arange(len(logits))
    masks = {"class_index": class_index, "image_index": index, "random_coords": draws}
    assert_opcheck(torch.ops.rendseg.sample_uncertain_points.default, (logits, 8), masks)


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", CALLS)
def test_outputs_never_require_grad(name: str, backend: str) -> None:
    logits = torch.randn(2, 3, 8, 9, requires_grad=True)
    draws = torch.rand(2, 26, 2, requires_grad=True)
    with rendseg.backend(backend):
        results = flatten(CALLS[name](logits))
        results.append(ops.sample_uncertain_points(logits, 8, random_coords=draws))
        results += flatten(CALLS[name](logits[..., ::2]))  # through a copy
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", CALLS)
def test_backends_agree(name: str, backend: str) -> None:
    logits = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(19)).double()
    with rendseg.backend(backend):
        got = flatten(CALLS[name](logits))
    with rendseg.backend("reference"):
        wanted = flatten(CALLS[name](logits))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_compile_and_export(name: str) -> None:
    logits = torch.randn(2, 5, 12, 14, generator=torch.Generator().manual_seed(20))
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (logits, logits[:, :, :9, :11].contiguous(), logits.requires_grad_()):
        for got, wanted in zip(flatten(compiled(x)), flatten(CALLS[name](x)), strict=True):
            assert torch.equal(got, wanted)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return CALLS[name](x)

    program = torch.export.export(Module(), (logits.detach(),))
    got = flatten(program.module()(logits.detach()))
    assert all(torch.equal(a, b) for a, b in zip(got, flatten(CALLS[name](logits)), strict=True))


def test_compiled_draws_follow_the_seed() -> None:
    logits = torch.randn(2, 5, 12, 14)
    compiled = torch.compile(lambda x: ops.sample_uncertain_points(x, 16), fullgraph=True, backend="aot_eager")
    torch.manual_seed(21)
    got = [compiled(logits), compiled(logits)]
    torch.manual_seed(21)
    wanted = [ops.sample_uncertain_points(logits, 16) for _ in range(2)]
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]) and not torch.equal(got[0], got[1])


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    logits = torch.randn(2, 5, 12, 14, generator=torch.Generator().manual_seed(22))
    with torch.autocast("cpu", torch.bfloat16):
        got = flatten(CALLS[name](logits))
    assert all(same_bits(a, b) for a, b in zip(got, flatten(CALLS[name](logits)), strict=True))


def test_half_margins_are_exact() -> None:
    """A margin below the resolution of the half type at that size is kept: the difference is taken in float32."""
    logits = torch.tensor([256.0, 258.0, 2.0]).view(1, 3, 1, 1).bfloat16()
    assert ops.uncertainty(logits).item() == -2.0
    logits = torch.tensor([300.0, 0.01]).view(1, 2, 1, 1).half()
    assert ops.uncertainty(logits).item() == np.float32(logits[0, 1].item()) - np.float32(300.0)


# Bad input


@pytest.mark.bad_input
@pytest.mark.parametrize("caller", ["reference", "torch.ops", "public"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, caller: str) -> None:
    op, kwargs, exception, pattern = BAD[case]
    bad_input_runner(op, caller, kwargs, exception, pattern)


@pytest.mark.bad_input
def test_bad_input_does_not_draw() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        ops.sample_uncertain_points(torch.zeros(1, 2, 4, 4), 4, padding_mode="reflection")
    assert torch.equal(torch.get_rng_state(), before)
