"""``rendseg.patch`` on stand-ins of packages that PyPI does not have: names, arguments and binding are theirs."""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rendseg
from rendseg import ops
from rendseg.integrations import TARGETS
from tests.integrations.agreement import agree
from tests.integrations.draws import Draws

STANDINS = Path(__file__).parent / "standins"
POINTS = 32
PACKAGES = ("mask2former", "maskdino", "oneformer")


@pytest.fixture(autouse=True)
def standins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("scipy", reason="needs the package scipy, which solves the assignment")
    names = {*PACKAGES, "detectron2"}
    shutil.copytree(STANDINS, tmp_path, dirs_exist_ok=True)
    for package in PACKAGES[1:]:
        shutil.copytree(STANDINS / "mask2former", tmp_path / package)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name in before:
        del sys.modules[name]
    yield
    rendseg.unpatch()
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(before)


def modules_of(package: str) -> tuple[Any, Any]:
    return tuple(importlib.import_module(f"{package}.modeling.{name}") for name in ("criterion", "matcher"))


def criterion_of(package: str, criterion: Any = None, matcher: Any = None) -> Any:
    modules = modules_of(package)
    matching = (matcher or modules[1].HungarianMatcher)(2.0, 5.0, 5.0, POINTS)
    return (criterion or modules[0].SetCriterion)(4, matching, ("masks", "labels"), POINTS, 3.0, 0.75)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    g = torch.Generator().manual_seed(1)
    layers = [
        {
            "pred_logits": torch.randn(2, 6, 5, generator=g).to(dtype).requires_grad_(),
            "pred_masks": torch.randn(2, 6, 9, 11, generator=g).to(dtype).requires_grad_(),
        }
        for _ in range(3)
    ]
    targets = [
        {
            "labels": torch.randint(4, (count,), generator=g),
            "masks": torch.rand(count, 24 + count, 30, generator=g) > 0.5,
        }
        for count in (3, 2)
    ]
    return {**layers[0], "aux_outputs": layers[1:]}, targets


def objects(*owners: Any) -> list[tuple[Any, str, Any]]:
    return [(owner, name, value) for owner in owners for name, value in vars(owner).items()]


def unchanged(before: list[tuple[Any, str, Any]], *owners: Any) -> bool:
    after = objects(*owners)
    return len(before) == len(after) and all(vars(owner)[name] is value for owner, name, value in before)


def replaced(report: Any) -> list[str]:
    return [name for name, _ in report.replaced]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("package", PACKAGES)
def test_set_criterion(package: str, dtype: torch.dtype) -> None:
    criterion, matcher = modules_of(package)
    owners = criterion, matcher, criterion.SetCriterion, matcher.HungarianMatcher
    before = objects(*owners)
    outputs, targets = inputs(dtype)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    leaves = [tensor for layer in (outputs, *outputs["aux_outputs"]) for tensor in list(layer.values())[:2]]
    loss, draws = criterion_of(package), Draws(POINTS)
    torch.manual_seed(0)
    with draws.recorded(), autocast:
        wanted = loss(outputs, targets)
    state = torch.get_rng_state()
    with rendseg.patched(package) as report:
        assert torch.equal(torch.get_rng_state(), state)  # patching draws nothing
        assert f"{package}.modeling.criterion.SetCriterion.loss_masks" in replaced(report)
        assert f"{package}.modeling.criterion.get_uncertain_point_coords_with_randomness" in replaced(report)
        assert f"{package}.modeling.matcher.point_sample" in replaced(report)
        whole = f"{package}.modeling.criterion.SetCriterion.forward" in replaced(report)
        assert whole == (package != "maskdino")
        with draws.fed(), autocast:
            got = loss(outputs, targets)
    assert unchanged(before, *owners)
    agree(f"{package} (stand-in)", got, wanted, leaves, str(dtype).removeprefix("torch."))


def test_one_copy_to_the_host_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = inputs()
    loss, copies, cpu = criterion_of("mask2former"), [], torch.Tensor.cpu
    with rendseg.patched("mask2former"):
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.dtype) or cpu(self))
        loss(outputs, targets)
    assert copies.count(torch.float32) == 1


