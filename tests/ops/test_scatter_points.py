from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from cases_scatter_points import bad_inputs, distinct, make, samples
from torch import Tensor, library

import rendseg
from rendseg import reference
from rendseg._extension import C
from rendseg.ops import scatter_points, scatter_points_
from rendseg.reference.scatter_points import _scatter_points_backward

CASES = dict(samples())
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def brute_force(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """One point at a time."""
    out = logits.clone()
    for n in range(indices.shape[0]):
        for p, index in enumerate(indices[n].tolist()):
            out[n, :, index // logits.shape[3], index % logits.shape[3]] = values[n, :, p]
    return out


def in_place(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """scatter_points_ on a copy that keeps the strides; the copy is not a leaf."""
    copy = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
    return scatter_points_(copy, indices, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, dtype):
    logits, indices, values = dict(samples(dtype))[name]
    wanted = brute_force(logits, indices, values)
    out = scatter_points(logits, indices, values)
    assert torch.equal(out, wanted) and out.stride() == torch.empty_like(logits).stride()
    assert torch.equal(reference.scatter_points(logits, indices, values), wanted)
    strides, pointer = logits.stride(), logits.data_ptr()
    result = scatter_points_(logits, indices, values)
    assert result is logits and logits.data_ptr() == pointer and logits.stride() == strides
    assert torch.equal(logits, wanted)


def test_in_place_leaves_the_rest_of_the_storage_alone():
    for layout in ("strided", "slice"):
        logits, indices, values = make(2, 5, 7, 9, 20, layout=layout)
        base = logits._base
        while base._base is not None:
            base = base._base
        before, inside = base.clone(), torch.zeros_like(base, dtype=torch.bool)
        torch.as_strided(inside, logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
        scatter_points_(logits, indices, values)
        assert torch.equal(base[~inside], before[~inside])


@pytest.mark.parametrize("function", [scatter_points, in_place, reference.scatter_points])
@pytest.mark.parametrize("name", CASES)
def test_gradients(function, name):
    logits, indices, values = (t.clone() for t in CASES[name])
    logits.requires_grad_()
    values.requires_grad_()
    out = function(logits, indices, values)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    grad_logits, grad_values = torch.autograd.grad(out, (logits, values), weight)
    replaced = torch.zeros_like(weight).flatten(2)
    for n in range(indices.shape[0]):
        replaced[n, :, indices[n]] = 1
    assert torch.equal(grad_logits, weight * (1 - replaced.view(weight.shape)))
    wanted = torch.stack([weight.flatten(2)[n][:, indices[n]] for n in range(len(indices))]) if len(indices) else values
    assert torch.equal(grad_values, wanted)


@pytest.mark.parametrize("name", CASES)
def test_backward_of_the_reference(name):
    logits, indices, _ = CASES[name]
    for got, wanted in zip(
        torch.ops.rendseg._scatter_points_backward(logits, indices),
        _scatter_points_backward(logits, indices),
        strict=True,
    ):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


@pytest.mark.gradcheck
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("function", [scatter_points, in_place])
def test_gradcheck(function, layout):
    logits, indices, values = make(2, 3, 4, 5, 6, torch.float64, layout)
    inputs = logits.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: function(a, indices, b), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: function(a, indices, b).square(), inputs)


def test_in_place_autograd_is_that_of_pytorch():
    logits, indices, values = make(2, 3, 4, 5, 6)
    base = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        scatter_points_(base[:], indices, values)
    assert torch.equal(base, logits)
    for function in (scatter_points_, torch.ops.rendseg.scatter_points_):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            function(base, indices, values)
        assert torch.equal(base, logits)  # nothing was written
        copy = base * 2
        squared = copy.square()  # saves copy, which is then changed
        version = copy._version
        function(copy, indices, values)
        assert copy._version > version and copy.requires_grad and copy.grad_fn is not None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()
        fresh = logits.clone()  # only values require a gradient
        trained = values.clone().requires_grad_()
        function(fresh, indices, trained)
        assert fresh.requires_grad
        fresh.square().sum().backward()
        assert torch.equal(trained.grad, 2 * values)
    with torch.no_grad():
        version = base._version
        scatter_points_(base, indices, values)
        assert base._version > version and base.requires_grad
    plain = logits.clone()
    version = plain._version
    scatter_points_(plain, indices, values)
    assert plain._version > version and not plain.requires_grad


def test_in_place_on_a_view_reaches_the_base():
    logits, indices, values = make(2, 3, 4, 5, 6)
    leaf, trained = torch.cat((logits, logits)).requires_grad_(), values.requires_grad_()
    base = leaf * 1
    scatter_points_(base[2:], indices, trained)
    weight = torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(base, (leaf, trained), weight)
    functional = torch.cat((leaf[:2], reference.scatter_points(leaf[2:], indices, trained)))
    wanted = torch.autograd.grad(functional, (leaf, trained), weight)
    assert torch.equal(base, functional) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_inference_mode():
    with torch.inference_mode():
        logits, indices, values = make(2, 3, 4, 5, 6)
        wanted = brute_force(logits, indices, values)
        assert torch.equal(scatter_points_(logits, indices, values), wanted)


def test_repeated_indices_do_not_crash():
    logits, _, values = make(2, 3, 4, 5, 6)
    out = scatter_points(logits, torch.full((2, 6), 7), values)
    assert ((out[:, :, 1, 2].unsqueeze(-1) == values).any(-1)).all()


@pytest.mark.bad_input
def test_refuses_maps_that_overlap_themselves():
    _, indices, values = make(2, 3, 4, 5, 6)
    with pytest.raises(RuntimeError):
        scatter_points_(torch.zeros(2, 1, 4, 5).expand(2, 3, 4, 5), indices, values)


@pytest.mark.bad_input
def test_refuses_logits_that_hold_the_indices_or_the_values():
    logits, indices, values = make(2, 3, 4, 5, 6)
    inside = logits.view(-1).view(torch.int64)[:12].view(2, 6).zero_()
    before = logits.clone()
    for function in (scatter_points_, reference.scatter_points_):
        for arguments in ((inside, values), (indices, logits.view(-1)[:36].view(2, 3, 6))):
            with pytest.raises(RuntimeError, match="single memory location"):
                function(logits, *arguments)
            assert torch.equal(logits, before)


def test_negative_views():
    """Memory that holds the negative values, as the imaginary part of a conjugate does."""
    logits, indices, values = make(2, 3, 4, 5, 6)
    wanted = reference.scatter_points(logits, indices, values)
    for function in (scatter_points_, reference.scatter_points_):
        for given in (values, torch._neg_view(-values)):
            imaginary = torch.complex(torch.zeros_like(logits), -logits).conj().imag
            for view in (torch._neg_view(-logits), imaginary):
                version = view._version
                assert view.is_neg() and torch.equal(function(view, indices, given), wanted)
                assert view._version > version


@pytest.mark.skipif(C is None, reason="the compiled kernels are not loaded")
def test_indices_that_another_thread_changes():
    """What is checked is what is used: a call either refuses or writes to cells of the map."""
    map_ = torch.zeros(3, 1, 64, 64)
    logits, indices = map_[1:2], torch.zeros(1, 20_000, dtype=torch.int64)
    values, done = torch.ones(1, 1, 20_000), threading.Event()

    def change() -> None:
        while not done.is_set():
            indices.fill_(64 * 64)  # the first cell after the map
            indices.zero_()

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(300):
            with contextlib.suppress(IndexError):
                scatter_points_(logits, indices, values)
    finally:
        done.set()
        changing.join()
    assert not map_[2].any() and not map_[0].any()


@pytest.mark.opcheck
@pytest.mark.parametrize("name", ["nchw", "channels_last", "slice", "no points", "no images"])
def test_opcheck(name):
    logits, indices, values = (t.clone() for t in CASES[name])
    library.opcheck(
        torch.ops.rendseg.scatter_points, (logits.clone().requires_grad_(), indices, values.clone().requires_grad_())
    )
    library.opcheck(torch.ops.rendseg._scatter_points_backward, (logits.clone().requires_grad_(), indices))
    library.opcheck(torch.ops.rendseg.scatter_points_, (logits, indices, values))


@pytest.mark.parametrize("function", [scatter_points, scatter_points_])
@pytest.mark.parametrize("train", [False, True])
def test_compile(function, train):
    leaf, indices, values = make(2, 5, 7, 9, 20)

    def run(leaf: Tensor, values: Tensor) -> Tensor:
        logits = leaf * 2
        return function(logits, indices, values * 3).square()

    results = []
    torch._dynamo.reset()
    for candidate in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        a, b = leaf.clone().requires_grad_(train), values.clone().requires_grad_(train)
        out = candidate(a, b)
        results.append((out.detach(), *(torch.autograd.grad(out.sum(), (a, b)) if train else ())))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_compile_of_the_raw_op_under_grad():
    leaf, indices, values = make(2, 5, 7, 9, 20)

    def run(leaf: Tensor, values: Tensor) -> Tensor:
        logits = leaf * 2
        torch.ops.rendseg.scatter_points_(logits, indices, values)
        return logits.square()

    torch._dynamo.reset()
    a, b = leaf.clone().requires_grad_(), values.clone().requires_grad_()
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(a, b).sum(), (a, b))
    wanted = torch.autograd.grad(run(a, b).sum(), (a, b))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_compile_mutates_the_input():
    logits, indices, values = make(2, 5, 7, 9, 20)
    wanted = brute_force(logits, indices, values)
    torch._dynamo.reset()
    torch.compile(scatter_points_, fullgraph=True, backend="aot_eager")(logits, indices, values)
    assert torch.equal(logits, wanted)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
            return scatter_points_(logits * 2, indices, values) + scatter_points(logits, indices, values)

    args = make(2, 5, 7, 9, 20)
    assert torch.equal(torch.export.export(Module(), args).module()(*args), Module()(*args))


@pytest.mark.parametrize("function", [scatter_points, scatter_points_])
def test_autocast_casts_values(function):
    logits, indices, values = make(2, 5, 7, 9, 20)
    wanted = brute_force(logits, indices, values.bfloat16().float())
    half = values.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = function(logits.clone(), indices, half)
        with rendseg.backend("reference"):
            assert torch.equal(function(logits.clone(), indices, half.detach()), wanted)
    assert out.dtype == torch.float32 and torch.equal(out, wanted)
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and (half.grad == 1).all()


@pytest.mark.skipif(C is None, reason="the compiled kernels are not loaded")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_same_for_any_number_of_threads(layout):
    logits, indices, values = make(3, 19, 40, 50, 1900, layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = scatter_points(logits, indices, values)
            results.append((out, *torch.ops.rendseg._scatter_points_backward(out, indices)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.bad_input
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input(name, call, error, words):
    functions = (
        torch.ops.rendseg.scatter_points,
        torch.ops.rendseg.scatter_points_,
        scatter_points,
        scatter_points_,
        reference.scatter_points,
        reference.scatter_points_,
    )
    before = call["logits"].clone()
    for function in functions:
        with pytest.raises(error, match=words):
            function(**call)
        assert torch.equal(call["logits"], before)  # nothing was written


@pytest.mark.bad_input
def test_bad_input_of_the_backward():
    grad, indices, _ = make(2, 3, 4, 5, 6)
    with pytest.raises(IndexError, match="indices must lie in"):
        torch.ops.rendseg._scatter_points_backward(grad, indices + 20)
    with pytest.raises(ValueError, match=r"indices must have shape \[N, P\]"):
        torch.ops.rendseg._scatter_points_backward(grad, indices[0])


def test_after_selection():
    logits = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    indices = distinct(2, 10, 72).sort(1).values
    out = scatter_points(logits, indices, logits.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, 4, -1)))
    assert torch.equal(out, logits)
