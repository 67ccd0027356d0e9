"""The Triton kernels of refine's one-call form, step by step against the head in float64; see _triton.py for where."""

from __future__ import annotations

from typing import Any

import cases_refine as cases
import pytest
import torch
from _triton import DEVICE, TRITON, implementation, to_device
from torch import Tensor

import rendseg
from rendseg import reference
from rendseg.ops import refine
from rendseg.reference.refine import every_cell, resolve_steps
from rendseg.reference.subdivide import upsample, upsample_cells

pytestmark = TRITON

# One image but for two of them, and fewer cells: the interpreter takes its time.
SMALLER = {"several blocks": ({"h": 7, "w": 9}, {}, {"steps": 2, "num_points": 150})}
CASES = [
    (name, made if name in ("plain", "current coarse") else made | {"n": 1}, *rest)
    for name, made, *rest in ((case[0], *SMALLER.get(case[0], case[1:])) for case in cases.refine_cases())
    if name != "no step"
]
# As in test_refine.py: those of the stored dtype and of the head's.
LOOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(coarse: Tensor, features: list[Tensor], head: cases.Head, labels: bool = False, **options: Any) -> Tensor:
    """The launcher, called as ``refine`` is."""
    factor = options.get("scale_factor", 2)
    steps = resolve_steps(coarse, options.get("steps"), options.get("output_size"), factor)
    out = implementation("refine", "_refine_mlp")(
        to_device(coarse),
        to_device(features),
        to_device([w.detach() for w in head.weights]),
        to_device([b.detach() for b in head.biases]),
        steps,
        options["num_points"],
        options.get("coarse_source", "original"),
        factor,
        options.get("align_corners", False),
        options.get("padding_mode", "zeros"),
        head.each,
        head.coarse_first,
        labels,
        to_device(options.get("class_index")),
        options.get("class_only", False),
        *to_device(options.get("rois", (None, None))),
    )
    assert labels or out.dtype == coarse.dtype
    return out.cpu()


def check_step(got: Tensor, previous: Tensor, coarse: Tensor, features: list[Tensor], head: cases.Head, **options: Any):
    """``got`` is ``previous`` after one step: the cells that subdivide selects hold the head's answer in float64."""
    factor = options.get("scale_factor", 2)
    height, width = previous.shape[2] * factor, previous.shape[3] * factor
    num_points, padding = options["num_points"], options.get("padding_mode", "zeros")
    fine = indices = None
    if num_points >= height * width:
        coords = every_cell(coarse, height, width)
    else:
        subdivide = implementation("subdivide", "subdivide")
        parts = subdivide(to_device(previous), num_points, factor, options.get("align_corners", False))
        fine, indices, coords = (part.cpu() for part in parts)
    source = coarse
    if options.get("coarse_source") == "current":
        source = fine if fine is not None else upsample(previous, factor, options.get("align_corners", False))
    with torch.no_grad():
        dtype = head.weights[0].dtype
        exact = head.double()(
            reference.point_sample([f.double() for f in features], coords, padding_mode=padding),
            reference.point_sample(source.double(), coords, padding_mode=padding),
        )
        head.to(dtype)
    values = got.flatten(2)
    if indices is not None:
        assert fine is not None
        at = indices.unsqueeze(1).expand_as(exact)
        kept = torch.ones_like(values, dtype=torch.bool).scatter(2, at, False)
        assert torch.equal(values[kept], fine.flatten(2)[kept])
        values = values.gather(2, at)
    tolerance = max(LOOSE[dtype], LOOSE[coarse.dtype])
    torch.testing.assert_close(values.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name, made, layers, options", CASES, ids=[case[0] for case in CASES])
def test_against_reference(name: str, made: dict, layers: dict, options: dict) -> None:
    coarse, features = cases.inputs(**made)
    coarse, features = coarse.float(), [f.float() for f in features]
    before = coarse.clone()
    head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1], **layers)
    steps = resolve_steps(coarse, options.get("steps"), options.get("output_size"), options.get("scale_factor", 2))
    options = {key: value for key, value in options.items() if key != "output_size"}
    previous = run(coarse, features, head, **options | {"steps": steps - 1})
    got = run(coarse, features, head, **options | {"steps": steps})
    check_step(got, previous, coarse, features, head, **options)
    last = torch.channels_last
    maps = [f.contiguous(memory_format=last) for f in features]
    labels = run(coarse.contiguous(memory_format=last), maps, head, labels=True, **options | {"steps": steps})
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), got.argmax(1))
    assert torch.equal(coarse, before)


