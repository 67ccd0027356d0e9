"""The CUDA sample_uncertain_points on the CPU: draws, keys, selection and order, however the work is shared out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases_uncertain_points import bad_inputs, logits_cases
from test_uncertain_points import check_sampled, smallest
from torch import Tensor

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
# Without the tensors that the dispatcher sends elsewhere: only the CPU key of the emulated ops has a kernel.
BAD = {
    name: (kwargs, exception, pattern)
    for name, op, kwargs, exception, pattern in bad_inputs()
    if op == "sample_uncertain_points" and not name.endswith(("sparse", "elsewhere")) and name != "sparse logits"
}
SEEDS = range(3)
# How the launches see the device, and what that leads to for many candidates.
DEVICES = {
    "one launch": {"processors": 3},
    "one launch, images shared out": {"processors": 4, "shared_limit": 227 * 1024},
    "two launches, keys copied": {"processors": 100},
    "two launches, keys in the workspace": {"processors": 100, "shared_limit": 17 * 1024},
}


def sampled_margins(
    logits: Tensor, points: Tensor, class_index: Tensor | None, padding_mode: str, align_corners: bool
) -> np.ndarray:
    """``[N, P]`` margins by numpy, every operation rounded as csrc/math/bilinear.h has it; NaN if unknown."""
    kind = np.float64 if logits.dtype == torch.float64 else np.float32
    values = logits.to(torch.float64 if kind == np.float64 else torch.float32).numpy()
    height, width = values.shape[2:]

    def axis(coord: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Left neighbour (as a float; NaN and infinities lie off the map) and the weight of the right one."""
        from_corner = (kind(2) * coord - kind(1)) + kind(1)
        half = kind(0.5)
        position = from_corner * (kind(size - 1) * half) if align_corners else from_corner * (kind(size) * half) - half
        if padding_mode == "border":
            position = np.where(position > 0, position, kind(0))
            position = np.where(position < size - 1, position, kind(size - 1))
        floor = np.floor(position)
        return floor, position - floor

    with np.errstate(invalid="ignore", over="ignore"):
        xy = points.numpy().astype(kind)
        (left, far_x), (top, far_y) = axis(xy[..., 0], width), axis(xy[..., 1], height)
        weights = [[(kind(1) - far_x) * (kind(1) - far_y), far_x * (kind(1) - far_y)]]
        weights += [[(kind(1) - far_x) * far_y, far_x * far_y]]
        lost = ~((left >= -1) & (left < width) & (top >= -1) & (top < height))
        total: Any = 0
        image = np.arange(len(values))[:, None]
        for down in (0, 1):
            for right in (0, 1):
                row, col = top + down, left + right
                on_map = (row >= 0) & (row < height) & (col >= 0) & (col < width)
                cell = values[
                    image, :, np.where(on_map, row, 0).astype(np.int64), np.where(on_map, col, 0).astype(np.int64)
                ]
                weight = np.where(lost, kind(0), weights[down][right])[..., None]
                total = total + np.where(on_map[..., None], cell, kind(0)) * weight
        rounded = torch.from_numpy(total).to(logits.dtype).to(torch.from_numpy(total).dtype).numpy()
        if class_index is not None:
            rounded = np.take_along_axis(rounded, class_index.numpy()[:, None, None], axis=2)
        if rounded.shape[2] == 1:
            return np.abs(rounded[..., 0]).astype(np.float32)
        ordered = np.sort(rounded, axis=2)
        margin = (ordered[..., -1] - ordered[..., -2]).astype(np.float32)
    return np.where(np.isnan(rounded).any(2), np.float32(np.nan), margin)


def expected(logits: Tensor, draws: Tensor, num_points: int, oversample: float, importance: float, **options) -> Tensor:
    candidates, kept = int(oversample * num_points), int(importance * num_points)
    margin = sampled_margins(
        logits,
        draws[:, :candidates],
        options.get("class_index"),
        options.get("padding_mode", "zeros"),
        options.get("align_corners", False),
    )
    chosen = torch.from_numpy(smallest(margin, kept))
    return torch.cat((draws.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2)), draws[:, candidates:]), 1)


