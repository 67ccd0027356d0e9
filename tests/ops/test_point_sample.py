from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from _common import close, each_isa, use_isa
from cases_point_sample import LABEL_DTYPES, NAN, WILD, bad_inputs, bad_labels, maps, points, samples
from torch import Tensor, library

import rendseg
from rendseg import reference
from rendseg._extension import C
from rendseg.ops import point_labels, point_sample, sample_uncertain_points
from rendseg.reference.point_sample import _point_sample_backward

CASES = {name: (inputs, coords) for name, inputs, coords in samples()}
MODES = list(itertools.product(("bilinear", "nearest"), ("zeros", "border"), (False, True)))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def grid_sample(input: Tensor, coords: Tensor, mode: str, padding_mode: str, align_corners: bool) -> Tensor:
    grid = 2 * coords - 1
    out = F.grid_sample(
        input,
        grid if grid.dim() == 4 else grid.unsqueeze(2),
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    return out if grid.dim() == 4 else out.squeeze(3)


def gradients(
    function, inputs: list[Tensor], coords: Tensor, *options, rounded: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients for a random upstream one, which is rounded to ``rounded`` (the output's dtype)."""
    inputs = [m.detach().clone().requires_grad_() for m in inputs]
    coords = coords.detach().clone().requires_grad_()
    out = function(inputs, coords, *options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    weight = weight.to(rounded or out.dtype).to(out.dtype)
    return out.detach(), list(torch.autograd.grad(out, (*inputs, coords), weight))


@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("no ")])
def test_equals_grid_sample_in_float32(isa, name, mode, padding_mode, align_corners):
    inputs, coords = CASES[name]
    out = point_sample(inputs, coords, mode, padding_mode, align_corners)
    wanted = torch.cat([grid_sample(m, coords, mode, padding_mode, align_corners) for m in inputs], 1)
    assert out.is_contiguous()
    if mode == "nearest":  # cells, not sums: exact
        assert torch.equal(out, wanted)
    else:
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-4 if "larger" in name else 1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("channels", [1, 5, 67])
@pytest.mark.parametrize("mode,padding_mode,align_corners", MODES)
def test_dtypes_forward_and_backward(isa, dtype, layout, channels, mode, padding_mode, align_corners):
    inputs = [maps(2, channels, 6, 7, dtype, layout)]
    coords = points(2, 70) if dtype != torch.float64 else points(2, 70).double()
    options = (mode, padding_mode, align_corners)
    out, (grad, coords_grad) = gradients(point_sample, inputs, coords, *options)
    wide, (wide_grad, wide_coords_grad) = gradients(
        reference.point_sample, [m.double() for m in inputs], coords.double(), *options, rounded=dtype
    )
    assert out.dtype == dtype and grad.dtype == dtype and coords_grad.dtype == coords.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    close(out, wide, compute)
    close(grad, wide_grad, compute, "gradient of the map")
    close(coords_grad, wide_coords_grad, compute, "gradient of the coordinates")
    if layout == "channels_last" and channels > 1:
        assert grad.is_contiguous(memory_format=torch.channels_last)
    else:
        assert grad.is_contiguous()


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_reference(isa, name, padding_mode):
    inputs, coords = CASES[name]
    out, grads = gradients(point_sample, inputs, coords, "bilinear", padding_mode)
    wanted, wanted_grads = gradients(reference.point_sample, inputs, coords, "bilinear", padding_mode)
    assert out.shape == wanted.shape
    for grad, wanted_grad in zip(grads[:-1], wanted_grads[:-1], strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=2e-3 if "larger" in name else 1e-5)
    if "larger" not in name:  # the slope jumps from cell to cell, and positions near 500 are good to 3e-5 cells only
        torch.testing.assert_close(grads[-1], wanted_grads[-1], rtol=1e-3, atol=1e-3, equal_nan=True)


def test_nan_with_border_padding_is_the_first_cell():
    value = torch.arange(12.0).view(1, 1, 3, 4) + 1
    out = point_sample(value, torch.tensor([[(NAN, 0.5), (0.5, NAN), (NAN, NAN)]]), padding_mode="border")
    assert out.tolist() == [[[5.0, 2.5, 1.0]]]
    _, (grad, coords_grad) = gradients(point_sample, [value], torch.tensor([WILD]), "bilinear", "border")
    assert grad.isfinite().all() and coords_grad.isfinite().all()


def test_nan_with_zeros_padding_is_nan_and_leaves_the_map_alone():
    out, (grad, coords_grad) = gradients(point_sample, [maps(1, 9, 4, 4)], torch.full((1, 3, 2), NAN))
    assert out.isnan().all() and (grad == 0).all() and coords_grad.isnan().all()


def test_infinite_values_off_the_map_or_unused_do_not_leak():
    value = torch.zeros(1, 9, 3, 3)
    value[:, :, 0, 0] = float("-inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        out = point_sample(value.contiguous(memory_format=layout), torch.tensor([[(0.05, 0.05), (0.9, 0.9)]]))
        assert (out[:, :, 0] == float("-inf")).all() and (out[:, :, 1] == 0).all()


def test_cell_centres_return_the_cells():
    value = maps(1, 70, 8, 16)
    rows, cols = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
    coords = torch.stack(((cols + 0.5) / 16, (rows + 0.5) / 8), -1).view(1, -1, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(point_sample(value.contiguous(memory_format=layout), coords), value.flatten(2))


def test_tensor_and_list_of_one_are_the_same():
    value, coords = maps(2, 5, 6, 7), points(2, 9)
    assert torch.equal(point_sample(value, coords), point_sample([value], coords))


def test_large_gradient_is_zero_where_untouched():
    # Above the size at which memory comes from the system, several times over (a freed block must come back zeroed).
    value = maps(1, 16, 400, 400).requires_grad_()
    coords = torch.tensor([[[0.5, 0.5]]])
    for _ in range(3):
        (grad,) = torch.autograd.grad(point_sample(value, coords).sum(), value)
        assert grad.count_nonzero() == 16 * 4 and grad.sum() == 16
        grad.fill_(NAN)


@pytest.mark.skipif(C is None, reason="the compiled kernels are not loaded")
@pytest.mark.parametrize(
    "name", ["many channels", "channels_last", "list", "more than one block", "same point many times"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_for_any_number_of_threads(name, dtype):
    inputs, coords = CASES[name]
    inputs = [m.to(dtype) for m in inputs]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = gradients(point_sample, inputs, coords)
            results.append([out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(len(each_isa()) < 2, reason="one instruction set only")
@pytest.mark.parametrize("name", ["one channel", "many channels", "channels_last", "more than one block"])
def test_the_same_for_any_instruction_set(name):
    results = []
    for wanted in each_isa():
        with use_isa(wanted):
            out, grads = gradients(point_sample, *CASES[name])
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gradcheck
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [2, 9])
@pytest.mark.parametrize("padding_mode,align_corners", list(itertools.product(("zeros", "border"), (False, True))))
def test_gradcheck(layout, channels, padding_mode, align_corners):
    inputs = [
        maps(2, channels, 4, 5, torch.float64, layout).requires_grad_(),
        maps(2, 1, 3, 2, torch.float64).requires_grad_(),
    ]
    coords = points(2, 6).double().requires_grad_()

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return point_sample([a, b], c, "bilinear", padding_mode, align_corners)

    assert torch.autograd.gradcheck(function, (*inputs, coords))


@pytest.mark.gradcheck
def test_gradcheck_nearest():
    value = maps(2, 3, 4, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: point_sample(m, points(2, 6).double(), "nearest"), (value,))


def test_only_needed_gradients_are_made():
    a, b, coords = maps(2, 9, 4, 5), maps(2, 3, 6, 5).requires_grad_(), points(2, 8)
    out = point_sample([a, b], coords)
    out.square().sum().backward()
    wanted = b.detach().clone().requires_grad_()
    reference.point_sample([a, wanted], coords).square().sum().backward()
    assert a.grad is None
    torch.testing.assert_close(b.grad, wanted.grad)
    grads = torch.ops.rendseg._point_sample_backward(
        out.detach(), [a, b.detach()], coords, "bilinear", "zeros", False, False, True
    )
    assert [g.numel() for g in grads] == [0, 0, coords.numel()]
    grads = torch.ops.rendseg._point_sample_backward(
        out.detach(), [a, b.detach()], coords, "bilinear", "zeros", False, True, False
    )
    assert [g.shape for g in grads] == [a.shape, b.shape, (0,)]


@pytest.mark.parametrize("name", ["few channels", "channels_last", "list", "grid coords", "no points", "no images"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_backward_formulas_of_the_reference(name, mode):
    # What serves a device without a compiled kernel, against autograd through F.grid_sample.
    inputs, coords = CASES[name]
    inputs = [m.double() for m in inputs]
    for padding_mode, align_corners in itertools.product(("zeros", "border"), (False, True)):
        out, wanted = gradients(reference.point_sample, inputs, coords.double(), mode, padding_mode, align_corners)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        grads = _point_sample_backward(weight, inputs, coords.double(), mode, padding_mode, align_corners, True, True)
        for grad, wanted_grad in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.opcheck
@pytest.mark.parametrize("name", ["few channels", "channels_last", "list", "grid coords", "no points", "no images"])
def test_opcheck(name):
    inputs, coords = CASES[name]
    inputs = [m.detach().clone().requires_grad_() for m in inputs]
    library.opcheck(
        torch.ops.rendseg.point_sample, (inputs, coords.clone().requires_grad_(), "bilinear", "border", True)
    )
    plain = [m.detach() for m in inputs]
    out = point_sample(plain, coords)
    for flags in ((True, True), (True, False), (False, True)):
        library.opcheck(
            torch.ops.rendseg._point_sample_backward, (out, plain, coords, "bilinear", "zeros", False, *flags)
        )


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile(layout):
    inputs, coords = [maps(2, 9, 6, 5, layout=layout), maps(2, 2, 3, 4)], points(2, 11)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda m, c: point_sample(m, c, padding_mode="border") * 2, fullgraph=True, backend="aot_eager"
    )
    out, grads = gradients(compiled, inputs, coords)
    wanted, wanted_grads = gradients(lambda m, c: point_sample(m, c, padding_mode="border") * 2, inputs, coords)
    assert torch.equal(out, wanted)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted_grads, strict=True))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return point_sample([a, b], coords), point_labels(labels, coords)

    args = (maps(2, 9, 6, 5), maps(2, 2, 3, 4), points(2, 11), torch.arange(60).view(2, 6, 5))
    program = torch.export.export(Module(), args)
    for got, wanted in zip(program.module()(*args), Module()(*args), strict=True):
        assert torch.equal(got, wanted)


def test_autocast_promotes_mixed_maps_to_the_widest():
    a, b, coords = maps(2, 9, 6, 5, torch.bfloat16), maps(2, 3, 6, 5), points(2, 11)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, same = point_sample([a, b], coords), point_sample(a, coords)
        pair = point_sample([a, a.half()], coords)
        with rendseg.backend("reference"):
            torch.testing.assert_close(point_sample([a, b], coords), mixed)
    assert mixed.dtype == torch.float32 and same.dtype == torch.bfloat16 and pair.dtype == torch.float32
    torch.testing.assert_close(mixed, reference.point_sample([a.float(), b], coords))


def test_autocast_gradients_keep_the_dtype_of_each_map():
    a, b = maps(2, 9, 6, 5, torch.bfloat16).requires_grad_(), maps(2, 3, 6, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        point_sample([a, b], points(2, 11)).sum().backward()
    assert a.grad.dtype == torch.bfloat16 and b.grad.dtype == torch.float32


def test_checkpoint():
    value, coords = maps(2, 9, 6, 5).requires_grad_(), points(2, 11)
    out = torch.utils.checkpoint.checkpoint(lambda m: point_sample(m, coords).square(), value, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), value)
    (wanted,) = torch.autograd.grad(reference.point_sample(value, coords).square().sum(), value)
    torch.testing.assert_close(grad, wanted)


def test_double_backward_is_refused():
    value = maps(1, 2, 3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(point_sample(value, points(1, 5)).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_masks_are_sampled_as_float32(dtype, name):
    masks = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 3, 7, 9)).to(dtype)
    coords = points(2, 11)
    with rendseg.backend(name):
        got = point_sample(masks, coords, align_corners=True)
        chosen = sample_uncertain_points(masks, 5, random_coords=torch.rand(2, 17, 2))
    assert got.dtype == torch.float32 and chosen.shape == (2, 5, 2)
    torch.testing.assert_close(got, grid_sample(masks.float(), coords, "bilinear", "zeros", True))
    mixed = point_sample([masks, masks.float()], coords)
    assert torch.equal(mixed[:, :3], mixed[:, 3:])


@pytest.mark.bad_input
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input(name, call, error, words):
    for function in (torch.ops.rendseg.point_sample, point_sample, reference.point_sample):
        with pytest.raises(error, match=words):
            function(**call)


@pytest.mark.bad_input
def test_bad_input_of_the_backward():
    value, coords = maps(2, 3, 4, 5), points(2, 6)
    tail = ("bilinear", "zeros", False, True, True)
    op = torch.ops.rendseg._point_sample_backward
    for device in ("cpu", "meta"):
        value, coords, grad = value.to(device), coords.to(device), torch.zeros(2, 3, 6, device=device)
        with pytest.raises(ValueError, match=r"grad must have shape \[2, 3, 6\] as the output, got \[2, 4, 6\]"):
            op(torch.zeros(2, 4, 6, device=device), [value], coords, *tail)
        with pytest.raises(TypeError, match="grad must have the dtype of input"):
            op(grad.double(), [value], coords, *tail)
        with pytest.raises(ValueError, match="padding_mode must be one of zeros, border, got 'reflect'"):
            op(grad, [value], coords, "bilinear", "reflect", *tail[2:])
        with pytest.raises(ValueError, match="coords must have shape"):
            op(grad, [value], coords[:1], *tail)


@pytest.mark.bad_input
def test_another_device():
    with pytest.raises(RuntimeError, match="coords must be on the device of input"):
        reference.point_sample(maps(2, 3, 4, 5), points(2, 6).to("meta"))
    with pytest.raises(RuntimeError, match=r"input\[1\] must be on the device of input\[0\]"):
        point_sample([maps(2, 3, 4, 5), maps(2, 3, 4, 5).to("meta")], points(2, 6))


# -- labels --------------------------------------------------------------------------------


def brute_force_labels(labels: Tensor, coords: Tensor, ignore_index: int) -> Tensor:
    """Rational arithmetic, one point at a time."""
    out = torch.empty(coords.shape[:2], dtype=torch.int64)
    height, width = labels.shape[1:]
    for n, p in itertools.product(range(coords.shape[0]), range(coords.shape[1])):
        x, y = coords[n, p].tolist()
        if not (0 <= x <= 1 and 0 <= y <= 1):
            out[n, p] = ignore_index
            continue
        col, row = min(int(Fraction(x) * width), width - 1), min(int(Fraction(y) * height), height - 1)
        out[n, p] = int(labels[n, row, col])
    return out


def label_points(height: int, width: int) -> Tensor:
    """Random and wild points, cell borders and their neighbours one ulp away."""
    borders = torch.arange(width + 1).float() / width
    near = torch.cat(
        [borders, torch.nextafter(borders, torch.tensor(2.0)), torch.nextafter(borders, torch.tensor(-1.0))]
    )
    rows = torch.arange(near.numel()).remainder(height + 1).float() / height
    return torch.cat([points(1, 60)[0], torch.tensor(WILD), torch.stack((near, rows), -1)]).unsqueeze(0)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("height,width", [(5, 7), (4, 6), (1, 1), (3, 480)])
def test_labels_equal_brute_force(dtype, height, width):
    low, high = max(torch.iinfo(dtype).min, -(2**60)), min(torch.iinfo(dtype).max, 2**60 + 1)
    labels = torch.randint(low, high, (2, height, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, 0, 0] = torch.iinfo(dtype).max  # beyond the exact range of float32, and of float64 for int64
    coords = label_points(height, width).repeat(2, 1, 1)
    wanted = brute_force_labels(labels, coords, -1)
    for coordinate in (coords, coords.double()):
        assert torch.equal(point_labels(labels, coordinate, -1), wanted)
        assert torch.equal(reference.point_labels(labels, coordinate, -1), wanted)
    strided = torch.zeros(2, width, height * 2, dtype=dtype)
    strided[:, :, ::2] = labels.transpose(1, 2)
    assert torch.equal(point_labels(strided[:, :, ::2].transpose(1, 2), coords, -1), wanted)


def test_labels_agree_with_nearest_grid_sample_inside_cells():
    labels = torch.randint(0, 150, (2, 33, 47), generator=torch.Generator().manual_seed(0))
    coords = torch.rand(2, 3000, 2, generator=torch.Generator().manual_seed(1))
    wanted = F.grid_sample(
        labels[:, None].double(), (2 * coords.double() - 1)[:, :, None], mode="nearest", align_corners=False
    )
    assert torch.equal(point_labels(labels, coords), wanted[:, 0, :, 0].long())


def test_labels_at_the_ends():
    labels = torch.tensor([[[1, 2], [3, 4]]])
    coords = torch.tensor(
        [[(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (1.0000001, 0.5), (-1e-9, 0.5)]]
    )
    assert point_labels(labels, coords).tolist() == [[1, 2, 3, 4, 4, 255, 255]]


def test_labels_empty():
    assert point_labels(torch.zeros(2, 3, 4, dtype=torch.uint8), points(2, 0)).shape == (2, 0)
    assert point_labels(torch.zeros(0, 3, 4, dtype=torch.uint8), points(0, 5)).shape == (0, 5)


@pytest.mark.opcheck
def test_labels_opcheck():
    labels = torch.arange(60, dtype=torch.int16).view(2, 5, 6)
    library.opcheck(torch.ops.rendseg.point_labels, (labels, points(2, 9), 3))
    library.opcheck(torch.ops.rendseg.point_labels, (labels, points(2, 0)))


def test_labels_compile():
    labels, coords = torch.arange(60, dtype=torch.uint8).view(2, 5, 6), points(2, 9)
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(point_labels, fullgraph=True, backend="aot_eager")(labels, coords), point_labels(labels, coords)
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_labels()])
def test_labels_bad_input(name, call, error, words):
    for function in (torch.ops.rendseg.point_labels, point_labels, reference.point_labels):
        with pytest.raises(error, match=words):
            function(**call)


def test_backends():
    value, coords = maps(2, 3, 4, 5), points(2, 6)
    with rendseg.backend("reference"):
        wanted = point_sample(value, coords)
    torch.testing.assert_close(point_sample(value, coords), wanted)
    if C is not None:
        with rendseg.backend("cpp"):
            torch.testing.assert_close(point_sample(value, coords), wanted)