def test_under_torch_compile() -> None:
    loss = criterion_of("mask2former")
    compiled = torch.compile(loss, backend="eager")
    outputs, targets = inputs()
    del outputs["aux_outputs"]

    def results(function: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        found = function(outputs, targets)
        return [*found.values(), *torch.autograd.grad(sum(found.values()), list(outputs.values()))]

    plain = results(compiled)
    with rendseg.patched("mask2former"):
        patched = results(compiled)
        assert all(torch.equal(a, b) for a, b in zip(patched, results(loss), strict=True))
    assert not torch.equal(patched[0], plain[0])  # other points: what was compiled before is not used
    assert all(torch.equal(a, b) for a, b in zip(results(compiled), plain, strict=True))


def test_consumers_of_detectron2() -> None:
    names = ("semantic_seg", "mask_head")
    semantic, masks = (importlib.import_module(f"detectron2.projects.point_rend.{name}") for name in names)
    g = torch.Generator().manual_seed(2)
    logits, classes = torch.randn(3, 4, 8, 9, generator=g).requires_grad_(), torch.tensor([3, 0, 1])
    before = objects(semantic, masks)
    calls = ((semantic.points_and_values, (logits,)), (masks.points_and_values, (logits, classes)))
    draws = [Draws(16) for _ in calls]
    wanted = []
    for (function, args), drawn in zip(calls, draws, strict=True):
        with drawn.recorded():
            wanted.append(function(*args))
    report = rendseg.patch("detectron2")
    assert sum("semantic_seg" in name or "mask_head" in name for name in replaced(report)) == 5
    for (function, args), drawn, (coords, values) in zip(calls, draws, wanted, strict=True):
        with drawn.fed():
            got = function(*args)
        order = [pair[0][..., 0].argsort(1) for pair in (got, (coords, values))]  # candidates come in any order
        for i, (a, b) in enumerate(zip(got, (coords, values), strict=True)):
            a, b = (x if i == 0 else x.transpose(1, 2) for x in (a, b))
            index = [o[..., None].expand(-1, -1, a.shape[2]) for o in order]
            a, b = a.gather(1, index[0]), b.gather(1, index[1])
            torch.testing.assert_close(a, b)
        agree("detectron2 (stand-in)", {"square": a.square()}, {"square": b.square()}, [logits])
    # A callback that is neither uncertainty is called as before.
    torch.manual_seed(0)
    largest = masks.points_by_largest(logits)
    rendseg.unpatch("detectron2")
    torch.manual_seed(0)
    assert torch.equal(largest, masks.points_by_largest(logits))
    assert unchanged(before, semantic, masks)


def mask_head_of_detectron2(count: int, **options: Any) -> tuple[Any, ...]:
    """A mask head of 8 channels and 3 classes, and the arguments of its loop: boxes in two of three images."""
    masks, points = (
        importlib.import_module(f"detectron2.projects.point_rend.{n}") for n in ("mask_head", "point_head")
    )
    structures = importlib.import_module("detectron2.structures")
    torch.manual_seed(3)
    point_head = points.StandardPointHead(8, 3, 16, 2, **options)
    torch.nn.init.normal_(point_head.predictor.weight, std=0.4)
    head = masks.PointRendMaskHead(point_head, ["p2", "p3"], {"p2": 1 / 4, "p3": 1 / 8}).eval()
    features = {"p2": torch.randn(3, 5, 24, 32), "p3": torch.randn(3, 3, 12, 16)}
    corners = torch.rand(count, 2) * 60 - 5
    boxes, classes = torch.cat((corners, corners + 4 + 60 * torch.rand(count, 2)), 1), torch.randint(3, (count,))
    instances = [structures.Instances((96, 128)) for _ in range(3)]
    for found, part in zip(instances, (slice(2, None), slice(0, 0), slice(0, 2)), strict=True):
        found.pred_boxes, found.pred_classes = structures.Boxes(boxes[part]), classes[part]
    return head, features, 2 * torch.randn(count, 3, 7, 7), instances


def masks_of(head: Any, *arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        found = head._subdivision_inference(*arguments)
    return torch.cat([f.pred_masks for f in found])


def test_masks_of_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 boxes, from 7 to 224 cells a side, 28 x 28 points a step."""
    head, *arguments = mask_head_of_detectron2(100)
    wanted = masks_of(head, *arguments)
    calls = []
    monkeypatch.setattr(ops, "refine", lambda *a, refine=ops.refine, **o: calls.append(a[2]) or refine(*a, **o))
    with rendseg.patched("detectron2") as report:
        assert "detectron2.projects.point_rend.mask_head.PointRendMaskHead._subdivision_inference" in replaced(report)
        got = masks_of(head, *arguments)
        hook = head.point_head.register_forward_hook(lambda *a: None)
        hooked = masks_of(head, *arguments)
        hook.remove()
    assert calls[-2].refine_parameters() is not None and got.shape == (100, 1, 224, 224)
    for masks in (got, hooked):
        # A cell whose uncertainty ties with the last chosen to rounding may be chosen on one side alone.
        assert ((masks - wanted).abs() > 1e-4).float().mean() < 1e-5
        other = (masks > 0.5) != (wanted > 0.5)
        print(f"\ndetectron2 (stand-in), masks of 100 boxes: {int(other.sum())} of {other.numel()} pixels differ")
        assert not other[(wanted - 0.5).abs() > 1e-5].any()  # those that are left are rounded


def test_mask_heads_of_detectron2_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = mask_head_of_detectron2(3, mask_classes=1)
    fewer, *arguments = mask_head_of_detectron2(3)
    fewer.mask_point_subdivision_num_points = 700

    class Doubled(type(fewer)):
        def _get_point_logits(self, *args: Any) -> Any:
            return 2 * super()._get_point_logits(*args)

    doubled = Doubled(fewer.point_head, fewer.mask_point_in_features, fewer._feature_scales).eval()
    wanted = [masks_of(head, *arguments) for head in (one, fewer, doubled)]
    with rendseg.patched("detectron2") as report:
        monkeypatch.setattr(ops, "refine", None)
        got = [masks_of(head, *arguments) for head in (one, fewer, doubled)]
    torch.testing.assert_close(got, wanted)
    reasons = " ".join(why for _, why in report.left)
    assert "its point head has another number of classes than its coarse masks: its own code runs" in reasons
    assert "700 points at a time do not predict every cell of 28 x 28 first" in reasons
    assert "overrides _get_point_logits: its own code runs" in reasons


def test_what_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, matcher = modules_of("mask2former")
    sample, masks = matcher.point_sample, criterion.SetCriterion.loss_masks

    def shifted(input: Any, point_coords: Any, **kwargs: Any) -> Any:
        return sample(input, point_coords + 0.01, **kwargs)

    def halved(self: Any, outputs: Any, targets: Any, indices: Any, num_masks: Any) -> Any:
        return {name: value / 2 for name, value in masks(self, outputs, targets, indices, num_masks).items()}

    def longer(self: Any, outputs: Any, targets: Any, cost: Any = ()) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(matcher, "point_sample", shifted)
    monkeypatch.setattr(criterion.SetCriterion, "loss_masks", halved)
    monkeypatch.setattr(matcher.HungarianMatcher, "memory_efficient_forward", longer)
    report = rendseg.patch("mask2former")
    left = dict(report.left)
    assert "computes something else" in left["mask2former.modeling.matcher.point_sample"]
    assert "computes something else" in left["mask2former.modeling.criterion.SetCriterion.loss_masks"]
    name = "mask2former.modeling.matcher.HungarianMatcher.memory_efficient_forward"
    assert left[name] == "takes (self, outputs, targets, cost) and not (self, outputs, targets)"
    assert matcher.point_sample is shifted and criterion.SetCriterion.loss_masks is halved
    assert name in str(report) and "replaced: 2" in str(report)


def test_a_subclass_that_overrides_a_piece_keeps_it() -> None:
    criterion, matcher = modules_of("mask2former")

    class Doubled(criterion.SetCriterion):
        def loss_masks(self, *args: Any) -> Any:
            return {name: 2 * value for name, value in super().loss_masks(*args).items()}

    class Reversed(matcher.HungarianMatcher):
        def forward(self, outputs: Any, targets: Any) -> Any:
            count = [len(target["labels"]) for target in targets]
            return [(torch.arange(n), torch.arange(n).flip(0)) for n in count]

    outputs, targets = inputs()
    report = rendseg.patch("mask2former")
    left = {name.rpartition(".")[2]: why for name, why in report.left}
    assert left["Doubled"].startswith("overrides loss_masks") and left["Reversed"].startswith("overrides forward")
    results = []
    for kind in (criterion.SetCriterion, Doubled):
        torch.manual_seed(0)
        results.append(criterion_of("mask2former", kind, Reversed)(outputs, targets)["loss_mask"])
    torch.testing.assert_close(results[1], 2 * results[0])


def test_patching_twice_and_by_a_model() -> None:
    criterion, matcher = modules_of("mask2former")
    before = objects(criterion, matcher, criterion.SetCriterion, matcher.HungarianMatcher)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), criterion_of("mask2former"))
    report = rendseg.patch(model)
    forward = criterion.SetCriterion.forward
    assert rendseg.patch("mask2former") is report and criterion.SetCriterion.forward is forward
    with rendseg.patched(model):  # what was patched before stays so
        pass
    assert criterion.SetCriterion.forward is forward
    later = lambda *args, **kwargs: None  # noqa: E731
    criterion.point_sample = later
    rendseg.unpatch(model)
    assert criterion.point_sample is later  # somebody else's
    criterion.point_sample = next(
        value for owner, name, value in before if owner is criterion and name == "point_sample"
    )
    assert unchanged(before, criterion, matcher, criterion.SetCriterion, matcher.HungarianMatcher)


@pytest.mark.bad_input
def test_what_cannot_be_patched() -> None:
    with pytest.raises(ValueError, match="one of transformers, mmdet, .* or for a model, got 'nothing'"):
        rendseg.patch("nothing")
    with pytest.raises(ValueError, match="Linear has no module of a package that rendseg knows"):
        rendseg.patch(torch.nn.Linear(1, 1))


@pytest.mark.bad_input
def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "maskdino", ("no_such_package_of_masks",))
    with pytest.raises(ImportError, match="nothing of maskdino can be imported: install it"):
        rendseg.patch("maskdino")


def test_importing_rendseg_imports_no_peer() -> None:
    peers = {"scipy", *(name for names in TARGETS.values() for name in names)}
    package, found = Path(rendseg.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not what a function imports when it is called
            if isinstance(node, ast.Import):
                found |= {(path.name, alias.name.partition(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # relative ones too: nothing may import the module of a target
                found |= {
                    (path.name, name) for name in [*(node.module or "").split("."), *(a.name for a in node.names)]
                }
    assert len(found) > 500  # the modules were read
    assert not [(path, name) for path, name in found if name in peers]
