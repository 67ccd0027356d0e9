"""Encoding layer against the forms people use: the broadcast over [B, M, K, D] and the GEMM form.

The case is that of ENCNet: 512 channels, a 64x128 map, 32 codewords, two images. The GEMM form is hand-tuned eager:
||x||^2 - 2 x c + ||c||^2 by matrix products that read the map in its own layout, and E = A^T x - c sum A.

Workload Enc is that, and on a GPU rows of 4 and 16 images in bfloat16 and float32 (with --quick only those); workload
broadcast adds rows with the broadcast form at its own pace. On a GPU "eager" of 4 images is the broadcast form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from _floors import Floor, encode_backward, encode_forward  # noqa: E402
from _harness import Bench, Candidate, backend_of  # noqa: E402
from torch import Tensor  # noqa: E402

from rendseg import ops, reference  # noqa: E402

Form = Callable[[Tensor, Tensor, Tensor], Tensor]

GPU_GOALS_MS = {  # on an H200
    "forward, 16 images, bfloat16": 0.042,
    "forward + backward, 16 images, bfloat16": 0.145,
    "forward, 16 images, float32": 0.105,
    "forward + backward, 16 images, float32": 0.340,
    "forward + backward, 4 images, bfloat16": 0.040,
    "forward + backward, 4 images, float32": 0.090,
}


def broadcast(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Residuals spelled out for every position and codeword, twice: the form of common frameworks."""
    positions = x.flatten(2).transpose(1, 2).contiguous()
    size = (x.shape[0], positions.shape[1], *codewords.shape)
    residual = positions.unsqueeze(2).expand(size) - codewords
    assignment = (scale * residual.pow(2).sum(3)).softmax(2)
    residual = positions.unsqueeze(2).expand(size) - codewords
    return (assignment.unsqueeze(3) * residual).sum(1)


def gemm(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """The same by two matrix products; loses digits where features lie far from zero."""
    features = x.flatten(2)
    squares = features.square().sum(1, keepdim=True) + codewords.square().sum(1).unsqueeze(1)
    product = torch.matmul(codewords, features)
    assignment = (scale.unsqueeze(1) * torch.add(squares, product, alpha=-2)).softmax(1)
    return torch.matmul(assignment, features.transpose(1, 2)) - codewords * assignment.sum(2, keepdim=True)


def errors(bench: Bench, row: str, forms: dict[str, Form], x: Tensor, c: Tensor, s: Tensor, limit: float) -> set[str]:
    """Right before fast: every form, and ours under Triton, against float64 on a part of the map.

    Those of ours that are wrong are failures, and returned; the others only have their errors stated.
    """
    part = x[:1, :, :8].contiguous()
    truth = reference.encode(part.double(), c.double(), s.double())
    wrong: set[str] = set()
    for name, form in (forms | ({} if bench.no_triton else {"triton": ops.encode})).items():
        if bench.lost:
            break
        try:
            with backend_of(name):
                error = float((form(part, c, s) - truth).abs().max() / truth.abs().max())
        except Exception as raised:
            wrong.add(name)
            bench.fail(f"{row}, {name}, before timing", raised)
            continue
        bench.note(f"{row}: largest relative error of {name}: {error:.2g} (at most {limit:g})")
        if not error <= limit and name in ("rendseg", "triton"):
            wrong.add(name)
            bench.fail(f"{row}, {name}", f"its values are wrong, so it is not timed: error {error:.3g}")
    return wrong


def sizes(bench: Bench) -> tuple[int, int, int, int]:
    """Channels, height, width and codewords."""
    return (32, 4, 9, 6) if bench.rehearsal else (512, 64, 128, 32)


def rows(bench: Bench) -> None:
    if bench.for_gpu and bench.wants("Enc"):
        for images in (16, 4):
            for dtype in (torch.bfloat16, torch.float32):
                title = f"Enc, {images} images, {str(dtype).removeprefix('torch.')}"
                bench.run(title, gpu_rows, bench, *sizes(bench), images, dtype)
    if not (bench.quick and bench.for_gpu):
        bench.run("two images", two_images, bench)


def two_images(bench: Bench) -> None:
    channels, height, width, codes = sizes(bench)
    batch = 1 if bench.quick else 2
    positions = height * width
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, device=bench.device)
    bound = (channels * codes) ** -0.5
    codewords = torch.empty(codes, channels, device=bench.device).uniform_(-bound, bound)
    scale = -torch.rand(codes, device=bench.device)
    grad = torch.randn(batch, codes, channels, device=bench.device)
    facts: dict[str, Any] = {"shape": [batch, channels, height, width], "codes": codes, "dtype": "float32", "seed": 0}

    forms: dict[str, Form] = {"broadcast": broadcast, "gemm": gemm, "rendseg": ops.encode}
    wrong = errors(bench, f"{batch} images", forms, x, codewords, scale, 1e-3)
    twins = () if "triton" in wrong else None
    if bench.with_compile:
        forms["gemm, torch.compile"] = bench.compiled(gemm)
    order = ("broadcast", "gemm", "gemm, torch.compile", "rendseg")
    forms = {name: forms[name] for name in order if name in forms and name not in wrong}

    def forward(function: Form, features: Tensor) -> Callable[[], Any]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(features, codewords, scale)

        return call

    def both(function: Form, features: Tensor) -> Callable[[], Any]:
        inputs = [t.detach().requires_grad_() for t in (features, codewords, scale)]
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    # The broadcast form is two hundred times slower than the rest, so its rounds are few, and it has rows of its own.
    slow_rounds = 1 if bench.quick else 3
    floors = {
        "forward": encode_forward(batch, channels, positions, codes, 4),
        "forward + backward": _add(
            encode_forward(batch, channels, positions, codes, 4), encode_backward(batch, channels, positions, codes, 4)
        ),
    }
    for title, wrap in (("forward", forward), ("forward + backward", both)):
        if bench.wants("Enc"):
            fast = {name: wrap(form, x) for name, form in forms.items() if name != "broadcast"}
            if not (bench.for_gpu or bench.quick):
                last = x.contiguous(memory_format=torch.channels_last)
                fast["rendseg, channels_last"] = wrap(ops.encode, last)
                fast["rendseg, bf16 features"] = wrap(ops.encode, x.bfloat16())
            bench.compare(title, fast, baseline="gemm", floor=floors[title], images=batch, twins=twins, **facts)
        if bench.wants("broadcast"):
            slow = {name: wrap(forms[name], x) for name in ("broadcast", "rendseg") if name in forms}
            row = f"{title}, broadcast form"
            bench.compare(row, slow, baseline="broadcast", samples=slow_rounds, twins=twins, **facts)

    row = "forward + backward"
    if bench.wants("Enc"):
        bench.bar("forward against the GEMM form", bench.ratio("forward", "gemm", "rendseg"), at_least=3.0)
        bench.bar(f"{row} against the GEMM form", bench.ratio(row, "gemm", "rendseg"), at_least=5.0)
    if bench.wants("broadcast"):
        ours = bench.median(row if bench.wants("Enc") else f"{row}, broadcast form", "rendseg")
        ratio = bench.median(f"{row}, broadcast form", "broadcast") / ours
        bench.bar(f"{row} against the broadcast form", ratio, at_least=100.0)
    if not bench.wants("Enc"):
        return

    # Memory beyond the inputs, the result and the gradients.
    results = grad.nbytes
    gradients = x.nbytes + codewords.nbytes + scale.nbytes
    for title, wrap, given in (("forward", forward, results), (row, both, results + gradients)):
        for name in ("gemm", "rendseg"):
            if name not in forms:
                continue
            peak = bench.peak_extra_bytes(wrap(forms[name], x))
            if peak is None:
                bench.note("this system does not tell the peak memory")
                continue
            extra = max(peak[0] - given, 0) / 1e6
            bench.note(f"{title}, {name}: {extra:.1f} MB beyond inputs, result and gradients")
            if name == "rendseg":
                bench.bar(f"{title}: extra memory, MB", extra, at_most=10.0)


