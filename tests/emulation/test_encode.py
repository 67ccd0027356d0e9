"""The CUDA encoding ops on the CPU: every sample, layout and dtype, forward and backward, in several orders."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rendseg import reference
from rendseg.reference.encode import _aggregate_backward, _encode_backward, _scaled_l2_backward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from cases_encode import bad_inputs, make, rows, samples  # noqa: E402

# Shared memory of a block on sm_90 and sm_80, on the smaller GPUs, and too little for any kernel on tensor cores.
SM_90, SM_80, DEFAULT_LIMIT, TOO_LITTLE = 232448, 166912, 101376, 32000
SAMPLES = {sample[0]: sample[1:] for sample in samples()}
BAD = {f"{op}: {name}": (op, kwargs, error, pattern) for name, op, kwargs, error, pattern in bad_inputs()}
BAD = {name: bad for name, bad in BAD.items() if "sparse" not in name}  # tensors that the dispatcher does not send here


def close(got: Tensor, wanted: Tensor, compute: torch.dtype, what: str = "result") -> None:
    """Within the rounding of the arithmetic (sums and a softmax behind them) and of the dtype, against the largest."""
    assert got.shape == wanted.shape, what
    if wanted.numel() == 0:
        return
    arithmetic = 1e-12 if compute == torch.float64 else 2e-5
    bound = (arithmetic + torch.finfo(got.dtype).eps) * max(wanted.abs().max().item(), 1e-3)
    error = (got.double() - wanted).abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_op(
    emulated, name: str, inputs: tuple[Tensor, ...], seeds: int = 2, shared_limit: int = DEFAULT_LIMIT
) -> None:
    """Forward and gradients against the reference in float64 on the same rounded inputs; the same bits for any seed."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = getattr(reference, name)(*wide)
    promoted = inputs[0].dtype
    for t in inputs[1:]:
        promoted = torch.promote_types(promoted, t.dtype)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(promoted)
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    before: list[Tensor] = []
    for seed in range(seeds):
        emulated.seed(seed)
        emulated.device(processors=3 + seed, shared_limit=shared_limit)
        got = getattr(emulated.ops, name)(*inputs)
        assert got.dtype == promoted
        assert got.is_contiguous()
        close(got, wanted.detach(), compute_dtype(*inputs))
        got_grads = getattr(emulated.ops, f"_{name}_backward")(grad, *inputs)
        for i, (g, w, t) in enumerate(zip(got_grads, wanted_grads, inputs, strict=True)):
            assert g.dtype == t.dtype
            if t.numel() > 0:
                assert g.stride() == (torch.empty_like(t).stride() if t.dim() > 2 else torch.empty(t.shape).stride())
            close(g, w, compute_dtype(*inputs), f"gradient of argument {i}")
        results = [got, *got_grads]
        for a, b in zip(before, results, strict=bool(before)):
            assert torch.equal(a, b)
        before = results


@pytest.mark.parametrize("name", SAMPLES)
def test_encode(emulated, name: str) -> None:
    check_op(emulated, "encode", SAMPLES[name], seeds=3)


@pytest.mark.parametrize("name", ["plain", "tiles", "one codeword", "channels_last", "sliced", "bfloat16 features"])
def test_encode_without_tensor_cores(emulated, name: str) -> None:
    check_op(emulated, "encode", SAMPLES[name], shared_limit=TOO_LITTLE)


@pytest.mark.parametrize("name", SAMPLES)
def test_scaled_l2(emulated, name: str) -> None:
    x, c, s = SAMPLES[name]
    check_op(emulated, "scaled_l2", (rows(x), c, s))


@pytest.mark.parametrize("name", SAMPLES)
def test_aggregate(emulated, name: str) -> None:
    x, c, s = SAMPLES[name]
    g = torch.Generator().manual_seed(3)
    a = torch.rand(x.shape[0], rows(x).shape[1], c.shape[0], generator=g).to(s.dtype)
    check_op(emulated, "aggregate", (a, rows(x), c))
    check_op(emulated, "aggregate", (a.transpose(1, 2).contiguous().transpose(1, 2), rows(x), c), seeds=1)


