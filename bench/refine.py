"""The inference loop (W1, W2, W3) whole and per stage, against eager PyTorch in the same run.

``eager`` is the loop as the frameworks write it (interpolate, topk(2), topk, grid_sample, Conv1d, scatter);
``hand-tuned`` takes the second logit by amax, skips the sort of topk and reads channels_last features; ``compiled`` is
torch.compile of ``eager``. W1 is one Cityscapes image (19 classes, 1024x2048), W2 a batch of ADE20K (150 classes,
512x512), W3 the masks (one class, 224x224) of 100 boxes in an image of 800x1344, of which ``eager`` is the loop of
detectron2; ``stages`` is the last step of W1 stage by stage. On the CPU W2 and W3
have fewer images, and --quick drops the last step of W2. On a GPU --quick takes fewer of our variants, and
torch.compile has a row of its own, the last. The ceilings are those of ATen's own copy and GEMM, so a floor can be
beaten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from _floors import W1, W2, W3, Floor, RefineWorkload
from _harness import (  # puts the checkout on the path, so it comes before rendseg
    OURS,
    TRITON,
    Bench,
    Candidate,
    backend_of,
)

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
    features = torch.randn(1 if work.boxes else work.n, work.feature_channels, *work.feature_size, device=device)
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


def small(work: RefineWorkload) -> RefineWorkload:
    """The workload for a rehearsal."""
    h, w = min(work.coarse[0], 7), min(work.coarse[1], 9)
    feature_size = (min(work.feature_size[0], 8), min(work.feature_size[1], 12))
    return replace(
        work,
        n=min(work.n, 2),
        classes=min(work.classes, 33),
        coarse=(h, w),
        steps=2,
        num_points=40,
        feature_size=feature_size,
        feature_channels=32,
        hidden=32,
        layers=2,
    )


def differing(got: Tensor, want: Tensor, tolerance: float) -> float:
    """The share of cells with a class that differs by more than ``tolerance``, or is NaN."""
    return float((~((got.float() - want.float()).abs() <= tolerance)).any(1).float().mean())


def share_of_half(bench: Bench, eager: Candidate, want: Tensor, tolerance: float) -> float:
    """The share of cells in which bfloat16 may differ from float32.

    Rounded margins tie, so it selects other cells. Where only one of the two selects, they may differ by any amount: in
    one cell after the last step, in 4 x 4 cells a step earlier, since they are upsampled. How many those are depends on
    the logits. The loop of eager in bfloat16 breaks ties in its own way and says it; ours may have a quarter more.
    (The points of the first step of W1 reach 4.6 % of its cells, so a head that is wrong at all of them is found.)
    """
    return 0.5 if bench.rehearsal else 1e-3 + 1.25 * differing(eager(), want, tolerance)


def checked(
    bench: Bench,
    row: str,
    candidates: Mapping[str, Candidate],
    want: Tensor,
    tolerance: float,
    share: float,
    twins: Collection[str] | None,
) -> tuple[dict[str, Candidate], list[str]]:
    """Right before fast: the candidates, and those of ours with a twin under Triton, whose results are right.

    Logits are compared with ``want``, of which a ``share`` of the cells may differ by more than ``tolerance``; labels
    with the logits of the same call. What is wrong is named as a failure of the row and not timed.
    """
    wrong: set[str] = set()
    both = {key: key for key in candidates if key.startswith(OURS)}
    if not bench.no_triton:
        both |= {TRITON + key.removeprefix(OURS): key for key in both if twins is None or key in twins}
    logits: dict[str, Tensor] = {}
    for key, ours in both.items():
        if bench.lost:
            break
        try:
            with backend_of(key):
                got = candidates[ours]()
            if "labels" in key:
                of = key.replace(" labels", "")
                right = of in logits and bool((got.long() == logits[of].argmax(1)).all())
                said = f"labels equal to those of its own logits: {right}"
            else:
                part = differing(got, want, tolerance)
                right, logits[key] = part <= share, got
                said = f"{100 * part:.4f} % of cells differ by more than {tolerance} (at most {100 * share:.2f} %)"
        except Exception as error:
            wrong.add(key)
            bench.fail(f"{row}, {key}, before timing", error)
            continue
        bench.note(f"{row}, {key}: {said}")
        if not right:
            wrong.add(key)
            bench.fail(f"{row}, {key}", f"its values are wrong, so it is not timed: {said}")
    left = {key: candidate for key, candidate in candidates.items() if key not in wrong}
    return left, [key for key in left if key in both and TRITON + key.removeprefix(OURS) not in wrong]


def chosen(bench: Bench, candidates: dict[str, Candidate]) -> tuple[dict[str, Candidate], list[str] | None]:
    """On a GPU with --quick: which candidates, and of which of ours the twin under Triton."""
    if not (bench.quick and bench.for_gpu):
        return candidates, None
    for key in ("rendseg any head", "rendseg labels"):
        if key + " nhwc" in candidates or key == "rendseg any head":
            candidates.pop(key, None)
    return candidates, ["rendseg nhwc"] if "rendseg nhwc" in candidates else ["rendseg"]


def whole(bench: Bench, work: RefineWorkload, title: str, with_compile: bool, budget_s: float) -> None:
    """The float32 and the bfloat16 row, each for itself."""
    bench.run(title, whole_float32, bench, work, title, with_compile, budget_s)
    bench.run(f"{title}, bfloat16", whole_bfloat16, bench, work, title, with_compile, budget_s)


def make_boxes(work: RefineWorkload, device: torch.device) -> Tensor:
    """Objects of a twentieth to a half of each side of the image."""
    torch.manual_seed(SEED + 1)
    sides = 0.05 + 0.45 * torch.rand(work.n, 2, device=device)
    corner = torch.rand(work.n, 2, device=device) * (1 - sides)
    return torch.cat((corner, corner + sides), 1)


def eager_masks(
    coarse: Tensor,
    features: Tensor,
    boxes: Tensor,
    head: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    num_points: int,
    sort: bool = True,
) -> Tensor:
    """detectron2's loop for one image: from the largest grid that is predicted whole, which takes the steps before."""
    n, side = coarse.shape[0], coarse.shape[2]
    while 4 * side * side <= num_points and steps > 0:
        side, steps = 2 * side, steps - 1
    wide = coarse.float()
    logits = coarse
    for step in range(steps + 1):
        if step == 0:
            indices = torch.arange(side * side, device=coarse.device).expand(n, -1)
        else:
            side *= 2
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            indices = (-logits[:, 0].abs()).flatten(1).topk(num_points, dim=1, sorted=sort).indices
        x = (indices % side).float() / side + 0.5 / side
        y = torch.div(indices, side, rounding_mode="floor").float() / side + 0.5 / side
        coords = torch.stack((x, y), dim=-1)
        placed = boxes[:, None, :2] + coords * (boxes[:, None, 2:] - boxes[:, None, :2])
        fine = F.grid_sample(features, (2 * placed - 1).reshape(1, 1, -1, 2), align_corners=False)
        fine = fine.view(-1, n, indices.shape[1]).transpose(0, 1).to(coarse.dtype)
        points = F.grid_sample(wide, (2 * coords - 1).unsqueeze(2), align_corners=False).squeeze(3).to(coarse.dtype)
        values = head(fine, points)
        if step == 0:
            logits = values.reshape(n, 1, side, side)
        else:
            flat = logits.reshape(n, 1, side * side)
            logits = flat.scatter_(2, indices.unsqueeze(1), values).view(n, 1, side, side)
    return logits


