"""One step of a whole mask criterion, forward and backward, the matching included: the original against rendseg.patch.

K1  transformers' Mask2FormerLoss: 2 images (16 on a GPU), 100 queries of 256 x 256, 10 targets of 1024 x 1024 an image,
    12544 points, 10 layers
K2  the criterion of Mask2Former's repository at the same sizes, by the stand-in of tests/integrations

Each workload has a row for the whole step and one for each stage of one layer: matching, losses (with the selection of
points), backward. K1 needs the package transformers, both need SciPy.

eager        the original, from a second copy of its module that is not patched
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from _harness import Bench, Candidate
from torch import Tensor

import rendseg

CLASSES = 133
SIZES = {"images": 2, "queries": 100, "size": 256, "targets": 10, "target_size": 1024, "layers": 10, "points": 12544}
SMALL = {"images": 2, "queries": 6, "size": 16, "targets": 2, "target_size": 24, "layers": 2, "points": 40}


def second_copy(module: ModuleType) -> ModuleType:
    """The same file under another name, so that patching does not reach it."""
    name = f"{module.__name__}_original"
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def transformers_criterion(points: int) -> Callable[[bool], Any]:
    module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    original = second_copy(module)
    print(rendseg.patch("transformers"))
    config = SimpleNamespace(
        num_labels=CLASSES,
        no_object_weight=0.1,
        train_num_points=points,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
    )
    return lambda ours: (module if ours else original).Mask2FormerLoss(config, {})


def official_criterion(points: int) -> Callable[[bool], Any]:
    standins = Path(__file__).resolve().parents[1] / "tests/integrations/standins"
    folder = Path(tempfile.mkdtemp())
    for name in ("detectron2", "mask2former"):
        shutil.copytree(standins / name, folder / name)
    shutil.copytree(standins / "mask2former", folder / "mask2former_original")
    sys.path.insert(0, str(folder))
    print(rendseg.patch("mask2former"))

    def make(ours: bool) -> Any:
        package = "mask2former" if ours else "mask2former_original"
        parts = [importlib.import_module(f"{package}.modeling.{name}") for name in ("criterion", "matcher")]
        matcher = parts[1].HungarianMatcher(2.0, 5.0, 5.0, points)
        return parts[0].SetCriterion(CLASSES, matcher, ("masks", "labels"), points, 3.0, 0.75)

    return make


class Step:
    """The calls of a criterion in its own form, on the same tensors."""

    def __init__(self, bench: Bench, sizes: dict[str, int], official: bool) -> None:
        g = torch.Generator().manual_seed(0)
        images, queries, side, count, big, layers = (sizes[key] for key in list(SIZES)[:6])
        self.official = official
        self.masks = [
            torch.nn.functional.interpolate(torch.randn(images, queries, 8, 8, generator=g) * 4, (side, side))
            .to(bench.device)
            .requires_grad_()
            for _ in range(layers)
        ]
        self.classes = [
            torch.randn(images, queries, CLASSES + 1, generator=g).to(bench.device).requires_grad_()
            for _ in range(layers)
        ]
        coarse = torch.rand(images, count, 8, 8, generator=g)
        self.targets = list((torch.nn.functional.interpolate(coarse, (big, big)) > 0.5).float().to(bench.device))
        self.labels = [torch.randint(CLASSES, (count,), generator=g).to(bench.device) for _ in range(images)]

    def losses(self, criterion: Any) -> Tensor:
        if self.official:
            layers = [{"pred_logits": c, "pred_masks": m} for c, m in zip(self.classes, self.masks, strict=True)]
            found = criterion({**layers[0], "aux_outputs": layers[1:]}, self._dicts())
        else:
            rest = zip(self.masks[1:], self.classes[1:], strict=True)
            auxiliary = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in rest]
            found = criterion(self.masks[0], self.classes[0], self.targets, self.labels, auxiliary)
        return sum(loss.sum() for loss in found.values())

    def match(self, criterion: Any) -> Any:
        with torch.no_grad():
            if self.official:
                return criterion.matcher({"pred_logits": self.classes[0], "pred_masks": self.masks[0]}, self._dicts())
            return criterion.matcher(self.masks[0], self.classes[0], self.targets, self.labels)

    def mask_losses(self, criterion: Any, indices: Any) -> Tensor:
        count = float(sum(len(label) for label in self.labels))
        if self.official:
            found = criterion.loss_masks({"pred_masks": self.masks[0]}, self._dicts(), indices, count)
        else:
            found = criterion.loss_masks(self.masks[0], self.targets, indices, count)
        return sum(found.values())

    def _dicts(self) -> list[dict[str, Tensor]]:
        return [{"labels": label, "masks": mask} for label, mask in zip(self.labels, self.targets, strict=True)]


def workload(bench: Bench, name: str, sizes: dict[str, int]) -> None:
    make = (official_criterion if name == "K2" else transformers_criterion)(sizes["points"])
    step = Step(bench, sizes, name == "K2")
    criterions = {"eager": make(False).to(bench.device), "rendseg": make(True).to(bench.device)}
    facts = {"points_per_mask" if name == "points" else name: size for name, size in sizes.items()} | {"seed": 0}

    def whole(criterion: Any) -> Candidate:
        return lambda: torch.autograd.grad(step.losses(criterion), step.masks + step.classes)

    def rows_of(stage: str, candidates: dict[str, Candidate]) -> None:
        bench.compare(f"{name} {stage}", candidates, memory=True, twins=(), **facts)

    rows_of("step", {key: whole(criterion) for key, criterion in criterions.items()})
    bench.bar(f"{name} step against the original", bench.ratio(f"{name} step", "eager", "rendseg"), at_least=4.0)
    beyond = bench.beyond_result(f"{name} step", "rendseg")
    bench.bar(f"{name} step: memory beyond inputs and gradients, MB", beyond, at_most=40.0)
    rows_of("matching", {key: (lambda c=criterion: step.match(c)) for key, criterion in criterions.items()})
    indices = step.match(criterions["eager"])
    losses = {key: (lambda c=criterion: step.mask_losses(c, indices)) for key, criterion in criterions.items()}
    rows_of("losses", losses)
    totals = {key: compute() for key, compute in losses.items()}
    backward = {
        key: (lambda t=total: torch.autograd.grad(t, step.masks[0], retain_graph=True)) for key, total in totals.items()
    }
    rows_of("backward", backward)


def rows(bench: Bench) -> None:
    sizes = SMALL if bench.rehearsal else {**SIZES, **({"images": 16} if bench.for_gpu else {})}
    for name in ("K1", "K2"):
        if bench.wants(name):
            bench.run(name, workload, bench, name, sizes)


if __name__ == "__main__":
    raise SystemExit(Bench("criterion", __doc__).main(rows))