def same_points(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("case", CASES)
def test_selection(emulated, case: str) -> None:
    logits, class_index = CASES[case]
    generator = torch.Generator().manual_seed(9)
    draws = torch.rand(len(logits), 3 * 40 + 10, 2, generator=generator)
    draws = (draws * 1.2 - 0.1).where(torch.rand(draws.shape[:2], generator=generator).unsqueeze(-1) < 0.3, draws)
    for seed in SEEDS:
        emulated.seed(seed)
        padding_mode, align_corners = ("zeros", "border", "border")[seed], seed == 1
        options = {"class_index": class_index, "padding_mode": padding_mode, "align_corners": align_corners}
        got = emulated.ops.sample_uncertain_points(logits, 40, random_coords=draws, **options)
        assert same_points(got, expected(logits, draws, 40, 3.0, 0.75, **options))
        if "NaN" not in case and "equal" not in case and len(logits):
            check_sampled(logits, got, draws, 40, 3.0, 0.75, **options)


@pytest.mark.parametrize(
    "oversample,importance", [(1.0, 0.5), (2.5, 0.0), (3.0, 1.0), (1.0, 1.0), (1.01, 0.999), (7, 0.2)]
)
def test_ratios(emulated, oversample: float, importance: float) -> None:
    logits = torch.randn(2, 4, 20, 24, generator=torch.Generator().manual_seed(10))
    for num_points in (1, 7, 100):
        total = int(oversample * num_points) + num_points - int(importance * num_points)
        draws = torch.rand(2, total, 2, generator=torch.Generator().manual_seed(11))
        for seed in SEEDS:
            emulated.seed(seed)
            got = emulated.ops.sample_uncertain_points(logits, num_points, oversample, importance, random_coords=draws)
            assert same_points(got, expected(logits, draws, num_points, oversample, importance))


@pytest.mark.parametrize("how", DEVICES)
@pytest.mark.parametrize("channels", [1, 5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_many_candidates(emulated, dtype: torch.dtype, channels: int, how: str) -> None:
    """Several blocks to an image, several candidates to a thread, tails in each."""
    emulated.device(**DEVICES[how])
    num_points = {1: 5701, 5: 1501, 19: 601}[channels]
    logits = torch.randn(2, channels, 48, 40, generator=torch.Generator().manual_seed(12)).to(dtype)
    kept = int(0.75 * num_points)
    draws = torch.rand(2, 3 * num_points + num_points - kept, 2, generator=torch.Generator().manual_seed(13))
    wanted = expected(logits, draws, num_points, 3.0, 0.75)
    for seed in range(1 if dtype == torch.float64 else 3):
        emulated.seed(seed)
        layout = torch.channels_last if seed % 2 else torch.contiguous_format
        before = emulated.launches()
        got = emulated.ops.sample_uncertain_points(
            logits.contiguous(memory_format=layout), num_points, random_coords=draws
        )
        assert emulated.launches() - before == (1 if how.startswith("one launch") else 2)
        assert same_points(got, wanted)


@pytest.mark.parametrize("how", DEVICES)
@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf])
def test_ties_go_to_the_first_drawn(emulated, value: float, how: str) -> None:
    emulated.device(**DEVICES[how])
    draws = torch.rand(2, 6000 + 500, 2, generator=torch.Generator().manual_seed(14))
    logits = torch.full((2, 3, 8, 8), value)
    for seed in SEEDS:
        emulated.seed(seed)
        got = emulated.ops.sample_uncertain_points(logits, 2000, random_coords=draws, padding_mode="border")
        assert same_points(got[:, :1500], draws[:, :1500])
        assert same_points(got[:, 1500:], draws[:, 6000:])


def test_few_values_of_margin(emulated) -> None:
    """Ties at the threshold, with keys below and above."""
    logits = torch.randint(0, 4, (3, 1, 2, 2), generator=torch.Generator().manual_seed(15)) * 0.5
    draws = torch.rand(3, 900 + 75, 2, generator=torch.Generator().manual_seed(16))
    draws[:, :900] = (draws[:, :900] * 8).floor() / 8
    for seed in SEEDS:
        emulated.seed(seed)
        for kept in (0.2, 0.5, 0.75):
            given = torch.cat((draws[:, :900], draws[:, : 300 - int(kept * 300)]), 1)
            got = emulated.ops.sample_uncertain_points(logits, 300, 3.0, kept, random_coords=given)
            assert same_points(got, expected(logits, given, 300, 3.0, kept))


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_wild_coordinates(emulated, padding_mode: str) -> None:
    logits = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(14))
    draws = torch.rand(2, 65, 2, generator=torch.Generator().manual_seed(15)) * 3 - 1
    draws[0, ::7, 0] = math.nan
    draws[1, ::5, 1] = math.inf
    draws[1, 1::5, 0] = -math.inf
    draws[0, 2::9] = 1e30
    for seed in SEEDS:
        emulated.seed(seed)
        got = emulated.ops.sample_uncertain_points(logits, 20, random_coords=draws, padding_mode=padding_mode)
        assert same_points(got, expected(logits, draws, 20, 3.0, 0.75, padding_mode=padding_mode))


