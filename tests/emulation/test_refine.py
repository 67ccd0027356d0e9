"""The CUDA refine on the CPU. Each step is compared with the float64 head at the very cells that the step selects, so
rounding cannot shift the selection of a later one."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rendseg import reference
from rendseg.reference.refine import every_cell
from rendseg.reference.subdivide import upsample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import cases_refine as cases  # noqa: E402

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ROIS = list(cases.roi_cases())
CASES = [case for case in cases.refine_cases() if case[0] != "output size"]
LOOSE = {F64: 1e-9, F32: 1e-4, "tf32": 2e-2, F16: 2e-2, BF16: 1e-1}
# (coarse, features, head): what modules in one dtype give, and what autocast gives.
DTYPES = [(F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16), (F64, F64, F64)]
MIXED = [(F32, F32, BF16), (F32, F16, F16), (BF16, F32, F16), (F16, BF16, F32)]


def as_laid_out(t: Tensor, how: str) -> Tensor:
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "strided":  # every second column of a wider, poisoned map
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


class Call:
    """One op call, run for any number of steps, with the float64 answer of a single step."""

    def __init__(
        self,
        ops: Any,
        made: dict[str, Any],
        layers: dict[str, Any],
        kwargs: dict[str, Any],
        dtypes: Sequence[torch.dtype],
        how: str = "contiguous",
        device: str = "cpu",
    ) -> None:
        self.ops, self.dtype = ops, dtypes[2]
        coarse, features = cases.inputs(**made)
        self.coarse = as_laid_out(coarse.to(device, dtypes[0]), how)
        self.features = [as_laid_out(f.to(device, dtypes[1]), how) for f in features]
        self.head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1], **layers).to(device, dtypes[2])
        self.steps, self.num_points = kwargs["steps"], kwargs["num_points"]
        self.source = kwargs.get("coarse_source", "original")
        self.factor = kwargs.get("scale_factor", 2)
        self.align = kwargs.get("align_corners", False)
        self.padding = kwargs.get("padding_mode", "zeros")

    def run(self, steps: int | None = None, labels: bool = False) -> Tensor:
        return self.ops._refine_mlp(
            self.coarse,
            self.features,
            [w.detach() for w in self.head.weights],
            [b.detach() for b in self.head.biases],
            self.steps if steps is None else steps,
            self.num_points,
            self.source,
            self.factor,
            self.align,
            self.padding,
            self.head.each,
            self.head.coarse_first,
            labels,
        )

    def check(self, tolerance: float) -> Tensor:
        """Every step in turn. The final logits."""
        previous = self.run(0)
        assert torch.equal(previous, self.coarse)
        for step in range(1, self.steps + 1):
            got = self.run(step)
            n, classes, height, width = got.shape
            if self.num_points >= height * width:
                kept = torch.zeros(n, height * width, dtype=torch.bool, device=got.device)
                coords, fine = every_cell(self.coarse, height, width), None
                indices = torch.arange(height * width, device=got.device).expand(n, -1)
            else:
                fine, indices, coords = self.ops.subdivide(previous, self.num_points, self.factor, self.align)
                kept = torch.ones(n, height * width, dtype=torch.bool, device=got.device).scatter(1, indices, False)
            at = indices.unsqueeze(1).expand(-1, classes, -1)
            with torch.no_grad():
                if self.source == "original":
                    points = reference.point_sample(self.coarse.double(), coords, padding_mode=self.padding)
                else:  # the cells themselves of the upsampled map
                    source = upsample(previous, self.factor, self.align) if fine is None else fine
                    points = source.double().flatten(2).gather(2, at)
                features = reference.point_sample(
                    [f.double() for f in self.features], coords, padding_mode=self.padding
                )
                exact = copy.deepcopy(self.head).double()(features, points)
            torch.testing.assert_close(got.flatten(2).gather(2, at).double(), exact, rtol=tolerance, atol=tolerance)
            if fine is not None:
                everywhere = kept.unsqueeze(1).expand(-1, classes, -1)
                assert torch.equal(got.flatten(2)[everywhere], fine.flatten(2)[everywhere])
            assert got.dtype == self.coarse.dtype
            assert torch._prims_common.suggest_memory_format(got) == torch._prims_common.suggest_memory_format(
                self.coarse
            )
            previous = got
        labels = self.run(labels=True)
        assert labels.dtype == (torch.uint8 if previous.shape[1] <= 256 else torch.int16)
        assert torch.equal(labels.long(), previous.argmax(1))
        return previous


def tolerance(dtypes: Sequence[torch.dtype]) -> float:
    coarse, features, head = dtypes
    return max(LOOSE["tf32" if head == F32 else head], LOOSE[coarse], LOOSE[features])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d[2]).removeprefix("torch."))
@pytest.mark.parametrize("name, made, layers, kwargs", CASES, ids=[case[0] for case in CASES])
def test_shared_cases(emulated, name: str, made: dict, layers: dict, kwargs: dict, dtypes: Sequence) -> None:
    results = []
    for seed, how in enumerate(("contiguous", "channels_last", "strided")):
        emulated.seed(seed)
        call = Call(emulated.ops, made, layers, kwargs, dtypes, how)
        results.append(call.check(tolerance(dtypes)))
    for other in results[1:]:  # the kernels sum in one order whatever the layout and the schedule
        if dtypes[2] != F64:
            assert torch.equal(other, results[0])


@pytest.mark.parametrize("name, made, kwargs", ROIS, ids=[case[0] for case in ROIS])
def test_masks_of_boxes(emulated, name: str, made: dict, kwargs: dict) -> None:
    """The whole loop in float64, and a step of every cell, which no rounding can shift, in the types that are fused."""
    for seed, dtype in enumerate((F64, F32, F16, BF16)):
        emulated.seed(seed)
        coarse, features, rois, classes = cases.roi_inputs(**made)
        coarse, features = (
            coarse.to(dtype),
            [as_laid_out(f.to(dtype), ("contiguous", "channels_last")[seed % 2]) for f in features],
        )
        head = cases.Head(sum(f.shape[1] for f in features), coarse.shape[1]).to(dtype)
        steps, points = (kwargs["steps"], kwargs["num_points"]) if dtype == F64 else (2, 144)
        source, padding = kwargs.get("coarse_source", "original"), kwargs.get("padding_mode", "zeros")
        got = emulated.ops._refine_mlp(
            coarse, features, [w.detach() for w in head.weights], [b.detach() for b in head.biases], steps, points,
            source, 2, False, padding, True, False, False, classes, False, *rois,
        )  # fmt: skip
        wanted = reference.refine(
            coarse.double(), [f.double() for f in features], head.double(), steps=steps, num_points=points,
            coarse_source=source, padding_mode=padding, rois=rois, class_index=classes,
        )  # fmt: skip
        within = tolerance((dtype,) * 3)
        torch.testing.assert_close(got.double(), wanted, rtol=within, atol=within)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_one_class_of_each_mask(emulated, dtype: torch.dtype) -> None:
    """Its logit is the uncertainty, and it may be all that is written."""
    coarse, features, rois, classes = cases.roi_inputs(side=8)
    coarse, features, head = coarse.to(dtype), [f.to(dtype) for f in features], cases.Head(8, 4).to(dtype)
    fine, indices, _ = emulated.ops.subdivide(coarse, 30, 2, False, classes)
    layers = ([w.detach() for w in head.weights], [b.detach() for b in head.biases])
    rest = ("original", 2, False, "zeros", True, False, False, classes)
    got = emulated.ops._refine_mlp(coarse, features, *layers, 1, 30, *rest, False, *rois)
    changed = (got != fine).any(1).flatten(1)
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, indices, True))
    for steps in (0, 2):
        whole, alone = (
            emulated.ops._refine_mlp(coarse, features, *layers, steps, 300, *rest, only, *rois)
            for only in (False, True)
        )
        assert torch.equal(alone[:, 0], whole[torch.arange(5), classes])


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_mixed_dtypes(emulated, dtypes: Sequence, how: str) -> None:
    made = {"classes": 7, "channels": (16, 8, 5)}
    for seed in range(3):
        emulated.seed(seed)
        Call(emulated.ops, made, {}, {"steps": 2, "num_points": 40}, dtypes, how).check(tolerance(dtypes))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_block_sizes(emulated, dtype: torch.dtype) -> None:
    """32, 64, 80 and 128 points to a block (see test_refine_blocks.py), with a partial last block and blocks that span
    images: the same bits."""
    made = {"n": 3, "classes": 19, "h": 7, "w": 10, "channels": (24, 8)}
    results = []
    for seed, processors in enumerate((132, 10, 5, 3)):
        emulated.seed(seed)
        emulated.device(processors=processors)
        call = Call(emulated.ops, made, {"hidden": (48, 40)}, {"steps": 1, "num_points": 101}, [dtype] * 3)
        results.append(call.check(tolerance([dtype] * 3)))
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_head_of_the_paper(emulated, dtype: torch.dtype) -> None:
    """Three hidden layers of 256: every warp has its four tiles, and weights are fetched ahead."""
    made = {"n": 1, "classes": 19, "h": 5, "w": 8, "channels": (256,)}
    layers = {"hidden": (256, 256, 256)}
    call = Call(emulated.ops, made, layers, {"steps": 1, "num_points": 30}, [dtype] * 3, "channels_last")
    call.check(tolerance([dtype] * 3))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_many_classes(emulated, dtype: torch.dtype) -> None:
    """More outputs than a block sums at a time, and labels that need 16 bits."""
    made = {"n": 2, "classes": 301, "h": 3, "w": 4}
    for layers in ({"hidden": (20,)}, {"hidden": (), "coarse_first": True}):
        Call(emulated.ops, made, layers, {"steps": 1, "num_points": 33}, [dtype] * 3).check(tolerance([dtype] * 3))


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtypes", [(F64, F64, F64), (F32, F32, F32), (F16, F16, F16), (BF16, F16, F32)], ids=str)
def test_current_reads_the_upsampled_map(emulated, dtypes: Sequence[torch.dtype], how: str) -> None:
    """A head that hands the coarse logits back, times -1024: the bits of the upsampled map, before any value of it is
    replaced, in logits and in labels, where some cells and where all are recomputed."""
    for seed, (factor, align, num_points) in enumerate([(2, False, 101), (3, False, 333), (2, True, 10_000)]):
        emulated.seed(seed)
        kwargs = {"steps": 1, "num_points": num_points, "coarse_source": "current", "scale_factor": factor}
        made, layers = {"n": 2, "classes": 5, "h": 7, "w": 11}, {"hidden": (), "coarse_first": True}
        call = Call(emulated.ops, made, layers, kwargs | {"align_corners": align}, dtypes, how)
        with torch.no_grad():
            call.head.weights[0].copy_(-1024 * torch.eye(5, call.head.weights[0].shape[1]))
            call.head.biases[0].zero_()
        fine, indices, _ = emulated.ops.subdivide(call.coarse, num_points, factor, align)
        at = indices.unsqueeze(1).expand(-1, 5, -1)
        values = fine.flatten(2).gather(2, at)
        if dtypes[2] == F32:
            values = tf32(values.float()).to(dtypes[0])
        wanted = fine.flatten(2).scatter(2, at, -1024 * values).view_as(fine)
        assert torch.equal(call.run(), wanted)
        assert torch.equal(call.run(labels=True).long(), wanted.argmax(1))


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, halves away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(F32)


def test_ties_and_not_a_number(emulated) -> None:
    """The lowest class wins a tie, the first NaN wins over all; as argmax of the logits."""
    for dtypes in ((F32, F32, F32), (F16, F16, F16), (BF16, BF16, F16), (F64, F64, F64)):
        call = Call(emulated.ops, {"n": 1, "classes": 40}, {"hidden": ()}, {"steps": 1, "num_points": 99}, dtypes)
        with torch.no_grad():
            for weight, bias in zip(call.head.weights, call.head.biases, strict=True):
                weight.zero_()
                bias.zero_()
            _, indices, _ = emulated.ops.subdivide(call.coarse, 99)

            def picked(call: Call = call, indices: Tensor = indices) -> Tensor:
                return call.run(labels=True).flatten(1).gather(1, indices)

            assert not picked().any()
            call.head.biases[0][[7, 31]] = 3.0
            assert (picked() == 7).all()
            call.head.biases[0][[12, 35]] = math.nan
            call.head.biases[0][3] = math.inf
            assert (picked() == 12).all()
            assert torch.equal(call.run(labels=True).long(), call.run().argmax(1))


def test_zeros_of_either_sign_tie(emulated) -> None:
    call = Call(emulated.ops, {"classes": 9}, {"hidden": ()}, {"steps": 1, "num_points": 10_000}, (F16, F32, F32))
    with torch.no_grad():
        call.head.weights[0].zero_()
        call.head.biases[0].fill_(1e-12)
        call.head.biases[0][[0, 4]] = -1e-12  # rounded to -0 by the half logits
    got = call.run()
    assert not got.any() and got[:, 4].signbit().all() and not call.run(labels=True).any()


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_not_a_number_spreads_as_in_the_reference(emulated, padding: str, how: str) -> None:
    for dtype in (F32, BF16):
        kwargs = {"steps": 1, "num_points": 60, "padding_mode": padding}
        call = Call(emulated.ops, {"channels": (8, 16)}, {}, kwargs, [dtype] * 3, how)
        call.coarse[0, 2, 3, 4] = math.nan
        call.features[0][1, :, 2, 2] = math.nan
        call.features[1][0, 3, 0, 0] = math.nan
        got = call.run()
        expected = reference.refine(call.coarse, call.features, call.head, steps=1, num_points=60, padding_mode=padding)
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any()


def test_infinite_activations(emulated) -> None:
    """Columns that pad a layer stay zero when its sums overflow."""
    call = Call(emulated.ops, {}, {"hidden": (12, 9, 33)}, {"steps": 1, "num_points": 60}, [F16] * 3)
    with torch.no_grad():
        call.head.weights[0].abs_()
        call.head.biases[0].fill_(60000.0)
        call.head.weights[1].abs_()
        call.head.weights[2].abs_()
        call.head.weights[3].abs_()
    call.coarse.abs_()
    call.features[0].abs_().mul_(8000)
    got, _ = call.run(), call.run(labels=True)
    _, indices, _ = emulated.ops.subdivide(call.coarse, 60)
    values = got.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, 5, -1))
    assert values.isinf().any() and not values.isnan().any()


def test_which_path_runs(emulated, monkeypatch) -> None:
    """Half heads are fused, and float32 heads where convolutions may use tf32; else, and where the activations do not
    fit into shared memory, point_sample and the products of ATen run."""

    def check(dtype: torch.dtype, fused: bool, within: float, channels: tuple = (8, 3), **layers: Any) -> None:
        made = {"channels": channels}
        every = Call(emulated.ops, made, layers, {"steps": 2, "num_points": 10_000}, [dtype] * 3)
        before = emulated.launches()
        every.run()
        launches = emulated.launches() - before
        assert launches == 2 if fused else launches > 2  # the packing and the last step, which replaces the first
        every.check(within)
        for how in ("contiguous", "channels_last"):
            for source in ("original", "current"):
                kwargs = {"steps": 2, "num_points": 100, "coarse_source": source}
                Call(emulated.ops, made, layers, kwargs, [dtype] * 3, how).check(within)

    for dtype in (F32, F16, BF16):
        check(dtype, True, tolerance([dtype] * 3))
        check(dtype, False, tolerance([dtype] * 3), hidden=(300,))
    check(F64, False, LOOSE[F64])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(F32, False, LOOSE[F32])
    check(F32, False, LOOSE[F32], each=False, coarse_first=True)
    check(F16, True, LOOSE[F16])
    monkeypatch.undo()
    for dtype in (F32, F16, BF16):  # rows of more than 3 KB
        check(dtype, False, tolerance([dtype] * 3), channels=(1700,), coarse_first=True)


def _optimizer(call: Call) -> None:
    for p in call.head.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(call.head.parameters(), lr=0.05).step()


def _inference(call: Call) -> None:
    with torch.inference_mode():
        call.head.weights[0].mul_(0.5)


def _another_head(call: Call) -> None:
    """Its storages may well take the addresses of those it replaces."""
    layers = copy.deepcopy(call.head.state_dict())
    del call.head
    call.head = cases.Head(8, 5)
    call.head.load_state_dict({name: 0.5 * value for name, value in layers.items()})


def _copied(call: Call) -> None:
    call.head = copy.deepcopy(call.head)
    call.head.biases[-1].data.add_(1.0)


CHANGES = {
    "optimizer": _optimizer,
    "load_state_dict": lambda call: call.head.load_state_dict({k: -v for k, v in call.head.state_dict().items()}),
    "data": lambda call: call.head.weights[1].data.mul_(0.5),  # no version counter sees these two
    "numpy": lambda call: call.head.biases[1].detach().numpy().fill(2.0),
    "inference mode": _inference,
    "new storage": lambda call: setattr(call.head.weights[0], "data", 0.5 * call.head.weights[0].data),
    "another dtype": lambda call: (setattr(call, "dtype", F16), call.head.half()),
    "another head": _another_head,
    "a copy": _copied,
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_are_those_of_the_call(emulated, name: str) -> None:
    """Whatever changed them since the last call."""
    call = Call(emulated.ops, {}, {}, {"steps": 1, "num_points": 60}, [F32] * 3)
    before = call.check(LOOSE["tf32"])
    CHANGES[name](call)
    call.check(LOOSE["tf32"])
    assert not torch.equal(call.run(), before)


def test_heads_in_turn(emulated) -> None:
    """Two heads of the same shapes."""
    first = Call(emulated.ops, {}, {}, {"steps": 1, "num_points": 60}, [F16] * 3)
    second = Call(emulated.ops, {}, {}, {"steps": 1, "num_points": 60}, [F16] * 3)
    with torch.no_grad():
        second.head.weights[0].neg_()
    wanted = first.check(LOOSE[F16]), second.check(LOOSE[F16])
    assert not torch.equal(*wanted)
    for _ in range(2):
        assert torch.equal(first.run(), wanted[0]) and torch.equal(second.run(), wanted[1])


def test_empty_batch(emulated) -> None:
    for dtype in (F32, F16, F64):
        call = Call(emulated.ops, {"n": 0}, {}, {"steps": 2, "num_points": 7}, [dtype] * 3)
        assert call.run().shape == (0, 5, 24, 36) and call.run(labels=True).shape == (0, 24, 36)
        call.num_points = 10_000
        assert call.run().shape == (0, 5, 24, 36) and call.run(labels=True).shape == (0, 24, 36)


@pytest.mark.bad_input
@pytest.mark.parametrize("name, kwargs, exception, pattern", cases.bad_layers(), ids=[c[0] for c in cases.bad_layers()])
def test_refuses_what_the_cpu_op_refuses(emulated, name: str, kwargs: dict, exception: type, pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        emulated.ops._refine_mlp(**kwargs)