def gpu_rows(bench: Bench, channels: int, height: int, width: int, codes: int, images: int, dtype: torch.dtype) -> None:
    """Forward, and with backward; both layouts.

    The floor of float32 counts three products of bfloat16, the cheapest way to its accuracy on tensor cores.
    """
    size, products = (2, 1) if dtype == torch.bfloat16 else (4, 3)
    batch = min(images, 2) if bench.rehearsal else images
    x = torch.randn(batch, channels, height, width, device=bench.device).to(dtype)
    codewords = torch.randn(codes, channels, device=bench.device).mul_(0.05).to(dtype)
    scale = -torch.rand(codes, device=bench.device).to(dtype)
    grad = torch.randn(batch, codes, channels, device=bench.device).to(dtype)

    kind = str(dtype).removeprefix("torch.")
    forms: dict[str, tuple[Form, Tensor]] = {"gemm": (gemm, x), "rendseg": (ops.encode, x)}
    checked = {name: form for name, (form, _) in forms.items()}
    wrong = errors(bench, f"{images} images, {kind}", checked, x, codewords, scale, 2e-2 if size == 2 else 1e-3)
    forms = {name: form for name, form in forms.items() if name not in wrong}
    if images <= 4:  # two times 2 GB in float32; with 16 images four times that
        forms = {"eager": (broadcast, x)} | forms
    if bench.with_compile:
        forms["gemm, torch.compile"] = (bench.compiled(gemm), x)
    if "rendseg" in forms:
        forms["rendseg, channels_last"] = (ops.encode, x.contiguous(memory_format=torch.channels_last))
    twins = [] if "triton" in wrong else ["rendseg"] if bench.quick else ["rendseg", "rendseg, channels_last"]

    def both(form: Form) -> Callable[[Tensor], Any]:
        def call(features: Tensor) -> Any:
            inputs = [t.detach().requires_grad_() for t in (features, codewords, scale)]
            return torch.autograd.grad(form(*inputs), inputs, grad)

        return call

    floor = encode_forward(batch, channels, height * width, codes, size)
    backward = encode_backward(batch, channels, height * width, codes, size)
    rows: dict[str, tuple[Floor, dict[str, Candidate]]] = {
        "forward": (
            floor,
            {
                name: bench.cold(lambda t, form=form: form(t, codewords, scale), features)
                for name, (form, features) in forms.items()
            },
        ),
        "forward + backward": (
            _add(floor, backward),
            {name: bench.cold(both(form), features) for name, (form, features) in forms.items()},
        ),
    }
    for title, (least, candidates) in rows.items():
        row = f"{title}, {images} images, {kind}"
        bench.compare(
            row,
            candidates,
            baseline="gemm",
            floor=Floor(least.bytes, products * least.flops),
            precision="bf16",
            images=batch,
            twins=twins,
            shape=[batch, channels, height, width],
            codes=codes,
            dtype=kind,
            seed=0,
        )
        bench.bar(f"{row}, against the GEMM form", bench.ratio(row, "gemm", "rendseg"), at_least=4.0)
        if row in GPU_GOALS_MS:
            bench.bar(f"{row}, ms", bench.median(row, "rendseg"), at_most=GPU_GOALS_MS[row])


def _add(a: Floor, b: Floor) -> Floor:
    return Floor(a.bytes + b.bytes, a.flops + b.flops)


if __name__ == "__main__":
    raise SystemExit(Bench("encode", __doc__).main(rows))
