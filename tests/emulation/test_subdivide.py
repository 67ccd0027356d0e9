"""The CUDA subdivide on the CPU: stored values against F.interpolate in float64, selection and labels exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rendseg import reference
from tests.ops import cases_subdivide as cases

CASES = {name: (logits, kwargs) for name, logits, kwargs in cases.logits_cases()}
SEEDS = 3


def check_stored(fine: Tensor, x: Tensor, factor: int = 2, aligned: bool = False) -> None:
    size = (x.shape[2] * factor, x.shape[3] * factor)
    want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
    tolerance = dict(cases.TOLERANCE[x.dtype])
    tolerance["atol"] = max(tolerance["atol"], tolerance["rtol"] * float(x.double().abs().max()) * 0.5)
    assert fine.dtype == x.dtype
    torch.testing.assert_close(fine.double(), want, **tolerance)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_interpolate(emulated, case: str, dtype: torch.dtype) -> None:
    logits, kwargs = CASES[case]
    for layout, x in cases.layouts(logits.to(dtype)):
        for seed in range(SEEDS if logits.numel() < 3000 else 1):
            emulated.seed(seed)
            fine, indices, coords = emulated.ops.subdivide(x, **kwargs)
            check_stored(fine, x, kwargs.get("scale_factor", 2), kwargs.get("align_corners", False))
            # The selection is that of the stored values, exactly.
            wanted = reference.uncertain_points(fine, kwargs["num_points"], kwargs.get("class_index"))
            assert torch.equal(indices, wanted[0]) and torch.equal(coords, wanted[1]), layout
            if layout == "channels_last" and x.shape[2] * x.shape[3] > 1:
                assert fine.is_contiguous(memory_format=torch.channels_last)
            nothing, same_indices, same_coords = emulated.ops.subdivide(x, **kwargs, return_logits=False)
            assert nothing.numel() == 0 and torch.equal(same_indices, indices) and torch.equal(same_coords, coords)


def check_labels(emulated, x: Tensor, num_points: int, factor: int = 2, aligned: bool = False) -> None:
    fine, indices, coords = emulated.ops.subdivide(x, num_points, factor, aligned)
    labels, same_indices, same_coords = emulated.ops._subdivide_labels(x, num_points, factor, aligned)
    assert labels.dtype == (torch.uint8 if x.shape[1] <= 256 else torch.int16)
    assert torch.equal(labels.long(), fine.argmax(1))
    assert torch.equal(same_indices, indices) and torch.equal(same_coords, coords)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_labels_are_the_argmax(emulated, case: str, dtype: torch.dtype) -> None:
    logits, kwargs = CASES[case]
    for _, x in cases.layouts(logits.to(dtype)):
        for seed in range(SEEDS if logits.numel() < 3000 else 1):
            emulated.seed(seed)
            check_labels(
                emulated, x, kwargs["num_points"], kwargs.get("scale_factor", 2), kwargs.get("align_corners", False)
            )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name, logits", list(cases.special_cases()), ids=[case[0] for case in cases.special_cases()])
def test_special_values(emulated, name: str, logits: Tensor, dtype: torch.dtype) -> None:
    for layout, x in cases.layouts(logits.to(dtype)):
        for factor, aligned in cases.SPECIAL_FACTORS:
            fine, indices, _ = emulated.ops.subdivide(x, 50, factor, aligned)
            size = (x.shape[2] * factor, x.shape[3] * factor)
            want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
            assert torch.equal(fine.isnan(), want.isnan()), layout
            assert torch.equal(fine == math.inf, want == math.inf)
            assert torch.equal(fine == -math.inf, want == -math.inf)
            assert torch.equal(indices, reference.uncertain_points(fine, 50)[0]), layout
            check_labels(emulated, x, 50, factor, aligned)


def regions(channels: int, h: int, w: int, seed: int, steepness: float) -> Tensor:
    """Smooth logits, as a network gives: regions with one winner each and borders between them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, max(2, h // 8), max(2, w // 8), generator=generator, dtype=torch.float64)
    return F.interpolate(coarse * steepness, size=(h, w), mode="bicubic", align_corners=True)


def adversarial() -> Iterator[tuple[str, Tensor]]:
    """Inputs on which a careless bound on the margin, or a limit that is too low, gives another result."""
    smooth = regions(5, 20, 36, seed=1, steepness=8.0)
    yield "smooth", smooth
    yield "smooth, two classes", regions(2, 20, 36, seed=2, steepness=4.0)
    yield "smooth, two images", torch.cat((smooth, regions(5, 20, 36, seed=3, steepness=1e-3)))
    yield "plateaus", smooth.round()
    yield "near ties", 1.0 + 2.0**-9 * smooth.round()
    yield "huge offset", smooth + 3e4
    yield "huge values", smooth * 5e3
    yield "tiny values", smooth * 2.0**-140
    one_winner = smooth * 0.01
    one_winner[:, 3] += 5
    yield "one winner everywhere", one_winner
    equal_margins = torch.zeros_like(smooth)
    equal_margins[:, 2] = 1
    yield "one winner, all margins equal", equal_margins
    yield "all equal", torch.full_like(smooth, 0.1)
    runner_up_changes = one_winner.clone()
    runner_up_changes[:, 0, :, ::2] += 4.99
    runner_up_changes[:, 1, :, 1::2] += 4.99
    yield "the runner-up changes from cell to cell", runner_up_changes
    negative_zero = torch.zeros_like(smooth)
    negative_zero[:, 1::2] = -0.0
    yield "zeros of both signs", negative_zero
    for value in (math.nan, math.inf, -math.inf, 3.3e38, -3.3e38):
        spoilt = one_winner.clone()
        spoilt[:, 0, 0, 0] = value
        spoilt[:, 4, 7, 9:12] = value
        spoilt[:, 3, 12, 35] = value
        yield f"{value} among one winner", spoilt
        masked = smooth.clone()
        masked[:, 1] = value
        yield f"a whole class {value}", masked


ADVERSARIAL = dict(adversarial())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_pruning_is_exact(emulated, case: str, dtype: torch.dtype) -> None:
    x = ADVERSARIAL[case].to(dtype)
    cells = x.shape[2] * x.shape[3] * 4
    for seed, num_points in enumerate((1, 37, cells // 3, cells - 1)):
        emulated.seed(seed)
        check_labels(emulated, x, num_points)
    check_labels(emulated, x.contiguous(memory_format=torch.channels_last), 60)
    check_labels(emulated, x[..., 1:], 60, aligned=True)
    check_labels(emulated, x[..., :9, :9], 60, factor=3)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_pruning_where_rounding_makes_ties(emulated, dtype: torch.dtype) -> None:
    """The winner is the next larger number at every source cell, and after rounding not everywhere the larger one."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = (cases.make(1, 3, 40, 40, scale=1.5, seed=11).exp2()).to(dtype)
    x[:, 2] = 0
    x[:, 1] = (x[:, 0].view(integer) + 1).view(dtype)
    fine = emulated.ops.subdivide(x, 1)[0]
    assert (fine[:, 0] == fine[:, 1]).any()
    for factor in (2, 3):
        check_labels(emulated, x, 500, factor)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pruning_of_a_large_map(emulated, channels_last: bool) -> None:
    """Many tiles, and a selection by histogram."""
    x = regions(6, 90, 130, seed=4, steepness=6.0).bfloat16()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for seed in range(SEEDS):
        emulated.seed(seed)
        check_labels(emulated, x, 700)
        check_labels(emulated, x, 30000)


def test_many_classes_give_int16_labels(emulated) -> None:
    x = cases.make(1, 257, 3, 20).float()
    x[:, 256, 1] = 50
    labels, _, _ = emulated.ops._subdivide_labels(x, 5)
    assert labels.dtype == torch.int16 and int(labels.max()) == 256
    check_labels(emulated, x, 5)
    check_labels(emulated, x, 5, factor=3)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_small_masks_of_one_class(emulated, dtype: torch.dtype) -> None:
    """As instance masks are: many, with one channel or one chosen channel."""
    for channels in (1, 3):
        x = cases.make(5, channels, 7, 7, seed=8).to(dtype)
        chosen = None if channels == 1 else torch.tensor([2, 0, 1, 1, 2])
        for step in range(2):
            fine, indices, _ = emulated.ops.subdivide(x, 60, 2, False, chosen)
            check_stored(fine, x)
            assert torch.equal(indices, reference.uncertain_points(fine, 60, chosen)[0]), step
            x = fine


def test_several_tasks_in_a_warp(emulated) -> None:
    emulated.device(processors=1)
    x = cases.make(1, 3, 60, 70).half().contiguous(memory_format=torch.channels_last)
    for factor, aligned in ((2, False), (3, False)):
        fine, indices, _ = emulated.ops.subdivide(x, 400, factor, aligned)
        check_stored(fine, x, factor, aligned)
        assert torch.equal(indices, reference.uncertain_points(fine, 400)[0])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_sources_that_are_not_aligned(emulated, dtype: torch.dtype) -> None:
    x = cases.make(1, 3, 6, 16).to(dtype)
    for shift in (1, 2, 4):
        memory = torch.zeros(x.numel() + shift, dtype=dtype)
        memory[shift:] = x.flatten()
        moved = memory[shift:].view(x.shape)
        fine, indices, _ = emulated.ops.subdivide(moved, 20)
        wanted, same, _ = emulated.ops.subdivide(x, 20)
        assert torch.equal(fine, wanted) and torch.equal(indices, same)
        check_labels(emulated, moved, 20)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("factor, aligned", [(1, False), (2, False), (2, True), (3, False), (4, True), (5, False)])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 1, 6), (1, 5, 9, 1), (0, 2, 3, 4)], ids=str)
def test_gradient(emulated, shape: tuple[int, ...], factor: int, aligned: bool, dtype: torch.dtype) -> None:
    n, c, h, w = shape
    upstream = cases.make(n, c, h * factor, w * factor, seed=1).to(dtype)
    if n == 0:
        assert emulated.ops._subdivide_backward(upstream, h, w, aligned).shape == shape
        return
    y = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    size = (h * factor, w * factor)
    F.interpolate(y, size=size, mode="bilinear", align_corners=aligned).backward(upstream.double())
    rounding = {2: 1e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    results = []
    for layout, grad in cases.layouts(upstream):
        for seed in range(SEEDS):
            emulated.seed(seed)
            got = emulated.ops._subdivide_backward(grad, h, w, aligned)
            assert got.dtype == dtype and got.shape == shape
            torch.testing.assert_close(got.double(), y.grad, rtol=rounding, atol=rounding, msg=layout)
            results.append(got)
    assert all(torch.equal(results[0], other) for other in results[1:])


def launches(emulated, function, *args) -> int:
    before = emulated.launches()
    function(*args)
    return emulated.launches() - before


def test_launches(emulated) -> None:
    """One kernel before the selection, three with labels; a selection takes one on a small map, at most three."""
    small, large = cases.make(2, 4, 9, 18).float(), cases.make(1, 3, 70, 70).float()
    selection = {True: 1, False: 2}  # 140 x 140 cells are selected in a single pass
    for x, is_small in ((small, True), (large, False)):
        assert launches(emulated, emulated.ops.subdivide, x, 20) == 1 + selection[is_small]
        assert launches(emulated, emulated.ops._subdivide_labels, x, 20) == 3 + selection[is_small]
        grad = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        assert launches(emulated, emulated.ops._subdivide_backward, grad, *x.shape[2:], False) == 1
        assert launches(emulated, emulated.ops._subdivide_backward, grad, *x.shape[2:], True) == 2


def test_empty_batch(emulated) -> None:
    x = torch.zeros(0, 3, 4, 5)
    fine, indices, coords = emulated.ops.subdivide(x, 7)
    assert fine.shape == (0, 3, 8, 10) and indices.shape == (0, 7) and coords.shape == (0, 7, 2)
    assert emulated.ops._subdivide_labels(x, 7)[0].shape == (0, 8, 10)


def test_input_is_left_alone(emulated) -> None:
    for _, x in cases.layouts(cases.make(2, 4, 9, 18).float()):
        before = x.clone()
        fine, _, _ = emulated.ops.subdivide(x, 20, 1)
        assert torch.equal(fine, x) and fine.data_ptr() != x.data_ptr()
        emulated.ops.subdivide(x, 20)
        emulated.ops._subdivide_labels(x, 20)
        assert torch.equal(x, before)


# Dispatch does not bring sparse and meta tensors here.
BAD = [case for case in cases.bad_inputs() if case[0] not in ("sparse", "index device")]


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", BAD, ids=[case[0] for case in BAD])
def test_bad_input(emulated, name: str, kwargs: dict, exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        emulated.ops.subdivide(**kwargs)


@pytest.mark.bad_input
def test_bad_input_of_labels_and_gradient(emulated) -> None:
    with pytest.raises(ValueError, match="at most 32768 classes, got 32769"):
        emulated.ops._subdivide_labels(torch.zeros(1, 32769, 1, 1), 1)
    with pytest.raises(ValueError, match="grad must have shape"):
        emulated.ops._subdivide_backward(torch.zeros(1, 2, 9, 10), 4, 5, False)
