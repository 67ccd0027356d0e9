from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _common import assert_opcheck, bad_input_runner, close, thread_counts, use_threads
from cases_mask_losses import Case, bad_inputs, build, cases, masks, normal
from torch import Tensor

import rendseg
from rendseg import ops, reference
from rendseg._extension import C
from rendseg.reference.mask_losses import _mask_losses_backward as reference_backward

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = dict(cases())
BAD = {f"{op}: {name}": (op, kwargs, error, words) for name, op, kwargs, error, words in bad_inputs()}
FEW = ("bilinear border (12, 13)", "channels_last", "no pairs", "no images")


def weights(count: int) -> Tensor:
    return torch.linspace(-1, 2, 2 * count, dtype=torch.float64).view(2, count)


def sampled(map_: Tensor, coords: Tensor, mode: str, padding_mode: str) -> Tensor:
    """``map_ [h, w]`` at ``coords [P, 2]`` by F.grid_sample on a copy; nearest in float32, as coordinates are."""
    if len(coords) == 0:
        return coords.new_zeros(0, dtype=torch.float64) + map_.sum() * 0
    dtype = torch.float32 if mode == "nearest" else torch.float64
    grid = 2 * coords.to(dtype) - 1
    found = F.grid_sample(
        map_.to(dtype)[None, None], grid[None, None], mode=mode, padding_mode=padding_mode, align_corners=False
    )
    return found.flatten().double()


def one_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the contract, as they stand, in float64."""
    cross_entropy = (torch.logaddexp(x, torch.zeros_like(x)) - x * y).mean() if len(x) else x.sum()
    s = 1 / (1 + (-x).exp())
    return cross_entropy, 1 - (2 * (s * y).sum() + 1) / (s.sum() + y.sum() + 1)


def on_canvas(target: Tensor, canvas: Any) -> Tensor:
    """Padded at the right and at the bottom."""
    if canvas is None:
        return target
    padded = torch.zeros(*canvas, dtype=target.dtype)
    padded[: target.shape[0], : target.shape[1]] = target
    return padded


def wanted_losses(
    logits: Tensor, targets: Any, coords: Tensor, image_index: Tensor, query_index: Tensor, target_index: Tensor,
    label_mode: str = "bilinear", padding_mode: str = "zeros", canvas: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = []
    for n, (b, q, t) in enumerate(torch.stack((image_index, query_index, target_index), 1).tolist()):
        x = sampled(logits[b, q], coords[n], "bilinear", padding_mode)
        found.append(one_pair(x, sampled(on_canvas(targets[b][t], canvas), coords[n], label_mode, padding_mode)))
    if not found:
        return logits.sum() * torch.zeros(0), logits.sum() * torch.zeros(0)
    return torch.stack([a for a, _ in found]), torch.stack([d for _, d in found])


def wanted_costs(
    logits: Tensor, targets: Any, coords: Tensor, label_mode: str = "bilinear", padding_mode: str = "zeros",
    canvas: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.zeros(2, *logits.shape[:2], max((len(t) for t in targets), default=0), dtype=torch.float64)
    for b, target in enumerate(targets):
        xs = [sampled(x, coords[b], "bilinear", padding_mode) for x in logits[b]]
        for t, mask in enumerate(target):
            y = sampled(on_canvas(mask, canvas), coords[b], label_mode, padding_mode)
            for q, x in enumerate(xs):
                out[:, b, q, t] = torch.stack(one_pair(x, y))
    return out[0], out[1]


def with_gradient(function: Any, case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and the gradient of a weighted sum of them."""
    leaf = case["logits"].detach().to(dtype).requires_grad_()
    losses = function(**case | {"logits": leaf})
    rows = weights(len(case["coords"])).to(losses[0].dtype)
    (grad,) = torch.autograd.grad((rows * torch.stack(losses)).sum(), leaf)
    return losses[0].detach(), losses[1].detach(), grad