def masks(bench: Bench, work: RefineWorkload, title: str, half: bool, budget_s: float) -> None:
    """Masks of boxes: the features of one image, read through them."""
    device = bench.device
    coarse, features, head = make_inputs(work, device)
    boxes, image = make_boxes(work, device), torch.zeros(work.n, dtype=torch.int64, device=device)
    steps, k = work.steps, work.num_points
    want = eager_masks(coarse, features, boxes, head, steps, k)
    dtype = torch.bfloat16 if half else torch.float32
    coarse, features, head = coarse.to(dtype), features.to(dtype), head.to(dtype)
    last = features.contiguous(memory_format=torch.channels_last)

    def ours(called: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda c, f, b: refine(c, f, called, steps=steps, num_points=k, rois=(image, b))

    def theirs(c: Tensor, f: Tensor, b: Tensor, sort: bool = True) -> Tensor:
        return eager_masks(c, f.float(), b, head, steps, k, sort)  # grid_sample wants coordinates as wide as its input

    candidates: dict[str, Candidate] = {
        "eager": bench.cold(theirs, coarse, features, boxes),
        "hand-tuned": bench.cold(lambda c, f, b: theirs(c, f, b, False), coarse, last, boxes),
        "rendseg any head": bench.cold(ours(lambda fine, at: head(fine, at)), coarse, features, boxes),
        "rendseg": bench.cold(ours(head), coarse, features, boxes),
        "rendseg nhwc": bench.cold(ours(head), coarse, last, boxes),
    }
    candidates, twins = chosen(bench, candidates)
    tolerance = 0.25 if half else 3e-2 if bench.for_gpu else 1e-3
    share = share_of_half(bench, candidates["eager"], want, tolerance) if half else 0.5 if bench.rehearsal else 1e-3
    candidates, twins = checked(bench, title, candidates, want, tolerance, share, twins)
    precision = "bf16" if half else "tf32" if bench.for_gpu else "fp32"
    facts = facts_of(work, str(dtype).removeprefix("torch."))
    floor = work.floor(2 if half else 4)
    bench.compare(
        title, candidates, floor=floor, precision=precision, memory=True, budget_s=budget_s, twins=twins, **facts
    )


def facts_of(work: RefineWorkload, dtype: str) -> dict[str, Any]:
    return {
        "images": work.n,
        "points": work.n * work.points(),
        "serial": True,
        "shape": [work.n, work.classes, *work.output_size()],
        "dtype": dtype,
        "num_points": work.num_points,
        "seed": SEED,
    }


def whole_float32(bench: Bench, work: RefineWorkload, title: str, with_compile: bool, budget_s: float) -> None:
    coarse, features, head = make_inputs(work, bench.device)
    last = features.contiguous(memory_format=torch.channels_last)
    steps, k = work.steps, work.num_points

    def fused(c: Tensor, f: Tensor, output: str = "logits") -> Tensor:
        return refine(c, f, head, steps=steps, num_points=k, output=output)

    def labels(c: Tensor, f: Tensor) -> Tensor:
        return fused(c, f, "labels")

    candidates: dict[str, Candidate] = {
        "eager": bench.cold(lambda c, f: eager_loop(c, f, head, steps, k), coarse, features),
        "hand-tuned": bench.cold(lambda c, f: eager_loop(c, f, head, steps, k, margin_by_amax, False), coarse, last),
    }
    if with_compile:
        compiled = bench.compiled(eager_loop)
        candidates["compiled"] = bench.cold(lambda c, f: compiled(c, f, head, steps, k), coarse, features)
    candidates |= {
        "rendseg any head": bench.cold(
            lambda c, f: refine(c, f, lambda fine, at: head(fine, at), steps=steps, num_points=k), coarse, features
        ),
        "rendseg": bench.cold(fused, coarse, features),
        "rendseg nhwc": bench.cold(fused, coarse, last),
        "rendseg labels": bench.cold(labels, coarse, features),
        "rendseg labels nhwc": bench.cold(labels, coarse, last),
    }
    candidates, twins = chosen(bench, candidates)
    # TF32 rounds the operands of the head to ten bits, and the two sides add up in another order.
    tolerance = 3e-2 if bench.for_gpu else 1e-3
    # A tiny map of a rehearsal has as many points as it has cells that tie or nearly tie.
    share = 0.5 if bench.rehearsal else 1e-3
    candidates, twins = checked(bench, title, candidates, candidates["eager"](), tolerance, share, twins)
    bench.compare(
        title,
        candidates,
        floor=work.floor(4),
        precision="tf32" if bench.for_gpu else "fp32",
        memory=True,
        budget_s=budget_s,
        twins=twins,
        **facts_of(work, "float32"),
    )


def whole_bfloat16(bench: Bench, work: RefineWorkload, title: str, with_compile: bool, budget_s: float) -> None:
    coarse, features, head = make_inputs(work, bench.device)
    steps, k = work.steps, work.num_points
    short = copy.deepcopy(head).bfloat16()
    half = [t.bfloat16() for t in (coarse, features, features.contiguous(memory_format=torch.channels_last))]
    want = eager_loop(half[0].float(), half[1].float(), head, steps, k)
    del coarse, features
    candidates: dict[str, Candidate] = {
        "eager": bench.cold(lambda c, f: eager_half(c, f, short, steps, k), half[0], half[1]),
        "hand-tuned": bench.cold(
            lambda c, f: eager_half(c, f, short, steps, k, margin_by_amax, False), half[0], half[2]
        ),
    }
    if with_compile:
        compiled = bench.compiled(eager_half)
        candidates["compiled"] = bench.cold(lambda c, f: compiled(c, f, short, steps, k), half[0], half[1])
    candidates |= {
        "rendseg": bench.cold(lambda c, f: refine(c, f, short, steps=steps, num_points=k), half[0], half[2]),
        "rendseg labels": bench.cold(
            lambda c, f: refine(c, f, short, steps=steps, num_points=k, output="labels"), half[0], half[2]
        ),
    }
    candidates, twins = chosen(bench, candidates)
    share = share_of_half(bench, candidates["eager"], want, 0.25)
    candidates, twins = checked(bench, f"{title}, bfloat16", candidates, want, 0.25, share, twins)
    del want
    bench.compare(
        f"{title}, bfloat16",
        candidates,
        floor=work.floor(2),
        precision="bf16",
        budget_s=budget_s / 2,
        twins=twins,
        **facts_of(work, "bfloat16"),
    )


def compiled_alone(bench: Bench, work: RefineWorkload) -> None:
    """torch.compile in a row of its own: should it take long or fail, the other rows are there already."""
    coarse, features, head = make_inputs(work, bench.device)
    last = features.contiguous(memory_format=torch.channels_last)
    steps, k = work.steps, work.num_points
    compiled = bench.compiled(eager_loop)
    bench.compare(
        "W1, torch.compile",
        {
            "eager": bench.cold(lambda c, f: eager_loop(c, f, head, steps, k), coarse, features),
            "compiled": bench.cold(lambda c, f: compiled(c, f, head, steps, k), coarse, features),
            "rendseg nhwc": bench.cold(lambda c, f: refine(c, f, head, steps=steps, num_points=k), coarse, last),
        },
        floor=work.floor(4),
        precision="tf32",
        twins=(),
        **facts_of(work, "float32"),
    )


def eager_half(
    coarse: Tensor,
    features: Tensor,
    head: PointHead,
    steps: int,
    num_points: int,
    uncertainty: Callable[[Tensor], Tensor] = margin,
    sort: bool = True,
) -> Tensor:
    """bfloat16: grid_sample wants coordinates of the dtype of its input, so it is given wide maps, as by autocast."""
    logits = coarse
    n, classes = coarse.shape[:2]
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        height, width = logits.shape[2:]
        k = min(num_points, height * width)
        indices = uncertainty(logits).flatten(1).topk(k, dim=1, sorted=sort).indices
        x = (indices % width).float() / width + 0.5 / width
        y = torch.div(indices, width, rounding_mode="floor").float() / height + 0.5 / height
        grid = (2 * torch.stack((x, y), dim=-1) - 1).unsqueeze(2)
        fine = F.grid_sample(features.float(), grid, align_corners=False).squeeze(3).bfloat16()
        points = F.grid_sample(coarse.float(), grid, align_corners=False).squeeze(3).bfloat16()
        spread = indices.unsqueeze(1).expand(-1, classes, -1)
        logits = logits.flatten(2).scatter_(2, spread, head(fine, points)).view(n, classes, height, width)
    return logits


def and_compiled(bench: Bench, function: Callable[..., object], *tensors: Tensor) -> dict[str, Callable[[], object]]:
    """The column of torch.compile, where it is wanted."""
    if not bench.with_compile:
        return {}
    compiled = bench.compiled(function)
    return {"compiled": bench.cold(compiled, *tensors) if tensors else compiled}


def stages(bench: Bench) -> None:
    """The last step of W1, stage by stage: selection."""
    work = small(W1) if bench.rehearsal else W1
    coarse, _, _ = make_inputs(work, bench.device)
    k = work.num_points
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
            "eager": bench.cold(eager_select, logits),
            "hand-tuned": bench.cold(tuned_select, logits),
            **and_compiled(bench, eager_select, logits),
            "rendseg": bench.cold(lambda t: subdivide(t, k), logits),
            "rendseg no logits": bench.cold(lambda t: subdivide(t, k, return_logits=False), logits),
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
            "interpolate+topk2+argmax": bench.cold(eager_labels, logits),
            **and_compiled(bench, eager_labels, logits),
            "rendseg": bench.cold(lambda t: torch.ops.rendseg._subdivide_labels(t, k), logits),
        },
        baseline="interpolate+topk2+argmax",
        floor=Floor(source + cells, 0),
        memory=True,
        budget_s=8,
        **facts,
    )


