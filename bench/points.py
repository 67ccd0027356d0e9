"""Training selection, sampling and scattering at points, forward and backward, against eager PyTorch.

T1  selection: 4 x 19 x 128 x 256 logits, 2048 points of 3 x 2048 candidates (PointRend, section 3.2)
T2  selection: 300 masks of 256 x 256, 12544 points (Mask2Former's loss), and sampling of the masks
T3  sampling 4 x 256 x 128 x 256 features at 2048 points, forward and backward, both layouts
step  the point part of a PointRend training step: select, gather fine and coarse features and labels, backward
scatter  writing 8192 refined points of 19 classes into 1024 x 2048 logits

eager        F.grid_sample chains as in detectron2 (labels gathered as a float map)
eager tuned  the same by hand: amax for the two largest logits, unsorted top-k, labels by integer gather, channels_last
             where that is faster
compiled     torch.compile of eager (with --quick only when --compile asks for it)

Before a row is timed, its candidate "rendseg" (and the twin under Triton) is held to eager; a wrong one is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from _floors import Floor, point_sample_backward, point_sample_forward, selection
from _harness import OURS, TRITON, Bench, Candidate, backend_of
from torch import Tensor

from rendseg.ops import point_labels, point_sample, sample_uncertain_points, scatter_points_


def eager_point_sample(features: Tensor, coords: Tensor, mode: str = "bilinear") -> Tensor:
    """[N,C,H,W] at [N,P,2] -> [N,C,P]."""
    return F.grid_sample(features, 2.0 * coords.unsqueeze(2) - 1.0, mode=mode, align_corners=False).squeeze(3)


def eager_uncertainty(values: Tensor) -> Tensor:
    """[N,C,P] -> [N,P]."""
    if values.shape[1] == 1:
        return -values.squeeze(1).abs()
    top = values.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def tuned_uncertainty(values: Tensor) -> Tensor:
    """The second largest is the largest of what is left when the first is taken out."""
    if values.shape[1] == 1:
        return -values.squeeze(1).abs()
    best, at = values.max(1, keepdim=True)
    return values.scatter(1, at, float("-inf")).amax(1) - best.squeeze(1)


def eager_select(
    logits: Tensor, num_points: int, uncertainty: Callable[[Tensor], Tensor] = eager_uncertainty, ordered: bool = True
) -> Tensor:
    """Section 3.2 with the usual ratios: 3 times as many candidates, three quarters of the points by uncertainty."""
    n = logits.shape[0]
    kept = int(0.75 * num_points)
    candidates = torch.rand(n, 3 * num_points, 2, device=logits.device)
    scores = uncertainty(eager_point_sample(logits, candidates))
    at = scores.topk(kept, dim=1, sorted=ordered).indices
    picked = candidates.gather(1, at.unsqueeze(-1).expand(-1, -1, 2))
    return torch.cat((picked, torch.rand(n, num_points - kept, 2, device=logits.device)), 1)


def tuned_labels(labels: Tensor, coords: Tensor) -> Tensor:
    height, width = labels.shape[1:]  # as numbers: a tensor of them would be a copy from the host, which waits
    col = (coords[..., 0] * width).long().clamp_(max=width - 1)
    row = (coords[..., 1] * height).long().clamp_(max=height - 1)
    return labels.flatten(1).gather(1, row * width + col).long()


def grads(output: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def checked(
    bench: Bench, row: str, candidates: dict[str, Candidate], error_of: Callable[[Candidate], float], limit: float
) -> tuple[dict[str, Candidate], list[str]]:
    """Right before fast: the candidates, and those of ours with a twin under Triton, without those that are wrong.

    ``error_of`` says how far a candidate is from eager, under the backend in force.
    """
    wrong: set[str] = set()
    for key in [key for key in candidates if key.startswith(OURS)]:
        for name in (key,) if bench.no_triton else (key, TRITON + key.removeprefix(OURS)):
            if bench.lost:
                break
            try:
                with backend_of(name):
                    error = error_of(candidates[key])
            except Exception as raised:
                wrong.add(name)
                bench.fail(f"{row}, {name}, before timing", raised)
                continue
            bench.note(f"{row}, {name}: differs from eager by {error:.2g} of the largest value (at most {limit:g})")
            if not error <= limit:
                wrong.add(name)
                bench.fail(f"{row}, {name}", f"its values are wrong, so it is not timed: error {error:.3g}")
    left = {key: candidate for key, candidate in candidates.items() if key not in wrong}
    twins = [key for key in left if key.startswith(OURS) and TRITON + key.removeprefix(OURS) not in wrong]
    return left, twins


def rows(bench: Bench) -> None:
    device = bench.device
    # Small cases only on a CPU: a GPU takes the workloads as they are.
    few = (bench.quick and not bench.for_gpu) or bench.rehearsal

    # T1, T2: selection
    workloads = [("T1", (4, 19, 128, 256), 2048), ("T2", (30 if few else 300, 1, 256, 256), 12544)]
    if bench.rehearsal:
        workloads = [("T1", (2, 19, 16, 20), 64), ("T2", (9, 1, 16, 16), 100)]
    for name, shape, num_points in workloads:
        if not bench.wants(name):
            continue
        torch.manual_seed(0)
        logits = F.interpolate(torch.randn(*shape[:2], 16, 16, device=device) * 4, shape[2:], mode="bilinear")
        logits += torch.randn(shape, device=device) * 0.1
        row = f"{name} select {'x'.join(map(str, shape))}, {num_points} points"
        bench.run(row, selecting, bench, row, logits, num_points)
        goal = 8.0 if name == "T2" and not bench.for_gpu else 2.0
        bench.bar(f"{name} select against eager", bench.ratio(row, "eager", "rendseg"), at_least=goal)
        if bench.for_gpu:
            goal = 0.010 if name == "T1" else 0.2
            bench.bar(f"{name} select, ms", bench.median(row, "rendseg"), at_most=goal)
            row = f"{name} select {'x'.join(map(str, shape))} bfloat16, {num_points} points"
            bench.run(row, selecting, bench, row, logits.bfloat16(), num_points)
        if name == "T2":
            coords = torch.rand(shape[0], num_points, 2, device=device)
            bench.run("T2 sample", sampling, bench, "T2 sample", logits, coords, tuned=False)
        del logits

    # T3: sampling
    images, points = 2 if few else 4, 64 if bench.rehearsal else 2048
    if bench.wants("T3"):
        torch.manual_seed(0)
        shape = (images, 16, 12, 20) if bench.rehearsal else (images, 256, 128, 256)
        features, coords = torch.randn(shape, device=device), torch.rand(images, points, 2, device=device)
        last = features.to(memory_format=torch.channels_last)
        bench.run("T3 sample", sampling, bench, "T3 sample", features, coords, tuned=True)
        bench.run("T3 sample channels_last", sampling, bench, "T3 sample channels_last", last, coords, tuned=False)
        if not bench.quick:
            half = features.bfloat16()
            bench.run("T3 sample bfloat16", sampling, bench, "T3 sample bfloat16", half, coords, tuned=False)
            if bench.for_gpu:
                name, last = "T3 sample bfloat16 channels_last", half.contiguous(memory_format=torch.channels_last)
                bench.run(name, sampling, bench, name, last, coords, tuned=False)
    if bench.wants("step"):
        bench.run("training point step", step, bench, images, points)
    if bench.wants("scatter"):
        bench.run("scatter", scatter, bench)


def selecting(bench: Bench, row: str, logits: Tensor, num_points: int) -> None:
    n, channels = logits.shape[:2]
    tuned = tuned_uncertainty if channels > 1 else eager_uncertainty
    # PyTorch samples halves only with half coordinates, so they are widened.
    candidates = {
        "eager": bench.cold(lambda x: eager_select(x.float(), num_points), logits),
        "eager tuned": bench.cold(lambda x: eager_select(x.float(), num_points, tuned, False), logits),
    }
    if bench.with_compile:
        candidates["compiled"] = bench.cold(bench.compiled(lambda x: eager_select(x.float(), num_points)), logits)
    candidates["rendseg"] = bench.cold(lambda x: sample_uncertain_points(x, num_points), logits)

    # Candidates given, no point kept by ours may be less uncertain than eager's last, apart from rounding.
    kept = int(0.75 * num_points)
    draws = torch.rand(n, 3 * num_points + num_points - kept, 2, device=logits.device)
    scores = eager_uncertainty(eager_point_sample(logits.float(), draws[:, : 3 * num_points]))
    last = scores.topk(kept, dim=1).values[:, -1]

    def error_of(candidate: Candidate) -> float:
        candidate()
        picked = sample_uncertain_points(logits, num_points, random_coords=draws)[:, :kept]
        least = eager_uncertainty(eager_point_sample(logits.float(), picked)).amin(1)
        return float(((last - least) / logits.float().abs().max()).max())

    half = logits.dtype != torch.float32  # sampled values are rounded to the dtype of the logits
    candidates, twins = checked(bench, row, candidates, error_of, 2e-2 if half else 1e-4)
    bench.compare(
        row,
        candidates,
        floor=selection(*logits.shape, num_points, logits.element_size()),
        points=n * num_points,
        twins=twins,
        shape=list(logits.shape),
        dtype=str(logits.dtype).removeprefix("torch."),
        seed=0,
    )


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    """The call under ``use_deterministic_algorithms``, without its filling of fresh memory."""

    def run() -> object:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled

    return run


def sampling(bench: Bench, name: str, features: Tensor, coords: Tensor, tuned: bool) -> None:
    """One row forward and one backward; ``tuned`` adds eager on a channels_last copy of the features."""

    def error_of(want: Tensor) -> Callable[[Candidate], float]:
        def error(candidate: Candidate) -> float:
            got = candidate()
            got = got[0] if isinstance(got, tuple) else got
            return float((got.float() - want.float()).abs().max() / want.float().abs().max())

        return error

    n, channels, height, width = features.shape
    points, size = coords.shape[1], features.element_size()
    wide = features.dtype == torch.float32
    facts = {"shape": list(features.shape), "points_per_image": points, "dtype": str(features.dtype), "seed": 0}

    def eager(x: Tensor) -> Tensor:  # PyTorch samples halves only with half coordinates, so they are widened
        return eager_point_sample(x, coords) if wide else eager_point_sample(x.float(), coords).to(x.dtype)

    variants: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {"eager": (eager, features)}
    if tuned:
        variants["eager tuned"] = (eager, features.contiguous(memory_format=torch.channels_last))
    if bench.with_compile:
        variants["compiled"] = (bench.compiled(eager), features)
    variants["rendseg"] = (lambda x: point_sample(x, coords), features)
    forward: dict[str, Candidate] = {key: bench.cold(f, x) for key, (f, x) in variants.items()}
    forward, twins = checked(bench, f"{name} forward", forward, error_of(forward["eager"]()), 1e-3 if wide else 2e-2)
    bench.compare(
        f"{name} forward",
        forward,
        floor=point_sample_forward(n, channels, points, size),
        points=n * points,
        twins=twins,
        **facts,
    )
    del forward
    backward: dict[str, Candidate] = {}
    weight = torch.randn(n, channels, points, device=features.device).to(features.dtype)
    for key, (f, x) in variants.items():
        leaf = x.detach().requires_grad_()
        backward[key] = grads(f(leaf), [leaf], weight)
    if bench.for_gpu:
        backward["rendseg deterministic"] = deterministic(backward["rendseg"])
    want = backward["eager"]()[0]
    backward, twins = checked(bench, f"{name} backward", backward, error_of(want), 1e-3 if wide else 2e-2)
    del want
    floor = point_sample_backward(n, channels, height, width, points, size)
    bench.compare(
        f"{name} backward",
        backward,
        floor=floor,
        points=n * points,
        twins=twins,
        **facts,
    )
    if bench.for_gpu and bench.ceilings:
        floor_ms = floor.bytes / bench.ceilings["copy_gb_s"] / 1e6
        times = bench.median(f"{name} backward", "rendseg deterministic") / floor_ms
        bench.bar(f"{name} backward, deterministic, times the floor", times, at_most=1.3)
    for part in ("forward", "backward"):
        bench.bar(f"{name} {part} against eager", bench.ratio(f"{name} {part}", "eager", "rendseg"), at_least=2.0)


def step(bench: Bench, n: int, num_points: int) -> None:
    """Select on the coarse logits, gather fine and coarse features and the labels, and go back to both maps."""
    classes, device = 19, bench.device
    channels, height, width = (8, 12, 20) if bench.rehearsal else (256, 128, 256)
    coarse = torch.randn(n, classes, height, width, device=device, requires_grad=True)
    fine = torch.randn(n, channels, height, width, device=device, requires_grad=True)
    labels = torch.randint(0, classes, (n, 4 * height, 4 * width), device=device, dtype=torch.uint8)
    weight = torch.randn(n, channels + classes, num_points, device=device)
    integer = labels.long()

    def run(select, gather, label) -> tuple[Tensor, ...]:
        with torch.no_grad():
            coords = select(coarse)
        return (*torch.autograd.grad(gather(coords), (fine, coarse), weight), label(coords))

    def eager_gather(coords: Tensor) -> Tensor:
        return torch.cat((eager_point_sample(fine, coords), eager_point_sample(coarse, coords)), 1)

    def eager_labels(coords: Tensor) -> Tensor:
        return eager_point_sample(integer.unsqueeze(1).float(), coords, "nearest").squeeze(1).long()

    candidates: dict[str, Candidate] = {
        "eager": lambda: run(lambda x: eager_select(x, num_points), eager_gather, eager_labels),
        "eager tuned": lambda: run(
            lambda x: eager_select(x, num_points, tuned_uncertainty, False),
            eager_gather,
            lambda c: tuned_labels(labels, c),
        ),
    }
    if bench.with_compile:
        parts = [bench.compiled(part) for part in (lambda x: eager_select(x, num_points), eager_gather, eager_labels)]
        candidates["compiled"] = lambda: run(*parts)
    candidates["rendseg"] = lambda: run(
        lambda x: sample_uncertain_points(x, num_points),
        lambda c: point_sample([fine, coarse], c),
        lambda c: point_labels(labels, c),
    )
    row = f"PointRend training point step, {n} images"
    bench.compare(
        row,
        candidates,
        points=n * num_points,
        images=n,
        seed=0,
    )
    bench.bar("training point step against eager", bench.ratio(row, "eager", "rendseg"), at_least=2.0)

    coords = torch.rand(n, num_points, 2, device=device)
    row = f"labels {n}x{4 * height}x{4 * width}, {num_points} points"

    def eager_bytes(c: Tensor) -> Tensor:
        return eager_point_sample(labels.unsqueeze(1).float(), c, "nearest").squeeze(1).long()

    candidates = {"eager": lambda: eager_bytes(coords), "eager tuned": lambda: tuned_labels(labels, coords)}
    if bench.with_compile:
        compiled = bench.compiled(eager_bytes)
        candidates["compiled"] = lambda: compiled(coords)
    candidates["rendseg"] = lambda: point_labels(labels, coords)
    bench.compare(row, candidates, points=n * num_points)


def scatter(bench: Bench) -> None:
    n, classes, height, width, num_points = 1, 19, 1024, 2048, 8192
    if bench.rehearsal:
        height, width, num_points = 16, 20, 64
    logits = torch.randn(n, classes, height, width, device=bench.device)
    indices = torch.randperm(height * width, device=bench.device)[:num_points].sort().values.unsqueeze(0)
    values = torch.randn(n, classes, num_points, device=bench.device)

    def eager() -> None:  # detectron2: an expanded index and scatter_
        expanded = indices.unsqueeze(1).expand(-1, classes, -1)
        logits.view(n, classes, -1).scatter_(2, expanded, values)

    candidates: dict[str, Candidate] = {"eager": eager}
    if bench.with_compile:
        candidates["compiled"] = bench.compiled(eager)
    candidates["rendseg"] = lambda: scatter_points_(logits, indices, values)
    bench.compare(
        f"scatter {num_points} points of {classes} classes into {height}x{width}",
        candidates,
        floor=Floor(float(n * num_points * (classes * 4 * 2 + 8)), 0.0),
        points=n * num_points,
    )


if __name__ == "__main__":
    raise SystemExit(Bench("points", __doc__).main(rows))