def check_losses_and_costs(name: str, dtype: torch.dtype, function: Any) -> None:
    losses, costs = dict(cases(dtype))[name]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    got = with_gradient(function.mask_losses, losses, dtype)
    wanted = with_gradient(wanted_losses, losses, torch.float64)
    for mine, theirs, what in zip(got, wanted, ("cross-entropy", "dice", "gradient"), strict=True):
        assert mine.dtype == (dtype if what == "gradient" else compute)
        close(mine, theirs, compute, what)
    assert got[2].is_contiguous() or got[2].is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(function.mask_costs(**costs), wanted_costs(**costs), strict=True):
        assert mine.dtype == compute and not mine.requires_grad
        close(mine, theirs, compute, "cost")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_costs(name: str, dtype: torch.dtype, isa: str) -> None:
    check_losses_and_costs(name, dtype, ops)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, dtype: torch.dtype) -> None:
    check_losses_and_costs(name, dtype, reference)


@pytest.mark.parametrize("value", [0.0, 40.0, -40.0, 300.0, -300.0])
def test_sure_logits(value: float, isa: str) -> None:
    """Where sigmoid is 0 or 1 and exp would overflow: the loss is linear, the gradient bounded."""
    losses, costs = build(torch.full((1, 1, 8, 8), value), [masks(1, 8, 8, torch.bool)], [(0, 0, 0)], 40)
    inside = {"coords": losses["coords"].clamp(0.1, 0.9)}
    for mine, theirs in zip(
        with_gradient(ops.mask_losses, losses | inside, torch.float32),
        with_gradient(wanted_losses, losses | inside, torch.float64),
        strict=True,
    ):
        close(mine, theirs, torch.float32)
    for mine, theirs in zip(ops.mask_costs(**costs | inside), wanted_costs(**costs | inside), strict=True):
        close(mine, theirs, torch.float32)