def test_sizes_that_need_memory_beyond_a_block(emulated) -> None:
    """Channels in several parts, rows of codes outside shared memory, many images."""
    check_op(emulated, "encode", make(1, 3001, (11,), 5), seeds=1)
    check_op(emulated, "encode", make(2, 5, (9,), 2101, torch.float64), seeds=1)
    x, c, s = make(1, 3001, (9,), 101)
    check_op(emulated, "scaled_l2", (rows(x), c, s), seeds=1)
    check_op(emulated, "encode", make(300, 6, (3,), 4), seeds=1)


def test_more_positions_than_65535(emulated) -> None:
    check_op(emulated, "encode", make(1, 3, (257, 257), 2), seeds=1)


# ---- Numbers


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, truth, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("limit", [DEFAULT_LIMIT, TOO_LITTLE], ids=["tensor cores", "without"])
def test_error_is_at_most_twice_that_of_the_direct_form(emulated, limit: int, spread: float, offset: float) -> None:
    """Codewords and features far from zero: an expanded square would lose every digit."""
    emulated.device(shared_limit=limit)
    g = torch.Generator().manual_seed(5)
    c = offset + spread * torch.randn(16, 64, generator=g)
    x = offset + spread * torch.randn(2, 64, 12, 24, generator=g)
    s = -torch.rand(16, generator=g) / (64 * spread**2)
    grad = torch.randn(2, 16, 64, generator=g)
    truth = [reference.encode(x.double(), c.double(), s.double())]
    truth += _encode_backward(grad.double(), x.double(), c.double(), s.double())
    direct = errors([reference.encode(x, c, s), *_encode_backward(grad, x, c, s)], truth)
    got = [emulated.ops.encode(x, c, s)]
    before = emulated.launches()
    got += emulated.ops._encode_backward(grad, x, c, s)
    assert emulated.launches() - before == (3 if limit == TOO_LITTLE else 5)
    ours = errors(got, truth)
    for what, mine, theirs in zip(("result", "x", "codewords", "scale"), ours, direct, strict=True):
        assert mine <= 2 * theirs + 4e-7, f"{what}: {mine:.3g} against {theirs:.3g}"


def test_features_on_the_codewords(emulated) -> None:
    """Distances of exactly zero, beside large ones."""
    _, c, s = make(1, 32, (1,), 8)
    c = c * 50
    x = c.t().unsqueeze(0).repeat(1, 1, 13).contiguous()
    distance = emulated.ops.scaled_l2(rows(x), c, torch.ones(8))
    own = torch.arange(8).repeat(13)
    assert (distance[0, torch.arange(104), own] == 0).all()
    assert (distance >= 0).all()
    check_op(emulated, "encode", (x, c, s), seeds=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_the_reference(emulated, value: float) -> None:
    ops = emulated.ops
    x, c, s = make(2, 20, (12, 12), 6)
    poisoned = x.clone()
    poisoned[1, 7, 3, 4] = value
    got, wanted = ops.encode(poisoned, c, s), reference.encode(poisoned, c, s)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got[1].isnan().all() and got[0].isfinite().all()

    a = torch.rand(2, 144, 6)
    grad_a, grad_e = torch.randn(2, 144, 6), torch.randn(2, 6, 20)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (ops.scaled_l2, reference.scaled_l2, (rows(poisoned), c, s)),
        (ops.aggregate, reference.aggregate, (a, rows(poisoned), c)),
    ]
    codewords = c.clone()
    codewords[2, 5] = value
    pairs += [
        (ops.scaled_l2, reference.scaled_l2, (rows(x), codewords, s)),
        (ops.aggregate, reference.aggregate, (a, rows(x), codewords)),
    ]
    for function, other, inputs in pairs:
        torch.testing.assert_close(function(*inputs), other(*inputs), equal_nan=True, rtol=1e-4, atol=1e-4)
    for function, other, inputs in (
        (ops._scaled_l2_backward, _scaled_l2_backward, (grad_a, rows(poisoned), c, s)),
        (ops._aggregate_backward, _aggregate_backward, (grad_e, a, rows(poisoned), c)),
    ):
        for g, w in zip(function(*inputs), other(*inputs), strict=True):
            torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-4, atol=1e-3)
    if math.isnan(value):
        assert ops.encode(x, codewords, s).isnan().all()
    scale = s.clone()
    scale[0] = math.nan
    assert ops.encode(x, c, scale).isnan().all()


