"""What ``torch.utils.flop_counter`` counts for the operators: products of matrices, as for PyTorch's own.

One multiply-add is 2. Sampling, selection, upsampling and the softmax count 0, as PyTorch counts ``grid_sample``,
``topk``, ``interpolate`` and ``softmax``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from typing import Any

import torch

Shape = Sequence[int]


def _encoding(x: Shape, codewords: Shape) -> int:
    """One product of features ``[B, D, ...]`` or ``[B, M, D]`` with codewords ``[K, D]``."""
    return 2 * prod(x) * codewords[0]


def _refine_mlp(
    coarse: Shape, features: Any, weights: Sequence[Shape], biases: Any, steps: int, num_points: int,
    coarse_source: str, scale_factor: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The layers ``[O, I]`` of the head at the points of every step."""
    n, height, width = coarse[0], coarse[2], coarse[3]
    cells = [height * width * scale_factor ** (2 * step) for step in range(1, steps + 1)]
    if coarse_source == "original":  # of the steps that predict every cell, the last alone is run
        cells = cells[max(0, sum(count <= num_points for count in cells) - 1) :]
    points = sum(min(num_points, count) for count in cells)
    return 2 * n * points * sum(map(prod, weights))


_PRODUCTS: dict[str, Callable[..., int]] = {
    "scaled_l2": lambda x, codewords, *_, **__: _encoding(x, codewords),
    "_scaled_l2_backward": lambda grad, x, codewords, *_, **__: 2 * _encoding(x, codewords),
    "aggregate": lambda assignment, x, codewords, *_, **__: _encoding(x, codewords),
    "_aggregate_backward": lambda grad, assignment, x, codewords, *_, **__: 2 * _encoding(x, codewords),
    "encode": lambda x, codewords, *_, **__: 2 * _encoding(x, codewords),
    # both losses of every query and target of an image: a product with the logits, and one with their sigmoid
    "mask_costs": lambda logits, targets, coords, *_, **__: (
        4 * logits[1] * coords[1] * sum(target[0] for target in targets)
    ),
    # four gradients of products, and the assignment, which is computed again
    "_encode_backward": lambda grad, x, codewords, *_, **__: 5 * _encoding(x, codewords),
    "_refine_mlp": _refine_mlp,
}


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _PRODUCTS.items():
        operator = getattr(torch.ops.rendseg, name)
        flop_registry.pop(operator, None)  # of an earlier import of rendseg
        register_flop_formula(operator)(formula)


class _AfterImport(MetaPathFinder):
    """Registers when ``torch.utils.flop_counter`` is imported: it imports Triton, for which no one should wait."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is not None:

            def run(module: Any) -> None:
                execute(module)
                _register()

            loader.exec_module = run
        return spec


_COUNTER = "torch.utils.flop_counter"
if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterImport())
