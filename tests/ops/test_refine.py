"""refine: the loop over operators and the one-call form, against the plain-PyTorch definition in float64."""

from __future__ import annotations

import copy
from typing import Any

import cases_refine as cases
import pytest
import torch
import torch.nn.functional as F
from _common import assert_opcheck, use_threads
from torch import Tensor

import rendseg
from rendseg import _extension, reference
from rendseg.ops import refine
from rendseg.reference.subdivide import upsample_cells

CASES = list(cases.refine_cases())
IDS = [case[0] for case in CASES]
LOOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def build(made: dict[str, Any], layers: dict[str, Any], stock: bool) -> tuple[Tensor, list[Tensor], cases.Head]:
    coarse, features = cases.inputs(**made)
    head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1], stock=stock, **layers).double()
    return coarse, features, head


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
@pytest.mark.parametrize("name, made, layers, kwargs", CASES, ids=IDS)
def test_against_reference(name: str, made: dict, layers: dict, kwargs: dict, stock: bool, isa: str) -> None:
    coarse, features, head = build(made, layers, stock)
    before = coarse.clone()
    with torch.no_grad():
        want = reference.refine(coarse, features, head, **kwargs)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = coarse.contiguous(memory_format=memory_format)
            maps = [f.contiguous(memory_format=memory_format) for f in features]
            got = refine(x, maps, head, **kwargs)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            labels = refine(x, maps, head, output="labels", **kwargs)
            assert labels.dtype == torch.uint8 and torch.equal(labels.long(), got.argmax(1))
            assert got.data_ptr() != x.data_ptr() and torch.equal(x, before)