def stages_at_points(bench: Bench) -> None:
    """The last step of W1, stage by stage: gather, head and scatter."""
    work = small(W1) if bench.rehearsal else W1
    coarse, features, head = make_inputs(work, bench.device)
    last = features.contiguous(memory_format=torch.channels_last)
    k = work.num_points
    logits = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    n, classes, h, w = logits.shape
    facts = {"shape": [n, classes, 2 * h, 2 * w], "dtype": "float32", "seed": SEED}
    fine, indices, coords = subdivide(logits, k)
    assert fine is not None
    grid = (2 * coords - 1).unsqueeze(2)
    taps = min(work.pixels_per_point * k, features[0, 0].numel()) * work.feature_channels * 4

    def eager_gather(t: Tensor) -> Tensor:
        return F.grid_sample(t, grid, align_corners=False)

    bench.compare(
        "W1 gather",
        {
            "eager": bench.cold(eager_gather, features),
            "eager nhwc": bench.cold(eager_gather, last),
            **and_compiled(bench, eager_gather, features),
            "rendseg": bench.cold(lambda t: point_sample(t, coords), features),
            "rendseg nhwc": bench.cold(lambda t: point_sample(t, coords), last),
        },
        floor=Floor(taps + k * work.feature_channels * 4, 0),
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
            **and_compiled(bench, lambda: head(sampled, points)),
            "rendseg gather+head": lambda: refine(tile, last, head, steps=1, num_points=4 * side * side),
        },
        floor=Floor(0, k * work.flops_per_point()),
        points=k,
        budget_s=3,
        **facts,
    )
    bench.compare(
        "W1 scatter",
        {
            "eager": lambda: fine.flatten(2).scatter_(2, spread, values),
            **and_compiled(bench, lambda: fine.flatten(2).scatter_(2, spread, values)),
            "rendseg": lambda: scatter_points_(fine, indices, values),
        },
        floor=Floor(3 * k * classes * 4, 0),
        points=k,
        budget_s=2,
        **facts,
    )


