"""The Triton kernels of encode, scaled_l2 and aggregate, called directly, against the reference in float64.

The interpreter multiplies in float32 or better, whatever ``input_precision`` says, and runs the threads of a program in
step: what three TF32 products lose, and races, only a GPU can show.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from _triton import DEVICE, INTERPRETED, TRITON, implementation, to_device
from cases_encode import bad_inputs, make, rows, samples
from test_encode import close, compute_dtype, leaves
from torch import Tensor

from rendseg import reference
from rendseg.reference.encode import _aggregate_backward, _encode_backward, _scaled_l2_backward

pytest.importorskip("triton")
pytestmark = TRITON

# Fewer positions where channels or codewords are many: the interpreter takes its time.
SAMPLES = {sample[0]: sample[1:] for sample in samples()} | {
    "many channels": make(1, 515, (5, 7), 32),
    "many codewords": make(1, 18, (5, 7), 600),
}
BAD = {f"{op}: {name}": (op, kwargs, error, pattern) for name, op, kwargs, error, pattern in bad_inputs(DEVICE)}
FORMULAS = {"encode": _encode_backward, "scaled_l2": _scaled_l2_backward, "aggregate": _aggregate_backward}


def run(op: str, *inputs: Tensor) -> Any:
    """The launcher's results, on the CPU."""
    results = implementation("encode", op)(*(to_device(t) for t in inputs))
    return results.cpu() if isinstance(results, Tensor) else tuple(t.cpu() for t in results)


