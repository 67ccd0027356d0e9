"""One operator, in every dtype and layout, forward and backward, against the reference in float64 on the CPU.

``make gpu-check`` starts a process of this for each operator (stage smoke), and for each operator and dtype under
Triton (stage triton). Every case leaves two lines in the file of results, one before it runs and one after it, so what
a crash costs is the case in flight. A case that broke the CUDA context ends the process: nothing after it would tell
anything. ``--list`` prints the cases.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]


def own_tests() -> None:
    """Makes ``tests`` mean the folder of this checkout: some package of the machine may have installed another one."""
    ours = str(Path(__file__).resolve().parents[1])
    held = sys.modules.get("tests")
    if held is None:
        spec = importlib.util.find_spec("tests")
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if places[:1] == [ours]:
            return
    elif ours in list(getattr(held, "__path__", ())):
        return
    module = types.ModuleType("tests")
    module.__path__ = [ours]
    sys.modules["tests"] = module


EXIT_STICKY = 70  # the CUDA context is gone
EXIT_TIMEOUT = 71  # a case took too long
OPS = (
    "uncertainty",
    "uncertain_points",
    "sample_uncertain_points",
    "subdivide",
    "subdivide_labels",
    "point_sample",
    "point_labels",
    "mask_losses",
    "mask_costs",
    "scatter_points",
    "scaled_l2",
    "aggregate",
    "encode",
    "refine",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
LABELS = ("uint8", "int16", "int32", "int64")
LAYOUTS = ("contiguous", "channels_last")


def dtypes_of(op: str, backend: str = "cpp") -> tuple[str, ...]:
    if op == "point_labels":
        return LABELS
    # Triton has no kernel of the head in float64.
    return DTYPES[:3] if op == "refine" and backend == "triton" else DTYPES


def layouts_of(op: str, backend: str = "cpp") -> tuple[str, ...]:
    return LAYOUTS[:1] if op == "point_labels" or backend == "triton" else LAYOUTS


def case_names(op: str, backend: str = "cpp", dtypes: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{op} {dtype} {layout}"
        for dtype in dtypes_of(op, backend)
        if not dtypes or dtype in dtypes
        for layout in layouts_of(op, backend)
    ]


class Results:
    """Lines of JSON, each written whole and at once."""

    def __init__(self, path: Path | None, **facts: Any) -> None:
        self.path, self.facts = path, facts

    def write(self, **entry: Any) -> None:
        line = json.dumps({**self.facts, **entry}) + "\n"
        if self.path is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


class Watchdog:
    """Ends the process when a case takes longer than ``limit`` seconds, and says where it was."""

    def __init__(self, limit: float, say: Callable[[str], None]) -> None:
        self.limit, self.say = limit, say
        self.main = threading.main_thread().ident
        self.timer: threading.Timer | None = None

    def _bark(self) -> None:
        frames = []
        frame = sys._current_frames().get(self.main or 0)
        while frame is not None and len(frames) < 3:
            frames.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            frame = frame.f_back
        self.say(f"took more than {self.limit:g} s, in {' < '.join(frames)}")
        faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(EXIT_TIMEOUT)

    def start(self) -> None:
        self.stop()
        self.timer = threading.Timer(self.limit, self._bark)
        self.timer.daemon = True
        self.timer.start()
        # A thread of Python does not run while something holds the lock of the interpreter; this one does.
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):
            faulthandler.dump_traceback_later(self.limit + 5, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            faulthandler.cancel_dump_traceback_later()


def plant(stage: str, name: str) -> str:
    """How this case is to fail: RENDSEG_CHECK_PLANT holds ``stage:part of the name@segv|sticky|hang``, by commas."""
    for wish in filter(None, os.environ.get("RENDSEG_CHECK_PLANT", "").split(",")):
        where, _, how = wish.partition("@")
        wanted, _, part = where.partition(":")
        if wanted == stage and part in name:
            return how or "segv"
    return ""


def planted(how: str) -> None:
    """A fault on purpose, to see that it costs one case and no more."""
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(3600)
    if how == "sticky":
        import torch

        def dead(*args: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (planted)")

        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = dead
        dead()


def context_lost() -> str:
    """The error that a broken CUDA context answers everything with; empty where the context works, or there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:  # its class depends on the torch
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]


