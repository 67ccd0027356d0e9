"""The inference loop (W1, W2, W3) whole and per stage, against eager PyTorch in the same run.

``eager`` is the loop as the frameworks write it (interpolate, topk(2), topk, grid_sample, Conv1d, scatter);
``hand-tuned`` takes the second logit by amax, skips the sort of topk and reads channels_last features; ``compiled`` is
torch.compile of ``eager``. W1 is one Cityscapes image (19 classes, 1024x2048), W2 a batch of ADE20K (150 classes,
512x512), W3 instance masks (one class, 224x224). On the CPU W2 and W3 have fewer images, and --quick drops the last
step of W2. The ceilings are those of ATen's own copy and GEMM, so a floor can be beaten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from _floors import W1, W2, W3, Floor, RefineWorkload
from _harness import Bench  # puts the checkout on the path, so it comes before rendseg

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor  # isort: skip

from rendseg.nn import PointHead  # isort: skip
from rendseg.ops import point_sample, refine, scatter_points_, subdivide  # isort: skip

SEED = 0


def make_inputs(work: RefineWorkload, device: torch.device) -> tuple[Tensor, Tensor, PointHead]:
    """Smooth regions with edges and a little noise: the coarse logits of a trained net look like that."""
    torch.manual_seed(SEED)
    h, w = work.coarse
    regions = torch.randn(work.n, work.classes, max(2, h // 16), max(2, w // 16), device=device)
    coarse = 4 * F.interpolate(regions, size=(h, w), mode="bilinear") + 0.1 * torch.randn(
        work.n, work.classes, h, w, device=device
    )
    features = torch.randn(work.n, work.feature_channels, *work.feature_size, device=device)
    head = PointHead(work.feature_channels, work.classes, work.hidden, work.layers, init="torch")
    return coarse, features, head.to(device).eval()


def margin(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    top = logits.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def margin_by_amax(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    first = logits.amax(1, keepdim=True)
    return logits.masked_fill(logits == first, float("-inf")).amax(1) - first[:, 0]


def eager_loop(
    coarse: Tensor,
    features: Tensor,
    head: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    num_points: int,
    uncertainty: Callable[[Tensor], Tensor] = margin,
    sort: bool = True,
) -> Tensor:
    n, classes = coarse.shape[:2]
    logits = coarse
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        height, width = logits.shape[2:]
        k = min(num_points, height * width)
        indices = uncertainty(logits).flatten(1).topk(k, dim=1, sorted=sort).indices
        x = (indices % width).float() / width + 0.5 / width
        y = torch.div(indices, width, rounding_mode="floor").float() / height + 0.5 / height
        grid = (2 * torch.stack((x, y), dim=-1) - 1).unsqueeze(2)
        fine = F.grid_sample(features, grid, align_corners=False).squeeze(3)
        points = F.grid_sample(coarse, grid, align_corners=False).squeeze(3)
        values = head(fine, points)
        spread = indices.unsqueeze(1).expand(-1, classes, -1)
        logits = logits.reshape(n, classes, height * width).scatter_(2, spread, values).view(n, classes, height, width)
    return logits


def whole(bench: Bench, work: RefineWorkload, title: str, with_compile: bool, budget_s: float) -> None:
    coarse, features, head = make_inputs(work, bench.device)
    last = features.contiguous(memory_format=torch.channels_last)
    steps, k = work.steps, work.num_points
    candidates: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: eager_loop(coarse, features, head, steps, k),
        "hand-tuned": lambda: eager_loop(coarse, last, head, steps, k, margin_by_amax, sort=False),
    }
    if with_compile:
        compiled = torch.compile(eager_loop)
        candidates["compiled"] = lambda: compiled(coarse, features, head, steps, k)
    candidates |= {
        "rendseg any head": lambda: refine(coarse, features, lambda f, c: head(f, c), steps=steps, num_points=k),
        "rendseg": lambda: refine(coarse, features, head, steps=steps, num_points=k),
        "rendseg nhwc": lambda: refine(coarse, last, head, steps=steps, num_points=k),
        "rendseg labels": lambda: refine(coarse, features, head, steps=steps, num_points=k, output="labels"),
        "rendseg labels nhwc": lambda: refine(coarse, last, head, steps=steps, num_points=k, output="labels"),
    }
    # Right before fast: the one-call form against eager, and labels against its own logits.
    logits, want = candidates["rendseg"](), candidates["eager"]()
    wrong = float(((logits - want).abs().amax(1) > 1e-3).float().mean())
    same = bool((candidates["rendseg labels"]().long() == logits.argmax(1)).all())
    bench.note(f"\n{title}: {100 * wrong:.4f} % of cells differ from eager by more than 1e-3; labels exact: {same}")
    if wrong > 1e-3 or not same:
        raise SystemExit(f"{title}: rendseg and eager disagree; nothing is timed")
    del logits, want
    images, points = work.n, work.n * work.points()
    bench.compare(
        title,
        candidates,
        floor=work.floor(4),
        serial=True,
        images=images,
        points=points,
        memory=True,
        budget_s=budget_s,
        shape=[work.n, work.classes, *work.output_size()],
        dtype="float32",
        num_points=k,
        seed=SEED,
    )
    half = [t.bfloat16() for t in (coarse, features, last)]
    short = PointHead(work.feature_channels, work.classes, work.hidden, work.layers, init="torch")
    short.load_state_dict(head.state_dict())
    short = short.to(bench.device, torch.bfloat16).eval()
    bench.compare(
        f"{title}, bfloat16",
        {
            "eager": lambda: (
                eager_loop(half[0], half[1], lambda f, c: short(f, c), steps, k)
                if bench.device.type == "cuda"
                else eager_half(half[0], half[1], short, steps, k)
            ),
            "rendseg": lambda: refine(half[0], half[2], short, steps=steps, num_points=k),
            "rendseg labels": lambda: refine(half[0], half[2], short, steps=steps, num_points=k, output="labels"),
        },
        floor=work.floor(2),
        serial=True,
        precision="bf16",
        images=images,
        points=points,
        budget_s=budget_s / 2,
        shape=[work.n, work.classes, *work.output_size()],
        dtype="bfloat16",
        seed=SEED,
    )


def eager_half(coarse: Tensor, features: Tensor, head: PointHead, steps: int, num_points: int) -> Tensor:
    """bfloat16 on the CPU: grid_sample wants coordinates of the dtype of its input, so points are gathered by hand."""
    logits = coarse
    n, classes = coarse.shape[:2]
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        height, width = logits.shape[2:]
        k = min(num_points, height * width)
        indices = margin(logits).flatten(1).topk(k, dim=1).indices
        x = (indices % width).float() / width + 0.5 / width
        y = torch.div(indices, width, rounding_mode="floor").float() / height + 0.5 / height
        grid = (2 * torch.stack((x, y), dim=-1) - 1).unsqueeze(2)
        fine = F.grid_sample(features.float(), grid, align_corners=False).squeeze(3).bfloat16()
        points = F.grid_sample(coarse.float(), grid, align_corners=False).squeeze(3).bfloat16()
        spread = indices.unsqueeze(1).expand(-1, classes, -1)
        logits = logits.flatten(2).scatter_(2, spread, head(fine, points)).view(n, classes, height, width)
    return logits


def stages(bench: Bench) -> None:
    """The last step of W1, stage by stage."""
    coarse, features, head = make_inputs(W1, bench.device)
    last = features.contiguous(memory_format=torch.channels_last)
    k = W1.num_points
    logits = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    n, classes, h, w = logits.shape
    cells = 4 * h * w
    source, full = classes * h * w * 4, classes * cells * 4
    facts = {"shape": [n, classes, 2 * h, 2 * w], "dtype": "float32", "seed": SEED}

    def upsample(t: Tensor) -> Tensor:
        return F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=False)

    def eager_select(t: Tensor) -> tuple[Tensor, Tensor]:
        fine = upsample(t)
        return fine, margin(fine).flatten(1).topk(k, dim=1).indices

    def tuned_select(t: Tensor) -> tuple[Tensor, Tensor]:
        fine = upsample(t)
        return fine, margin_by_amax(fine).flatten(1).topk(k, dim=1, sorted=False).indices

    bench.compare(
        "W1 subdivide",
        {
            "eager": lambda: eager_select(logits),
            "hand-tuned": lambda: tuned_select(logits),
            "rendseg": lambda: subdivide(logits, k),
            "rendseg no logits": lambda: subdivide(logits, k, return_logits=False),
        },
        floor=Floor(source + full, 0),
        memory=True,
        budget_s=6,
        **facts,
    )

    def eager_labels(t: Tensor) -> tuple[Tensor, Tensor]:
        fine = upsample(t)
        return margin(fine), fine.argmax(1)

    bench.compare(
        "W1 subdivide, label mode",
        {
            "interpolate+topk2+argmax": lambda: eager_labels(logits),
            "rendseg": lambda: torch.ops.rendseg._subdivide_labels(logits, k),
        },
        baseline="interpolate+topk2+argmax",
        floor=Floor(source + cells, 0),
        memory=True,
        budget_s=8,
        **facts,
    )
    fine, indices, coords = subdivide(logits, k)
    assert fine is not None
    grid = (2 * coords - 1).unsqueeze(2)
    taps = min(W1.pixels_per_point * k, features[0, 0].numel()) * W1.feature_channels * 4
    bench.compare(
        "W1 gather",
        {
            "eager": lambda: F.grid_sample(features, grid, align_corners=False),
            "eager nhwc": lambda: F.grid_sample(last, grid, align_corners=False),
            "rendseg": lambda: point_sample(features, coords),
            "rendseg nhwc": lambda: point_sample(last, coords),
        },
        floor=Floor(taps + k * W1.feature_channels * 4, 0),
        points=k,
        budget_s=3,
        **facts,
    )
    sampled, points = point_sample(features, coords), point_sample(coarse, coords)
    values = head(sampled, points)
    spread = indices.unsqueeze(1).expand(-1, classes, -1)
    stock = head.refine_parameters()
    assert stock is not None
    # The fused head cannot be timed alone: a step that takes every cell is gather + head + write, and nothing else.
    side = round(k**0.5 / 2)
    tile = coarse[..., :side, :side].contiguous()
    bench.compare(
        "W1 head",
        {
            "eager": lambda: head(sampled, points),
            "rendseg gather+head": lambda: refine(tile, last, head, steps=1, num_points=4 * side * side),
        },
        floor=Floor(0, k * W1.flops_per_point()),
        points=k,
        budget_s=3,
        **facts,
    )
    bench.compare(
        "W1 scatter",
        {
            "eager": lambda: fine.flatten(2).scatter_(2, spread, values),
            "rendseg": lambda: scatter_points_(fine, indices, values),
        },
        floor=Floor(3 * k * classes * 4, 0),
        points=k,
        budget_s=2,
        **facts,
    )


def main() -> int:
    bench = Bench("refine", __doc__)
    cpu, quick = bench.device.type == "cpu", bench.quick
    with torch.no_grad():
        stages(bench)
        whole(bench, W1, "W1", bench.with_compile, 8 if quick else 40)
        second = replace(W2, n=1 if quick else 2, steps=3 if quick else 4) if cpu else W2
        third = replace(W3, n=8 if quick else 100) if cpu else W3
        whole(bench, second, "W2" if not cpu else f"W2 ({second.n} images)", bench.args.compile, 3 if quick else 30)
        whole(bench, third, "W3" if not cpu else f"W3 ({third.n} masks)", bench.args.compile, 2 if quick else 20)
    bench.bar("W1 full logits against eager", bench.ratio("W1", "eager", "rendseg"), at_least=3)
    bench.bar(
        "W1 labels against eager (which stops at logits)", bench.ratio("W1", "eager", "rendseg labels"), at_least=4.5
    )
    baseline = "interpolate+topk2+argmax"
    bench.bar(
        "W1 subdivide in label mode against " + baseline,
        bench.ratio("W1 subdivide, label mode", baseline, "rendseg"),
        at_least=10,
    )
    peaks = {row["candidate"]: row.get("peak_extra_bytes") for row in bench.rows if row["row"] == "W1"}
    if peaks.get("rendseg labels") is not None:
        height, width = W1.output_size()
        share = peaks["rendseg labels"] / (W1.classes * height * width * 4)
        bench.bar("W1 labels: peak memory over that of the full-resolution logits", share, at_most=0.99)
    return bench.finish()


if __name__ == "__main__":
    raise SystemExit(main())
