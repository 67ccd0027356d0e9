"""The encoding ops on a GPU against the reference in float64 on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rendseg import _backends, ops, reference
from rendseg.reference.encode import _encode_backward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from cases_encode import bad_inputs, make, rows, samples  # noqa: E402

pytestmark = pytest.mark.gpu

SAMPLES = {sample[0]: sample[1:] for sample in samples()}
BAD = {f"{op}: {name}" for name, op, *_ in bad_inputs()}
HALVES = [torch.float16, torch.bfloat16]
LARGE = {  # several tiles and chunks, more than a block for every multiprocessor
    "main": (4, 512, (64, 128), 32),
    "odd map": (3, 512, (97, 97), 32),
    "few channels": (2, 96, (61, 40), 20),
    "channels of no tile": (2, 130, (31, 33), 31),
    "many codewords": (2, 70, (33, 31), 65),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("encode", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """What PyTorch's allocator hands out next holds NaN."""
    if torch.cuda.is_available():
        torch.full((1 << 26,), math.nan, device="cuda")  # freed at once, into the pool


def close(got: Tensor, wanted: Tensor, compute: torch.dtype, what: str = "result") -> None:
    """Within the rounding of the arithmetic (sums and a softmax behind them) and of the dtype, against the largest."""
    assert got.is_cuda
    assert got.shape == wanted.shape, what
    if wanted.numel() == 0:
        return
    arithmetic = 1e-12 if compute == torch.float64 else 2e-5
    bound = (arithmetic + torch.finfo(got.dtype).eps) * max(wanted.abs().max().item(), 1e-3)
    error = (got.cpu().double() - wanted).abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def to_cuda(t: Tensor) -> Tensor:
    """On the GPU with the very strides, whatever they are."""
    if t.numel() == 0 or t.is_contiguous():
        return t.cuda()
    length = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    flat = torch.as_strided(t, (length,), (1,)).cuda()
    return torch.as_strided(flat, t.shape, t.stride())


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_op(name: str, inputs: tuple[Tensor, ...], runs: int = 3) -> None:
    """Through the public op and autograd; every run gives the same bits."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = getattr(reference, name)(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    before: list[Tensor] = []
    for _ in range(runs):
        held = [to_cuda(t.detach()).requires_grad_() for t in inputs]
        got = getattr(ops, name)(*held)
        rounded = grad.to(got.dtype)
        got_grads = torch.autograd.grad(got, held, rounded.cuda())
        results = [got.detach(), *got_grads]
        for a, b in zip(before, results, strict=bool(before)):
            assert torch.equal(a, b)
        before = results
    wanted_grads = torch.autograd.grad(wanted, wide, rounded.double())
    close(before[0], wanted.detach(), compute_dtype(*inputs))
    for i, (g, w, t) in enumerate(zip(before[1:], wanted_grads, inputs, strict=True)):
        assert g.dtype == t.dtype
        close(g, w, compute_dtype(*inputs), f"gradient of argument {i}")


def assignment(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.rand(x.shape[0], rows(x).shape[1], c.shape[0], generator=g).to(s.dtype)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str) -> None:
    x, c, s = SAMPLES[name]
    check_op("encode", (x, c, s))
    check_op("scaled_l2", (rows(x), c, s))
    check_op("aggregate", (assignment(x, c, s), rows(x), c))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, dtype: torch.dtype, last: bool) -> None:
    """The reference's [B, M, K, D] would be too large here: chunks of images through the products in float64."""
    x, c, s = make(*LARGE[name])
    x = x.to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    held = [t.cuda().requires_grad_() for t in (x, c, s)]
    grad = torch.randn(x.shape[0], *c.shape, generator=torch.Generator().manual_seed(1)).cuda()
    wide = [t.detach().double().requires_grad_() for t in held]
    positions = rows(wide[0])
    logits = wide[2] * torch.cdist(positions, wide[1].expand(x.shape[0], -1, -1)).square()
    assigned = logits.softmax(-1)
    wanted = assigned.transpose(1, 2) @ positions - assigned.sum(1).unsqueeze(-1) * wide[1]
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    before: list[Tensor] = []
    for _ in range(20):
        out = ops.encode(*held)
        results = [out.detach(), *torch.autograd.grad(out, held, grad)]
        for a, b in zip(before, results, strict=bool(before)):
            assert torch.equal(a, b)
        before = results
    assert before[1].stride() == x.stride()
    for what, g, w in zip(("result", "x", "codewords", "scale"), before, (wanted, *wanted_grads), strict=True):
        close(g, w.detach().cpu(), torch.float32, what)


