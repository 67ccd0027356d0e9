"""The Triton kernels of subdivide, _subdivide_labels and _subdivide_backward against the reference."""

from __future__ import annotations

import importlib
from typing import Any

import cases_subdivide as cases
import pytest
import torch
import torch.nn.functional as F
from _triton import DEVICE, TRITON, implementation, to_device
from torch import Tensor

from rendseg import _extension, reference
from rendseg.reference.subdivide import subdivide_backward

pytestmark = [*TRITON, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy, on NaN in the interpreter

# The interpreter takes seconds for these shapes; smaller ones reach the same branches.
SMALLER = {
    "odd sizes": (cases.make(2, 5, 4, 9), {"num_points": 40}),
    "wide rows": (cases.make(1, 5, 1, 70), {"num_points": 80}),
    "factor 3": (cases.make(1, 4, 3, 13), {"num_points": 50, "scale_factor": 3}),
    "large offset": (cases.make(1, 7, 4, 11) + 1000, {"num_points": 30}),
    "all equal": (torch.zeros(2, 4, 3, 9, dtype=torch.float64), {"num_points": 33}),
    "ties": (cases.make(1, 3, 4, 15, scale=1.0).round(), {"num_points": 60}),
    "one channel": (cases.make(2, 1, 6, 12), {"num_points": 30}),
    "two channels": (cases.make(2, 2, 6, 12), {"num_points": 30}),
    "class index": (cases.make(3, 5, 4, 10), {"num_points": 30, "class_index": torch.tensor([4, 0, 2])}),
    "rows of 16": (cases.make(2, 3, 3, 16), {"num_points": 60}),
    "aligned corners": (cases.make(1, 6, 9, 17), {"num_points": 50, "align_corners": True}),
    "factor 4, aligned corners": (
        cases.make(1, 6, 3, 11),
        {"num_points": 50, "scale_factor": 4, "align_corners": True},
    ),
    "many channels": (cases.make(1, 260, 1, 9), {"num_points": 20}),
    "several bands and tiles": (cases.make(1, 4, 3, 66, seed=3), {"num_points": 300}),
}
# Without the empty distance between the special values.
SPECIAL = {"NaN": (6, range(19)), "infinities": (9, (*range(4, 9), *range(29, 32), 38, 39)), "all NaN": (4, range(9))}
# Those where a dtype or a layout more can make a difference; the others run in two combinations.
THOROUGH = ("odd sizes", "factor 3", "aligned corners", "class index", "one channel", "ties")
ALWAYS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))
SOMETIMES = ((torch.float32, "channels_last"), (torch.float16, "contiguous"))
CASES = {name: SMALLER.get(name, (logits, kwargs)) for name, logits, kwargs in cases.logits_cases()}


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    result = implementation("subdivide", op)(*to_device(args), **to_device(kwargs))
    return tuple(tensor.cpu() for tensor in result) if isinstance(result, tuple) else result.cpu()


def check_against_interpolate(x: Tensor, kwargs: dict[str, Any]) -> None:
    fine, indices, coords = run("subdivide", x, **kwargs)
    factor, aligned = kwargs.get("scale_factor", 2), kwargs.get("align_corners", False)
    size = (x.shape[2] * factor, x.shape[3] * factor)
    want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
    tolerance = dict(cases.TOLERANCE[x.dtype])
    tolerance["atol"] = max(tolerance["atol"], tolerance["rtol"] * float(x.double().abs().max()) * 0.5)
    assert fine.dtype == x.dtype
    torch.testing.assert_close(fine.double(), want, **tolerance)
    assert fine.stride() == reference.subdivide(x, 1, factor, aligned)[0].stride()
    # The selection is that of the stored values, exactly.
    chosen = reference.uncertain_points(fine, kwargs["num_points"], kwargs.get("class_index"))
    assert torch.equal(indices, chosen[0]) and torch.equal(coords, chosen[1])
    # Without the logits, and with labels in their place, nothing else changes.
    nothing, *same = run("subdivide", x, **kwargs, return_logits=False)
    assert nothing.shape == (0,) and torch.equal(same[0], indices) and torch.equal(same[1], coords)
    if "class_index" not in kwargs:
        labels, *same = run("_subdivide_labels", x, **kwargs)
        assert labels.dtype == (torch.uint8 if x.shape[1] <= 256 else torch.int16)
        assert torch.equal(labels.long(), fine.argmax(1))
        assert torch.equal(same[0], indices) and torch.equal(same[1], coords)
    # The compiled operator computes the same bits.
    if _extension.LOADED:
        compiled = torch.ops.rendseg.subdivide(x, **kwargs)
        assert torch.equal(fine, compiled[0]) and torch.equal(indices, compiled[1])