# --- the draws --------------------------------------------------------------------------------------------------------


def philox(seed: int, low: int, high: np.ndarray) -> np.ndarray:
    """``[len(high), 4]`` words of Philox4x32-10 for the counters ``high * 2**64 + low``."""
    mask = np.uint64(0xFFFFFFFF)

    def halves(value: int) -> list[np.ndarray]:
        return [np.full(len(high), value & 0xFFFFFFFF, np.uint64), np.full(len(high), value >> 32, np.uint64)]

    counter = [*halves(low), high.astype(np.uint64) & mask, high.astype(np.uint64) >> np.uint64(32)]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        key = [np.uint64(k) for k in keys]
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ key[0],
            second & mask,
            (first >> np.uint64(32)) ^ counter[3] ^ key[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, 1)


def test_philox_of_this_file() -> None:
    """The known answers of Random123, of which the header has its own copy."""
    words = philox(0x299F31D0A4093822, 0x85A308D3243F6A88, np.array([0x0370734413198A2E]))
    assert [hex(int(word)) for word in words[0]] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


def drawn(seed: int, offset: int, images: int, total: int) -> Tensor:
    """``[images, total, 2]``: a pair of draws of an image is a counter."""
    pairs = (total + 1) // 2
    words = philox(seed, offset // 4, np.arange(images * pairs))
    numbers = ((words >> np.uint64(8)).astype(np.float64) * 2.0**-24).astype(np.float32)
    return torch.from_numpy(numbers.reshape(images, pairs * 2, 2)[:, :total].copy())


@pytest.mark.parametrize("how", DEVICES)
@pytest.mark.parametrize("num_points", [1, 33, 1501, 4000])
def test_draws_are_those_of_philox(emulated, num_points: int, how: str) -> None:
    """Whatever the number of blocks, and the same where candidates are judged and where they are written."""
    emulated.device(**DEVICES[how])
    logits = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(17))
    # The emulated generator: offset / 4 and seed are two random words of the CPU generator.
    words = torch.empty(2, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(18))
    offset, seed = 4 * (int(words[0]) & 0xFFFF), int(words[1]) % 2**64
    total = 3 * num_points + num_points - int(0.75 * num_points)
    draws = drawn(seed, offset, 3, total)
    got = emulated.ops.sample_uncertain_points(logits, num_points, generator=torch.Generator().manual_seed(18))
    assert same_points(got, expected(logits, draws, num_points, 3.0, 0.75))


