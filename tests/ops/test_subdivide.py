"""subdivide: fused upsampling, margin and selection, against F.interpolate in float64 and a brute-force selection."""

from __future__ import annotations

import cases_subdivide as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _common import assert_opcheck, bad_input_runner, callers, use_threads
from torch import Tensor

import rendseg
from rendseg import reference
from rendseg.ops import subdivide
from rendseg.reference.subdivide import subdivide_labels as reference_labels

CASES = list(cases.logits_cases())


def selection(fine: Tensor, k: int, class_index: Tensor | None = None) -> Tensor:
    """The k most uncertain cells of each image by a stable sort of the margins in float64, rounded to float32."""
    rows = []
    for n, image in enumerate(fine.double().flatten(2)):
        if class_index is not None:
            margins = image[class_index[n]].abs()
        elif image.shape[0] == 1:
            margins = image[0].abs()
        else:
            top = image.topk(2, dim=0).values
            margins = top[0] - top[1]
            margins[image.isnan().any(0)] = float("nan")
        keys = margins.float().nan_to_num(nan=-1.0, posinf=float("inf")).numpy()
        rows.append(np.sort(np.argsort(keys, kind="stable")[:k]))
    return torch.from_numpy(np.array(rows, dtype=np.int64)).reshape(fine.shape[0], -1)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name, logits, kwargs", CASES, ids=[case[0] for case in CASES])
def test_against_interpolate(name: str, logits: Tensor, kwargs: dict, dtype: torch.dtype, isa: str) -> None:
    for layout, x in cases.layouts(logits.to(dtype)):
        fine, indices, coords = subdivide(x, **kwargs)
        factor, aligned = kwargs.get("scale_factor", 2), kwargs.get("align_corners", False)
        size = (x.shape[2] * factor, x.shape[3] * factor)
        want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
        tolerance = dict(cases.TOLERANCE[dtype])
        tolerance["atol"] = max(tolerance["atol"], tolerance["rtol"] * float(x.double().abs().max()) * 0.5)
        assert fine.dtype == dtype
        torch.testing.assert_close(fine.double(), want, **tolerance, msg=lambda m, at=layout: f"{at}: {m}")
        # The selection is that of the stored values, exactly.
        k = min(kwargs["num_points"], size[0] * size[1])
        assert torch.equal(indices, selection(fine, k, kwargs.get("class_index"))), layout
        assert torch.equal(coords[..., 0], ((indices % size[1]).float() + 0.5) / size[1])
        assert torch.equal(coords[..., 1], (indices // size[1] + 0.5).float() / size[0])
        if layout == "channels_last" and x.shape[2] * x.shape[3] > 1:
            assert fine.is_contiguous(memory_format=torch.channels_last)
        # Without the logits nothing else changes.
        nothing, same_indices, same_coords = subdivide(x, **kwargs, return_logits=False)
        assert nothing is None and torch.equal(same_indices, indices) and torch.equal(same_coords, coords)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name, logits, kwargs", CASES, ids=[case[0] for case in CASES])
def test_labels_are_the_argmax(name: str, logits: Tensor, kwargs: dict, dtype: torch.dtype, isa: str) -> None:
    kwargs = {key: value for key, value in kwargs.items() if key != "class_index"}
    for layout, x in cases.layouts(logits.to(dtype)):
        fine, indices, coords = subdivide(x, **kwargs)
        labels, same_indices, same_coords = torch.ops.rendseg._subdivide_labels(x, **kwargs)
        assert labels.dtype == (torch.uint8 if x.shape[1] <= 256 else torch.int16)
        assert torch.equal(labels.long(), fine.argmax(1)), layout
        assert torch.equal(same_indices, indices) and torch.equal(same_coords, coords)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name, logits", list(cases.special_cases()), ids=[case[0] for case in cases.special_cases()])
def test_special_values(name: str, logits: Tensor, dtype: torch.dtype, isa: str) -> None:
    for layout, x in cases.layouts(logits.to(dtype)):
        for factor, aligned in cases.SPECIAL_FACTORS:
            fine, indices, _ = subdivide(x, 50, factor, aligned)
            size = (x.shape[2] * factor, x.shape[3] * factor)
            want = F.interpolate(x.double(), size=size, mode="bilinear", align_corners=aligned)
            assert torch.equal(fine.isnan(), want.isnan()), (layout, factor, aligned)
            assert torch.equal(fine == float("inf"), want == float("inf"))
            assert torch.equal(fine == float("-inf"), want == float("-inf"))
            assert torch.equal(indices, selection(fine, 50)), layout
            labels, same, _ = torch.ops.rendseg._subdivide_labels(x, 50, factor, aligned)
            assert torch.equal(labels.long(), fine.argmax(1)) and torch.equal(same, indices), layout


def test_many_classes_give_int16_labels() -> None:
    x = cases.make(1, 257, 3, 20).float()
    x[:, 256, 1] = 50
    labels, _, _ = torch.ops.rendseg._subdivide_labels(x, 5)
    assert labels.dtype == torch.int16 and int(labels.max()) == 256


def test_threads_do_not_matter(isa: str) -> None:
    x = cases.make(3, 7, 40, 90).float()
    results = []
    for count in (1, 2, 3):
        with use_threads(count):
            results.append((*subdivide(x, 500), torch.ops.rendseg._subdivide_labels(x, 500)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_map_uses_streaming_stores(isa: str) -> None:
    x = cases.make(1, 5, 512, 512).float()  # 21 MB of output: past the threshold of huge pages and streaming
    fine, indices, _ = subdivide(x, 100)
    torch.testing.assert_close(fine, F.interpolate(x, scale_factor=2, mode="bilinear"), rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, reference.uncertain_points(fine, 100)[0])


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, 4, 5, requires_grad=True)
    fine, indices, coords = subdivide(x, 7)
    assert fine.shape == (0, 3, 8, 10) and indices.shape == (0, 7) and coords.shape == (0, 7, 2)
    fine.sum().backward()
    assert x.grad.shape == x.shape
    labels, _, _ = torch.ops.rendseg._subdivide_labels(x.detach(), 7)
    assert labels.shape == (0, 8, 10)


def test_input_is_left_alone(isa: str) -> None:
    for _, x in cases.layouts(cases.make(2, 4, 9, 18).float()):
        before = x.clone()
        subdivide(x, 20)
        torch.ops.rendseg._subdivide_labels(x, 20)
        assert torch.equal(x, before)


def test_factor_one_does_not_alias() -> None:
    x = cases.make(1, 3, 4, 5).float()
    fine, _, _ = torch.ops.rendseg.subdivide(x, 3, 1)
    assert torch.equal(fine, x) and fine.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradient_is_that_of_interpolate(dtype: torch.dtype) -> None:
    for aligned in (False, True):
        x = cases.make(2, 3, 5, 7).to(dtype).requires_grad_()
        fine, indices, coords = subdivide(x, 9, 3, aligned)
        assert not indices.requires_grad and not coords.requires_grad
        upstream = cases.make(*fine.shape, seed=1).to(dtype)
        fine.backward(upstream)
        y = x.detach().double().requires_grad_()
        F.interpolate(y, scale_factor=3, mode="bilinear", align_corners=aligned).backward(upstream.double())
        rounding = 1e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=rounding, atol=2 * rounding)


@pytest.mark.gradcheck
@pytest.mark.parametrize("aligned", [False, True])
def test_gradcheck(aligned: bool) -> None:
    x = cases.make(2, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: subdivide(t, 5, 2, aligned)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda t: subdivide(t, 5, 2, aligned)[0], (x,))


@pytest.mark.opcheck
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str) -> None:
    x = dict(cases.layouts(cases.make(2, 3, 4, 5).float()))[layout]
    op = torch.ops.rendseg.subdivide.default
    assert_opcheck(op, (x.clone(memory_format=torch.preserve_format).requires_grad_(), 6))
    assert_opcheck(op, (x, 6, 3, True, torch.tensor([0, 2]), False))
    assert_opcheck(op, (x.bfloat16(), 10000))
    assert_opcheck(torch.ops.rendseg._subdivide_labels.default, (x, 6, 2, False))
    assert_opcheck(torch.ops.rendseg._subdivide_backward.default, (x[..., :4].clone().requires_grad_(), 2, 2, False))


def test_compile_and_export() -> None:
    x = cases.make(2, 3, 4, 5).float()

    def function(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, indices, coords = subdivide(t * 2, 6)
        assert fine is not None
        return fine + 1, indices, coords

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), function(x), strict=True):
        assert torch.equal(got, want)

    class Module(torch.nn.Module):
        def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return function(t)

    program = torch.export.export(Module(), (x,))
    for got, want in zip(program.module()(x), function(x), strict=True):
        assert torch.equal(got, want)