@pytest.mark.parametrize("spoil", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_wide_maps_of_several_steps(channels_last: bool, spoil: float | None, isa: str) -> None:
    """One call stores no map between its steps, and works in tiles; the loop over operators stores every one."""
    torch.manual_seed(3)
    coarse = 4 * torch.randn(2, 150, 3, 37, dtype=torch.float64)
    if spoil is not None:
        coarse[1, 70, 1, 20] = spoil
    features = torch.randn(2, 8, 9, 80, dtype=torch.float64)
    if channels_last:
        coarse = coarse.contiguous(memory_format=torch.channels_last)
    head = cases.Head(8, 150).double()
    for options in ({"steps": 3}, {"steps": 4, "class_index": torch.tensor([7, 149])}, {"steps": 2, "scale_factor": 3}):
        with torch.no_grad():
            head.stock = False
            want = refine(coarse, features, head, num_points=70, **options)
            head.stock = True
            got = refine(coarse, features, head, num_points=70, **options)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
            if "class_index" not in options:
                labels = refine(coarse, features, head, num_points=70, output="labels", **options)
                assert torch.equal(labels.long(), got.argmax(1))


def test_maps_between_steps_are_not_stored(isa: str) -> None:
    coarse, features = torch.randn(1, 19, 32, 40), torch.randn(1, 8, 32, 40)
    head = cases.Head(8, 19)
    between = coarse.nbytes * 4**2  # of the second of three steps
    for output, largest in (("labels", between - 1), ("logits", 4 * between)):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            refine(coarse, features, head, steps=3, num_points=50, output=output)
        sizes = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
        assert max(sizes) <= largest and not any(between <= size < 4 * between for size in sizes), sizes


ROIS = list(cases.roi_cases())


@pytest.mark.parametrize("name, made, kwargs", ROIS, ids=[case[0] for case in ROIS])
def test_masks_of_boxes(name: str, made: dict, kwargs: dict, isa: str) -> None:
    """Against the loop of detectron2, where that has the option, and every form against the reference."""
    coarse, features, rois, classes = cases.roi_inputs(**made)
    head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1]).double()
    options = {**kwargs, "rois": rois, "class_index": classes}
    with torch.no_grad():
        wanted = reference.refine(coarse, features, head, **options)
        if "coarse_source" not in kwargs and len(coarse):
            masks = cases.instance_masks(coarse, features, head, rois, classes, **kwargs)
            torch.testing.assert_close(wanted, masks, rtol=1e-6, atol=1e-6)
        for stock in (True, False):
            head.stock = stock
            for memory_format in (torch.contiguous_format, torch.channels_last):
                maps = [f.contiguous(memory_format=memory_format) for f in features]
                got = refine(coarse.contiguous(memory_format=memory_format), maps, head, **options)
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
                alone = refine(coarse, maps, head, output="class", **options)
                assert torch.equal(alone, got.gather(1, classes.view(-1, 1, 1, 1).expand_as(alone)))
        labels = refine(coarse, features, head, rois=rois, output="labels", **kwargs)
        plain = refine(coarse, features, head, rois=rois, **kwargs)
        assert torch.equal(labels.long(), plain.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("boxes", [5, 70])
def test_masks_of_boxes_in_narrow_types(boxes: int, dtype: torch.dtype, isa: str) -> None:
    """All cells: with more points than pixels it is products of the features that are read through the boxes."""
    coarse, features, rois, _ = cases.roi_inputs(n=boxes, images=2)
    head = cases.Head(8, 4).to(dtype)
    coarse, features = coarse.to(dtype), [f.to(dtype) for f in features]
    options = {"steps": 2, "num_points": 144, "rois": rois}
    with torch.no_grad():
        got = refine(coarse, features, head, **options)
        exact = reference.refine(coarse.double(), [f.double() for f in features], head.double(), **options)
    torch.testing.assert_close(got.double(), exact, rtol=LOOSE[dtype], atol=LOOSE[dtype])


@pytest.mark.parametrize("layers", [{}, {"each": False}, {"coarse_first": True}, {"hidden": ()}], ids=str)
def test_more_points_than_pixels(layers: dict, isa: str) -> None:
    """The first layer is then made for the pixels, in every order of the inputs."""
    coarse, features, rois, classes = cases.roi_inputs(n=9, images=2)
    head = cases.Head(8, 4, **layers).double()
    for padding in ("zeros", "border"):
        options = {"steps": 3, "num_points": 60, "padding_mode": padding, "rois": rois, "class_index": classes}
        with torch.no_grad():
            wanted = reference.refine(coarse, features, head, **options)
            for maps in (features, [features[0].contiguous(memory_format=torch.channels_last)], [features[0].mT]):
                wanted = reference.refine(coarse, maps, head, **options) if maps[0].shape[2] == 17 else wanted
                got = refine(coarse, maps, head, **options)
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_masks_of_boxes_with_gradients_and_compiled() -> None:
    coarse, features, rois, classes = cases.roi_inputs()
    head = cases.Head(8, 4).double()
    options = {"steps": 3, "num_points": 40}
    leaves = [coarse.requires_grad_(), features[0].requires_grad_(), *head.parameters()]
    gradients = []
    for function in (cases.instance_masks, refine):
        out = function(coarse, features, head, rois=rois, class_index=classes, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)

    def masks(c: Tensor, f: list[Tensor], image_index: Tensor, boxes: Tensor, of: Tensor) -> Tensor:
        return refine(c, f, head, rois=(image_index, boxes), class_index=of, **options)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
            arguments = (coarse, features, *rois, classes)
            torch.testing.assert_close(compiled(*arguments), masks(*arguments))

    class Masks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, c: Tensor, f: Tensor, image_index: Tensor, boxes: Tensor, of: Tensor) -> Tensor:
            rois = (image_index, boxes)
            return refine(c, f, self.head, rois=rois, class_index=of, output="class", **options)

    with torch.no_grad():
        program = torch.export.export(Masks(), (coarse, features[0], *rois, classes))
        exported = program.module()(coarse, features[0], *rois, classes)
        assert torch.equal(exported, Masks()(coarse, features[0], *rois, classes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["original", "current"])
@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_dtypes(dtype: torch.dtype, source: str, stock: bool, isa: str) -> None:
    coarse, features = cases.inputs(classes=7)
    head = cases.Head(8, 7, stock=stock).to(dtype)
    coarse, features = coarse.to(dtype), [f.to(dtype) for f in features]
    with torch.no_grad():
        got = refine(coarse, features, head, steps=1, num_points=40, coarse_source=source)
        labels = refine(coarse, features, head, steps=1, num_points=40, coarse_source=source, output="labels")
        # The cells are those that subdivide selects; their values are those of the head in float64.
        fine, indices, coords = rendseg.ops.subdivide(coarse, 40)
        points = reference.point_sample([f.double() for f in features], coords)
        assert fine is not None
        seen = coarse if source == "original" else fine
        exact = head.double()(points, reference.point_sample(seen.double(), coords))
    assert got.dtype == dtype and torch.equal(labels.long(), got.argmax(1))
    at = indices.unsqueeze(1).expand(-1, 7, -1)
    torch.testing.assert_close(got.flatten(2).gather(2, at).double(), exact, rtol=LOOSE[dtype], atol=LOOSE[dtype])
    kept = torch.ones(2, fine[0, 0].numel(), dtype=torch.bool).scatter(1, indices, False).unsqueeze(1).expand(-1, 7, -1)
    assert torch.equal(got.flatten(2)[kept], fine.flatten(2)[kept])


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_current_is_the_loop_of_the_deeplab_write_ups(stock: bool) -> None:
    """Written out: upsample with aligned corners, sample the upsampled map at its most uncertain points, replace."""
    coarse, features, head = build({}, {"coarse_first": True, "hidden": ()}, stock)
    wanted = coarse
    with torch.no_grad():
        for _ in range(2):
            wanted = F.interpolate(wanted, scale_factor=2, mode="bilinear", align_corners=True)
            height, width = wanted.shape[2:]
            largest = wanted.sort(1, descending=True).values
            uncertain = (largest[:, 1] - largest[:, 0]).flatten(1).topk(30).indices
            x, y = uncertain % width, uncertain // width
            grid = torch.stack(((2 * x + 1.0).double() / width - 1, (2 * y + 1.0).double() / height - 1), -1)
            seen, fine = (F.grid_sample(m, grid.unsqueeze(2), align_corners=False)[..., 0] for m in (wanted, *features))
            wanted = wanted.flatten(2).scatter(2, uncertain.unsqueeze(1).expand_as(seen), head(fine, seen))
            wanted = wanted.view(2, 5, height, width)
        for function in (reference.refine, refine):
            options = {"num_points": 30, "coarse_source": "current", "align_corners": True}
            got = function(coarse, features, head, steps=2, **options)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # the features' points are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor, align", [(2, False), (3, False), (2, True), (3, True)])
def test_upsampled_cells_have_the_bits_of_subdivide(dtype: torch.dtype, factor: int, align: bool, isa: str) -> None:  # noqa: F811
    coarse = cases.inputs(h=7, w=11)[0].to(dtype)
    for logits in (coarse, coarse.contiguous(memory_format=torch.channels_last), coarse[..., ::2], coarse[:, :, :1]):
        fine, indices, _ = rendseg.ops.subdivide(logits, 50, factor, align)
        assert fine is not None
        got = upsample_cells(logits, indices, factor, align)
        wanted = fine.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, 5, -1))
        if _extension.LOADED:
            assert torch.equal(got, wanted)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_labels_of_many_classes_and_ties(stock: bool) -> None:
    coarse, features = cases.inputs(n=1, classes=300, h=3, w=4)
    head = cases.Head(8, 300, hidden=(), stock=stock).float()
    with torch.no_grad():
        for p in (*head.weights, *head.biases):
            p.zero_()  # every class ties at every point: class 0 wins
        args = (coarse.float(), [f.float() for f in features], head)
        labels = refine(*args, steps=2, num_points=20, output="labels")
        logits = refine(*args, steps=2, num_points=20)
    assert labels.dtype == torch.int16 and torch.equal(labels.long(), logits.argmax(1))
    assert int((labels == 0).sum()) >= 20


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_labels_allocate_no_full_logits(stock: bool) -> None:
    if not _extension.LOADED:
        pytest.skip("the reference upsamples in full")
    coarse, features = cases.inputs(n=1, classes=16, h=32, w=32)
    head = cases.Head(8, 16, stock=stock)
    args = (coarse.float(), [f.float() for f in features], head)
    full = 16 * 128 * 128 * 4
    largest = {}
    for output in ("logits", "labels"):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            refine(*args, steps=2, num_points=200, output=output)
        # Allocations are charged to the op that made them, frees are events of their own.
        largest[output] = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert largest["logits"] >= full
    assert largest["labels"] < full / 2


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_not_a_number(stock: bool, isa: str) -> None:
    coarse, features = cases.inputs()
    coarse[0, 2, 3, 4] = float("nan")
    features[0][1, :, 2, 2] = float("nan")
    head = cases.Head(8, 5, stock=stock).double()
    with torch.no_grad():
        for padding in ("zeros", "border"):
            want = reference.refine(coarse, features, head, steps=2, num_points=60, padding_mode=padding)
            got = refine(coarse, features, head, steps=2, num_points=60, padding_mode=padding)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
            labels = refine(coarse, features, head, steps=2, num_points=60, padding_mode=padding, output="labels")
            assert torch.equal(labels.long(), got.argmax(1)) and got.isnan().any()


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_empty_batch(stock: bool) -> None:
    coarse, features = cases.inputs(n=0)
    head = cases.Head(8, 5, stock=stock).double()
    with torch.no_grad():
        assert refine(coarse, features, head, steps=2, num_points=7).shape == (0, 5, 24, 36)
        assert refine(coarse, features, head, steps=2, num_points=7, output="labels").shape == (0, 24, 36)