@pytest.mark.parametrize(
    "name, dtype, layout",
    [(name, *kind) for name in CASES for kind in (ALWAYS + SOMETIMES if name in THOROUGH else ALWAYS)],
    ids=str,
)
def test_against_interpolate(name: str, dtype: torch.dtype, layout: str) -> None:
    logits, kwargs = CASES[name]
    check_against_interpolate(dict(cases.layouts(logits.to(dtype)))[layout], kwargs)


@pytest.mark.parametrize("layout", ["a slice", "transposed"])
@pytest.mark.parametrize("name", ["odd sizes", "aligned corners", "class index"])
def test_other_strides(name: str, layout: str) -> None:
    logits, kwargs = CASES[name]
    check_against_interpolate(dict(cases.layouts(logits.float()))[layout], kwargs)


def test_float64() -> None:
    for name in ("odd sizes", "factor 4, aligned corners"):
        logits, kwargs = CASES[name]
        for _, x in list(cases.layouts(logits))[:2]:
            check_against_interpolate(x, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, logits", list(cases.special_cases()), ids=[case[0] for case in cases.special_cases()])
def test_special_values(name: str, logits: Tensor, dtype: torch.dtype) -> None:
    rows, columns = SPECIAL[name]
    for layout, x in list(cases.layouts(logits[:, :, :rows, list(columns)].to(dtype)))[:2]:
        factors = cases.SPECIAL_FACTORS if layout == "contiguous" and dtype == torch.float32 else [(2, False)]
        for factor, aligned in factors:
            fine, indices, _ = run("subdivide", x, 50, factor, aligned)
            size = (x.shape[2] * factor, x.shape[3] * factor)
            want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
            assert torch.equal(fine.isnan(), want.isnan()), (layout, factor, aligned)
            assert torch.equal(fine == float("inf"), want == float("inf"))
            assert torch.equal(fine == float("-inf"), want == float("-inf"))
            assert torch.equal(indices, reference.uncertain_points(fine, 50)[0]), layout
            labels, same, _ = run("_subdivide_labels", x, 50, factor, aligned)
            assert torch.equal(labels.long(), fine.argmax(1)) and torch.equal(same, indices), layout


def test_map_too_large_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection in several launches, with the first digit counted while the values are made, or afterwards."""
    monkeypatch.setattr(importlib.import_module("rendseg.kernels._select"), "SMALL", 1024)
    x = cases.make(1, 2, 17, 19).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        fine, indices, coords = run("subdivide", x.contiguous(memory_format=layout), 200)
        wanted = reference.uncertain_points(fine, 200)
        assert torch.equal(indices, wanted[0]) and torch.equal(coords, wanted[1])


def test_runs_agree() -> None:
    x = cases.make(1, 3, 10, 15, scale=1.0).round().float()
    first = run("subdivide", x, 300)
    for _ in range(20 if DEVICE == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run("subdivide", x, 300), strict=True))


def test_many_classes_give_int16_labels() -> None:
    x = cases.make(1, 257, 2, 9).float()
    x[:, 256, 1] = 50
    for layout in (torch.contiguous_format, torch.channels_last):
        labels, _, _ = run("_subdivide_labels", x.contiguous(memory_format=layout), 5)
        assert labels.dtype == torch.int16 and int(labels.max()) == 256


def test_input_is_left_alone_and_not_aliased() -> None:
    for _, x in cases.layouts(cases.make(1, 4, 5, 18).float()):
        before = x.clone()
        run("_subdivide_labels", x, 20)
        fine, _, _ = run("subdivide", x, 20, 1)
        assert torch.equal(x, before) and torch.equal(fine, x) and fine.data_ptr() != x.data_ptr()


def test_empty_batch() -> None:
    fine, indices, coords = run("subdivide", torch.zeros(0, 3, 4, 5), 7)
    assert fine.shape == (0, 3, 8, 10) and indices.shape == (0, 7) and coords.shape == (0, 7, 2)
    assert run("_subdivide_labels", torch.zeros(0, 3, 4, 5), 7)[0].shape == (0, 8, 10)
    assert run("_subdivide_backward", torch.zeros(0, 3, 8, 10), 4, 5, False).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "size, factor", [((5, 7), 2), ((3, 2), 3), ((1, 1), 5), ((2, 1), 3), ((1, 40), 2), ((4, 3), 1)], ids=str
)
def test_gradient(size: tuple[int, int], factor: int, aligned: bool) -> None:
    """Against the gradient of F.interpolate in float64, in both layouts and a slice."""
    for channels in (3, 35) if factor == 2 else (3,):
        grad = cases.make(1, channels, size[0] * factor, size[1] * factor, seed=1)
        want = subdivide_backward(grad, *size, aligned)
        layouts = dict(cases.layouts(grad.float()))
        layout_names = ("contiguous", "channels_last", "a slice") if factor == 3 else ("contiguous", "channels_last")
        for layout in layout_names if channels == 3 else ("channels_last",):
            got = run("_subdivide_backward", layouts[layout], *size, aligned)
            # Positions of F.interpolate are rounded where corners are aligned, those of the kernel are not.
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * factor**2)
            assert got.stride() == subdivide_backward(layouts[layout], *size, aligned).stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gradient_dtypes(dtype: torch.dtype) -> None:
    grad = cases.make(1, 3, 10, 14, seed=2).to(dtype)
    rounding = {torch.float64: 1e-12, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}[dtype]
    for aligned in (False, True):
        want = subdivide_backward(grad.double(), 5, 7, aligned)
        got = run("_subdivide_backward", grad, 5, 7, aligned)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding * 0.1)


def test_gradient_is_the_transpose_of_the_upsampling() -> None:
    """``<up(x), g> = <x, down(g)>``, in float64."""
    x = cases.make(1, 2, 4, 6)
    for factor, aligned in ((2, False), (3, False), (3, True)):
        fine = run("subdivide", x, 1, factor, aligned)[0]
        grad = cases.make(*fine.shape, seed=4)
        down = run("_subdivide_backward", grad, 4, 6, aligned)
        torch.testing.assert_close((fine * grad).sum(), (x * down).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE == "cuda", reason="an index out of range is only refused on the CPU")
def test_class_that_does_not_exist_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, where the range is not checked: every cell of that image is as uncertain as can be."""
    module = importlib.import_module("rendseg.kernels.subdivide")
    monkeypatch.setattr(module, "check_class_index", lambda *_: None)
    for return_logits in (True, False):
        indices = run("subdivide", cases.make(2, 2, 4, 5), 3, 2, False, torch.tensor([2, -7]), return_logits)[1]
        assert indices.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_inputs(), ids=[c[0] for c in cases.bad_inputs()])
def test_bad_input(name: str, kwargs: dict[str, Any], exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        implementation("subdivide", "subdivide")(**kwargs)


@pytest.mark.bad_input
def test_bad_input_of_the_private_operators() -> None:
    with pytest.raises(ValueError, match="at most 32768 classes, got 32769"):
        run("_subdivide_labels", torch.zeros(1, 32769, 1, 1), 1)
    for shape in ((1, 3, 9, 10), (1, 3, 8, 15)):
        with pytest.raises(ValueError, match="grad must be a whole multiple of height and width"):
            run("_subdivide_backward", torch.zeros(shape), 4, 5, False)
    with pytest.raises(ValueError, match="grad must have shape"):
        run("_subdivide_backward", torch.zeros(3, 8, 10), 4, 5, False)