def test_autocast_changes_nothing() -> None:
    x = cases.make(1, 3, 4, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        fine, _, _ = subdivide(x, 4)
    assert fine.dtype == torch.float32


def test_backend_reference() -> None:
    x = cases.make(1, 4, 6, 20).float()
    with rendseg.backend("reference"):
        fine, indices, coords = subdivide(x, 30)
    assert torch.equal(fine, F.interpolate(x, scale_factor=2, mode="bilinear"))
    assert torch.equal(indices, selection(fine, 30)) and coords.shape == (1, 30, 2)
    labels, same, _ = reference_labels(x, 30, 2, False)
    assert torch.equal(labels.long(), fine.argmax(1)) and torch.equal(same, indices)


@pytest.mark.bad_input
@pytest.mark.parametrize("caller", ["reference", "torch.ops", "public"])
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_inputs(), ids=[c[0] for c in cases.bad_inputs()])
def test_bad_input(name: str, kwargs: dict, exception: type[Exception], pattern: str, caller: str) -> None:
    assert caller in callers("subdivide")
    bad_input_runner("subdivide", caller, kwargs, exception, pattern)


@pytest.mark.bad_input
def test_too_many_classes_for_labels() -> None:
    for function in (reference_labels, torch.ops.rendseg._subdivide_labels):
        with pytest.raises(ValueError, match="at most 32768 classes, got 32769"):
            function(torch.zeros(1, 32769, 1, 1), 1, 2, False)


@pytest.mark.bad_input
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_of_the_backward(device: str) -> None:
    op, grad = torch.ops.rendseg._subdivide_backward, torch.zeros(1, 2, 6, 9, device=device)
    assert op(grad, 2, 3, False).shape == (1, 2, 2, 3)
    for height, width in ((2, 4), (4, 9), (2, 9), (0, 0), (-2, -3), (7, 10)):
        words = rf"grad must be a whole multiple of height and width = \[{height}, {width}\], got \[1, 2, 6, 9\]"
        with pytest.raises(ValueError, match=words):
            op(grad, height, width, False)
    with pytest.raises(ValueError, match=r"grad must have shape \[N, C, H, W\], got \[2, 6, 9\]"):
        op(grad[0], 2, 3, False)
    with pytest.raises(TypeError, match="grad must be float32, float64, float16 or bfloat16"):
        op(grad.long(), 2, 3, False)


@pytest.mark.bad_input
def test_a_sparse_class_index_is_refused() -> None:
    index = torch.tensor([0, 1]).to_sparse()
    for function in (reference.subdivide, torch.ops.rendseg.subdivide):
        with pytest.raises(TypeError, match="class_index must be a dense"):
            function(torch.zeros(2, 2, 3, 3), 2, class_index=index)