# --- the cases --------------------------------------------------------------------------------------------------------

Measure = tuple[str, float, float]  # what, its error, the bound


class Case:
    """Inputs of one dtype and layout on the device, and the measures against the reference."""

    def __init__(self, dtype: str, layout: str, device: str, small: bool = False) -> None:
        import torch

        self.torch, self.device, self.small = torch, device, small
        self.dtype = getattr(torch, dtype)
        self.layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
        self.generator = torch.Generator().manual_seed(11)
        self.wide = self.dtype == torch.float64

    def cut(self, number: int, by: int = 3) -> int:
        """A length, and with ``by=9`` a number of points: less for Triton's interpreter, which is slow."""
        return max(number // by, 3) if self.small else number

    def normal(self, *shape: int) -> Any:
        """On the CPU, in the dtype and layout."""
        values = self.torch.randn(shape, generator=self.generator).to(self.dtype)
        return values.contiguous(memory_format=self.layout) if len(shape) == 4 else values

    def uniform(self, *shape: int) -> Any:
        values = self.torch.rand(shape, generator=self.generator)
        return values.double() if self.wide else values

    def leaf(self, value: Any) -> Any:
        return value.detach().to(self.device).requires_grad_()

    def bound(self, got: Any, wanted: Any, arithmetic: float = 2e-5, roundings: float = 1) -> float:
        """Rounding of the sums and of the result's dtype, against the largest value."""
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        return ((1e-11 if self.wide else arithmetic) + roundings * self.torch.finfo(got.dtype).eps) * max(largest, 1e-3)

    def compare(self, what: str, got: Any, wanted: Any, arithmetic: float = 2e-5, roundings: float = 1) -> Measure:
        if got.shape != wanted.shape:
            raise AssertionError(f"{what}: shape {tuple(got.shape)} where {tuple(wanted.shape)} is right")
        if got.device.type != self.torch.device(self.device).type:
            raise AssertionError(f"{what} is on {got.device}")
        wanted = wanted.detach()
        error = float((got.detach().cpu().double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        return what, math.inf if math.isnan(error) else error, self.bound(got, wanted, arithmetic, roundings)

    def exact(self, what: str, got: Any, wanted: Any) -> Measure:
        """The number of values that differ; none may."""
        if got.shape != wanted.shape:
            raise AssertionError(f"{what}: shape {tuple(got.shape)} where {tuple(wanted.shape)} is right")
        return what + ", values that differ", float((got.detach().cpu() != wanted).sum()), 0.0

    def with_gradients(
        self, what: str, function: Callable[..., Any], reference: Callable[..., Any], *inputs: Any
    ) -> Iterator[Measure]:
        """Result and gradients of a function of tensors, through autograd, against the reference in float64."""
        torch = self.torch
        wide = [t.detach().double().requires_grad_() for t in inputs]
        wanted = reference(*wide)
        held = [self.leaf(t) for t in inputs]
        got = function(*held)
        yield self.compare(what, got, wanted)
        upstream = torch.randn(wanted.shape, generator=self.generator).to(got.dtype)
        grads = torch.autograd.grad(got, held, upstream.to(self.device))
        for i, (grad, right, value) in enumerate(
            zip(grads, torch.autograd.grad(wanted, wide, upstream.double()), inputs, strict=True)
        ):
            if grad.dtype != value.dtype:
                raise AssertionError(f"gradient {i} of {what} is {grad.dtype}")
            yield self.compare(f"gradient {i} of {what}", grad, right, 5e-5, 2)


def case_uncertainty(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    for channels in (19, 1):
        logits = c.normal(2, channels, c.cut(33), c.cut(45))
        got = ops.uncertainty(logits.to(c.device))
        yield c.compare(f"{channels} classes", got, reference.uncertainty(logits.double()), 1e-6)


def centres(c: Case, what: str, coords: Any, indices: Any, height: int, width: int) -> Measure:
    torch = c.torch
    x = ((indices % width).double() + 0.5) / width
    y = (torch.div(indices, width, rounding_mode="floor").double() + 0.5) / height
    return c.compare(what, coords, torch.stack((x, y), -1), 1e-6)[:2] + (3e-7,)


def case_uncertain_points(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    chosen = c.torch.tensor([3, 7])
    for channels, points, index in ((19, 200, None), (1, 100, None), (19, 50, chosen)):
        height, width, points = c.cut(33), c.cut(45), c.cut(points, 9)
        logits = c.normal(2, channels, height, width)
        got, coords = ops.uncertain_points(logits.to(c.device), points, None if index is None else index.to(c.device))
        wanted, _ = reference.uncertain_points(logits.double(), points, index)
        yield c.exact(f"{points} of {channels} classes", got, wanted)
        yield centres(c, "coordinates", coords, wanted, height, width)


def case_sample_uncertain_points(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    torch, points = c.torch, c.cut(200, 9)
    drawn = 3 * points
    kept = int(0.75 * points)
    # Few images and many masks take different kernels.
    for images, channels, size in ((2, 19, (c.cut(33), c.cut(45))), (c.cut(150, 40), 1, (16, 16))):
        logits = c.normal(images, channels, *size)
        draws = torch.rand(images, drawn + points - kept, 2, generator=c.generator)
        got = ops.sample_uncertain_points(logits.to(c.device), points, random_coords=draws.to(c.device)).cpu()
        what = f"{images} images"
        yield c.exact(f"{what}: uniform points", got[:, kept:], draws[:, drawn:])
        at = reference.point_sample(logits.double(), draws[:, :drawn].double())
        scores = reference.uncertainty(at.unsqueeze(-1)).squeeze(-1)
        same = (got[:, :kept, None] == draws[:, None, :drawn]).all(-1)
        yield c.exact(f"{what}: candidates", same.sum(-1), torch.ones(images, kept, dtype=torch.int64))
        where = same.int().argmax(-1)
        yield c.exact(f"{what}: order", where.diff(dim=1) > 0, torch.ones(images, kept - 1, dtype=torch.bool))
        mine = scores.gather(1, where).sort(1).values
        best = scores.topk(kept, 1).values.sort(1).values
        # Rounding of the sampled value, of the margin, and of the place in a map of this width.
        slack = (2 * torch.finfo(c.dtype).eps + 2e-6 * max(size)) * float(logits.double().abs().max())
        yield f"{what}: uncertainty of the chosen", float((best - mine).abs().max()), 2 * slack
    free = ops.sample_uncertain_points(c.normal(2, 19, c.cut(33), c.cut(45)).to(c.device), points)
    yield "drawn points outside [0, 1]", float(((free < 0) | (free > 1)).sum()), 0.0
    yield "drawn points, how often the first recurs", float((free[0] == free[0, 0]).all(-1).sum() - 1), 0.0


def case_subdivide(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference
    from rendseg.reference.subdivide import upsample

    torch = c.torch
    variants = ((19, 2, False), (19, 3, True), (1, 2, False))
    for channels, factor, aligned in ((5, 2, False), (1, 3, True)) if c.small else variants:
        height, width, points = c.cut(17), c.cut(23), c.cut(100, 9)
        logits = c.normal(2, channels, height, width)
        leaf, wide = c.leaf(logits), logits.double().requires_grad_()
        fine, indices, coords = ops.subdivide(leaf, points, factor, aligned)
        wanted = upsample(wide, factor, aligned)
        what = f"{channels} classes, factor {factor}"
        yield c.compare(what, fine, wanted, 1e-5)
        # The selection is that of the values as stored.
        right, _ = reference.uncertain_points(fine.detach().cpu().double(), points)
        yield c.exact(f"{what}: selection", indices, right)
        yield centres(c, "coordinates", coords, right, height * factor, width * factor)
        nothing, same, _ = ops.subdivide(leaf.detach(), points, factor, aligned, return_logits=False)
        if nothing is not None:
            raise AssertionError("logits that were not wanted")
        yield c.exact(f"{what}: selection without logits", same, right)
        upstream = torch.randn(wanted.shape, generator=c.generator).to(fine.dtype)
        (grad,) = torch.autograd.grad(fine, leaf, upstream.to(c.device))
        (wanted_grad,) = torch.autograd.grad(wanted, wide, upstream.double())
        yield c.compare(f"gradient, {what}", grad, wanted_grad)


def case_subdivide_labels(c: Case) -> Iterator[Measure]:
    from rendseg.ops import subdivide
    from rendseg.reference.subdivide import upsample

    torch = c.torch
    for channels in (5,) if c.small else (19, 150):
        logits, points = c.normal(2, channels, c.cut(17), c.cut(23)), c.cut(100, 9)
        held = logits.to(c.device)
        labels, indices, _ = torch.ops.rendseg._subdivide_labels(held, points)
        fine, same, _ = subdivide(held, points)
        yield c.exact(f"{channels} classes: against its own logits", labels.long(), fine.argmax(1).cpu())
        yield c.exact(f"{channels} classes: selection", indices, same.cpu())
        wide = upsample(logits.double(), 2, False)
        short = wide.amax(1) - wide.gather(1, labels.cpu().long().unsqueeze(1)).squeeze(1)
        eps = torch.finfo(c.dtype).eps
        yield (
            f"{channels} classes: logits of the labels",
            float(short.max()),
            (2 * eps + 1e-6) * float(wide.abs().max()),
        )


def case_point_sample(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    for padding, aligned in (("zeros", False), ("border", True)):
        maps = [c.normal(2, c.cut(37), c.cut(21), c.cut(30)), c.normal(2, 5, 9, 11)]
        options = {"padding_mode": padding, "align_corners": aligned}
        coords = c.uniform(2, c.cut(70), 2) * 1.2 - 0.1
        mine, right = sampler(ops.point_sample, **options), sampler(reference.point_sample, **options)
        yield from c.with_gradients(f"bilinear, {padding}", mine, right, *maps, coords)
    # The nearest cell has no slope, and no gradient of the coordinates.
    mine = sampler(ops.point_sample, coords.to(c.device), mode="nearest")
    right = sampler(reference.point_sample, coords.double(), mode="nearest")
    yield from c.with_gradients("nearest", mine, right, *maps)
    # Points enough for the kernels that file them under tiles.
    coords = c.uniform(2, c.cut(2000, 30), 2)
    mine = sampler(ops.point_sample, coords.to(c.device))
    value = c.normal(2, c.cut(40), c.cut(60), c.cut(70))
    yield from c.with_gradients("many points", mine, sampler(reference.point_sample, coords.double()), value)


def sampler(function: Callable[..., Any], coords: Any = None, **options: Any) -> Callable[..., Any]:
    """``function`` of maps and then coordinates; or of maps alone, where the coordinates are given."""

    def call(*tensors: Any) -> Any:
        maps, at = (tensors, coords) if coords is not None else (tensors[:-1], tensors[-1])
        return function(list(maps), at, **options)

    return call


def case_point_labels(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    torch = c.torch
    limits = torch.iinfo(c.dtype)
    labels = torch.randint(limits.min, limits.max, (2, c.cut(40), c.cut(50)), generator=c.generator).to(c.dtype)
    coords = torch.rand(2, c.cut(300, 9), 2, generator=c.generator) * 1.2 - 0.1
    for at in (coords, coords.double()):
        got = ops.point_labels(labels.to(c.device), at.to(c.device), -1)
        yield c.exact(f"{at.dtype}"[6:], got, reference.point_labels(labels, at, -1))


def some_masks(c: Case) -> tuple[Any, list[Any], dict[str, Any]]:
    """Logits, targets of two sizes and dtypes, and pairs of which two share a query."""
    torch = c.torch
    logits = c.normal(2, 5, c.cut(33), c.cut(45))
    targets = [
        torch.rand(3, c.cut(60), 71, generator=c.generator) > 0.5,
        (torch.rand(2, 40, c.cut(50), generator=c.generator) > 0.5).to(torch.uint8),
    ]
    pairs = {
        name: torch.tensor(values)
        for name, values in (
            ("image_index", [1, 0, 0, 1, 0]),
            ("query_index", [4, 2, 0, 4, 1]),
            ("target_index", [1, 2, 0, 0, 1]),
        )
    }
    return logits, targets, pairs


def case_mask_losses(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    logits, targets, pairs = some_masks(c)
    coords = c.uniform(5, c.cut(700, 9), 2)
    held = [t.to(c.device) for t in targets]
    on_device = {name: index.to(c.device) for name, index in pairs.items()}
    for options in ({}, {"label_mode": "nearest", "padding_mode": "border", "canvas": (64, 80)}):
        yield from c.with_gradients(
            f"losses {options.get('label_mode', 'bilinear')}",
            lambda x, o=options: c.torch.stack(ops.mask_losses(x, held, coords.to(c.device), **on_device, **o)),
            lambda x, o=options: c.torch.stack(reference.mask_losses(x, targets, coords, **pairs, **o)),
            logits,
        )


def case_mask_costs(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    logits, targets, _ = some_masks(c)
    coords = c.uniform(2, c.cut(700, 9), 2)
    got = ops.mask_costs(logits.to(c.device), [t.to(c.device) for t in targets], coords.to(c.device))
    for name, mine, right in zip(
        ("cross-entropy", "dice"), got, reference.mask_costs(logits.double(), targets, coords), strict=True
    ):
        yield c.compare(name, mine, right)


def case_scatter_points(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    torch = c.torch
    height, width, points = c.cut(33), c.cut(45), c.cut(60)
    logits, values = c.normal(2, 19, height, width), c.normal(2, 19, points)
    indices = torch.stack([torch.randperm(height * width, generator=c.generator)[:points] for _ in range(2)])
    held = indices.to(c.device)
    yield from c.with_gradients(
        "new tensor",
        lambda a, b: ops.scatter_points(a, held, b),
        lambda a, b: reference.scatter_points(a, indices, b),
        logits,
        values,
    )
    mine = logits.to(c.device, copy=True)
    ops.scatter_points_(mine, held, values.to(c.device))
    yield c.exact("in place", mine, reference.scatter_points(logits, indices, values))


def codebook(c: Case) -> tuple[Any, Any]:
    return c.normal(12, 40), (-c.torch.rand(12, generator=c.generator) * 2 / 40).to(c.dtype)


def positions(c: Case) -> Any:
    """``[B, M, D]``: rows of a map in the layout, so a view with the channels far apart, or side by side."""
    return c.normal(2, 40, 9, c.cut(15)).flatten(2).transpose(1, 2)


def case_scaled_l2(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    yield from c.with_gradients("scaled_l2", ops.scaled_l2, reference.scaled_l2, positions(c), *codebook(c))


def case_aggregate(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    x = positions(c)
    weights = c.torch.rand(2, x.shape[1], 12, generator=c.generator).to(c.dtype)
    yield from c.with_gradients("aggregate", ops.aggregate, reference.aggregate, weights, x, codebook(c)[0])


def case_encode(c: Case) -> Iterator[Measure]:
    from rendseg import ops, reference

    yield from c.with_gradients("one dtype", ops.encode, reference.encode, c.normal(2, 40, 9, c.cut(15)), *codebook(c))
    # Half features with codewords in float32 are what training under autocast gives; 512 channels as in the paper.
    channels, x = c.cut(512, 8), c.normal(1, c.cut(512, 8), 12, c.cut(11))
    words, scale = c.torch.randn(32, channels, generator=c.generator), -c.torch.rand(32, generator=c.generator)
    words, scale = words.to(c.torch.float64 if c.wide else words.dtype), scale.to(x.dtype if c.wide else scale.dtype)
    yield from c.with_gradients("codewords in float32", ops.encode, reference.encode, x, words, scale * 2 / channels)


def case_refine(c: Case) -> Iterator[Measure]:
    from rendseg import reference
    from rendseg.nn import PointHead
    from rendseg.ops import refine
    from rendseg.reference.refine import every_cell
    from rendseg.reference.subdivide import upsample

    torch = c.torch
    # The head runs in TF32 where float32 may, and halves are rounded after every layer.
    loose = {torch.float64: 1e-9, torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}[c.dtype]
    h, w, points, width = c.cut(16), c.cut(24), c.cut(150, 9), 64
    for classes, hidden, layers in ((5, 32, 2),) if c.small else ((19, 64, 3), (1, 64, 3), (5, 32, 0)):
        coarse, features = c.normal(2, classes, h, w), c.normal(2, width, 2 * h, 2 * w)
        torch.manual_seed(3)
        head = PointHead(width, classes, hidden, layers, init="torch").eval().requires_grad_(False).to(c.dtype)
        wide, on_device = copy.deepcopy(head).double(), copy.deepcopy(head).to(c.device)
        held, maps = coarse.to(c.device), features.to(c.device)
        at = every_cell(coarse, 2 * h, 2 * w)
        answers = wide(
            reference.point_sample(features.double(), at.double()), reference.point_sample(coarse.double(), at.double())
        ).view(2, classes, 2 * h, 2 * w)
        fine = upsample(coarse.double(), 2, False)
        heads = [("stock head", on_device), ("any head", lambda f, g, h=on_device: h(f, g))]
        for name, called in heads[:1] if c.small else heads:
            what = f"{name}, {classes} classes"
            whole = refine(held, maps, called, steps=1, num_points=4 * h * w)
            largest = max(float(answers.abs().max()), 1.0)
            yield f"{what}, every cell", c.compare("", whole, answers)[1], loose * largest
            some = refine(held, maps, called, steps=1, num_points=points)
            # A cell holds the head's answer or the interpolated logits; which, the selection says.
            indices, _ = reference.uncertain_points(upsample(coarse, 2, False), points)
            taken = torch.zeros(2, 4 * h * w, dtype=torch.bool).scatter(1, indices, True).view(2, 1, 2 * h, 2 * w)
            off = (some.cpu().double() - torch.where(taken, answers, fine)).abs().amax(1)
            bound = loose * max(largest, float(fine.abs().max()))
            # Where rounding ties or turns an uncertainty round, a cell may be chosen for another.
            yield f"{what}, cells that differ", float((off > bound).sum()), 4.0
            deep = refine(held, maps, called, steps=2, num_points=points)
            labels = refine(held, maps, called, steps=2, num_points=points, output="labels")
            yield c.exact(f"{what}, labels against its own logits", labels.long(), deep.argmax(1).cpu())
            yield f"{what}, values that are not finite", float((~deep.isfinite()).sum()), 0.0
            boxes = torch.tensor([[0.1, 0.2, 0.9, 0.7], [0.3, -0.1, 0.6, 1.1]])
            rois, own = (torch.tensor([1, 0]), boxes), torch.tensor([classes - 1, 0])
            options = {"steps": 1, "num_points": 4 * h * w, "class_index": own.to(c.device), "output": "class"}
            masks = refine(held, maps, called, rois=[t.to(c.device) for t in rois], **options)
            placed = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
            answer = wide(
                reference.point_sample(features.double()[rois[0]], placed.double()),
                reference.point_sample(coarse.double(), at.double()),
            )[torch.arange(2), own].view(2, 1, 2 * h, 2 * w)
            yield f"{what}, through boxes", c.compare("", masks, answer)[1], loose * largest


RUN: dict[str, Callable[[Case], Iterator[Measure]]] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name.startswith("case_")
}
del RUN["names"]


def recorder() -> Any:
    """A mode that notes which operators of rendseg are called, gradients included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "rendseg":
                self.names.add(func.name().split("::")[1].split(".")[0])
            return func(*args, **(kwargs or {}))

    return Recorder()


def run_case(op: str, dtype: str, layout: str, device: str, small: bool) -> tuple[Measure, list[str]]:
    """The measure that comes nearest to its bound, or passes it furthest; and the operators that ran."""
    torch = sys.modules["torch"]
    if device == "cuda":  # what the allocator hands out next holds NaN
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
            torch.full((size,), math.nan, device="cuda")
    worst: Measure | None = None
    with recorder() as recorded:
        for measure in RUN[op](Case(dtype, layout, device, small)):
            if worst is None or share(measure) > share(worst):
                worst = measure
    if device == "cuda":
        torch.cuda.synchronize()
    assert worst is not None
    return worst, sorted(recorded.names)


def share(measure: Measure) -> float:
    """The error over its bound."""
    _, error, bound = measure
    return error / bound if bound else (math.inf if error else 0.0)


def launches() -> int:
    """Of emulated kernels so far in this process."""
    emulated = sys.modules.get("tests.emulation.as_backend")
    return emulated._EMULATED.launches() if emulated is not None else 0


def on_backend(backend: str, device: str) -> AbstractContextManager[None]:
    import rendseg
    import rendseg.ops  # noqa: F401

    if backend == "emulated":
        own_tests()
        from tests.emulation import as_backend  # noqa: F401

        return contextlib.nullcontext()
    if backend == "triton" and device == "cpu":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
        import _triton  # noqa: F401  (makes the interpreter faster)
    return rendseg.backend(backend)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", choices=OPS, action="append", help="again for several; default: every one")
    parser.add_argument("--dtype", action="append", default=[], help="again for several; default: all that it takes")
    parser.add_argument("--backend", choices=("cpp", "triton", "emulated"), default="cpp")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stage", default="smoke", help="what the lines of the results say")
    parser.add_argument("--after", default="", help="begin after this case")
    parser.add_argument("--results", type=Path, help="append lines of JSON to this file; default: print them")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a case")
    parser.add_argument("--small", action="store_true", help="fewer cells and points")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    names = [name for op in args.op or OPS for name in case_names(op, args.backend, tuple(args.dtype))]
    if args.list:
        print("\n".join(names))
        return 0
    if args.after:
        names = names[names.index(args.after) + 1 :]
    faulthandler.enable()
    results = Results(args.results, stage=args.stage, pid=os.getpid())
    failed = False
    current = "start"
    watchdog = Watchdog(
        args.limit, lambda text: results.write(case=current, event="end", outcome="timeout", message=text)
    )
    import torch  # noqa: F401

    with on_backend(args.backend, args.device):
        for current in names:
            op, dtype, layout = current.split()
            results.write(case=current, event="begin")
            watchdog.start()
            begin, lost = time.perf_counter(), ""
            entry: dict[str, Any] = {"case": current, "event": "end"}
            try:
                planted(plant(args.stage, current))
                before = launches()
                measure, called = run_case(op, dtype, layout, args.device, args.small)
                entry |= {"what": measure[0], "error": measure[1], "bound": measure[2], "ops": called}
                entry["outcome"] = "ok" if measure[1] <= measure[2] else "wrong"
                if args.backend == "emulated" and launches() == before:
                    entry |= {"outcome": "error", "message": "no emulated kernel was launched"}
            except Exception as error:
                entry |= {"outcome": "error", "message": first_line(error)}
                lost = context_lost()
            watchdog.stop()
            if lost:
                entry |= {"message": f"{entry['message']} (the CUDA context is lost)", "fatal": lost}
            results.write(**entry, seconds=round(time.perf_counter() - begin, 3))
            failed |= entry["outcome"] != "ok"
            if lost:
                os._exit(EXIT_STICKY)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
