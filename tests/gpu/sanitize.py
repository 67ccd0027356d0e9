"""Every operator once, forward and backward, on small inputs: what ``make gpu-check`` runs under compute-sanitizer.

Inputs are made on the CPU, so that few kernels but ours run. Says which operators ran, and fails if one that has a CUDA
kernel did not. ``--part`` takes some of them only, for a process of their own. ``--device cpu`` tries the script, with
``--emulated`` on the emulated CUDA kernels in the place of the CPU's.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import smoke  # noqa: E402
import torch  # noqa: E402
from sanitize_parts import DTYPES, PARTS  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from rendseg import _backends, ops  # noqa: E402
from rendseg.nn import PointHead  # noqa: E402


class Recorder(TorchDispatchMode):
    """The names of the operators of rendseg that were called, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rendseg":
            self.names.add(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


class Inputs:
    """Random tensors on the device, in one dtype and layout."""

    def __init__(self, device: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.device, self.dtype, self.layout = device, dtype, layout
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int, grad: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator).to(self.dtype)
        if len(shape) == 4:
            values = values.contiguous(memory_format=self.layout)
        return values.to(self.device).requires_grad_(grad)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


def backward(result: Tensor) -> None:
    weight = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.device, result.dtype)
    result.backward(weight)


def selection(make: Inputs) -> None:
    logits = make.tensor(2, 19, 33, 45)
    ops.uncertainty(logits)
    ops.uncertain_points(logits, 200)
    ops.uncertain_points(make.tensor(3, 1, 20, 30), 100)
    ops.uncertain_points(logits, 50, make.integers(19, 2))
    ops.sample_uncertain_points(logits, 700)
    ops.sample_uncertain_points(make.tensor(200, 1, 16, 16), 100)
    ops.sample_uncertain_points(make.tensor(270, 3, 16, 16), 2050)  # more than the blocks at once of 132 processors
    ops.sample_uncertain_points(logits, 300, random_coords=make.uniform(2, 975, 2), padding_mode="border")
    leaf = make.tensor(2, 19, 17, 23, grad=True)
    for align_corners in (False, True):
        fine, _, _ = ops.subdivide(leaf, 100, align_corners=align_corners)
        assert fine is not None
        backward(fine)
    ops.subdivide(logits, 100, 3)
    ops.subdivide(logits, 100, return_logits=False)
    torch.ops.rendseg._subdivide_labels(logits, 100)


def points(make: Inputs) -> None:
    features, more, coords = (
        make.tensor(2, 37, 21, 30, grad=True),
        make.tensor(2, 5, 9, 11, grad=True),
        make.uniform(2, 70, 2),
    )
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for mode in ("bilinear", "nearest"):
            where = (coords * 1.2 - 0.1).requires_grad_(mode == "bilinear")
            backward(ops.point_sample([features, more], where, mode=mode))
    torch.use_deterministic_algorithms(False)
    ops.point_labels(make.integers(19, 2, 40, 50).to(torch.uint8), coords)
    indices = torch.stack([torch.randperm(33 * 45, generator=make.generator)[:60] for _ in range(2)]).to(make.device)
    masks = [make.uniform(3, 40, 50) > 0.5, make.uniform(1, 25, 60)]
    pairs = torch.tensor([[1, 0, 0], [4, 2, 0], [0, 2, 1]]).to(make.device)
    logits = make.tensor(2, 5, 33, 45, grad=True)
    torch.stack(ops.mask_losses(logits, masks, make.uniform(3, 700, 2), *pairs)).sum().backward()
    ops.mask_costs(logits, masks, make.uniform(2, 700, 2), canvas=(45, 64))
    logits, values = make.tensor(2, 19, 33, 45, grad=True), make.tensor(2, 19, 60, grad=True)
    backward(ops.scatter_points(logits, indices, values))
    ops.scatter_points_(logits.detach().clone(), indices, values.detach())


def encoding(make: Inputs) -> None:
    codewords, scale = make.tensor(12, 40, grad=True), make.tensor(12, grad=True)
    backward(ops.encode(make.tensor(2, 40, 9, 15, grad=True), codewords, scale))
    flat = make.tensor(2, 135, 40, grad=True)
    backward(ops.scaled_l2(flat, codewords, scale))
    backward(ops.aggregate(make.tensor(2, 135, 12, grad=True), flat, codewords))


def refinement(make: Inputs) -> None:
    coarse, features = make.tensor(2, 19, 16, 24), make.tensor(2, 64, 32, 48)
    head = PointHead(64, 19, 64, 3, init="torch").to(make.device, make.dtype).eval()
    with torch.no_grad():
        for output in ("logits", "labels"):
            ops.refine(coarse, features, head, steps=2, num_points=150, output=output)
            ops.refine(coarse, features, lambda fine, at: head(fine, at), steps=1, num_points=150, output=output)
            ops.refine(
                make.tensor(3, 1, 7, 7),
                make.tensor(3, 64, 14, 14),
                PointHead(64, 1, 64, 3, init="torch").to(make.device, make.dtype),
                steps=3,
                num_points=200,
                output=output,
            )
        for output in ("logits", "class"):  # masks of boxes
            ops.refine(
                make.tensor(5, 19, 7, 7),
                features,
                head,
                steps=2,
                num_points=200,
                rois=(make.integers(2, 5), make.uniform(5, 4)),
                class_index=make.integers(19, 5),
                output=output,
            )


RUN = {"selection": selection, "points": points, "encoding": encoding, "refinement": refinement}
assert tuple(RUN) == PARTS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=PARTS, action="append", help="again for several; default: every one")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="again for several; default: every one")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--stage", default="sanitize", help="what the lines of the results say")
    parser.add_argument("--results", type=Path, help="append lines of JSON to this file; default: print them")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: torch finds no GPU")
        return 1
    if args.emulated:
        smoke.own_tests()
        from tests.emulation import as_backend  # noqa: F401
    if args.device == "cuda":  # a tool that refuses this device does so here
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    results = smoke.Results(args.results, stage=args.stage)
    called: set[str] = set()
    failed = False
    for dtype in args.dtype or DTYPES:
        layout = torch.channels_last if dtype == "bfloat16" else torch.contiguous_format
        for part in args.part or PARTS:
            case = f"{part} {dtype}"
            results.write(case=case, event="begin")
            begin = time.perf_counter()
            try:
                smoke.planted(smoke.plant(args.stage, case))
                with Recorder() as recorder:
                    RUN[part](Inputs(args.device, getattr(torch, dtype), layout))
                    if args.device == "cuda":
                        torch.cuda.synchronize()
            except Exception as error:
                traceback.print_exc()
                results.write(case=case, event="end", outcome="error", message=smoke.first_line(error))
                failed = True
                if smoke.context_lost():
                    print("sanitize: FAILED, the CUDA context is lost", flush=True)
                    return smoke.EXIT_STICKY
                continue
            seconds = round(time.perf_counter() - begin, 3)
            called |= recorder.names
            results.write(case=case, event="end", outcome="ok", ops=sorted(recorder.names), seconds=seconds)
    print(f"sanitize: ran {', '.join(sorted(called))}")
    missed = set(_backends.compiled_ops(args.device)) - called if not (args.part or args.dtype) else set()
    if missed:
        print(f"sanitize: FAILED, kernels that nothing above runs: {', '.join(sorted(missed))}")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