def test_both_forms_agree_in_float32(isa: str) -> None:
    coarse, features = cases.inputs(h=20, w=31, classes=19, channels=(24,))
    coarse, features = coarse.float(), [f.float() for f in features]
    results = []
    with torch.no_grad():
        for stock in (False, True):
            head = cases.Head(24, 19, hidden=(48, 40), stock=stock)
            results.append(refine(coarse, features, head, steps=1, num_points=700))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)


def test_threads_do_not_matter(isa: str) -> None:
    if isa == "none":
        pytest.skip("without the extension the head is PyTorch's matrix product, which depends on the thread count")
    coarse, features = cases.inputs(n=2, h=20, w=40)
    head = cases.Head(8, 5)
    args = (coarse.float(), [f.float() for f in features], head)
    results = []
    with torch.no_grad():
        for count in (1, 2, 3):
            with use_threads(count):
                results.append(refine(*args, steps=2, num_points=500))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("gemm", ["own", "aten"])
@pytest.mark.parametrize(
    "classes, coarse_first, each",
    [(40, False, True), (40, True, True), (40, True, False), (3, False, True), (3, True, True)],
)
def test_products_by_either_gemm(classes: int, coarse_first: bool, each: bool, gemm: str) -> None:
    """Points outnumber the cells of both maps, so that products are sampled; with many classes the coarse ones too."""
    if not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    assert _extension.C is not None
    coarse, features = cases.inputs(n=2, classes=classes, h=5, w=6, channels=(8, 7))
    head = cases.Head(15, classes, hidden=(35, 20), coarse_first=coarse_first, each=each).double()
    before = _extension.C.gemm()
    _extension.C.set_gemm(gemm)
    try:
        with torch.no_grad():
            for source in ("original", "current"):
                kwargs = {"steps": 3, "num_points": 300, "coarse_source": source}
                want = reference.refine(coarse, features, head, **kwargs)
                results = []
                for count in (1, 2, 3):
                    with use_threads(count):
                        results.append(refine(coarse, features, head, **kwargs))
                torch.testing.assert_close(results[0], want, rtol=1e-9, atol=1e-9)
                assert all(torch.equal(results[0], other) for other in results[1:])
                labels = refine(coarse, features, head, output="labels", **kwargs)
                assert torch.equal(labels.long(), results[0].argmax(1))
            low, maps, half = coarse.bfloat16(), [f.bfloat16() for f in features], copy.deepcopy(head).bfloat16()
            got = refine(low, maps, half, steps=1, num_points=10**4)
            want = reference.refine(low.double(), [f.double() for f in maps], half.double(), steps=1, num_points=10**4)
            torch.testing.assert_close(got.double(), want, rtol=0.1, atol=0.1)
    finally:
        _extension.C.set_gemm(before)