def test_what_is_not_a_number_spreads(isa: str) -> None:
    losses, costs = build(normal(1, 3, 6, 7), [masks(3, 6, 7, torch.bool)], [(0, 0, 0), (0, 1, 1), (0, 2, 2)], 20)
    losses["coords"][0, 3, 1] = float("nan")
    losses["logits"][0, 1] = float("nan")
    for result in ops.mask_losses(**losses):
        assert result.isnan().tolist() == [True, True, False]
    for result in ops.mask_costs(**costs):
        assert result.isnan().all(2).tolist() == [[False, True, False]]
    border = {"padding_mode": "border"}  # NaN takes the first cell
    for mine, theirs in zip(ops.mask_losses(**losses | border), reference.mask_losses(**losses | border), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
        assert not mine[0].isnan()


def test_targets_are_left_alone() -> None:
    """A frozen copy of each dtype, and no copy of a target in the profile."""
    losses, costs = CASES["every dtype of targets"]
    before = [t.clone() for t in losses["targets"]]
    ops.mask_losses(**losses)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.mask_costs(**costs)
    assert all(torch.equal(a, b) for a, b in zip(before, losses["targets"], strict=True))
    if C is not None and torch._C._dispatch_has_kernel_for_dispatch_key("rendseg::mask_costs", "CPU"):
        assert not [event.key for event in profile.key_averages() if event.key == "aten::copy_"]


@pytest.mark.parametrize("name", ["several blocks of points", "bilinear zeros None"])
def test_the_same_for_any_number_of_threads(name: str, isa: str) -> None:
    losses, costs = CASES[name]
    results = []
    for threads in thread_counts():
        with use_threads(threads):
            results.append((*with_gradient(ops.mask_losses, losses, torch.float32), *ops.mask_costs(**costs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gradcheck
@pytest.mark.parametrize("label_mode,padding_mode", [("bilinear", "zeros"), ("nearest", "border")])
def test_gradcheck(label_mode: str, padding_mode: str) -> None:
    logits, targets = normal(2, 2, 3, 4).double(), [masks(2, 5, 6, torch.bool), masks(1, 4, 3, torch.uint8)]
    options = dict(label_mode=label_mode, padding_mode=padding_mode)
    losses, _ = build(logits, targets, [(0, 1, 1), (1, 0, 0), (0, 1, 0)], 6, **options)
    leaf = losses.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.mask_losses(x, **losses), (leaf,))


def test_second_derivative_is_refused() -> None:
    losses, _ = CASES["channels_last"]
    leaf = losses["logits"].clone().requires_grad_()
    loss = sum(part.sum() for part in ops.mask_losses(**losses | {"logits": leaf}))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()


def positional(case: Case) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    names = ("logits", "targets", "coords", "image_index", "query_index", "target_index")
    losses, costs = (dict(part) for part in case)
    return tuple(losses.pop(n) for n in names), losses, tuple(costs.pop(n) for n in names[:3]), costs


@pytest.mark.opcheck
@pytest.mark.parametrize("name", FEW)
def test_opcheck(name: str) -> None:
    args, options, cost_args, cost_options = positional(CASES[name])
    leaf = args[0].clone(memory_format=torch.preserve_format).requires_grad_()
    assert_opcheck(torch.ops.rendseg.mask_losses.default, (leaf, *args[1:]), options)
    assert_opcheck(torch.ops.rendseg.mask_costs.default, cost_args, cost_options)
    grads = weights(len(args[2])).float().unbind()
    modes = [options.get("label_mode", "bilinear"), options.get("padding_mode", "zeros"), options.get("canvas")]
    assert_opcheck(torch.ops.rendseg._mask_losses_backward.default, (*grads, *args, *modes))


def test_compile_and_export() -> None:
    args, options, cost_args, _ = positional(CASES["bilinear border (12, 13)"])

    def run(logits: Tensor, targets: Any, *rest: Tensor) -> tuple[Tensor, ...]:
        return (*ops.mask_losses(logits * 2, targets, *rest, **options), *ops.mask_costs(logits, targets, cost_args[2]))

    results = []
    torch._dynamo.reset()
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = args[0].clone().requires_grad_()
        out = function(leaf, *args[1:])
        results.append((*(o.detach() for o in out), torch.autograd.grad(out[0].sum() + out[1].sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor, targets: Any, *rest: Tensor) -> Any:
            return run(logits, targets, *rest)

    got = torch.export.export(Module(), args).module()(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, run(*args), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    losses, costs = CASES["several blocks of points"]
    with rendseg.backend(backend):
        wanted = *ops.mask_losses(**losses), *ops.mask_costs(**costs)
        with torch.autocast("cpu", torch.bfloat16):
            got = *ops.mask_losses(**losses), *ops.mask_costs(**costs)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_an_empty_set_has_a_graph() -> None:
    losses, _ = CASES["no targets"]
    leaf = losses["logits"].clone().requires_grad_()
    cross_entropy, dice = ops.mask_losses(**losses | {"logits": leaf})
    assert cross_entropy.shape == dice.shape == (0,)
    (cross_entropy.sum() + dice.sum()).backward()
    assert leaf.grad is not None and not leaf.grad.any()


def test_float64_coordinates_and_strided_ones(isa: str) -> None:
    losses, costs = CASES["bilinear zeros None"]
    for case, function in ((losses, ops.mask_losses), (costs, ops.mask_costs)):
        wanted = function(**case)
        spread = torch.stack([case["coords"]] * 2, 2).flatten(1, 2)[:, ::2]
        for coords in (case["coords"].double(), spread):
            assert all(torch.equal(a, b) for a, b in zip(function(**case | {"coords": coords}), wanted, strict=True))


@pytest.mark.bad_input
@pytest.mark.parametrize("caller", ["reference", "torch.ops", "public"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, caller: str) -> None:
    op, kwargs, exception, pattern = BAD[case]
    bad_input_runner(op, caller, kwargs, exception, pattern)


@pytest.mark.bad_input
@pytest.mark.parametrize("wrong,error,words", [
    (torch.zeros(3), ValueError, r"dice_grad must have shape \[N\] with N = 5 as in image_index, got \[3\]"),
    (torch.zeros(5).half(), TypeError, "dice_grad must be (torch.)?[fF]loat"),
])  # fmt: skip
def test_bad_input_of_the_backward(wrong: Tensor, error: type[Exception], words: str) -> None:
    args, _, _, _ = positional(CASES["channels_last"])
    for function in (
        torch.ops.rendseg._mask_losses_backward,
        reference_backward,
    ):
        with pytest.raises(error, match=words):
            function(torch.zeros(5), wrong, *args, "bilinear", "zeros", None)
