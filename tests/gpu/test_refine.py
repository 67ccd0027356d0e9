"""refine with a stock head on a GPU: step by step against the float64 head; run by ``make gpu-check``."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rendseg import _backends, reference
from rendseg.nn import PointHead
from rendseg.ops import refine
from tests.emulation.test_refine import CASES, DTYPES, LOOSE, MIXED, ROIS, Call, as_laid_out, tolerance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import cases_refine as cases  # noqa: E402

pytestmark = pytest.mark.gpu
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
LAYOUTS = ("contiguous", "channels_last", "strided")


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("_refine_mlp", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """What the allocator hands out next holds NaN."""
    if torch.cuda.is_available():
        torch.full((64 << 20,), float("nan"), device="cuda")


@pytest.fixture
def ieee() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(made: dict, layers: dict, kwargs: dict, dtypes: Sequence, how: str = "contiguous") -> Call:
    return Call(torch.ops.rendseg, made, layers, kwargs, dtypes, how, "cuda")


def network(
    dtype: torch.dtype, n: int = 1, classes: int = 19, h: int = 64, w: int = 96
) -> tuple[Tensor, Tensor, PointHead]:
    """Logits, a feature map at twice their size and the head of the paper."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(n, classes, h, w, generator=generator) * 3
    features = torch.randn(n, 256, 2 * h, 2 * w, generator=generator)
    torch.manual_seed(5)
    head = PointHead(256, classes, init="torch").eval().requires_grad_(False)
    features = features.to("cuda", dtype, memory_format=torch.channels_last)
    return coarse.to("cuda", dtype), features, head.to("cuda", dtype)


