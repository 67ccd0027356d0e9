from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _common import close
from cases_encode import bad_inputs, make, rows, samples
from torch import Tensor, library

import rendseg
from rendseg import _extension, ops, reference
from rendseg.reference.encode import _aggregate_backward, _encode_backward, _scaled_l2_backward

SAMPLES = {sample[0]: sample[1:] for sample in samples()}
BAD = {f"{op}: {name}": (op, kwargs, error, pattern) for name, op, kwargs, error, pattern in bad_inputs()}


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def check_op(name: str, inputs: tuple[Tensor, ...], seed: int = 1) -> None:
    """Forward and gradients of ``ops.<name>`` against the reference in float64 on the same rounded inputs."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = getattr(reference, name)(*wide)
    held = [t.detach().requires_grad_() for t in inputs]  # the very strides of the sample
    got = getattr(ops, name)(*held)
    promoted = inputs[0].dtype
    for t in inputs[1:]:
        promoted = torch.promote_types(promoted, t.dtype)
    assert got.dtype == promoted
    assert got.is_contiguous()
    close(got, wanted.detach(), compute_dtype(*inputs))
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed)).to(got.dtype)
    got_grads = torch.autograd.grad(got, held, grad)
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    for i, (g, w, t) in enumerate(zip(got_grads, wanted_grads, inputs, strict=True)):
        assert g.dtype == t.dtype
        close(g, w, compute_dtype(*inputs), f"gradient of argument {i}")


# ---- The reference against facts of its own


def test_reference_is_the_written_sum() -> None:
    x, c, s = make(2, 3, (2, 2), 4, torch.float64)
    wanted = torch.zeros(2, 4, 3, dtype=torch.float64)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                logits = [
                    float(s[k]) * sum((float(x[b, d, i, j]) - float(c[k, d])) ** 2 for d in range(3)) for k in range(4)
                ]
                total = sum(math.exp(v) for v in logits)
                for k in range(4):
                    for d in range(3):
                        residual = float(x[b, d, i, j]) - float(c[k, d])
                        wanted[b, k, d] += math.exp(logits[k]) / total * residual
    torch.testing.assert_close(reference.encode(x, c, s), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.encode(x.flatten(2), c, s), wanted, rtol=1e-12, atol=1e-12)


def test_scaled_l2_is_the_squared_distance(isa: str) -> None:
    x, c, s = make(2, 17, (150,), 9, torch.float64)
    wanted = s * torch.cdist(rows(x).contiguous(), c, compute_mode="donot_use_mm_for_euclid_dist").square()
    for function in (ops.scaled_l2, reference.scaled_l2):
        torch.testing.assert_close(function(rows(x), c, s), wanted, rtol=1e-12, atol=1e-12)


def test_one_codeword_sums_the_residuals(isa: str) -> None:
    x, c, s = make(2, 12, (11, 13), 1)
    wanted = (x.double().flatten(2) - c.double().t()).sum(2).unsqueeze(1)
    close(ops.encode(x, c, s), wanted, torch.float32)
    close(reference.encode(x, c, s), wanted, torch.float32)


def test_zero_scale_spreads_evenly_and_steep_scale_takes_the_nearest(isa: str) -> None:
    x, c, s = make(1, 6, (9, 9), 5)
    residual = rows(x.double()).unsqueeze(2) - c.double()
    close(ops.encode(x, c, torch.zeros(5)), residual.sum(1) / 5, torch.float32)
    nearest = residual.square().sum(-1).argmin(-1)
    hard = torch.zeros(1, 5, 6, dtype=torch.float64)
    for m in range(81):
        hard[0, nearest[0, m]] += residual[0, m, nearest[0, m]]
    close(ops.encode(x, c, torch.full((5,), -1e5)), hard, torch.float32)


@pytest.mark.parametrize("name", ["plain", "one codeword", "zero scale", "positive scale", "flat", "channels_last"])
def test_gradient_formulas_are_those_of_autograd(name: str) -> None:
    x, c, s = (t.double() for t in SAMPLES[name])
    a = torch.rand(x.shape[0], rows(x).shape[1], c.shape[0], dtype=torch.float64)
    for function, formula, inputs in (
        (reference.encode, _encode_backward, (x, c, s)),
        (reference.scaled_l2, _scaled_l2_backward, (rows(x), c, s)),
        (reference.aggregate, _aggregate_backward, (a, rows(x), c)),
    ):
        inputs = leaves(*inputs)
        out = function(*inputs)
        grad = torch.randn_like(out)
        for got, wanted in zip(formula(grad, *inputs), torch.autograd.grad(out, inputs, grad), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# ---- The ops against the reference


@pytest.mark.parametrize("name", SAMPLES)
def test_encode(name: str, isa: str) -> None:
    check_op("encode", SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_scaled_l2(name: str, isa: str) -> None:
    x, c, s = SAMPLES[name]
    check_op("scaled_l2", (rows(x), c, s))


@pytest.mark.parametrize("name", SAMPLES)
def test_aggregate(name: str, isa: str) -> None:
    x, c, s = SAMPLES[name]
    g = torch.Generator().manual_seed(3)
    a = torch.rand(x.shape[0], rows(x).shape[1], c.shape[0], generator=g).to(s.dtype)
    check_op("aggregate", (a, rows(x), c))
    check_op("aggregate", (a.transpose(1, 2).contiguous().transpose(1, 2), rows(x), c))


def test_more_positions_than_65535(isa: str) -> None:
    x, c, s = make(1, 3, (257, 257), 2)
    assert x.shape[2] * x.shape[3] > 65_535
    check_op("encode", (x, c, s))
    x, c, s = make(1, 2, (70_001,), 3)
    check_op("encode", (x, c, s))


def test_layouts_give_the_same_bits(isa: str) -> None:
    x, c, s = make(2, 70, (17, 13), 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        contiguous = x.to(dtype).requires_grad_()
        last = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        a, b = ops.encode(contiguous, c, s), ops.encode(last, c, s)
        if isa != "none":  # plain PyTorch sums in another order for other strides
            assert torch.equal(a, b)
        ga, gb = torch.autograd.grad(a.sum(), contiguous)[0], torch.autograd.grad(b.sum(), last)[0]
        if isa != "none":
            assert torch.equal(ga, gb)
        assert ga.is_contiguous()
        assert gb.is_contiguous(memory_format=torch.channels_last)


# ---- Numbers


def errors(function: Any, x: Tensor, c: Tensor, s: Tensor, grad: Tensor) -> list[float]:
    """Largest errors of the result and of the three gradients against float64."""
    wide = leaves(x.double(), c.double(), s.double())
    truth = reference.encode(*wide)
    truths = [truth.detach(), *torch.autograd.grad(truth, wide, grad.double())]
    held = leaves(x, c, s)
    out = function(*held)
    got = [out.detach(), *torch.autograd.grad(out, held, grad)]
    return [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, truths, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_error_is_at_most_twice_that_of_the_direct_form(offset: float, spread: float, isa: str) -> None:
    """Codewords and features far from zero: an expanded square would lose every digit."""
    g = torch.Generator().manual_seed(5)
    c = offset + spread * torch.randn(16, 64, generator=g)
    x = offset + spread * torch.randn(2, 64, 24, 24, generator=g)
    s = -torch.rand(16, generator=g) / (64 * spread**2)
    grad = torch.randn(2, 16, 64, generator=g)
    ours, direct = errors(ops.encode, x, c, s, grad), errors(reference.encode, x, c, s, grad)
    for what, mine, theirs in zip(("result", "x", "codewords", "scale"), ours, direct, strict=True):
        assert mine <= 2 * theirs + 4e-7, f"{what}: {mine:.3g} against {theirs:.3g}"


def test_features_on_the_codewords(isa: str) -> None:
    """Distances of exactly zero, beside large ones."""
    _, c, s = make(1, 32, (1,), 8)
    c = c * 50
    x = c.t().unsqueeze(0).repeat(1, 1, 13).contiguous()
    distance = ops.scaled_l2(rows(x), c, torch.ones(8))
    own = torch.arange(8).repeat(13)
    assert (distance[0, torch.arange(104), own] == 0).all()
    assert (distance >= 0).all()
    check_op("encode", (x, c, s))


def test_a_few_features_on_the_codewords(isa: str) -> None:
    """In the middle of images whose other positions lie far from them, so that a kernel may change its form there."""
    x, c, s = make(32, 8, (400,), 8)
    x[:, :, 150:158] = c.t() + 1e-3 * x[:, :, 150:158]
    check_op("encode", (5 * x, 5 * c, s))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, isa: str) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    poisoned = x.clone()
    poisoned[1, 7, 3, 4] = value
    got, wanted = ops.encode(poisoned, c, s), reference.encode(poisoned, c, s)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got[1].isnan().all() and got[0].isfinite().all()

    got, wanted = ops.scaled_l2(rows(poisoned), c, s), reference.scaled_l2(rows(poisoned), c, s)
    torch.testing.assert_close(got, wanted, equal_nan=True)

    a = torch.rand(2, 144, 6)
    got, wanted = ops.aggregate(a, rows(poisoned), c), reference.aggregate(a, rows(poisoned), c)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)

    codewords = c.clone()
    codewords[2, 5] = value
    got, wanted = ops.scaled_l2(rows(x), codewords, s), reference.scaled_l2(rows(x), codewords, s)
    torch.testing.assert_close(got, wanted, equal_nan=True)
    got, wanted = ops.aggregate(a, rows(x), codewords), reference.aggregate(a, rows(x), codewords)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)
    if math.isnan(value):
        assert ops.encode(x, codewords, s).isnan().all()

    scale = s.clone()
    scale[0] = math.nan
    assert ops.encode(x, c, scale).isnan().all()


@pytest.mark.parametrize("where", ["x", "grad"])
def test_nan_gradients_spread_as_in_the_reference(where: str, isa: str) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    grad = torch.randn(2, 6, 20)
    if where == "x":
        x[1, 7, 3, 4] = math.nan
    else:
        grad[1, 3, 7] = math.inf
    got = torch.ops.rendseg._encode_backward(grad, x, c, s)
    wanted = _encode_backward(grad, x, c, s)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.isnan(), w.isnan())


def test_gradient_of_scale_at_zero_is_finite(isa: str) -> None:
    x, c, _ = make(2, 20, (12, 12), 6)
    inputs = leaves(x, c, torch.zeros(6))
    ops.encode(*inputs).square().sum().backward()
    for t in inputs:
        assert t.grad is not None and t.grad.isfinite().all() and t.grad.abs().max() > 0


# ---- Empty


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 0), (0, 4, 0), (2, 0, 3, 5)])
def test_empty(shape: tuple[int, ...], isa: str) -> None:
    x = torch.ones(shape, requires_grad=True)
    c, s = torch.ones(6, shape[1], requires_grad=True), torch.ones(6, requires_grad=True)
    out = ops.encode(x, c, s)
    assert out.shape == (shape[0], 6, shape[1]) and (out == 0).all()
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert (c.grad == 0).all() and (s.grad == 0).all()
    a = ops.scaled_l2(rows(x), c, s)
    assert (a == 0).all() or shape[1] > 0
    assert ops.aggregate(a, rows(x), c).shape == (shape[0], 6, shape[1])


# ---- Reproducible


def _all_results(x: Tensor, c: Tensor, s: Tensor) -> list[Tensor]:
    r = rows(x)
    g = torch.Generator().manual_seed(7)
    e = torch.randn(x.shape[0], c.shape[0], x.shape[1], generator=g)
    a = torch.rand(x.shape[0], r.shape[1], c.shape[0], generator=g)
    private = torch.ops.rendseg
    return [
        ops.encode(x, c, s),
        ops.scaled_l2(r, c, s),
        ops.aggregate(a, r, c),
        *private._encode_backward(e, x, c, s),
        *private._scaled_l2_backward(a, r, c, s),
        *private._aggregate_backward(e, a, r, c),
    ]


@pytest.mark.skipif(_extension.C is None, reason="plain PyTorch promises no bits")
def test_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for shape in ((2, 40, (61, 53), 32), (1, 600, (31, 29), 40)):
            x, c, s = make(*shape)
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(_all_results(x, c, s))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_inputs_are_left_as_they_were(isa: str) -> None:
    x, c, s = make(2, 37, (11, 13), 5)
    copies = [t.clone() for t in (x, c, s)]
    _all_results(x, c, s)
    for t, copy in zip((x, c, s), copies, strict=True):
        assert torch.equal(t, copy)


# ---- The op as PyTorch sees it


def _op_inputs(
    dtype: torch.dtype, batch: int = 2, channels: int = 4, size: tuple[int, ...] = (3, 5), codes: int = 3
) -> Any:
    x, c, s = make(batch, channels, size, codes, dtype)
    a = torch.rand(batch, math.prod(size), codes, dtype=dtype)
    return {
        "encode": leaves(x, c, s),
        "scaled_l2": leaves(rows(x), c, s),
        "aggregate": leaves(a, rows(x), c),
    }


@pytest.mark.gradcheck
@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
@pytest.mark.parametrize("shape", [(2, 4, (3, 5), 3), (1, 1, (2, 2), 1), (1, 13, (2, 50), 2), (2, 3, (4,), 18)])
def test_gradcheck(name: str, shape: Any, isa: str) -> None:
    inputs = _op_inputs(torch.float64, *shape)[name]
    assert torch.autograd.gradcheck(getattr(ops, name), inputs, fast_mode=math.prod(shape[2]) > 20)


@pytest.mark.gradcheck
def test_gradcheck_channels_last_and_zero_scale(isa: str) -> None:
    x, c, _ = make(2, 4, (3, 5), 3, torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    scale = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.encode, (x, c.requires_grad_(), scale))


@pytest.mark.opcheck
@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    inputs = _op_inputs(dtype)[name]
    library.opcheck(getattr(torch.ops.rendseg, name).default, tuple(inputs))


@pytest.mark.opcheck
@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
def test_opcheck_of_the_gradients(name: str) -> None:
    inputs = [t.detach() for t in _op_inputs(torch.float32)[name]]
    grad = torch.ones_like(getattr(ops, name)(*inputs))
    op = getattr(torch.ops.rendseg, f"_{name}_backward").default
    library.opcheck(op, (grad, *inputs))


@pytest.mark.opcheck
def test_opcheck_layouts_and_mixed_dtypes() -> None:
    x, c, s = make(2, 4, (3, 5), 3)
    for features in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[:, :, :2],
        x.bfloat16(),
        x.flatten(2),
        x[:0],
    ):
        library.opcheck(torch.ops.rendseg.encode.default, tuple(leaves(features, c, s)))


@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
def test_compile_without_a_graph_break(name: str) -> None:
    inputs = _op_inputs(torch.float32, 2, 8, (5, 6), 4)[name]
    function = getattr(ops, name)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
            return ops.encode(x, c, s)

    x, c, s = make(2, 8, (5, 6), 4)
    sizes = {"x": {2: torch.export.Dim("H"), 3: torch.export.Dim("W")}, "c": None, "s": None}
    program = torch.export.export(Layer(), (x, c, s), dynamic_shapes=sizes)
    assert any("rendseg.encode" in str(node.target) for node in program.graph.nodes)
    other = make(2, 8, (9, 7), 4)[0]
    torch.testing.assert_close(program.module()(other, c, s), ops.encode(other, c, s))


@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
def test_meta(name: str) -> None:
    inputs = _op_inputs(torch.float32)[name]
    wanted = getattr(ops, name)(*inputs)
    got = getattr(ops, name)(*(t.detach().to("meta") for t in inputs))
    assert got.device.type == "meta" and got.shape == wanted.shape and got.dtype == wanted.dtype


def test_autocast_takes_inputs_as_they_come() -> None:
    x, c, s = make(2, 16, (6, 7), 5)
    plain = ops.encode(x, c, s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.encode(x, c, s), plain)
        held = leaves(x.bfloat16(), c, s)
        mixed = ops.encode(*held)
        assert mixed.dtype == torch.float32
        mixed.sum().backward()
    assert [t.grad.dtype for t in held] == [torch.bfloat16, torch.float32, torch.float32]
    close(mixed, reference.encode(*(t.detach().double() for t in held)), torch.float32)


@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
def test_second_derivative_is_refused(name: str) -> None:
    inputs = _op_inputs(torch.float64)[name]
    (grad,) = torch.autograd.grad(getattr(ops, name)(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        grad.sum().backward()
    with rendseg.backend("reference"):
        assert torch.autograd.gradgradcheck(getattr(ops, name), inputs, fast_mode=True)


def test_checkpoint() -> None:
    inputs = leaves(*make(2, 16, (6, 7), 5))
    wanted = torch.autograd.grad(ops.encode(*inputs).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(ops.encode, *inputs, use_reentrant=False)
    for g, w in zip(torch.autograd.grad(again.square().sum(), inputs), wanted, strict=True):
        assert torch.equal(g, w)


def test_gradients_of_some_arguments_only() -> None:
    x, c, s = make(2, 16, (6, 7), 5)
    held = x.clone().requires_grad_()
    ops.encode(held, c, s).sum().backward()
    assert held.grad is not None
    scale = s.clone().requires_grad_()
    ops.encode(x, c, scale).square().sum().backward()
    assert scale.grad is not None


def test_backend_reference_is_plain_pytorch() -> None:
    x, c, s = make(2, 16, (6, 7), 5)
    with rendseg.backend("reference"):
        assert torch.equal(ops.encode(x, c, s), reference.encode(x, c, s))


@pytest.mark.skipif(_extension.C is None, reason="needs the compiled kernels")
def test_no_large_temporaries() -> None:
    """Nothing of the size of [B, M, K, D], of [B, M, D] or of [B, M, K] is allocated by PyTorch."""
    x, c, s = make(1, 128, (128, 128), 32)
    limit = min(x.numel(), 128 * 128 * 32) * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        out = ops.encode(x, c, s)
    used = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert out.numel() * 4 <= used < limit + 2**20


# ---- Bad input


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    op, kwargs, error, pattern = BAD[name]
    formulas = {
        "_encode_backward": _encode_backward,
        "_scaled_l2_backward": _scaled_l2_backward,
        "_aggregate_backward": _aggregate_backward,
    }
    callers = [getattr(torch.ops.rendseg, op)]
    callers += [formulas[op]] if op in formulas else [getattr(reference, op), getattr(ops, op)]
    for function in callers:
        with pytest.raises(error, match=pattern):
            function(**kwargs())


@pytest.mark.bad_input
def test_tensors_on_two_devices() -> None:
    x, c, s = make(2, 16, (6, 7), 5)
    with pytest.raises(RuntimeError, match=r"codewords must be on the device of x \(cpu\), got meta"):
        reference.encode(x, c.to("meta"), s)
    with pytest.raises(RuntimeError, match=r"must be on the device of x|on the device|same device"):
        ops.encode(x, c.to("meta"), s)