def test_gemm_of_no_known_name() -> None:
    if _extension.C is None:
        pytest.skip("needs the compiled extension")
    with pytest.raises(ValueError, match='RENDSEG_CPU_GEMM must be one of auto, own, aten, got "mkl"'):
        _extension.C.set_gemm("mkl")


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
@pytest.mark.parametrize("source", ["original", "current"])
def test_gradients(stock: bool, source: str) -> None:
    gradients = []
    for function in (reference.refine, refine):
        coarse, features, head = build({}, {}, stock)
        leaves = [coarse.requires_grad_(), *(f.requires_grad_() for f in features), *head.parameters()]
        out = function(coarse, features, head, steps=2, num_points=40, coarse_source=source)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    labels = refine(coarse, features, head, steps=2, num_points=40, output="labels")
    assert not labels.requires_grad


@pytest.mark.gradcheck
def test_gradcheck() -> None:
    coarse, features = cases.inputs(n=1, classes=3, h=3, w=3, channels=(2,))
    head = cases.Head(2, 3, hidden=(4,)).double()
    leaves = (coarse.requires_grad_(), features[0].requires_grad_())
    assert torch.autograd.gradcheck(lambda c, f: refine(c, f, head, steps=2, num_points=5), leaves)


@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_autocast(stock: bool, isa: str) -> None:
    coarse, features = cases.inputs(h=8, w=12, classes=7, channels=(16,))
    coarse, features = coarse.float(), [f.float() for f in features]
    head = cases.Head(16, 7, stock=stock)
    with torch.no_grad():
        plain = refine(coarse, features, head, steps=1, num_points=60)
        with torch.autocast("cpu", torch.bfloat16):
            got = refine(coarse, features, head, steps=1, num_points=60)
            labels = refine(coarse, features, head, steps=1, num_points=60, output="labels")
    assert got.dtype == torch.float32 and torch.equal(labels.long(), got.argmax(1))
    changed = (got != plain).any(1).sum(dim=(1, 2))
    assert (changed > 50).all() and (changed <= 60).all()  # the head ran in bfloat16, and only at the points
    torch.testing.assert_close(got, plain, rtol=0.1, atol=0.1)
    # The values are bfloat16 numbers: what the head returned was rounded to it.
    values = got[(got != plain).any(1, keepdim=True).expand_as(got)]
    assert torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("output", ["logits", "labels"])
