"""Point functions that a module has imported by name, and how they are recognised: by what they compute.

A function is replaced only if it and its replacement give the same on small tensors at the same random points. So a
changed version is left alone, and no list of versions is needed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .. import ops
from ._masks import sampler
from ._replace import Report, known, name_of, replace

SELECTION = "get_uncertain_point_coords_with_randomness"


@contextmanager
def own_randomness() -> Iterator[list[Tensor]]:
    """``torch.rand`` draws from a generator of its own; what it drew. The state of the process stays what it was."""
    generator = torch.Generator().manual_seed(0)
    real, drawn = torch.rand, []

    def rand(*size: Any, **options: Any) -> Tensor:
        drawn.append(real(*size, **{**options, "generator": generator, "device": "cpu"}))
        return drawn[-1]

    with torch.random.fork_rng(devices=[]), torch.no_grad(), mock.patch.object(torch, "rand", rand):
        yield drawn


@contextmanager
def fed(draws: list[Tensor]) -> Iterator[None]:
    """rendseg's selection takes the candidates and the uniform points that an original drew."""
    select, coords = ops.sample_uncertain_points, torch.cat(draws, 1)
    with mock.patch.object(ops, "sample_uncertain_points", lambda *a, **o: select(*a, random_coords=coords, **o)):
        yield


def bare(kind: Any, **attributes: Any) -> Any:
    """An object of a module's class, without its constructor, that has only ``attributes``."""
    part = kind.__new__(kind)
    nn.Module.__init__(part)
    for name, value in attributes.items():
        setattr(part, name, value)
    return part


def same(report: Report, owner: Any, name: str, compute: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether both results of ``compute`` agree; else a note that ``owner.name`` is left alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the example are not the user's
            got, wanted = compute()
        if got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), rtol=1e-4, atol=1e-5):
            return True
        report.keep(name_of(owner, name), "computes something else than rendseg on a small example")
    except Exception as error:  # a function of unknown source may raise anything
        report.keep(name_of(owner, name), f"failed on a small example ({type(error).__name__}: {error})")
    return False


def small(channels: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(count, channels, 5, 6, generator=generator)


def patch_sample(report: Report, module: ModuleType, *, padding_mode: str = "zeros") -> None:
    """Replace the name ``point_sample`` of a module."""
    if not known(report, module, "point_sample"):
        return
    original = module.point_sample
    new = sampler(original, padding_mode)

    def compute() -> tuple[Tensor, Tensor]:
        with own_randomness():
            points = torch.rand(2, 40, 2) * 1.4 - 0.2  # some are outside
        with torch.no_grad():
            return (
                torch.cat([new(small(2), points), new(small(2), points, mode="nearest", align_corners=False)]),
                torch.cat(
                    [original(small(2), points), original(small(2), points, mode="nearest", align_corners=False)]
                ),
            )

    if same(report, module, "point_sample", compute):
        replace(report, module, "point_sample", new, "rendseg.ops.point_sample")


def _classes(function: Callable[..., Any], logits: Tensor) -> Tensor | None:
    """The classes that a callback closes over: the only ``[N]`` int64 tensor in it."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    found = [
        value
        for value in cells
        if isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == logits.shape[:1]
    ]
    return found[0] if len(found) == 1 else None


def uncertainty_kind(function: Callable[..., Any], logits: Tensor, seen: dict[Any, str]) -> tuple[str, Tensor | None]:
    """``"margin"`` or ``"class"`` if a callback is that uncertainty, else ``"unknown"``; and its classes.

    It is found out once for each code, on small tensors.
    """
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return "unknown", None
    classes = _classes(function, logits) if logits.shape[1] > 1 else None
    key = code, logits.shape[1] > 1, classes is not None
    if key not in seen:
        seen[key] = "unknown"
        example = small(logits.shape[1], logits.shape[0]).flatten(2).to(logits.device)
        try:
            with torch.no_grad():
                given = function(example)
            for kind in ("class", "margin"):
                wanted = ops.uncertainty(example.unsqueeze(-1), classes if kind == "class" else None).squeeze(-1)
                if given.shape == (len(example), 1, example.shape[2]) and torch.allclose(given[:, 0], wanted):
                    seen[key] = kind
                    break
        except Exception:  # a callback of unknown source may raise anything; it is then called as before
            pass
    return seen[key], classes


def patch_selection(report: Report, module: ModuleType, *, padding_mode: str = "zeros") -> None:
    """Replace the name ``get_uncertain_point_coords_with_randomness`` of a module of detectron2's form."""
    if not known(report, module, SELECTION) or len(inspect.signature(getattr(module, SELECTION)).parameters) != 5:
        report.keep(name_of(module, SELECTION), "does not take five arguments")
        return
    original = getattr(module, SELECTION)
    seen: dict[Any, str] = {}

    def select(
        coarse_logits: Tensor,
        uncertainty_func: Callable[..., Any],
        num_points: int,
        oversample_ratio: float = 3,
        importance_sample_ratio: float = 0.75,
    ) -> Tensor:
        kind, classes = "unknown", None
        if coarse_logits.dim() == 4 and coarse_logits.numel() > 0 and num_points > 0:
            kind, classes = uncertainty_kind(uncertainty_func, coarse_logits, seen)
        if kind == "unknown":
            return original(coarse_logits, uncertainty_func, num_points, oversample_ratio, importance_sample_ratio)
        return ops.sample_uncertain_points(
            coarse_logits,
            num_points,
            oversample_ratio,
            importance_sample_ratio,
            class_index=classes if kind == "class" else None,
            padding_mode=padding_mode,
        )

    def uncertainty(logits: Tensor) -> Tensor:
        return -logits.abs()

    def compute() -> tuple[Tensor, Tensor]:
        logits = small(1)
        with own_randomness() as draws:
            wanted = original(logits, uncertainty, 8, 3, 0.75)
        coords = torch.cat(draws, 1)
        got = ops.sample_uncertain_points(logits, 8, 3, 0.75, padding_mode=padding_mode, random_coords=coords)
        # The order of points does not matter.
        return got.sort(1).values, wanted.sort(1).values

    if same(report, module, SELECTION, compute):
        replace(report, module, SELECTION, select, "rendseg.ops.sample_uncertain_points")