@pytest.mark.parametrize("source", ["original", "current"])
@pytest.mark.parametrize(
    "maps, layers",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_dtypes(maps: torch.dtype, layers: torch.dtype, source: str) -> None:
    coarse, features = cases.inputs(classes=7)
    coarse, features = coarse.to(maps), [f.to(maps) for f in features]
    head = cases.Head(8, 7).to(layers)
    options = {"num_points": 40, "coarse_source": source}
    got = run(coarse, features, head, steps=1, **options)
    check_step(got, coarse, coarse, features, head, **options)
    assert torch.equal(run(coarse, features, head, labels=True, steps=1, **options).long(), got.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_upsampled_cells_have_the_bits_of_subdivide(dtype: torch.dtype) -> None:
    from rendseg.kernels.subdivide import upsample_cells_triton

    logits = cases.inputs(n=2, classes=19, h=5, w=6)[0].to(dtype)
    for factor, align in ((2, False), (3, True)):
        for x in (logits, logits.contiguous(memory_format=torch.channels_last), logits[..., ::2]):
            fine, indices, _ = (
                t.cpu() for t in implementation("subdivide", "subdivide")(to_device(x), 60, factor, align)
            )
            got = upsample_cells_triton(to_device(x), to_device(indices), factor, align).cpu()
            assert torch.equal(got, fine.flatten(2).gather(2, indices.unsqueeze(1).expand_as(got)))
            assert torch.equal(got, upsample_cells(x, indices, factor, align))


def test_layouts_and_strides() -> None:
    coarse, features = cases.inputs(classes=19)
    coarse, features = coarse.half(), [f.half() for f in features]
    head = cases.Head(8, 19).half()
    options = {"steps": 1, "num_points": 40}
    want = run(coarse, features, head, **options)
    last = run(coarse.contiguous(memory_format=torch.channels_last), features, head, **options)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, want)
    apart = [torch.stack((f, f), dim=3)[:, :, :, 0] for f in features]
    for parameter in head.parameters():
        parameter.data = torch.stack((parameter.data, parameter.data), dim=-1)[..., 0]
    assert not apart[0].is_contiguous() and torch.equal(run(coarse, apart, head, **options), want)


def test_many_classes_and_ties() -> None:
    coarse, features = cases.inputs(n=1, classes=300, h=3, w=4)
    coarse, features = coarse.float(), [f.float() for f in features]
    head = cases.Head(8, 300, hidden=())
    options = {"steps": 1, "num_points": 20}
    for zero in (False, True):
        for p in head.parameters():
            p.data *= not zero  # every class ties at every point: class 0 wins
        logits = run(coarse, features, head, **options)
        labels = run(coarse, features, head, labels=True, **options)
        assert labels.dtype == torch.int16 and torch.equal(labels.long(), logits.argmax(1))
    assert int((labels == 0).sum()) >= 20


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_not_a_number(padding_mode: str) -> None:
    coarse, features = cases.inputs(classes=40)
    coarse, features = coarse.float(), [f.float() for f in features]
    coarse[0, 2, 3, 4] = float("nan")
    features[0][1, :, 2, 2] = float("nan")
    head = cases.Head(8, 40)
    head.weights[-1].data[5] = 0  # NaN all the same: 0 * NaN
    head.biases[-1].data[35] = float("nan")
    options = {"num_points": 60, "padding_mode": padding_mode}
    got = run(coarse, features, head, steps=1, **options)
    check_step(got, coarse, coarse, features, head, **options)
    labels = run(coarse, features, head, labels=True, steps=1, **options).long()
    assert torch.equal(labels, got.argmax(1)) and (labels == 35).any() and got.isnan().any()


def test_labels_allocate_no_full_logits() -> None:
    coarse, features = cases.inputs(n=1, classes=16, h=16, w=16)
    coarse, features = coarse.float(), [f.float() for f in features]
    head = cases.Head(8, 16)
    full = 16 * 64 * 64 * 4
    largest = {}
    for labels in (False, True):
        activity = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
            run(coarse, features, head, labels=labels, steps=2, num_points=50)
        events = profile.events()
        taken = "self_cpu_memory_usage" if DEVICE == "cpu" else "self_device_memory_usage"
        largest[labels] = max(abs(getattr(event, taken)) for event in events)
    assert largest[False] >= full and largest[True] < full / 2


def test_empty_batch_and_no_step() -> None:
    coarse, features = cases.inputs(n=0)
    head = cases.Head(8, 5)
    args = (coarse.float(), [f.float() for f in features], head)
    assert run(*args, steps=2, num_points=7).shape == (0, 5, 24, 36)
    assert run(*args, steps=2, num_points=7, labels=True).shape == (0, 24, 36)
    assert run(*args, steps=1, num_points=1000).shape == (0, 5, 12, 18)
    coarse, features = cases.inputs()
    args = (coarse.float(), [f.float() for f in features], head)
    assert torch.equal(run(*args, steps=0, num_points=7), coarse.float())
    labels = run(*args, steps=0, num_points=7, labels=True)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), coarse.float().argmax(1))


def test_float64_is_the_reference() -> None:
    coarse, features = cases.inputs()
    head = cases.Head(8, 5).double()
    with torch.no_grad():
        want = reference.refine(coarse, features, head, steps=2, num_points=30)
    got = run(coarse.contiguous(memory_format=torch.channels_last), features, head, steps=2, num_points=30)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_masks_of_boxes() -> None:
    """Every cell of boxes in two images, and the one class of it that is asked for."""
    coarse, features, rois, classes = cases.roi_inputs(n=4, images=2)
    coarse, features, head = coarse.float(), [f.float() for f in features], cases.Head(8, 4)
    options: dict[str, Any] = {"num_points": 36, "rois": rois, "class_index": classes}
    with torch.no_grad():
        want = reference.refine(coarse, features, head, steps=1, **options)
    got = run(coarse, features, head, steps=1, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    alone, whole = (run(coarse, features, head, steps=2, class_only=only, **options) for only in (True, False))
    assert torch.equal(alone[:, 0], whole[torch.arange(4), classes])


def test_public_call() -> None:
    coarse, features = cases.inputs()
    coarse, features = coarse.float(), [f.float() for f in features]
    head = cases.Head(8, 5).to(DEVICE)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), rendseg.backend("triton"):
        got = refine(to_device(coarse), to_device(features), head, steps=2, num_points=30)
    assert not calls and torch.equal(got.cpu(), run(coarse, features, head.cpu(), steps=2, num_points=30))


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_layers(), ids=[c[0] for c in cases.bad_layers()])
def test_bad_layers(name: str, kwargs: dict, exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        implementation("refine", "_refine_mlp")(**to_device(kwargs))