def rows(bench: Bench) -> None:
    cpu, quick = not bench.for_gpu, bench.quick
    if not cpu:  # float32 is TF32 on both sides; the JSON records it
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    first, second, third = W1, W2, W3
    if cpu:
        second = replace(W2, n=1 if quick else 2, steps=3 if quick else 4)
        third = replace(W3, n=8 if quick else 100)
    if bench.rehearsal:
        first, second, third = small(W1), small(W2), small(W3)
    with torch.no_grad():
        if bench.wants("W1"):
            whole(bench, first, "W1", bench.with_compile and not (quick and not cpu), 8 if quick else 40)
        if bench.wants("W2"):
            whole(bench, second, f"W2 ({second.n} images)" if cpu else "W2", bench.args.compile, 3 if quick else 30)
        if bench.wants("W3"):
            title = f"W3 ({third.n} masks)" if cpu else "W3"
            bench.run(title, masks, bench, third, title, False, 2 if quick else 20)
            bench.run(f"{title}, bfloat16", masks, bench, third, f"{title}, bfloat16", True, 2 if quick else 20)
        if bench.wants("stages"):
            bench.run("stages of W1", stages, bench)
            bench.run("stages of W1 at points", stages_at_points, bench)
        if bench.wants("W1") and quick and not cpu:
            bench.run("W1, torch.compile", compiled_alone, bench, first)
    if bench.wants("W1"):
        bench.bar("W1 full logits against eager", bench.ratio("W1", "eager", "rendseg"), at_least=6 if cpu else 3)
        key = "rendseg labels" if cpu or not quick else "rendseg labels nhwc"
        goal = 8 if cpu else 4.5
        bench.bar("W1 labels against eager (which stops at logits)", bench.ratio("W1", "eager", key), at_least=goal)
    for name, row, goal in (
        ("W2", f"W2 ({second.n} images)", 3.5),
        ("W3", f"W3 ({third.n} masks)", 4.0),
    ):
        if cpu and bench.wants(name):
            bench.bar(f"{row} against eager", bench.ratio(row, "eager", "rendseg"), at_least=goal)
    if bench.wants("stages"):
        baseline = "interpolate+topk2+argmax"
        bench.bar(
            "W1 subdivide in label mode against " + baseline,
            bench.ratio("W1 subdivide, label mode", baseline, "rendseg"),
            at_least=10,
        )
    peaks = {row["candidate"]: row.get("peak_extra_bytes") for row in bench.rows if row["row"] == "W1"}
    if peaks.get("rendseg labels") is not None:
        height, width = first.output_size()
        share = peaks["rendseg labels"] / (first.classes * height * width * 4)
        bench.bar("W1 labels: peak memory over that of the full-resolution logits", share, at_most=0.99)
    if not cpu:
        gpu_goals(bench, peaks)