def launches(function: Any) -> list[str]:
    """Names of the kernels and memory operations of one call."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtypes", DTYPES + MIXED, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name, made, layers, kwargs", CASES, ids=[case[0] for case in CASES])
def test_shared_cases(name: str, made: dict, layers: dict, kwargs: dict, dtypes: Sequence) -> None:
    results = [on_gpu(made, layers, kwargs, dtypes, how).check(tolerance(dtypes)) for how in LAYOUTS]
    if dtypes[2] != F64:
        assert all(torch.equal(other, results[0]) for other in results[1:])


def boxes_on_gpu(dtype: torch.dtype, how: str = "contiguous", **made: Any) -> tuple[Any, ...]:
    """``roi_inputs`` on the GPU, and a head."""
    coarse, features, rois, classes = cases.roi_inputs(**made)
    head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1]).to("cuda", dtype).requires_grad_(False)
    features = [as_laid_out(f.to("cuda", dtype), how) for f in features]
    return coarse.to("cuda", dtype), features, [t.cuda() for t in rois], classes.cuda(), head


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name, made, kwargs", ROIS, ids=[case[0] for case in ROIS])
def test_boxes(name: str, made: dict, kwargs: dict, dtype: torch.dtype) -> None:
    """The whole loop in float64, and a step of every cell, which no rounding can shift, in the types that are fused."""
    kwargs = kwargs if dtype == F64 else kwargs | {"steps": 2, "num_points": 144}
    within, results = tolerance((dtype,) * 3), []
    for how in LAYOUTS:
        coarse, features, rois, classes, head = boxes_on_gpu(dtype, how, **made)
        results.append(refine(coarse, features, head, rois=rois, class_index=classes, **kwargs))
        wanted = reference.refine(
            coarse.double(), [f.double() for f in features], copy.deepcopy(head).double(), rois=rois,
            class_index=classes, **kwargs,
        )  # fmt: skip
        torch.testing.assert_close(results[-1].double(), wanted, rtol=within, atol=within)
        alone = refine(coarse, features, head, rois=rois, class_index=classes, output="class", **kwargs)
        own = torch.arange(len(classes), device="cuda")
        assert torch.equal(alone[:, 0], results[-1][own, classes])
    assert dtype == F64 or all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_many_boxes(dtype: torch.dtype) -> None:
    """100 masks, from 7 to 224 cells a side: no step waits for the host, runs are bit-equal, and so is a replay."""
    coarse, features, rois, classes, head = boxes_on_gpu(dtype, n=100, images=2, side=7, channels=(64,))
    options = {"steps": 5, "num_points": 784, "rois": rois, "class_index": classes, "output": "class"}
    first = refine(coarse, features, head, **options)
    assert first.shape == (100, 1, 224, 224) and torch.isfinite(first).all()
    assert all(torch.equal(refine(coarse, features, head, **options), first) for _ in range(5))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = refine(coarse, features, head, **options)
    rois[1].copy_(rois[1].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, refine(coarse, features, head, **options)) and not torch.equal(out, first)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("how", LAYOUTS)
def test_the_head_of_the_paper(how: str, dtype: torch.dtype) -> None:
    """300 points, and about 30, 60 and 500 for each of 132 processors: every size of a block."""
    layers = {"hidden": (256, 256, 256)}
    for n, num_points in ((1, 300), (1, 4000), (2, 4000), (8, 9000)):
        made = {"n": n, "classes": 19, "h": 60, "w": 100, "channels": (256,)}
        on_gpu(made, layers, {"steps": 1, "num_points": num_points}, [dtype] * 3, how).check(tolerance([dtype] * 3))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("classes", [1, 150, 301])
def test_few_and_many_classes(classes: int, dtype: torch.dtype) -> None:
    made = {"n": 4, "classes": classes, "h": 14, "w": 14, "channels": (256, 32)}
    for layers in ({"hidden": (256, 256)}, {"hidden": (), "coarse_first": True}, {"hidden": (130,), "each": False}):
        on_gpu(made, layers, {"steps": 2, "num_points": 700}, [dtype] * 3).check(tolerance([dtype] * 3))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_heads_that_are_not_fused(dtype: torch.dtype) -> None:
    made = {"n": 2, "classes": 19, "h": 20, "w": 30, "channels": (64,)}
    for kwargs in ({"steps": 2, "num_points": 1000}, {"steps": 1, "num_points": 10_000}):
        on_gpu(made, {"hidden": (300, 40)}, kwargs, [dtype] * 3).check(tolerance([dtype] * 3))


def test_float32_is_exact_where_tf32_is_not_allowed(ieee: None) -> None:
    """Whatever the flag of matrix products says: the layers are convolutions."""
    made = {"n": 2, "classes": 19, "h": 20, "w": 30, "channels": (256,)}
    for kwargs in ({"steps": 2, "num_points": 1000}, {"steps": 1, "num_points": 10_000}):
        on_gpu(made, {"hidden": (256, 256)}, kwargs, [F32] * 3).check(LOOSE[F32])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("output", ["logits", "labels"])
def test_runs_are_bit_equal(output: str, dtype: torch.dtype) -> None:
    coarse, features, head = network(dtype)
    first = refine(coarse, features, head, steps=2, num_points=3000, output=output)
    for _ in range(20):
        assert torch.equal(refine(coarse, features, head, steps=2, num_points=3000, output=output), first)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_close_to_calling_the_head(dtype: torch.dtype) -> None:
    """One step, so that both refine the same cells."""
    coarse, features, head = network(dtype)
    stock = refine(coarse, features, head, steps=1, num_points=3000)
    called = refine(coarse, features, lambda fine, points: head(fine, points), steps=1, num_points=3000)
    torch.testing.assert_close(stock, called, rtol=2e-2, atol=2e-2)


def test_autocast() -> None:
    coarse, features, head = network(F32)
    with torch.autocast("cuda", BF16):
        got = refine(coarse, features, head, steps=1, num_points=3000)
        labels = refine(coarse, features, head, steps=1, num_points=3000, output="labels")
    plain = refine(coarse, features, head, steps=1, num_points=3000)
    assert got.dtype == F32 and torch.equal(labels.long(), got.argmax(1))
    torch.testing.assert_close(got, plain, rtol=0.1, atol=0.1)
    assert not torch.equal(got, plain)


def test_gradients_flow_through_the_operators() -> None:
    coarse, made = cases.inputs(n=1, classes=3, h=5, w=6, channels=(4,))
    gradients = []
    for device in ("cpu", "cuda"):
        head = cases.Head(4, 3, hidden=(6,)).double().to(device)
        leaves = [t.detach().to(device).requires_grad_() for t in (coarse, made[0])]
        out = refine(leaves[0], leaves[1], head, steps=2, num_points=20)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), [*leaves, *head.parameters()]))
    for ours, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours.cpu(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("hidden", [(256, 256), (300,)], ids=["fused", "aten"])
@pytest.mark.parametrize("labels", [False, True], ids=["logits", "labels"])
def test_graph_replay_and_another_stream(labels: bool, hidden: tuple) -> None:
    made = {"n": 2, "classes": 19, "h": 20, "w": 30, "channels": (64,)}
    call = on_gpu(made, {"hidden": hidden}, {"steps": 2, "num_points": 500}, [F16] * 3, "channels_last")
    expected = call.run(labels=labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(call.run(labels=labels), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(labels=labels)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
    other = torch.randn_like(call.coarse)
    call.coarse.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, call.run(labels=labels))
    before = out.clone()
    call.head.biases[-1].data[0] += 10  # no version counter sees it; the replay must
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, call.run(labels=labels)) and not torch.equal(out, before)


def subdivision(cells: int) -> int:
    """Launches of ``subdivide`` for a map of so many cells: upsampling, selection (csrc/cuda/select.cuh), clearing."""
    if cells <= 16_384:  # one block selects
        return 1 + 1
    # Clearing; the threshold in one pass, or in two of which the second may have nothing to do; writing.
    return 1 + 1 + (1 if cells <= 65_536 else 2) + 1


def test_launches() -> None:
    """One kernel packs the head, one a step gathers, runs it and scatters; the rest is selection."""
    coarse, features, head = network(BF16)
    for output in ("logits", "labels"):
        names = launches(lambda o=output: refine(coarse, features, head, steps=2, num_points=3000, output=o))
        assert sum("pack_head_kernel" in name for name in names) == 1, names
        assert sum("refine_points_kernel" in name for name in names) == 2, names
        if output == "logits":
            # Steps of 128 x 192 = 24,576 and of 256 x 384 = 98,304 cells, for which one call clears the memory.
            assert len(names) == 1 + 2 + subdivision(128 * 192) + subdivision(256 * 384) - 1 == 11, names
    for source in ("original", "current"):
        every = launches(lambda s=source: refine(coarse, features, head, steps=1, num_points=10**6, coarse_source=s))
        assert len(every) == 2, every


def test_labels_allocate_no_full_logits() -> None:
    coarse, features, head = network(F16, h=128, w=256)
    peaks = {}
    for case in itertools.product(("logits", "labels"), (2000, 10**7), ("original", "current")):
        output, num_points, source = case
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        refine(coarse, features, head, steps=1, num_points=num_points, coarse_source=source, output=output)
        torch.cuda.synchronize()
        peaks[case] = torch.cuda.max_memory_allocated() - before
    full = 19 * 256 * 512 * 2
    assert all(peak >= full if case[0] == "logits" else peak < full for case, peak in peaks.items()), peaks


def test_empty_batch() -> None:
    for dtype in (F32, F16, F64):
        call = on_gpu({"n": 0}, {}, {"steps": 2, "num_points": 7}, [dtype] * 3)
        assert call.run().shape == (0, 5, 24, 36) and call.run(labels=True).shape == (0, 24, 36)


def moved(value: Any) -> Any:
    if isinstance(value, list):
        return [moved(v) for v in value]
    return value.cuda() if isinstance(value, Tensor) and value.device.type == "cpu" else value


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_layers(), ids=[c[0] for c in cases.bad_layers()])
def test_bad_layers(name: str, kwargs: dict, exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        torch.ops.rendseg._refine_mlp(**{key: moved(value) for key, value in kwargs.items()})
