"""The criterions of Hugging Face transformers, patched and not, at the same random points."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import rendseg
from rendseg import ops
from rendseg.nn import mask_criterion
from tests.integrations.agreement import agree
from tests.integrations.draws import Draws
from tests.limits import TIMEOUT

pytest.importorskip("transformers", reason="needs the package transformers: pip install -e .[peers]")
pytest.importorskip("scipy", reason="needs the package scipy: pip install -e .[peers]")

MODELS = {"mask2former": "Mask2Former", "oneformer": "OneFormer", "eomt": "Eomt", "eomt_dinov3": "EomtDinov3"}
POINTS, CLASSES, LAYERS = 64, 5, 3


def module_of(model: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def criterion_of(model: str) -> Any:
    module, stem = module_of(model), MODELS[model]
    if model == "oneformer":
        matcher = module.OneFormerHungarianMatcher(2.0, 5.0, 5.0, POINTS)
        return module.OneFormerLoss(CLASSES, matcher, {}, 0.1, POINTS, 3.0, 0.75, 0.07)
    config = SimpleNamespace(
        num_labels=CLASSES,
        no_object_weight=0.1,
        train_num_points=POINTS,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
    )
    return getattr(module, f"{stem}Loss")(config, {})


def inputs_of(sizes: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    images = len(sizes)
    masks = [torch.randn(images, 7, 16, 20, generator=g).mul(3).to(dtype).requires_grad_() for _ in range(LAYERS)]
    classes = [torch.randn(images, 7, CLASSES + 1, generator=g).to(dtype).requires_grad_() for _ in range(LAYERS)]
    targets = [torch.rand(size, generator=g).gt(0.6).float() for size in sizes]
    labels = [torch.randint(CLASSES, size[:1], generator=g) for size in sizes]
    return {"masks": masks, "classes": classes, "targets": targets, "labels": labels}


def losses_of(model: str, criterion: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    extra = {}
    if model == "oneformer":
        g = torch.Generator().manual_seed(4)
        images = len(given["targets"])
        extra = {
            "contrastive_queries_logits": torch.randn(images, 7, 4, generator=g),
            "text_queries": torch.randn(images, 7, 4, generator=g),
        }
    layers = zip(given["masks"][1:], given["classes"][1:], strict=True)
    return criterion(
        masks_queries_logits=given["masks"][0],
        class_queries_logits=given["classes"][0],
        mask_labels=given["targets"],
        class_labels=given["labels"],
        auxiliary_predictions=[{"masks_queries_logits": m, "class_queries_logits": c} for m, c in layers],
        **extra,
    )


Pairs = list[list[tuple[torch.Tensor, torch.Tensor]]]  # of each layer and image


def both(
    model: str, given: dict[str, Any], autocast: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], tuple[Pairs, Pairs, list[torch.Tensor]]]:
    """The losses of rendseg and of the original at the same draws; pairs of the original, of rendseg, and their points.

    Under autocast the losses of rendseg are those of the pairs of the original.
    """
    criterion, draws, theirs, ours = criterion_of(model), Draws(POINTS), [], []
    match, assign = type(criterion.matcher).forward, mask_criterion.assign

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        theirs.append(match(self, *args, **kwargs))
        return theirs[-1]

    def assigned(costs: Any, counts: Any) -> Any:
        ours.extend(assign(costs, counts))
        return [[(query.numpy(), target.numpy()) for query, target in layer] for layer in theirs] if autocast else ours

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with mock.patch.object(type(criterion.matcher), "forward", noted), draws.recorded():
            wanted = losses_of(model, criterion, given)
        with rendseg.patched("transformers"), draws.fed(), mock.patch.object(mask_criterion, "assign", assigned):
            got = losses_of(model, criterion, given)
    return got, wanted, (theirs, ours, draws.drawn["matching"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sizes", [[(3, 40, 48), (2, 40, 48)], [(3, 40, 48), (9, 36, 52)], [(2, 30, 30), (0, 30, 30)]], ids=str
)
def test_same_losses_and_gradients(model: str, sizes: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    given = inputs_of(sizes)
    got, wanted, _ = both(model, given)
    agree(f"transformers {model}", got, wanted, given["masks"] + given["classes"])


@pytest.mark.parametrize("model", ["mask2former", "oneformer"])
def test_under_autocast(model: str) -> None:
    """Given the pairs of the original, all agrees. Its own pairs come from costs in bfloat16, and are never cheaper."""
    sizes, cheaper = [(3, 40, 48), (2, 40, 48)], 0
    for seed in range(3):
        torch.manual_seed(seed)
        given = inputs_of(sizes, torch.bfloat16)
        got, wanted, (theirs, ours, points) = both(model, given, autocast=True)
        agree(f"transformers {model}", got, wanted, given["masks"] + given["classes"], "bfloat16")
        for n, coords in enumerate(points):
            layer, b = divmod(n, len(sizes))
            image = [given[name][layer][b] for name in ("masks", "classes")] + [
                given[name][b] for name in ("targets", "labels")
            ]
            costs = exact_costs(*image, coords[0])
            original, rendsegs = (float(costs[pairs[layer][b]].sum()) for pairs in (theirs, ours))
            assert rendsegs <= original + 1e-5
            cheaper += rendsegs < original - 1e-5
    print(f"matched cheaper than by the original: {cheaper} of {3 * len(points)}")


@torch.no_grad()
def exact_costs(masks: Any, classes: Any, targets: Any, labels: Any, points: Any) -> torch.Tensor:
    """The costs of an image, ``[Q, T]``, in float64."""
    x, y = (
        F.grid_sample(maps[None].double(), 2 * points[None, :, None].double() - 1, align_corners=False)[0, ..., 0]
        for maps in (masks, targets)
    )
    entropy = (F.softplus(x).sum(1)[:, None] - x @ y.T) / x.shape[1]
    s = x.sigmoid()
    dice = 1 - (2 * s @ y.T + 1) / (s.sum(1)[:, None] + y.sum(1) + 1)
    return 5 * entropy + 5 * dice - 2 * classes.double().softmax(-1)[:, labels]


@pytest.mark.parametrize("model", ["mask2former", "oneformer"])
def test_matching_of_what_is_not_finite(model: str) -> None:
    given = inputs_of([(3, 40, 48), (0, 40, 48), (8, 40, 48)])
    masks, classes = given["masks"][0].detach().clone(), given["classes"][0].detach().clone()
    masks[0, 1], masks[0, 4], masks[2, 3], classes[2, 5] = float("nan"), float("inf"), -float("inf"), float("nan")
    matcher, draws = criterion_of(model).matcher, Draws(POINTS)
    args = masks, classes, given["targets"], given["labels"]
    with draws.recorded():
        wanted = matcher(*args)
    with rendseg.patched("transformers"), draws.fed():
        got = matcher(*args)
    for b in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(got[b], wanted[b], strict=True))
    # The third image has more targets than queries, so that bad queries are matched too; which of them gets which of
    # the targets left over is a tie.
    for pairs in (got[2], wanted[2]):
        assert pairs[0].tolist() == list(range(7)) and len(set(pairs[1].tolist())) == 7
    good = [n for n in range(7) if n not in (3, 5)]
    assert torch.equal(got[2][1][good], wanted[2][1][good])


def one_rank(number: int, folder: str) -> None:
    """The second of two processes has no targets. The number of masks is summed as accelerate's ``reduce`` does."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    given, module = inputs_of([(0, 30, 30) if number else (3, 30, 30)]), module_of("mask2former")

    def reduce(count: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(count)
        return count

    module.is_accelerate_available, module.reduce = lambda: True, reduce
    module.PartialState = type("PartialState", (), {"_shared_state": {"on": 1}, "num_processes": 2})
    got, wanted, _ = both("mask2former", given)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    a, b = (torch.autograd.grad(sum(found.values()), given["masks"]) for found in (got, wanted))
    assert all((x - y).abs().max() <= 1e-4 * y.abs().max() for x, y in zip(a, b, strict=True))
    print(float(sum(wanted[name].detach() for name in wanted if "mask" in name)), float(a[0].abs().sum()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_targets(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    # mmsegmentation installs a package called tests, which would be found first.
    begin = "import sys, types; sys.modules['tests'] = tests = types.ModuleType('tests'); "
    begin += f"tests.__path__ = [{str(root / 'tests')!r}]; from tests.peers import test_transformers; "
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"{begin}test_transformers.one_rank({number}, {str(tmp_path)!r})"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    first, second = (list(map(float, out.split())) for out, _ in said)
    assert first[0] > 0 and first[1] > 0 and second == [0.0, 0.0]


def test_rf_detr() -> None:
    module = importlib.import_module("transformers.loss.loss_rf_detr")
    images, queries, height, width = 2, 8, 16, 24
    matcher = module.RfDetrHungarianMatcher(2.0, 5.0, 2.0, 16, 5.0, 5.0)
    criterion = module.RfDetrImageLoss(matcher, CLASSES, 0.25, ["labels", "boxes", "cardinality", "masks"], 2, 16)
    g = torch.Generator().manual_seed(5)

    def layer() -> dict[str, torch.Tensor]:
        return {
            "logits": torch.randn(images, queries, CLASSES, generator=g).requires_grad_(),
            "pred_boxes": torch.rand(images, queries, 4, generator=g).mul(0.4).add(0.1).requires_grad_(),
            "pred_masks": torch.randn(images, queries, height, width, generator=g).requires_grad_(),
        }

    outputs = {**layer(), "auxiliary_outputs": [layer()]}
    leaves = [tensor for part in (outputs, outputs["auxiliary_outputs"][0]) for tensor in list(part.values())[:3]]
    targets = [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=g),
            "boxes": torch.rand(count, 4, generator=g) * 0.4 + 0.1,
            "masks": torch.rand(count, 50, 60, generator=g) > 0.5,
        }
        for count in (3, 1)
    ]
    draws = Draws(24)
    draws.sizes[images * queries * 4 // 16] = "matching"
    with draws.recorded():
        wanted = criterion(outputs, targets)
    with rendseg.patched("transformers") as report, draws.fed():
        got = criterion(outputs, targets)
    assert "probably by mistake" in dict(report.left)["transformers.loss.loss_rf_detr.RfDetrHungarianMatcher"]
    agree("transformers rf_detr", got, wanted, leaves)


def test_a_subclass_keeps_its_pieces_and_unpatch_puts_back_the_very_objects() -> None:
    module = module_of("mask2former")
    owners = module, module.Mask2FormerLoss, module.Mask2FormerHungarianMatcher
    before = [(owner, name, value) for owner in owners for name, value in vars(owner).items()]

    class Doubled(module.Mask2FormerLoss):
        def loss_masks(self, *args: Any, **kwargs: Any) -> Any:
            return {name: 2 * value for name, value in super().loss_masks(*args, **kwargs).items()}

    given = inputs_of([(3, 40, 48), (2, 40, 48)])
    plain = criterion_of("mask2former")
    doubled = Doubled.__new__(Doubled)
    doubled.__dict__ = plain.__dict__
    with rendseg.patched("transformers") as report:
        assert rendseg.patch("transformers") is report
        assert "Mask2FormerLoss.forward: all layers at once" in str(report)
        assert any(name.endswith("Doubled") and "overrides loss_masks" in why for name, why in report.left)
        results = []
        for criterion in (plain, doubled):
            with mock.patch.object(torch, "rand", lambda *size, **options: torch.full(size, 0.4)):
                with mock.patch.object(ops, "sample_uncertain_points", fixed_points):
                    results.append(losses_of("mask2former", criterion, given))
    for name, value in results[0].items():
        expected = value if name.startswith("loss_cross_entropy") else 2 * value
        torch.testing.assert_close(results[1][name], expected, msg=name)
    after = [(owner, name, value) for owner in owners for name, value in vars(owner).items()]
    assert len(before) == len(after) and all(vars(owner)[name] is value for owner, name, value in before)


def fixed_points(logits: torch.Tensor, num_points: int, *ratios: float, image_index: Any, **options: Any) -> Any:
    return torch.linspace(0.1, 0.9, num_points)[None, :, None].expand(len(image_index), -1, 2).contiguous()


@pytest.mark.parametrize("change", ["source", "wrapper", "function"])
def test_a_version_that_is_not_known_is_left_alone(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("mask2former")
    original = module.Mask2FormerLoss.loss_masks

    def loss_masks(self: Any, masks_queries_logits: Any, mask_labels: Any, indices: Any, num_masks: Any) -> Any:
        return {name: 2 * value for name, value in original(self, mask_labels, indices, num_masks).items()}

    def sample_point(input_features: Any, points: Any) -> Any:
        return None

    if change == "function":
        monkeypatch.setattr(module, "sample_point", sample_point)
    else:
        new = functools.wraps(original)(loss_masks) if change == "wrapper" else loss_masks
        monkeypatch.setattr(module.Mask2FormerLoss, "loss_masks", new)
    with rendseg.patched("transformers") as report:
        touched = [name.rpartition(".")[2] for name, _ in report.replaced if ".mask2former." in name]
        left = [(name.rpartition(".")[2], why) for name, why in report.left if ".mask2former." in name]
    why = "or its parameters cannot be read" if change == "wrapper" else "differs from the one that"
    assert len(left) == 1 and why in left[0][1]
    assert left[0][0] == ("sample_point" if change == "function" else "loss_masks")
    # Where only the criterion differs, matcher and sampling are replaced all the same.
    assert touched == ([] if change == "function" else ["forward", "sample_point"])


def curve(seed: int, patched: bool) -> torch.Tensor:
    """The losses of 30 steps of a tiny Mask2Former on two images, with weights and draws of one seed."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        num_labels=3,
        train_num_points=POINTS,
        dropout=0.0,
    )
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 3, 64, 64)
    masks[:, 0, :32], masks[:, 1, 32:, :32], masks[:, 2, 32:, 32:] = 1, 1, 1
    colours = torch.rand(3, 3, generator=g)
    pixels = torch.einsum("btij,tc->bcij", masks, colours) + 0.05 * torch.randn(2, 3, 64, 64, generator=g)
    labels = [torch.arange(3)] * 2
    losses = []
    with rendseg.patched("transformers") if patched else contextlib.nullcontext():
        for _ in range(30):
            loss = model(pixel_values=pixels, mask_labels=list(masks), class_labels=labels).loss.squeeze()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_thirty_steps_of_training() -> None:
    plain, other, ours = curve(0, False), curve(1, False), curve(0, True)
    spread, difference = (plain - other).abs().mean(), (plain - ours).abs().mean()
    print(f"mean difference of the curves: {difference:.3f}; spread of two seeds: {spread:.3f}")
    print(f"first and last loss: plain {plain[0]:.2f}, {plain[-1]:.2f}; patched {ours[0]:.2f}, {ours[-1]:.2f}")
    assert difference <= spread
    assert ours[-5:].mean() < 0.8 * ours[:5].mean()