def test_more_positions_than_65535() -> None:
    check_op("encode", make(1, 3, (257, 257), 2))
    check_op("encode", tuple(t.bfloat16() if i == 0 else t for i, t in enumerate(make(1, 24, (70_001,), 3))))


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(a.cpu().double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, truth, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_error_is_at_most_twice_that_of_the_direct_form(offset: float, spread: float) -> None:
    g = torch.Generator().manual_seed(5)
    c = offset + spread * torch.randn(16, 64, generator=g)
    x = offset + spread * torch.randn(2, 64, 24, 24, generator=g)
    s = -torch.rand(16, generator=g) / (64 * spread**2)
    grad = torch.randn(2, 16, 64, generator=g)
    truth = [reference.encode(x.double(), c.double(), s.double())]
    truth += _encode_backward(grad.double(), x.double(), c.double(), s.double())
    direct = errors([reference.encode(x, c, s), *_encode_backward(grad, x, c, s)], truth)
    held = [t.cuda() for t in (x, c, s)]
    ours = [ops.encode(*held), *torch.ops.rendseg._encode_backward(grad.cuda(), *held)]
    for what, mine, theirs in zip(("result", "x", "codewords", "scale"), errors(ours, truth), direct, strict=True):
        assert mine <= 2 * theirs + 4e-7, f"{what}: {mine:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("norm", [30.0, 500.0])
def test_large_norms_of_half_features(norm: float, dtype: torch.dtype) -> None:
    """Sums on tensor cores are cut off, not rounded; the softmax behind them must not notice. scale = -1."""
    g = torch.Generator().manual_seed(7)
    x = (torch.randn(1, 512, 24, 24, generator=g).relu() * (2 * norm / 512) ** 0.5).to(dtype)
    nearest = x.flatten(2)[0].t().float()[torch.randperm(576, generator=g)[:32]]
    c = nearest + 0.02 * torch.randn(32, 512, generator=g)
    truth = reference.encode(x.double(), c.double(), -torch.ones(32).double())
    got = ops.encode(x.cuda(), c.cuda(), -torch.ones(32).cuda())
    assert errors([got], [truth])[0] <= 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, dtype: torch.dtype) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    x = x.to(dtype)
    x[1, 7, 3, 4] = value
    got, wanted = ops.encode(x.cuda(), c.cuda(), s.cuda()), reference.encode(x, c, s)
    assert torch.equal(got.isnan().cpu(), wanted.isnan())
    assert got[1].isnan().all() and got[0].isfinite().all()


def test_gradient_of_scale_at_zero_is_finite() -> None:
    for dtype in (torch.float32, *HALVES):
        x, c, _ = make(2, 20, (12, 12), 6)
        held = [t.cuda().requires_grad_() for t in (x.to(dtype), c, torch.zeros(6))]
        ops.encode(*held).square().sum().backward()
        for t in held:
            assert t.grad is not None and t.grad.isfinite().all() and t.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_stream_and_graph(dtype: torch.dtype) -> None:
    x, c, s = (t.cuda() for t in make(2, 64, (33, 20), 32))
    x, grad = x.to(dtype), torch.randn(2, 32, 64, device="cuda")

    def both() -> list[Tensor]:
        return [torch.ops.rendseg.encode(x, c, s), *torch.ops.rendseg._encode_backward(grad, x, c, s)]

    expected = both()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for t in captured:
        t.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, wanted in zip(results, captured, expected, strict=True):
        assert torch.equal(a, wanted)
        assert torch.equal(b, wanted)


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, (3, 5)), (torch.bfloat16, (3, 5))], ids=str)
def test_launches(dtype: torch.dtype, launches: tuple[int, int]) -> None:
    from torch.profiler import ProfilerActivity, profile

    x, c, s = (t.cuda() for t in make(2, 64, (33, 20), 32))
    x, grad = x.to(dtype), torch.randn(2, 32, 64, device="cuda")
    calls = (
        lambda: torch.ops.rendseg.encode(x, c, s),
        lambda: torch.ops.rendseg._encode_backward(grad, x, c, s),
    )
    for call, wanted in zip(calls, launches, strict=True):
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as result:
            call()
            torch.cuda.synchronize()
        on_device = [e for e in result.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(on_device) == wanted, [e.name for e in on_device]


def test_memory_beyond_inputs_and_outputs_is_small() -> None:
    x, c, s = (t.cuda() for t in make(4, 512, (64, 128), 32))
    grad = torch.randn(4, 32, 512, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        features = x.to(dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = torch.ops.rendseg._encode_backward(grad, features, c, s)
        peak = torch.cuda.max_memory_allocated() - before - results[0].nbytes
        assert peak <= 20 << 20


@pytest.mark.bad_input
@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input(name: str) -> None:
    for case, op, kwargs, error, pattern in bad_inputs("cuda"):
        if f"{op}: {case}" == name:
            with pytest.raises(error, match=pattern):
                getattr(torch.ops.rendseg, op)(**kwargs())


@pytest.mark.bad_input
def test_tensors_on_different_devices() -> None:
    x, c, s = make(1, 4, (3, 3), 2)
    with pytest.raises(RuntimeError, match="codewords must be on the device of x"):
        torch.ops.rendseg.encode(x.cuda(), c, s)