@pytest.mark.parametrize("stock", [False, True], ids=["any head", "stock head"])
def test_compile(stock: bool, output: str, grad: bool) -> None:
    coarse, features, head = build({}, {}, stock)

    def function(c: Tensor, f: list[Tensor]) -> Tensor:
        return refine(c, f, head, steps=2, num_points=30, output=output)

    with torch.set_grad_enabled(grad):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(coarse, features), function(coarse, features))


def test_export() -> None:
    coarse, features, head = build({}, {}, True)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, c: Tensor, f: Tensor) -> Tensor:
            return refine(c, f, self.head, steps=2, num_points=30, output="labels")

    with torch.no_grad():
        program = torch.export.export(Model(), (coarse, features[0]))
        assert torch.equal(program.module()(coarse, features[0]), Model()(coarse, features[0]))


@pytest.mark.opcheck
def test_opcheck() -> None:
    coarse, features = cases.inputs()
    head = cases.Head(8, 5).double()
    layers = ([w.detach() for w in head.weights], [b.detach() for b in head.biases])
    op = torch.ops.rendseg._refine_mlp.default
    rest = ("original", 2, False, "zeros", True, False)
    assert_opcheck(op, (coarse, features, *layers, 2, 20, *rest, False))
    assert_opcheck(op, (coarse, features, *layers, 2, 20, *rest, True))
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    assert_opcheck(op, (coarse.contiguous(memory_format=torch.channels_last), last, *layers, 1, 10_000, *rest, False))
    assert_opcheck(op, (coarse, features, *layers, 0, 20, *rest, False))
    coarse, features, rois, classes = cases.roi_inputs(classes=5)
    assert_opcheck(op, (coarse, features, *layers, 2, 20, *rest, False, classes, True, *rois))


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_backends(name: str) -> None:
    coarse, features, head = build({}, {}, True)
    with torch.no_grad(), rendseg.backend(name):
        got = refine(coarse, features, head, steps=1, num_points=30)
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    assert int((got - fine).abs().amax(1).gt(1e-9).sum()) <= 2 * 30


def test_head_that_is_not_stock_is_called() -> None:
    coarse, features, head = build({}, {}, True)
    calls = []
    head.refine_parameters = lambda: None  # type: ignore[method-assign]
    handle = head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        refine(coarse, features, head, steps=2, num_points=30)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.bad_input
@pytest.mark.parametrize("function", [reference.refine, refine], ids=["reference", "public"])
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_inputs(), ids=[c[0] for c in cases.bad_inputs()])
def test_bad_input(name: str, kwargs: dict, exception: type[Exception], pattern: str, function: Any) -> None:
    with pytest.raises(exception, match=pattern):
        function(**kwargs)


@pytest.mark.bad_input
@pytest.mark.parametrize("caller", ["reference", "torch.ops"])
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_layers(), ids=[c[0] for c in cases.bad_layers()])
def test_bad_layers(name: str, kwargs: dict, exception: type[Exception], pattern: str, caller: str) -> None:
    from rendseg.reference.refine import refine_mlp

    with pytest.raises(exception, match=pattern):
        (refine_mlp if caller == "reference" else torch.ops.rendseg._refine_mlp)(**kwargs)