def test_nan_gradients_spread_as_in_the_reference(emulated) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    x[1, 7, 3, 4] = math.nan
    grad = torch.randn(2, 6, 20)
    got, wanted = emulated.ops._encode_backward(grad, x, c, s), _encode_backward(grad, x, c, s)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.isnan(), w.isnan())


def test_gradient_of_scale_at_zero_is_finite(emulated) -> None:
    x, c, _ = make(2, 20, (12, 12), 6)
    for g in emulated.ops._encode_backward(torch.randn(2, 6, 20), x, c, torch.zeros(6)):
        assert g.isfinite().all() and g.abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 0), (0, 4, 0), (2, 0, 3, 5)])
def test_empty(emulated, shape: tuple[int, ...]) -> None:
    x, c, s = torch.ones(shape), torch.ones(6, shape[1]), torch.ones(6)
    before = emulated.launches()
    out = emulated.ops.encode(x, c, s)
    assert out.shape == (shape[0], 6, shape[1]) and (out == 0).all()
    gx, gc, gs = emulated.ops._encode_backward(torch.ones_like(out), x, c, s)
    assert gx.shape == x.shape and (gc == 0).all() and (gs == 0).all()
    a = emulated.ops.scaled_l2(rows(x), c, s)
    assert (a == 0).all()
    assert emulated.ops.aggregate(a, rows(x), c).shape == (shape[0], 6, shape[1])
    assert emulated.launches() == before


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(emulated, name: str) -> None:
    op, kwargs, error, pattern = BAD[name]
    with pytest.raises(error, match=pattern):
        getattr(emulated.ops, op)(**kwargs())


# ---- Tensor cores: at most 32 codewords and 512 channels

HALVES = [torch.float16, torch.bfloat16]


def features(
    batch: int, channels: int, size: tuple[int, ...], codes: int, dtype: torch.dtype, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, c, s = make(batch, channels, size, codes)
    x = x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x, c, s


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, (12, 16), 32),  # the main case: all slices, whole tiles, 16-byte copies
        (2, 48, (9, 24), 19),  # warps without channels, several chunks, a tail of positions in 16-byte copies
        (3, 130, (7, 11), 31),  # nothing aligned
        (1, 16, (1, 8), 1),
    ],
    ids=str,
)
def test_tensor_cores(emulated, shape, dtype: torch.dtype, last: bool) -> None:
    inputs = features(*shape, dtype, last)
    wide = [t.double().requires_grad_() for t in inputs]
    wanted = reference.encode(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    results, gradients = [], []
    for seed, limit in enumerate((SM_90, SM_80, DEFAULT_LIMIT)):  # two large tiles, two small ones, one
        emulated.seed(seed)
        emulated.device(shared_limit=limit)
        results.append(emulated.ops.encode(*inputs))
        assert torch.equal(results[0], results[-1])  # the size of a tile leaves the order of the sums alone
        before = emulated.launches()
        grads = emulated.ops._encode_backward(grad, *inputs)
        gradients.append(grads)
        if emulated.launches() - before == 5:
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], grads, strict=True))
        else:
            assert shape[1] == 512 and limit == DEFAULT_LIMIT  # too little for the tables of so many channels
        for what, got, want in zip(("x", "codewords", "scale"), grads, wanted_grads, strict=True):
            close(got, want, torch.float32, what)
        assert grads[0].stride() == inputs[0].stride()
    close(results[0], wanted.detach(), torch.float32)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, (12, 16), 32),  # the main case
        (2, 48, (9, 24), 19),  # warps without channels, several chunks, a tail of positions in 16-byte copies
        (3, 130, (7, 11), 31),  # nothing aligned
        (2, 33, (5, 13), 2),
        (1, 16, (1, 8), 1),
        (2, 320, (3, 7), 8),
    ],
    ids=str,
)
def test_float32_on_tensor_cores(emulated, shape, last: bool) -> None:
    inputs = features(*shape, torch.float32, last)
    wide = [t.double().requires_grad_() for t in inputs]
    wanted = reference.encode(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    results = []
    for seed, limit in enumerate((SM_90, SM_80)):
        emulated.seed(seed)
        emulated.device(shared_limit=limit)
        results.append(emulated.ops.encode(*inputs))
        assert torch.equal(results[0], results[-1])  # two tiles under way, and one
        before = emulated.launches()
        grads = emulated.ops._encode_backward(grad, *inputs)
        # Backward at 512 channels needs more than sm_80 has.
        assert emulated.launches() - before == (3 if shape[1] == 512 and limit == SM_80 else 5)
        for what, got, want in zip(("x", "codewords", "scale"), grads, wanted_grads, strict=True):
            close(got, want, torch.float32, what)
        assert grads[0].stride() == inputs[0].stride()
    close(results[0], wanted.detach(), torch.float32)


def test_float32_on_tensor_cores_has_the_same_bits_in_any_order(emulated) -> None:
    for last in (False, True):
        inputs = features(2, 70, (9, 16), 21, torch.float32, last)
        check_op(emulated, "encode", inputs, seeds=4, shared_limit=SM_90)


def test_float32_at_any_magnitude(emulated) -> None:
    for magnitude in (1e-6, 1e-3, 1e6):
        x, c, s = make(1, 40, (192,), 9)
        inputs = x * magnitude, c * magnitude, s / magnitude**2
        grad = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(4)) * magnitude
        wide = [t.double() for t in inputs]
        got = [emulated.ops.encode(*inputs), *emulated.ops._encode_backward(grad, *inputs)]
        truth = [reference.encode(*wide), *_encode_backward(grad.double(), *wide)]
        assert max(errors(got, truth)) <= 3e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("norm", "offset"), [(30.0, 0.0), (500.0, 0.0), (30.0, 10.0)])