def gpu_goals(bench: Bench, peaks: Mapping[str, int | None]) -> None:
    """In milliseconds on an H200; channels_last features, of which a gather reads whole sectors."""
    for row, key, goal in (
        ("W1", "rendseg nhwc", 0.120),
        ("W1, bfloat16", "rendseg", 0.065),
        ("W1", "rendseg labels nhwc", 0.075),
        ("W1, bfloat16", "rendseg labels", 0.060),
        ("W2", "rendseg nhwc", 2.3),
        ("W2, bfloat16", "rendseg", 1.15),
        ("W2, bfloat16", "rendseg labels", 0.8),
        ("W3, bfloat16", "rendseg nhwc", 0.32),
        ("W1 subdivide", "rendseg", 0.070),  # 0.058 for the pass, 0.012 for the selection after it
    ):
        if bench.wants("stages" if "subdivide" in row else row[:2]):
            bench.bar(f"{row}, {key}: ms", bench.median(row, key), at_most=goal)
    if bench.wants("W1"):
        bench.bar("W1 against eager", bench.ratio("W1", "eager", "rendseg nhwc"), at_least=20)
    extra = peaks.get("rendseg labels nhwc")
    if extra is not None:
        bench.bar("W1 labels: extra memory, MB", extra / 1e6, at_most=15)


if __name__ == "__main__":
    raise SystemExit(Bench("refine", __doc__).main(rows))
