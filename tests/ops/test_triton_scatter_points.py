"""The Triton kernels of scatter_points against the reference; see _triton.py for where."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from _triton import DEVICE, TRITON, implementation, to_device
from cases_scatter_points import bad_inputs, make, samples
from torch import Tensor

from rendseg import reference
from rendseg.reference.scatter_points import _scatter_points_backward as reference_backward
from tests.limits import TIMEOUT

pytestmark = TRITON

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = [name for name, _ in samples()]


def scatter(*arguments: Tensor) -> Tensor:
    return implementation("scatter_points", "scatter_points")(*(to_device(t) for t in arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, dtype):
    logits, indices, values = dict(samples(dtype))[name]
    wanted = reference.scatter_points(logits, indices, values)
    out = scatter(logits, indices, values)
    assert torch.equal(out.cpu(), wanted) and out.stride() == wanted.stride()
    mine = to_device(logits)
    strides, pointer = mine.stride(), mine.data_ptr()
    result = implementation("scatter_points", "scatter_points_")(mine, to_device(indices), to_device(values))
    assert result is None and torch.equal(mine.cpu(), wanted)
    assert mine.stride() == strides and mine.data_ptr() == pointer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_backward(name, dtype):
    grad, indices, _ = dict(samples(dtype))[name]
    got = implementation("scatter_points", "_scatter_points_backward")(to_device(grad), to_device(indices))
    for a, b in zip(got, reference_backward(grad, indices), strict=True):
        assert torch.equal(a.cpu(), b) and a.stride() == b.stride()


@pytest.mark.parametrize("layout", ["strided", "slice"])
def test_the_rest_of_the_storage_is_left_alone(layout):
    logits, indices, values = (to_device(t) for t in make(2, 5, 7, 9, 20, layout=layout))
    storage = torch.empty(0, device=DEVICE).set_(logits.untyped_storage())
    before, inside = storage.clone(), torch.zeros_like(storage, dtype=torch.bool)
    torch.as_strided(inside, logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    implementation("scatter_points", "scatter_points_")(logits, indices, values)
    assert torch.equal(storage[~inside], before[~inside])


def test_bits_are_moved_as_they_are():
    # NaN with a payload, -0 and denormals are nothing to arithmetic that does not take place.
    logits, indices, _ = make(1, 2, 3, 4, 6)
    bits = torch.tensor([0x7FC12345, -0x80000000, 1, 0x7F800001, -1, 0x00400000], dtype=torch.int32)
    values = bits.view(torch.float32).expand(1, 2, 6).contiguous()
    out = scatter(logits, indices, values).cpu().flatten(2)
    picked = out.gather(2, indices.unsqueeze(1).expand(-1, 2, -1))
    assert torch.equal(picked.view(torch.int32), values.view(torch.int32))


def test_repeated_indices_do_not_crash():
    logits, _, values = make(2, 3, 4, 5, 6)
    out = scatter(logits, torch.full((2, 6), 7), values).cpu()
    assert ((out[:, :, 1, 2].unsqueeze(-1) == values).any(-1)).all()


@pytest.mark.bad_input
@pytest.mark.parametrize("op", ["scatter_points", "scatter_points_"])
@pytest.mark.parametrize("name,call,error,words", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input(op, name, call, error, words):
    if error is IndexError and DEVICE == "cuda":
        pytest.skip("a device assert, which ends the process: see below")
    call = to_device(call)
    before = call["logits"].clone()
    with pytest.raises(error, match=words):
        implementation("scatter_points", op)(**call)
    assert torch.equal(call["logits"], before)  # nothing was written


@pytest.mark.bad_input
def test_bad_input_of_the_backward():
    function = implementation("scatter_points", "_scatter_points_backward")
    grad, indices, _ = (to_device(t) for t in make(2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match=r"indices must have shape \[N, P\]"):
        function(grad, indices[0])
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="indices must lie in"):
            function(grad, indices + 20)


@pytest.mark.bad_input
def test_overlap_is_refused():
    logits, indices, values = (to_device(t) for t in make(2, 3, 4, 5, 6))
    function = implementation("scatter_points", "scatter_points_")
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        function(to_device(torch.zeros(2, 1, 4, 5)).expand(2, 3, 4, 5), indices, values)
    with pytest.raises(RuntimeError, match="some elements of the input tensor and the written-to tensor"):
        function(logits, indices, logits.flatten()[:36].view(2, 3, 6))
    inside = logits.flatten().view(torch.int64)[:12].view(2, 6).zero_()
    with pytest.raises(RuntimeError, match="some elements of the input tensor and the written-to tensor"):
        function(logits, inside, values)
    both = to_device(torch.randn(2 * 3 * 20 + 36))  # neighbours in one storage do not overlap
    part, rest = both[:120].view(2, 3, 4, 5), both[120:].view(2, 3, 6)
    wanted = reference.scatter_points(part.cpu(), indices.cpu(), rest.cpu())
    function(part, indices, rest)
    assert torch.equal(part.cpu(), wanted)


@pytest.mark.bad_input
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_an_index_outside_the_map_is_a_device_assert():
    program = (
        "import torch\n"
        "from rendseg.kernels.scatter_points import IMPLEMENTATIONS\n"
        "IMPLEMENTATIONS['scatter_points'](torch.zeros(1, 1, 2, 2).cuda(), torch.tensor([[4]]).cuda(), "
        "torch.ones(1, 1, 1).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0 and "device-side assert" in done.stderr
