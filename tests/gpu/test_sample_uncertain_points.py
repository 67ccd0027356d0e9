"""sample_uncertain_points on a GPU against the reference on the CPU; run by ``make gpu-check``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rendseg import _backends, ops, reference
from tests.ops.cases_uncertain_points import bad_inputs, logits_cases
from tests.ops.test_uncertain_points import check_sampled

pytestmark = pytest.mark.gpu

CASES = {name: (logits, class_index) for name, logits, class_index in logits_cases()}
# (logits, points): one launch for many masks; two launches for few images, keys in shared memory or beyond it
SHAPES = {
    "masks, one launch": ((150, 1, 40, 48), 1500),
    "masks of T2": ((140, 1, 64, 64), 12544),
    "few images": ((4, 19, 64, 96), 2048),
    "one image": ((1, 19, 64, 96), 2048),
    "keys beyond shared memory": ((2, 2, 64, 96), 25000),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not _backends.has_kernel("sample_uncertain_points", "cuda"):
        pytest.skip(f"the CUDA kernels are not built: {_backends.cuda_missing()[0]}")


def on_gpu(logits: Tensor, class_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return logits.cuda(), None if class_index is None else class_index.cuda()


def draws_for(images: int, num_points: int, seed: int = 0) -> Tensor:
    total = 3 * num_points + num_points - int(0.75 * num_points)
    return torch.rand(images, total, 2, generator=torch.Generator().manual_seed(seed))


def logits_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same_points(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str) -> None:
    logits, class_index = CASES[case]
    draws = draws_for(len(logits), 40)
    x, index = on_gpu(logits, class_index)
    for padding_mode in ("zeros", "border"):
        for align_corners in (False, True):
            options = {"padding_mode": padding_mode, "align_corners": align_corners}
            got = ops.sample_uncertain_points(x, 40, class_index=index, random_coords=draws.cuda(), **options)
            if "NaN" not in case and "equal" not in case:
                check_sampled(logits, got.cpu(), draws, 40, 3.0, 0.75, class_index=class_index, **options)
            # The same arithmetic, operation by operation, as on the CPU.
            cpu = ops.sample_uncertain_points(logits, 40, class_index=class_index, random_coords=draws, **options)
            assert same_points(got, cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_way_of_sharing_the_work_out(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    shape, num_points = SHAPES[name]
    logits = logits_of(shape).to(dtype).contiguous(memory_format=layout)
    draws = draws_for(shape[0], num_points)
    got = ops.sample_uncertain_points(logits.cuda(), num_points, random_coords=draws.cuda())
    assert same_points(got, ops.sample_uncertain_points(logits, num_points, random_coords=draws))
    if dtype == torch.float64:
        assert same_points(got, reference.sample_uncertain_points(logits, num_points, random_coords=draws))


@pytest.mark.parametrize("name", SHAPES)
def test_ties_and_repetition(name: str) -> None:
    shape, num_points = SHAPES[name]
    draws = draws_for(shape[0], num_points)
    equal = ops.sample_uncertain_points(torch.ones(shape).cuda(), num_points, random_coords=draws.cuda())
    kept = int(0.75 * num_points)
    # On the map every candidate ties; near the border zero padding makes some more uncertain.
    assert same_points(equal[:, kept:], draws[:, 3 * num_points :])
    equal = ops.sample_uncertain_points(
        torch.ones(shape).cuda(), num_points, random_coords=draws.cuda(), padding_mode="border"
    )
    assert same_points(equal[:, :kept], draws[:, :kept])
    x = (logits_of(shape) * 3).round().cuda()
    first = ops.sample_uncertain_points(x, num_points, random_coords=draws.cuda())
    for _ in range(20):
        poison = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(4)]  # what empty memory then holds
        del poison
        assert torch.equal(ops.sample_uncertain_points(x, num_points, random_coords=draws.cuda()), first)


@pytest.mark.parametrize("name", SHAPES)
def test_the_generator(name: str) -> None:
    shape, num_points = SHAPES[name]
    x = logits_of(shape).cuda()
    torch.cuda.manual_seed(3)
    first, second = ops.sample_uncertain_points(x, num_points), ops.sample_uncertain_points(x, num_points)
    torch.cuda.manual_seed(3)
    assert torch.equal(ops.sample_uncertain_points(x, num_points), first) and not torch.equal(first, second)
    offset = torch.cuda.get_rng_state()
    given = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(ops.sample_uncertain_points(x, num_points, generator=given), first)
    assert torch.equal(ops.sample_uncertain_points(x, num_points, generator=given), second)
    assert torch.equal(torch.cuda.get_rng_state(), offset), "the default generator is left alone"
    assert ((first >= 0) & (first < 1)).all()
    # As many draws, all kept: the draws themselves. Selecting from them gives what was selected.
    total = draws_for(1, num_points).shape[1]
    torch.cuda.manual_seed(3)
    draws = ops.sample_uncertain_points(x, total, 1.0, 1.0)
    assert torch.equal(ops.sample_uncertain_points(x, num_points, random_coords=draws), first)


def test_draws_are_uniform() -> None:
    x = torch.zeros(200, 1, 2, 2).cuda()
    points = ops.sample_uncertain_points(x, 5000, 1.0, 0.0, generator=torch.Generator("cuda").manual_seed(4)).double()
    count = points[..., 0].numel()
    assert (points.mean((0, 1)) - 0.5).abs().max() < 5 * (1 / 12 / count) ** 0.5
    cells = (points[..., 1] * 50).long() * 50 + (points[..., 0] * 50).long()
    expected = count / 2500
    chi_square = ((cells.flatten().bincount(minlength=2500) - expected).square() / expected).sum()
    assert abs(chi_square - 2499) < 5 * (2 * 2499) ** 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_graph_replay_is_eager(name: str) -> None:
    """A replay draws on from where the generator stands, as a call would."""
    shape, num_points = SHAPES[name]
    x, draws = logits_of(shape).cuda(), draws_for(shape[0], num_points).cuda()
    ops.sample_uncertain_points(x, num_points)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = ops.sample_uncertain_points(x, num_points, random_coords=draws)
        drawn = ops.sample_uncertain_points(x, num_points)
    given.zero_()
    torch.cuda.manual_seed(5)
    graph.replay()
    replayed = drawn.clone()
    graph.replay()
    assert torch.equal(given, ops.sample_uncertain_points(x, num_points, random_coords=draws))
    torch.cuda.manual_seed(5)
    assert torch.equal(replayed, ops.sample_uncertain_points(x, num_points))
    assert torch.equal(drawn, ops.sample_uncertain_points(x, num_points))


def test_another_stream() -> None:
    shape, num_points = SHAPES["few images"]
    x, draws = logits_of(shape).cuda(), draws_for(shape[0], num_points).cuda()
    wanted = ops.sample_uncertain_points(x, num_points, random_coords=draws)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.sample_uncertain_points(x, num_points, random_coords=draws)
    stream.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device() -> None:
    shape, num_points = SHAPES["few images"]
    x, draws = logits_of(shape), draws_for(shape[0], num_points)
    got = ops.sample_uncertain_points(x.cuda(1), num_points, random_coords=draws.cuda(1))
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert same_points(got, ops.sample_uncertain_points(x, num_points, random_coords=draws))


@pytest.mark.parametrize("name", SHAPES)
def test_launches(name: str) -> None:
    shape, num_points = SHAPES[name]
    x = logits_of(shape).cuda()
    ops.sample_uncertain_points(x, num_points)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.sample_uncertain_points(x, num_points)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin - 16 * 1024
    assert len(kernels) == (1 if "masks" in name and 3 * num_points * 4 <= room else 2), kernels
    assert all("sample_" in kernel for kernel in kernels), kernels


def test_no_memory_beyond_the_result() -> None:
    shape, num_points = SHAPES["masks, one launch"]
    x = logits_of(shape).cuda()
    result = ops.sample_uncertain_points(x, num_points)
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = ops.sample_uncertain_points(x, num_points)
    assert torch.cuda.max_memory_allocated() - before <= result.nbytes + 1024


BAD = {
    name: (kwargs, exception, pattern)
    for name, op, kwargs, exception, pattern in (bad_inputs("cuda") if torch.cuda.is_available() else ())
    if op == "sample_uncertain_points" and not name.endswith("elsewhere")
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD or ["needs a GPU"])
def test_bad_input(case: str) -> None:
    kwargs, exception, pattern = BAD[case]
    with pytest.raises(exception, match=pattern):
        ops.sample_uncertain_points(**kwargs)


@pytest.mark.bad_input
def test_a_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"generator must be on the device of logits \(cuda:0\), got cpu"):
        ops.sample_uncertain_points(torch.zeros(1, 1, 4, 4).cuda(), 4, generator=torch.Generator())
