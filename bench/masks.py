"""The mask losses of Mask2Former-like models: matching costs, selection of points, losses and their gradient.

M1  Mask2Former on COCO: 2 images (16 on a GPU), 100 queries of 256 x 256, 10 targets of 1024 x 1024 an image, 12544
    points
M2  RF-DETR-Seg: 2 images (16), 300 queries of 108 x 108, 20 targets of 432 x 432 an image, 729 points, nearest labels
    and border padding

Each row is one stage of one decoder layer; "layer" is the four together. The assignment itself is not timed: the pairs
are given.

eager        the chain of the published code: targets copied as float, masks gathered, F.grid_sample, one image at a
             time for the costs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness import Bench, Candidate
from points import checked, eager_select
from torch import Tensor

from rendseg.ops import mask_costs, mask_losses, sample_uncertain_points


@dataclass(frozen=True)
class Workload:
    images: int
    queries: int
    size: int
    targets: int
    target_size: int
    points: int
    options: dict[str, str]


WORKLOADS = {
    "M1": Workload(2, 100, 256, 10, 1024, 12544, {}),
    "M2": Workload(2, 300, 108, 20, 432, 729, {"label_mode": "nearest", "padding_mode": "border"}),
}
SMALL = {"images": 2, "queries": 5, "size": 12, "targets": 2, "target_size": 20, "points": 40}


def sampled(map_: Tensor, coords: Tensor, mode: str, padding_mode: str) -> Tensor:
    """``[N, C, H, W]`` at ``[N, P, 2]``: ``[N, C, P]``."""
    grid = 2.0 * coords.unsqueeze(2) - 1.0
    return F.grid_sample(map_, grid, mode=mode, padding_mode=padding_mode, align_corners=False).squeeze(3)


def eager_costs(
    logits: Tensor, targets: Sequence[Tensor], coords: Tensor, label_mode: str = "bilinear", padding_mode: str = "zeros"
) -> list[tuple[Tensor, Tensor]]:
    found = []
    for masks, wanted, at in zip(logits, targets, coords, strict=True):
        x = sampled(masks.float().unsqueeze(1), at.expand(len(masks), -1, -1), "bilinear", padding_mode).squeeze(1)
        y = sampled(wanted.float().unsqueeze(1), at.expand(len(wanted), -1, -1), label_mode, padding_mode).squeeze(1)
        ones, zeros = torch.ones_like(x), torch.zeros_like(x)
        positive = F.binary_cross_entropy_with_logits(x, ones, reduction="none") / x.shape[1]
        negative = F.binary_cross_entropy_with_logits(x, zeros, reduction="none") / x.shape[1]
        entropy = positive @ y.T + negative @ (1 - y).T
        s = x.sigmoid()
        found.append((entropy, 1 - (2 * s @ y.T + 1) / (s.sum(1)[:, None] + y.sum(1)[None] + 1)))
    return found


def eager_losses(
    logits: Tensor,
    targets: Sequence[Tensor],
    coords: Tensor,
    image_index: Tensor,
    query_index: Tensor,
    target_index: Tensor,
    label_mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    masks = logits[image_index, query_index].unsqueeze(1).float()
    with torch.no_grad():
        stacked = torch.stack([target.float() for target in targets])
        wanted = stacked[image_index, target_index].unsqueeze(1)
        y = sampled(wanted, coords, label_mode, padding_mode).squeeze(1)
    x = sampled(masks, coords, "bilinear", padding_mode).squeeze(1)
    entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
    s = x.sigmoid()
    return entropy, 1 - (2 * (s * y).sum(1) + 1) / (s.sum(1) + y.sum(1) + 1)


def eager_selection(logits: Tensor, num_points: int, image_index: Tensor, query_index: Tensor) -> Tensor:
    return eager_select(logits[image_index, query_index].unsqueeze(1).float(), num_points)


def error_of(wanted: Sequence[Tensor]) -> Callable[[Candidate], float]:
    def error(candidate: Candidate) -> float:
        pairs = zip(candidate(), wanted, strict=True)
        return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)

    return error


def workload(bench: Bench, name: str, of: Workload) -> None:
    device = bench.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    logits = F.interpolate(random(of.images, of.queries, 8, 8) * 8 - 4, (of.size, of.size), mode="bilinear").to(device)
    noise = F.interpolate(random(of.images, of.targets, 8, 8), (of.target_size, of.target_size), mode="bilinear")
    targets = list((noise > 0.5).to(device))
    del noise
    count = of.images * of.targets
    images = torch.arange(of.images).repeat_interleave(of.targets).to(device)
    chosen = torch.arange(of.targets).repeat(of.images).to(device)
    queries = torch.cat([torch.randperm(of.queries, generator=generator)[: of.targets] for _ in range(of.images)])
    queries = queries.to(device)
    shared, own = random(of.images, of.points, 2).to(device), random(count, of.points, 2).to(device)
    pairs, options = (images, queries, chosen), of.options
    facts = {"shape": list(logits.shape), "targets": of.targets, "points_per_mask": of.points, "seed": 0}

    def eager_stacked() -> tuple[Tensor, Tensor]:
        entropy, dice = zip(*eager_costs(logits, targets, shared, **options), strict=True)
        return torch.stack(entropy), torch.stack(dice)

    row = f"{name} costs"
    candidates: dict[str, Candidate] = {
        "eager": eager_stacked,
        "rendseg": lambda: mask_costs(logits, targets, shared, **options),
    }
    candidates, twins = checked(bench, row, candidates, error_of(eager_stacked()), 1e-4)
    bench.compare(row, candidates, points=of.images * of.queries * of.points, twins=twins, memory=True, **facts)

    candidates = {
        "eager": lambda: eager_selection(logits, of.points, images, queries),
        "rendseg": lambda: sample_uncertain_points(logits, of.points, class_index=queries, image_index=images),
    }
    bench.compare(f"{name} selection", candidates, points=count * of.points, memory=True, **facts)

    row = f"{name} losses forward"
    with torch.no_grad():
        wanted = eager_losses(logits, targets, own, *pairs, **options)
    losses = {
        "eager": lambda x: eager_losses(x, targets, own, *pairs, **options),
        "rendseg": lambda x: mask_losses(x, targets, own, *pairs, **options),
    }
    candidates = {key: (lambda f=function: f(logits)) for key, function in losses.items()}
    candidates, twins = checked(bench, row, candidates, error_of(wanted), 1e-4)
    bench.compare(row, candidates, points=count * of.points, twins=twins, memory=True, **facts)

    row = f"{name} losses backward"
    leaf = logits.clone().requires_grad_()

    def backward_of(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Candidate:
        entropy, dice = function(leaf)
        total = entropy.sum() + 2 * dice.sum()
        return lambda: torch.autograd.grad(total, leaf, retain_graph=True)

    candidates = {key: backward_of(function) for key, function in losses.items()}
    candidates, twins = checked(bench, row, candidates, error_of(candidates["eager"]()), 1e-4)
    bench.compare(row, candidates, points=count * of.points, twins=twins, memory=True, **facts)

    row = f"{name} layer"

    def layer(costs: Callable[[], object], select: Callable[[], Tensor], chain: Callable[..., object]) -> Candidate:
        def run() -> object:
            with torch.no_grad():
                costs()
                coords = select()
            entropy, dice = chain(leaf, targets, coords, *pairs, **options)
            return torch.autograd.grad(entropy.sum() + 2 * dice.sum(), leaf)

        return run

    candidates = {
        "eager": layer(eager_stacked, lambda: eager_selection(logits, of.points, images, queries), eager_losses),
        "rendseg": layer(
            lambda: mask_costs(logits, targets, shared, **options),
            lambda: sample_uncertain_points(logits, of.points, class_index=queries, image_index=images),
            mask_losses,
        ),
    }
    bench.compare(row, candidates, images=of.images, memory=True, **facts)
    bench.bar(f"{name} layer against eager", bench.ratio(row, "eager", "rendseg"), at_least=4.0)


def rows(bench: Bench) -> None:
    for name, of in WORKLOADS.items():
        if bench.wants(name):
            sizes = SMALL if bench.rehearsal else {"images": 16} if bench.for_gpu else {}
            bench.run(name, workload, bench, name, Workload(**{**vars(of), **sizes}))


if __name__ == "__main__":
    raise SystemExit(Bench("masks", __doc__).main(rows))
