"""Calls of the public operators drawn from a seed: valid ones of every kind, and ones with something wrong.

The same seed gives the same call, with fresh tensors each time. Sizes are tiny, or so enormous that no memory holds
them. One argument in three calls is spoilt, in a few calls two.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rendseg.reference import HeadLayers

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HUGE = (2**31, 2**32 + 1, 2**62 + 1, 2**63 - 1, 2**70)
SPECIAL = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 0.0, -0.0)


@dataclass
class Call:
    """``name(**arguments)``; ``defects`` says what was spoilt."""

    name: str
    arguments: dict[str, Any]
    defects: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({given})" + (f"  # {'; '.join(self.defects)}" if self.defects else "")


class Head(nn.Module):
    """A point head of one hidden layer; a stock one is known to the one-call form of ``refine``."""

    def __init__(self, fine: int, classes: int, dtype: torch.dtype, stock: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.stock = stock
        sizes = [(5, fine + classes), (classes, 5 + classes)]
        self.weights = nn.ParameterList(torch.randn(s, generator=generator).to(dtype) for s in sizes)
        self.biases = nn.ParameterList(torch.randn(s[0], generator=generator).to(dtype) for s in sizes)

    def layers(self) -> HeadLayers:
        return HeadLayers(list(self.weights), list(self.biases), True, False)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return self.layers().predict(fine, coarse)

    def refine_parameters(self) -> HeadLayers | None:
        return self.layers() if self.stock else None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = str(tuple(value.stride())) if value.layout == torch.strided else str(value.layout)
        flags = " requires_grad" * value.requires_grad + f" on {value.device}" * (value.device.type != "cpu")
        return f"<{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {layout}{flags}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return f"<{type(value).__name__}>" if isinstance(value, (nn.Module, np.ndarray)) else repr(value)


class Drawing:
    """One seed's choices."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self.choose.random() < share

    def size(self, largest: int = 9, smallest: int = 1) -> int:
        return self.choose.choice((smallest, 1, 2, 3, self.choose.randint(1, largest), largest))

    def floats(self, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.chance(0.2):
            values = values.round()  # ties
        if self.chance(0.12) and values.numel():
            for _ in range(self.choose.randint(1, 3)):
                values.view(-1)[self.choose.randrange(values.numel())] = self.choose.choice(SPECIAL)
        return self.laid_out(values.to(dtype))

    def laid_out(self, values: Tensor) -> Tensor:
        """The same values in one of many layouts."""
        kind = self.choose.choice(("plain",) * 4 + ("last", "last", "slice", "swapped", "far", "offset", "negative"))
        if kind == "last" and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if kind == "slice" and values.dim():
            wide = torch.cat((values, values, values), -1)
            wide[..., ::3] = values
            return wide[..., ::3]
        if kind == "swapped" and values.dim() > 1:
            a, b = self.choose.sample(range(values.dim()), 2)
            return values.transpose(a, b).contiguous().transpose(a, b)
        if kind == "far" and values.dim() and values.numel() <= 512:
            wide = values.new_zeros((values.shape[0], 4099, *values.shape[1:]))
            wide[:, 17] = values
            return wide[:, 17]
        if kind == "offset":
            return torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)
        if kind == "negative" and values.is_floating_point():
            return torch._neg_view(-values)
        return values

    def logits(self, n: int | None = None, dtype: torch.dtype | None = None, channels: int | None = None) -> Tensor:
        n = self.size(3, 0) if n is None else n
        channels = self.size(11) if channels is None else channels
        size = (n, channels, self.size(), self.size(13))
        map_ = self.floats(*size, dtype=dtype or self.choose.choice(FLOATS))
        if self.chance(0.05):
            return map_[:, :1].expand(size)
        return map_

    def coords(self, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.rand((*shape, 2), generator=self.generator, dtype=torch.float64)
        kind = self.choose.random()
        if kind < 0.3:
            values = values * 1.6 - 0.3
        elif kind < 0.5:
            values = (values * 8).round() / 8  # borders and centres of cells
        if self.chance(0.1) and values.numel():
            values.view(-1)[self.choose.randrange(values.numel())] = self.choose.choice(SPECIAL)
        return self.laid_out(values.to(dtype))

    def grad(self, tensor: Tensor) -> Tensor:
        return tensor.requires_grad_() if tensor.is_floating_point() and self.chance(0.4) else tensor

    def count(self, cells: int) -> int:
        return self.choose.choice((1, 2, max(1, cells // 3), max(1, cells), cells + 5, 2**62))

    def class_index(self, logits: Tensor) -> Tensor | None:
        if not self.chance(0.2):
            return None
        return torch.randint(logits.shape[1], (logits.shape[0],), generator=self.generator)


def _uncertainty(d: Drawing) -> dict[str, Any]:
    logits = d.grad(d.logits())
    return {"logits": logits, "class_index": d.class_index(logits)}


def _uncertain_points(d: Drawing) -> dict[str, Any]:
    logits = d.grad(d.logits())
    return {"logits": logits, "num_points": d.count(logits[0, 0].numel() if len(logits) else 4)} | {
        "class_index": d.class_index(logits)
    }


def _sample_uncertain_points(d: Drawing) -> dict[str, Any]:
    logits = d.grad(d.logits())
    num_points = d.size(20)
    oversample, importance = d.choose.choice((1.0, 1.5, 3.0, 4)), d.choose.choice((0.0, 0.3, 0.75, 1.0, 1))
    total = int(oversample * num_points) + num_points - int(importance * num_points)
    images = None
    if len(logits) and d.chance(0.2):
        images = torch.randint(len(logits), (d.size(4, 0),), generator=d.generator)
    masks = len(logits) if images is None else len(images)
    classes = torch.randint(logits.shape[1], (masks,), generator=d.generator) if d.chance(0.2) else None
    drawn = d.coords(masks, total, dtype=torch.float32)
    return {
        "logits": logits,
        "num_points": num_points,
        "oversample_ratio": oversample,
        "importance_ratio": importance,
        "class_index": classes,
        "image_index": images,
        "padding_mode": d.choose.choice(("zeros", "border")),
        "align_corners": d.chance(0.3),
        "generator": torch.Generator().manual_seed(3) if d.chance(0.3) else None,
        "random_coords": drawn if d.chance(0.7) else None,
    }


def _subdivide(d: Drawing) -> dict[str, Any]:
    logits = d.grad(d.logits())
    factor = d.choose.choice((1, 2, 2, 2, 3, 4, 5))
    cells = logits.shape[2] * logits.shape[3] * factor**2
    return {
        "logits": logits,
        "num_points": d.count(cells),
        "scale_factor": factor,
        "align_corners": d.chance(0.3),
        "class_index": d.class_index(logits),
        "return_logits": d.chance(0.8),
    }


def _point_sample(d: Drawing) -> dict[str, Any]:
    n, dtype = d.size(3, 0), d.choose.choice(FLOATS)
    maps = [d.grad(d.logits(n, dtype)) for _ in range(d.choose.choice((1, 1, 2, 3)))]
    shape = (n, d.size(20, 0)) if d.chance(0.7) else (n, d.size(5, 0), d.size(6, 0))
    coords = d.coords(*shape, dtype=torch.float64 if dtype == torch.float64 and d.chance(0.7) else torch.float32)
    return {
        "input": maps[0] if len(maps) == 1 and d.chance(0.7) else maps,
        "coords": d.grad(coords),
        "mode": d.choose.choice(("bilinear", "bilinear", "nearest")),
        "padding_mode": d.choose.choice(("zeros", "border")),
        "align_corners": d.chance(0.3),
    }


def _point_labels(d: Drawing) -> dict[str, Any]:
    n, dtype = d.size(3, 0), d.choose.choice(LABELS)
    values = torch.randint(0, 120, (n, d.size(), d.size(13)), generator=d.generator).to(dtype)
    ignore = d.choose.choice((255, -100, 0, 2**63 - 1, -(2**63)))
    coords = d.coords(n, d.size(20, 0), dtype=d.choose.choice((torch.float32, torch.float64)))
    return {"labels": d.laid_out(values), "coords": coords, "ignore_index": ignore}


def _scatter_points(d: Drawing) -> dict[str, Any]:
    logits = d.logits()
    n, channels, height, width = logits.shape
    points = d.choose.randint(0, height * width)
    rows = [torch.randperm(height * width, generator=d.generator)[:points] for _ in range(n)]
    indices = torch.stack(rows) if rows else torch.zeros(0, points, dtype=torch.int64)
    values = d.floats(n, channels, points, dtype=logits.dtype)
    return {"logits": d.grad(logits), "indices": d.laid_out(indices), "values": d.grad(values)}


def _codebook(d: Drawing, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count = d.size(17)
    mixed = [d.choose.choice(FLOATS) if d.chance(0.1) else dtype for _ in range(2)]
    codewords = d.grad(d.floats(count, channels, dtype=mixed[0]))
    return codewords, d.grad(d.floats(count, dtype=mixed[1]))


def _encode(d: Drawing) -> dict[str, Any]:
    dtype, size = d.choose.choice(FLOATS), (d.size(3, 0), d.size(9, 0), d.size(7, 0), d.size(9, 0))
    x = d.floats(*size, dtype=dtype) if d.chance(0.6) else d.floats(*size[:3], dtype=dtype)
    codewords, scale = _codebook(d, size[1], dtype)
    return {"x": d.grad(x), "codewords": codewords, "scale": scale}


def _scaled_l2(d: Drawing) -> dict[str, Any]:
    dtype, size = d.choose.choice(FLOATS), (d.size(3, 0), d.size(9, 0), d.size(9, 0))
    codewords, scale = _codebook(d, size[2], dtype)
    return {"x": d.grad(d.floats(*size, dtype=dtype)), "codewords": codewords, "scale": scale}


def _aggregate(d: Drawing) -> dict[str, Any]:
    dtype, size = d.choose.choice(FLOATS), (d.size(3, 0), d.size(9, 0), d.size(9, 0))
    codewords, _ = _codebook(d, size[2], dtype)
    assignment = d.grad(d.floats(size[0], size[1], codewords.shape[0], dtype=dtype))
    return {"assignment": assignment, "x": d.grad(d.floats(*size, dtype=dtype)), "codewords": codewords}


def _refine(d: Drawing) -> dict[str, Any]:
    n, dtype = d.size(3, 0), d.choose.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    coarse = d.logits(n, dtype, d.size(6))
    maps = [d.logits(n, dtype, d.size(4)) for _ in range(d.choose.choice((1, 1, 2)))]
    factor, steps = d.choose.choice((2, 2, 3)), d.choose.choice((0, 1, 1, 2))
    side = factor**steps
    head = Head(sum(m.shape[1] for m in maps), coarse.shape[1], dtype, d.chance(0.7), d.generator)
    size: dict[str, Any] = {"steps": steps}
    if steps and d.chance(0.3):
        size = {"output_size": (coarse.shape[2] * side, coarse.shape[3] * side)}
    masks: dict[str, Any] = {}
    if d.chance(0.3):  # of boxes, some of them partly off the map
        images = d.size(3)
        maps = [d.logits(images, dtype, d.size(4)) for _ in maps]
        head = Head(sum(m.shape[1] for m in maps), coarse.shape[1], dtype, d.chance(0.7), d.generator)
        boxes = torch.rand(n, 4, generator=d.generator) * 1.4 - 0.2
        masks = {"rois": [torch.randint(images, (n,), generator=d.generator), boxes]}
    output = d.choose.choice(("logits", "labels"))
    if d.chance(0.3):
        masks["class_index"] = torch.randint(coarse.shape[1], (n,), generator=d.generator)
        output = d.choose.choice(("logits", "class"))
    return {
        "coarse": coarse,
        "features": maps[0] if len(maps) == 1 and d.chance(0.7) else maps,
        "head": head.requires_grad_(False),
        **size,
        "num_points": d.count(coarse.shape[2] * coarse.shape[3] * side**2),
        "coarse_source": d.choose.choice(("original", "current")),
        "scale_factor": factor,
        "align_corners": d.chance(0.3),
        "padding_mode": d.choose.choice(("zeros", "border")),
        "output": output,
        **masks,
    }


def _targets(d: Drawing, count: int) -> list[Tensor]:
    """Of every dtype and of different sizes; at times an image has none."""
    targets = []
    for _ in range(count):
        size = (d.size(4, 0), d.size(), d.size(11))
        values = torch.rand(size, generator=d.generator)
        kind = d.choose.choice((torch.bool, torch.bool, *LABELS, *FLOATS))
        targets.append(d.laid_out((values if kind.is_floating_point else values > 0.4).to(kind)))
    return targets


def _mask_options(d: Drawing, targets: list[Tensor]) -> dict[str, Any]:
    largest = [max((t.shape[dim] for t in targets), default=1) for dim in (1, 2)]
    return {
        "label_mode": d.choose.choice(("bilinear", "nearest")),
        "padding_mode": d.choose.choice(("zeros", "border")),
        "canvas": (largest[0] + d.size(3, 0), largest[1] + d.size(3, 0)) if d.chance(0.4) else None,
    }


def _mask_losses(d: Drawing) -> dict[str, Any]:
    logits = d.logits()
    targets = _targets(d, len(logits))
    there = [b for b, target in enumerate(targets) if len(target)]
    images = [d.choose.choice(there) for _ in range(d.size(5, 0))] if there else []
    chosen = [d.choose.randrange(len(targets[b])) for b in images]
    queries = torch.randint(logits.shape[1], (len(images),), generator=d.generator)
    return {
        "logits": d.grad(logits),
        "targets": targets,
        "coords": d.coords(len(images), d.size(20, 0), dtype=d.choose.choice((torch.float32, torch.float64))),
        "image_index": torch.tensor(images, dtype=torch.int64),
        "query_index": queries,
        "target_index": torch.tensor(chosen, dtype=torch.int64),
        **_mask_options(d, targets),
    }


def _mask_costs(d: Drawing) -> dict[str, Any]:
    logits = d.logits()
    targets = _targets(d, len(logits))
    coords = d.coords(len(logits), d.size(20, 0), dtype=d.choose.choice((torch.float32, torch.float64)))
    return {"logits": d.grad(logits), "targets": targets, "coords": coords, **_mask_options(d, targets)}


OPS: dict[str, Callable[[Drawing], dict[str, Any]]] = {
    "uncertainty": _uncertainty,
    "uncertain_points": _uncertain_points,
    "sample_uncertain_points": _sample_uncertain_points,
    "subdivide": _subdivide,
    "point_sample": _point_sample,
    "point_labels": _point_labels,
    "mask_losses": _mask_losses,
    "mask_costs": _mask_costs,
    "scatter_points": _scatter_points,
    "scatter_points_": _scatter_points,
    "scaled_l2": _scaled_l2,
    "aggregate": _aggregate,
    "encode": _encode,
    "refine": _refine,
}


# ---- What is spoilt: each takes a value and returns it wrong, or None where it does not apply


def _grown(d: Drawing, t: Tensor) -> Tensor | None:
    if not t.dim():
        return None
    dim = d.choose.randrange(t.dim())
    return torch.cat((t, t.narrow(dim, 0, min(1, t.shape[dim]))), dim) if t.shape[dim] else None


def _enormous(d: Drawing, t: Tensor) -> Tensor | None:
    if not t.dim() or not t.numel():
        return None
    dim, size = d.choose.randrange(t.dim()), list(t.shape)
    if t.dim() == 4 and dim == 1:  # channels that take no memory are read all the same, for days
        return None
    size[dim] = d.choose.choice((2**47, 2**59, 2**62))
    if t.numel() // t.shape[dim] * size[dim] >= 2**63:
        return None
    return t.narrow(dim, 0, 1).expand(size)


def _emptied(d: Drawing, t: Tensor) -> Tensor | None:
    return t.narrow(d.choose.randrange(t.dim()), 0, 0) if t.dim() else None


_TENSORS: dict[str, Callable[[Drawing, Tensor], Any]] = {
    "dtype": lambda d, t: t.detach().to(d.choose.choice((*FLOATS, *LABELS, torch.bool, torch.complex64))),
    "rank": lambda d, t: t.unsqueeze(d.choose.randint(0, t.dim())) if d.chance(0.5) or not t.dim() else t.sum(0),
    "one more": _grown,
    "enormous": _enormous,
    "empty": _emptied,
    "turned": lambda d, t: t.transpose(0, -1) if t.dim() > 1 else None,
    "meta": lambda d, t: t.to("meta"),
    "sparse": lambda d, t: t.detach().resolve_neg().to_sparse() if t.dim() else None,
    "overlapping": lambda d, t: t.detach().flatten()[:1].expand(t.shape) if t.numel() else None,
    "no tensor": lambda d, t: d.choose.choice((None, 1, 2.5, "x", [0.5], np.zeros(3, dtype=np.float32), object)),
    "values": lambda d, t: t.detach().clone().fill_(d.choose.choice((-1, 2**31, -(2**63), 9))),
}


def _spoil(d: Drawing, name: str, value: Any) -> tuple[str, Any] | None:
    if isinstance(value, Tensor):
        kind = d.choose.choice(list(_TENSORS))
        # Positions that take no memory are read all the same, for days, where only their sum is kept.
        endless = kind == "enormous" and name in ("x", "assignment")
        if endless or value.numel() > 1 << 24 or (kind == "values" and value.dtype != torch.int64):  # enormous already
            return None
        try:
            wrong = _TENSORS[kind](d, value)
        except RuntimeError:  # of what is already spoilt
            return None
        return None if wrong is None and kind != "no tensor" else (kind, wrong)
    if isinstance(value, list):
        if d.chance(0.2) or not value:
            return "no maps", []
        at = d.choose.randrange(len(value))
        spoilt = _spoil(d, name, value[at])
        return spoilt and (f"[{at}] {spoilt[0]}", [*value[:at], spoilt[1], *value[at + 1 :]])
    if isinstance(value, bool):
        return "flag", d.choose.choice((None, 0, 1, "yes", 2.5, [], [1]))
    if isinstance(value, int):
        return "number", d.choose.choice((0, -1, 1.5, "3", None, [2], float("nan"), np.int64(2), True, *HUGE))
    if isinstance(value, float):
        return "number", d.choose.choice((0, -1.0, "3", None, [2.0], *map(float, ("nan", "inf", "1e300")), 2**70))
    if isinstance(value, str):
        return "option", d.choose.choice(("", "reflect", "ZEROS", None, 3, "\udcff"))
    if isinstance(value, tuple):
        return "size", d.choose.choice((value[:1], value * 2, 8, (0, 0), (-1, 5), (2**62, 2**62), (1.5, 2), "ab"))
    if isinstance(value, (nn.Module, torch.Generator)):
        return "object", d.choose.choice((None, 3, "head", lambda fine, coarse: coarse[:, :0], lambda *_: None))
    return None


def _alias(d: Drawing, arguments: dict[str, Any]) -> tuple[str, Any] | None:
    """Arguments of ``scatter_points_`` that share memory with what is written."""
    logits, indices, values = (arguments[name] for name in ("logits", "indices", "values"))
    base = logits.detach()
    if not base.is_contiguous() or base.is_neg() or base.numel() < max(2 * indices.numel(), values.numel(), 1):
        return None
    if not indices.numel():  # nothing is written
        return None
    if d.chance(0.5) and base.data_ptr() % 8 == 0:
        flat = base.view(-1)[: base.numel() // 4 * 4].view(torch.int64)
        if flat.numel() >= indices.numel():
            return "indices in logits", arguments | {
                "logits": base,
                "indices": flat[: indices.numel()].view_as(indices),
            }
    return "values in logits", arguments | {
        "logits": base,
        "values": base.view(-1)[: values.numel()].view(values.shape),
    }


def draw(seed: int) -> Call:
    d = Drawing(seed)
    name = d.choose.choice(list(OPS))
    call = Call(name, OPS[name](d))
    wrong = d.choose.choice((0, 0, 0, 0, 1, 1, 1, 2))
    if wrong and name == "scatter_points_" and d.chance(0.2):
        aliased = _alias(d, call.arguments)
        if aliased:
            call.defects, call.arguments = [aliased[0]], aliased[1]
            return call
    for _ in range(wrong):
        argument = d.choose.choice(list(call.arguments))
        spoilt = _spoil(d, argument, call.arguments[argument])
        if spoilt:
            call.arguments[argument] = spoilt[1]
            call.defects.append(f"{argument}: {spoilt[0]}")
    return call