@pytest.mark.parametrize("kept", [0.75, 0.25, 1.0])
@pytest.mark.parametrize(
    "images, processors, num_points",
    [
        (7, 3, 8301),  # three to the last image, one to each of the others
        (7, 5, 8301),  # two to each of the last two
        (2, 4, 8301),  # two to every image
        (7, 3, 5701),  # keys of two images fit a multiprocessor: five to the last image
    ],
)
def test_blocks_that_share_an_image(emulated, images: int, processors: int, num_points: int, kept: float) -> None:
    """The images of a last round that would leave the device idle, with what each block draws and counts."""
    emulated.device(processors, 227 * 1024)
    logits = torch.randn(images, 1, 16, 16, generator=torch.Generator().manual_seed(21))
    logits[-1] = logits[-1].round()  # ties
    words = torch.empty(2, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(22))
    offset, seed = 4 * (int(words[0]) & 0xFFFF), int(words[1]) % 2**64
    draws = drawn(seed, offset, images, 3 * num_points + num_points - int(kept * num_points))
    wanted = expected(logits, draws, num_points, 3.0, kept, padding_mode="border")
    for order in SEEDS:
        emulated.seed(order)
        before = emulated.launches()
        got = emulated.ops.sample_uncertain_points(
            logits, num_points, 3.0, kept, padding_mode="border", generator=torch.Generator().manual_seed(22)
        )
        assert emulated.launches() - before == 1
        assert same_points(got, wanted)


def uniform_points(emulated, images: int, count: int, **kwargs: Any) -> Tensor:
    return emulated.ops.sample_uncertain_points(torch.zeros(images, 1, 2, 2), count, 1.0, 0.0, **kwargs)


def test_draws_are_uniform(emulated) -> None:
    points = uniform_points(emulated, 40, 2500, generator=torch.Generator().manual_seed(19)).double()
    count = points[..., 0].numel()
    assert (points >= 0).all() and (points < 1).all()
    # Five standard deviations of each estimate.
    assert (points.mean((0, 1)) - 0.5).abs().max() < 5 * (1 / 12 / count) ** 0.5
    assert (points.var((0, 1)) - 1 / 12).abs().max() < 5 * (1 / 180 / count) ** 0.5
    centred = points - 0.5
    assert (centred[..., 0] * centred[..., 1]).mean().abs() < 5 / 12 / count**0.5
    # Neighbouring draws, and the draws of neighbouring images, go their own ways.
    for shifted in (centred.roll(1, 1), centred.roll(1, 0)):
        assert (centred * shifted).mean((0, 1)).abs().max() < 5 / 12 / count**0.5
    cells = (points[..., 1] * 20).long() * 20 + (points[..., 0] * 20).long()
    observed = cells.flatten().bincount(minlength=400).double()
    chi_square = ((observed - count / 400).square() / (count / 400)).sum()
    assert 399 - 5 * (2 * 399) ** 0.5 < chi_square < 399 + 5 * (2 * 399) ** 0.5
    assert len(points[..., 0].unique()) > 0.99 * count


def test_seeds(emulated) -> None:
    torch.manual_seed(20)
    first, second = uniform_points(emulated, 2, 50), uniform_points(emulated, 2, 50)
    torch.manual_seed(20)
    before = torch.get_rng_state()
    assert same_points(uniform_points(emulated, 2, 50), first)
    assert not same_points(first, second) and not same_points(first[0], first[1])
    torch.set_rng_state(before)
    given = torch.Generator().manual_seed(20)
    assert same_points(uniform_points(emulated, 2, 50, generator=given), first)
    assert same_points(uniform_points(emulated, 2, 50, generator=given), second)
    draws = torch.rand(2, 100, 2, generator=given)
    state = given.get_state()
    uniform_points(emulated, 2, 50, random_coords=draws, generator=given)
    assert torch.equal(given.get_state(), state), "nothing is drawn when the draws are given"
    assert torch.equal(torch.get_rng_state(), before), "the default generator is left alone"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_input(emulated, case: str) -> None:
    kwargs, exception, pattern = BAD[case]
    before = emulated.launches()
    with pytest.raises(exception, match=pattern):
        emulated.ops.sample_uncertain_points(**kwargs)
    assert emulated.launches() == before


def test_nothing_to_do_launches_nothing(emulated) -> None:
    before = emulated.launches()
    assert emulated.ops.sample_uncertain_points(torch.zeros(0, 2, 3, 3), 5).shape == (0, 5, 2)
    assert emulated.launches() == before