def test_tensor_cores_are_exact_enough(emulated, norm: float, offset: float, dtype: torch.dtype) -> None:
    """Steep scales, features near codewords, and an offset common to all, of which the reference codeword rids us."""
    g = torch.Generator().manual_seed(7)
    x = (offset + torch.randn(1, 128, 96, generator=g).relu() * (2 * norm / 128) ** 0.5).to(dtype)
    c = x[0, :, torch.randperm(96, generator=g)[:24]].t().float() + 0.05 * torch.randn(24, 128, generator=g)
    s = -torch.ones(24)
    truth = reference.encode(x.double(), c.double(), s.double())
    got = emulated.ops.encode(x, c, s)
    assert errors([got], [truth])[0] <= (2e-4 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensor_cores_spread_nan_and_infinity_as_the_reference(emulated, value: float, dtype: torch.dtype) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    x, grad = x.to(dtype), torch.randn(2, 6, 20)
    poisoned = x.clone()
    poisoned[1, 7, 3, 4] = value
    got, wanted = emulated.ops.encode(poisoned, c, s), reference.encode(poisoned, c, s)
    assert torch.equal(got.isnan(), wanted.isnan())
    if math.isnan(value):
        got_grads = emulated.ops._encode_backward(grad, poisoned, c, s)
        for g, w in zip(got_grads, _encode_backward(grad, poisoned, c, s), strict=True):
            assert torch.equal(g.isnan(), w.isnan())
    codewords = c.clone()
    codewords[2, 5] = value
    got, wanted = emulated.ops.encode(x, codewords, s), reference.encode(x, codewords, s)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-2, 1e4])
def test_tensor_cores_at_any_magnitude(emulated, magnitude: float, dtype: torch.dtype) -> None:
    """Codewords, gradients and their products beyond the range of float16, and tiles of growing gradients."""
    x, c, s = make(1, 40, (192,), 9)
    x = x * torch.linspace(0.05, 2, 192)
    inputs = (x * min(magnitude, 1e3)).to(dtype), c * min(magnitude, 1e3), s / min(magnitude, 1e3) ** 2
    grad = torch.randn(1, 9, 40) * magnitude
    got, truth = emulated.ops.encode(*inputs), reference.encode(*(t.double() for t in inputs))
    assert errors([got], [truth])[0] <= 2e-5
    grads = emulated.ops._encode_backward(grad, *inputs)
    wanted = _encode_backward(grad.double(), *(t.double() for t in inputs))
    for g, w in list(zip(grads, wanted, strict=True))[1:]:
        assert errors([g], [w])[0] <= 1e-4
    error = (grads[0].double() - wanted[0]).abs().max()
    assert error <= torch.finfo(dtype).eps * wanted[0].abs().max() + torch.finfo(dtype).smallest_normal