def grad_for(op: str, inputs: tuple[Tensor, ...], seed: int = 1) -> Tensor:
    """A gradient for the result, in its dtype."""
    dtype = inputs[0].dtype
    for t in inputs[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    shape = getattr(reference, op)(*(t.to("meta") for t in inputs)).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_op(op: str, inputs: tuple[Tensor, ...]) -> None:
    """Result and gradients of ``op`` against the reference in float64 on the same rounded inputs."""
    wide = tuple(t.double() for t in inputs)
    grad = grad_for(op, inputs)
    got = run(op, *inputs)
    assert got.dtype == grad.dtype
    assert got.is_contiguous()
    close(got, getattr(reference, op)(*wide), compute_dtype(*inputs))
    got_grads, wanted_grads = run(f"_{op}_backward", grad, *inputs), FORMULAS[op](grad.double(), *wide)
    for i, (g, w, t) in enumerate(zip(got_grads, wanted_grads, inputs, strict=True)):
        assert g.dtype == t.dtype
        assert g.stride() == torch.empty_like(t if t.dim() > 2 else t.contiguous()).stride()
        close(g, w, compute_dtype(*inputs), f"gradient of argument {i}")


def inputs_of(op: str, x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """What ``op`` takes, made of what encode takes."""
    if op == "encode":
        return x, c, s
    if op == "scaled_l2":
        return rows(x), c, s
    g = torch.Generator().manual_seed(3)
    return torch.rand(x.shape[0], rows(x).shape[1], c.shape[0], generator=g).to(s.dtype), rows(x), c


# ---- Against the reference


# aggregate takes no scale.
@pytest.mark.parametrize(
    "name, op", [(name, op) for name in SAMPLES for op in FORMULAS if op != "aggregate" or "scale" not in name]
)
def test_samples(name: str, op: str) -> None:
    check_op(op, inputs_of(op, *SAMPLES[name]))


@pytest.mark.parametrize("op", FORMULAS)
@pytest.mark.parametrize("name", ["odd", "sliced", "float16", "float64 features, channels_last", "many codewords"])
def test_several_tiles_of_a_chunk(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes get a tile for each chunk; here a chunk has all."""
    monkeypatch.setattr("rendseg.kernels._encode_common._PROGRAMS", 1)
    check_op(op, inputs_of(op, *SAMPLES[name]))


def test_offsets_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    for part in ("forward", "backward"):
        monkeypatch.setattr(f"rendseg.kernels._encode_{part}.index_of", lambda *_: tl.int64)
    for name in ("plain", "sliced", "channels_last"):
        check_op("encode", SAMPLES[name])


def test_assignment_and_gradients_of_any_strides() -> None:
    a, r, c = inputs_of("aggregate", *make(2, 24, (13, 9), 7))
    check_op("aggregate", (a.transpose(1, 2).contiguous().transpose(1, 2), r, c))
    x, c, s = make(2, 24, (13, 9), 7)
    flat = torch.ones(()).expand(2, 7, 24)
    for op, grad, inputs in (
        ("encode", flat, (x, c, s)),
        ("encode", torch.randn(2, 24, 7).transpose(1, 2), (x, c, s)),
        ("scaled_l2", torch.ones(()).expand(2, 117, 7), (r, c, s)),
        ("aggregate", flat, (a, r, c)),
    ):
        wanted = FORMULAS[op](grad.double(), *(t.double() for t in inputs))
        for g, w in zip(run(f"_{op}_backward", grad, *inputs), wanted, strict=True):
            close(g, w, torch.float32)


def test_more_positions_than_65535(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # a thousand tiles would take a minute
        from rendseg.kernels import _encode_common

        tile = _encode_common._tile
        monkeypatch.setattr(_encode_common, "_tile", lambda *a, **k: dataclasses.replace(tile(*a, **k), positions=1024))
    check_op("encode", make(1, 2, (66_001,), 3))


def test_codewords_of_every_tile() -> None:
    for codes in (16, 17, 64, 128, 200, 512):
        check_op("encode", make(1, 20, (3, 11), codes))


# ---- Numbers


def errors(results: list[Tensor], truths: list[Tensor]) -> list[float]:
    pairs = zip(results, truths, strict=True)
    return [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_an_offset_costs_no_digits(offset: float, spread: float) -> None:
    """Codewords and features far from zero: an expanded square would lose every digit."""
    g = torch.Generator().manual_seed(5)
    c = offset + spread * torch.randn(16, 64, generator=g)
    x = offset + spread * torch.randn(2, 64, 12, 14, generator=g)
    s = -torch.rand(16, generator=g) / (64 * spread**2)
    grad = torch.randn(2, 16, 64, generator=g)
    wide = [t.double() for t in (x, c, s)]
    truths = [reference.encode(*wide), *_encode_backward(grad.double(), *wide)]
    ours = errors([run("encode", x, c, s), *run("_encode_backward", grad, x, c, s)], truths)
    direct = errors([reference.encode(x, c, s), *_encode_backward(grad, x, c, s)], truths)
    for what, mine, theirs in zip(("result", "x", "codewords", "scale"), ours, direct, strict=True):
        assert mine <= 2 * theirs + 1e-6, f"{what}: {mine:.3g} against {theirs:.3g}"


def test_features_on_the_codewords() -> None:
    """Distances of zero beside large ones: right to float32 of the large ones, never negative."""
    _, c, s = make(1, 32, (1,), 8)
    c = c * 50
    x = c.t().unsqueeze(0).repeat(1, 1, 13).contiguous()
    distance = run("scaled_l2", rows(x), c, torch.ones(8))
    wanted = reference.scaled_l2(rows(x).double(), c.double(), torch.ones(8).double())
    assert (distance >= 0).all()
    close(distance, wanted, torch.float32)
    result, truth = run("encode", x, c, s).double(), reference.encode(x.double(), c.double(), s.double())
    assert (result - truth).abs().max() <= 13 * 2e-5 * c.abs().max()  # 13 features on each codeword
    grad = grad_for("encode", (x, c, s))
    wanted_grads = _encode_backward(grad.double(), x.double(), c.double(), s.double())
    for g, w in zip(run("_encode_backward", grad, x, c, s)[:2], wanted_grads, strict=False):
        close(g, w, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_nan_and_infinity_spread_as_in_the_reference(value: float) -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    a = torch.rand(2, 144, 6)
    poisoned, codewords = x.clone(), c.clone()
    poisoned[1, 7, 3, 4] = value
    codewords[2, 5] = value
    got = run("encode", poisoned, c, s)
    assert torch.equal(got.isnan(), reference.encode(poisoned, c, s).isnan())
    assert got[1].isnan().all() and got[0].isfinite().all()
    for features, codes in ((poisoned, c), (x, codewords)):
        for op, inputs in (("scaled_l2", (rows(features), codes, s)), ("aggregate", (a, rows(features), codes))):
            wanted = getattr(reference, op)(*inputs)
            torch.testing.assert_close(run(op, *inputs), wanted, equal_nan=True, rtol=1e-4, atol=1e-4)
    got = run("encode", x, codewords, s)
    assert torch.equal(got.isnan(), reference.encode(x, codewords, s).isnan())
    scale = s.clone()
    scale[0] = math.nan
    assert run("encode", x, c, scale).isnan().all()


def test_nan_gradients_spread_as_in_the_reference() -> None:
    x, c, s = make(2, 20, (12, 12), 6)
    x[1, 7, 3, 4] = math.nan
    for op in FORMULAS:
        inputs = inputs_of(op, x, c, s)
        grad = grad_for(op, inputs)
        for g, w in zip(run(f"_{op}_backward", grad, *inputs), FORMULAS[op](grad, *inputs), strict=True):
            assert torch.equal(g.isnan(), w.isnan())


def test_gradient_of_scale_at_zero() -> None:
    x, c, _ = make(2, 20, (12, 12), 6)
    inputs = leaves(x, c, torch.zeros(6))
    for g in run("_encode_backward", torch.randn(2, 6, 20), *(t.detach() for t in inputs)):
        assert g.isfinite().all() and g.abs().max() > 0


# ---- Empty


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 0), (0, 4, 0), (2, 0, 3, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    for op in FORMULAS:
        inputs = inputs_of(op, torch.ones(shape), torch.ones(6, shape[1]), torch.ones(6))
        wanted = getattr(reference, op)(*inputs)
        got = run(op, *inputs)
        assert got.shape == wanted.shape and (got == 0).all()
        for g, t in zip(run(f"_{op}_backward", torch.ones_like(wanted), *inputs), inputs, strict=True):
            assert g.shape == t.shape and (g == 0).all()


# ---- Reproducible


def _all_results(x: Tensor, c: Tensor, s: Tensor) -> list[Tensor]:
    results = []
    for op in FORMULAS:
        inputs = inputs_of(op, x, c, s)
        results += [run(op, *inputs), *run(f"_{op}_backward", grad_for(op, inputs), *inputs)]
    return results


def test_the_same_bits_every_run() -> None:
    inputs = make(2, 40, (17, 13), 12)
    for a, b in zip(_all_results(*inputs), _all_results(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("programs", [1, 264])
def test_nothing_is_read_before_it_is_written(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic algorithms on, PyTorch fills fresh memory with NaN."""
    monkeypatch.setattr("rendseg.kernels._encode_common._PROGRAMS", programs)
    x, c, s = make(2, 37, (11, 23), 5)
    torch.use_deterministic_algorithms(True)
    try:
        for result in _all_results(x, c, s):
            assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_as_they_were() -> None:
    inputs = [to_device(t) for t in make(2, 37, (11, 13), 5)]
    copies = [t.clone() for t in inputs]
    for op in FORMULAS:
        held = [to_device(t) for t in inputs_of(op, *inputs)]
        out = implementation("encode", op)(*held)
        implementation("encode", f"_{op}_backward")(torch.ones_like(out), *held)
    for t, copy in zip(inputs, copies, strict=True):
        assert torch.equal(t, copy)


def test_gradients_keep_the_layout() -> None:
    x, c, s = make(2, 24, (7, 9), 5)
    grad = torch.randn(2, 5, 24)
    last = run("_encode_backward", grad, x.contiguous(memory_format=torch.channels_last), c, s)[0]
    plain = run("_encode_backward", grad, x, c, s)[0]
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph() -> None:
    x, c, s = (to_device(t) for t in make(2, 64, (16, 24), 32))
    grad = torch.randn(2, 32, 64, device=DEVICE)
    forward, backward = implementation("encode", "encode"), implementation("encode", "_encode_backward")
    wanted = [forward(x, c, s), *backward(grad, x, c, s)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [forward(x, c, s), *backward(grad, x, c, s)]
    graph.replay()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


# ---- Bad input


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    op, kwargs, error, pattern = BAD[name]
    with pytest.raises(error, match=pattern):
        implementation("encode", op)(**kwargs())


@pytest.mark.bad_input
def test_tensors_on_two_devices() -> None:
    x, c, s = (to_device(t) for t in make(2, 16, (6, 7), 5))
    with pytest.raises(RuntimeError, match=r"codewords must be on the device of x .*, got meta"):
        implementation("encode", "encode")(x, c.to("meta"), s)


@pytest.mark.parametrize("op", ["encode", "scaled_l2", "aggregate"])
def test_float64_where_triton_has_no_products_of_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference then computes it, and no kernel is launched."""
    module = importlib.import_module("rendseg.kernels.encode")
    monkeypatch.setattr(module, "FLOAT64", False)
    monkeypatch.setattr(module, "forward", None)
    x, codewords, scale = to_device((torch.randn(2, 5, 3).double(), torch.randn(4, 3), -torch.rand(4)))
    arguments = {
        "encode": (x.transpose(1, 2), codewords, scale),
        "scaled_l2": (x, codewords, scale),
        "aggregate": (x[..., :1].expand(-1, -1, 4), x, codewords),
    }[op]
    assert torch.equal(module.IMPLEMENTATIONS[op](*arguments), getattr(reference, op)(*arguments))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # float32 asks for the kernel
        module.IMPLEMENTATIONS[op](*(tensor.float() for tensor in arguments))
